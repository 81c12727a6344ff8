"""Hold the scores on VBench-I2V that others have published, for comparison.

`published.csv` has every row with single scores in the tables of the paper, arXiv 2507.16116v2: table 1 (the full set
of 5,590 videos), table 3 (Wan2.1 and Wan2.2), 4 (a: LoRA rank, b: steps, c: training iterations, each by alpha) and 5
(a: the way of training, at 480p; b: the times of training). Rows of a table that repeat another's are there once.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from types import MappingProxyType

from pusa.evaluation.vbench.totals import DIMENSIONS

SOURCE = "arXiv 2507.16116v2"
FULL_SET = "1"
"""The table of the full set; all others are of a subset of 750 videos, whose composition is not published."""

REMARKS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        (FULL_SET, "CogVideoX1.5-5B"): "its columns look shifted by one, and its totals are computed from them so",
        (FULL_SET, "Pusa"): "resolution, guidance, shift and frame rate are not published",
        (FULL_SET, "Wan-I2V (14B)"): "sampled by the VBench team: 1280x720, 81 frames, 16 fps",
    }
)


@dataclass(frozen=True)
class Row:
    """Hold one published row, all numbers in percent as printed.

    Attributes:
        table: of the paper, such as ``1`` or ``4b``.
        model: its name, with what sets it apart in its table.
        iterations: of training; None: not told.
        alpha: LoRA alpha at inference, two with a slash for two experts; empty: not told, or no LoRA.
        steps: of denoising; None: not told.
        total, quality, i2v: as printed; None: not printed.
        scores: by the names of `DIMENSIONS`, without those that are not printed.
        remark: what is odd about it.
    """

    table: str
    model: str
    iterations: int | None
    alpha: str
    steps: int | None
    total: float | None
    quality: float | None
    i2v: float | None
    scores: Mapping[str, float] = field(default_factory=dict)
    remark: str = ""

    @property
    def is_full_set(self) -> bool:
        """Tell if all 5,590 videos were made: rows of the subset compare among themselves only."""
        return self.table == FULL_SET


def _read_rows() -> tuple[Row, ...]:
    text = files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(_row(cells) for cells in csv.DictReader(text.splitlines()))


def _row(cells: Mapping[str, str]) -> Row:
    return Row(
        table=cells["table"],
        model=cells["model"],
        iterations=int(cells["iterations"]) if cells["iterations"] else None,
        alpha=cells["alpha"],
        steps=int(cells["steps"]) if cells["steps"] else None,
        total=float(cells["total"]) if cells["total"] else None,
        quality=float(cells["quality"]) if cells["quality"] else None,
        i2v=float(cells["i2v"]) if cells["i2v"] else None,
        scores={name: float(cells[name]) for name in DIMENSIONS if cells[name]},
        remark=REMARKS.get((cells["table"], cells["model"]), ""),
    )


ROWS = _read_rows()
