"""List ready sweeps: the figures and tables of Pusa's paper (arXiv 2507.16116v2) and its README's settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pusa.evaluation.sweep.grid import Point
from pusa.evaluation.vbench.published import ROWS, SOURCE, Row

_ITERATIONS = 900  # of the released adapter


@dataclass(frozen=True)
class ReadySweep:
    """Describe a sweep whose points are known.

    Attributes:
        help: one line for people.
        base: settings that all of its points share, unless the user gives them.
        points: in the order of the table.
        source: where published figures are from; empty: none are published.
    """

    help: str
    base: Mapping[str, Any]
    points: tuple[Point, ...]
    source: str = ""


def _published(table: str, wanted: Callable[[Row], bool]) -> dict[str, float]:
    """Return the figures of the one row of a table that is wanted, by the names that VBench's suite has."""
    (row,) = (row for row in ROWS if row.table == table and wanted(row))
    totals = {"total": row.total, "quality": row.quality, "i2v": row.i2v}
    return {**{name: value for name, value in totals.items() if value is not None}, **row.scores}


def _of_adapter(alpha: str, steps: int = 10) -> Callable[[Row], bool]:
    return lambda row: (row.iterations, row.alpha, row.steps) == (_ITERATIONS, alpha, steps)


def _points(name: str, values: Sequence[Any]) -> tuple[Point, ...]:
    return tuple(Point({name: value}) for value in values)


_SUBSET = f"{SOURCE}, a subset of 750 videos of VBench-I2V"

READY: Mapping[str, ReadySweep] = {
    "paper-steps": ReadySweep(
        "Inference steps at alpha 1.4 (table 4b)",
        {"alpha": 1.4},
        tuple(Point({"steps": n}, _published("4b", _of_adapter("1.4", n))) for n in (2, 5, 10, 20)),
        f"{_SUBSET}, table 4b",
    ),
    "paper-alpha": ReadySweep(
        "LoRA alpha at inference, 10 steps, the adapter of 900 iterations (table 4c)",
        {"steps": 10},
        tuple(Point({"alpha": a}, _published("4c", _of_adapter(f"{a:.1f}"))) for a in (1.0, 1.4, 1.7, 2.0)),
        f"{_SUBSET}, table 4c",
    ),
    "paper-models": ReadySweep(
        "Pusa on Wan2.1 and on Wan2.2, at the paper's alphas (table 3)",
        {"steps": 10},
        (
            Point({"model": "wan2.1-14b", "alpha": 1.4}, _published("3", lambda row: row.model == "Pusa on Wan2.1")),
            Point(
                {"model": "wan2.2-a14b", "alpha": 1.5, "alpha_2": 1.4},
                _published("3", lambda row: row.model == "Pusa on Wan2.2"),
            ),
        ),
        f"{_SUBSET}, table 3",
    ),
    "paper-noise": ReadySweep(
        "Noise multiplier of the given frame: the README's range from clean to free",
        {"steps": 10},
        _points("noise", [[value] for value in (0.0, 0.1, 0.2, 0.3, 0.4)]),
    ),
    "paper-start-end": ReadySweep(
        "Noise of start and end frame: the README's 0.2 and 0.5, figure 9's 0.3 and 0.7, and both clean",
        {"steps": 10},
        _points("noise", [[0.0, 0.0], [0.2, 0.5], [0.3, 0.7]]),
    ),
    "paper-completion": ReadySweep(
        "Noise of the latent frames that are completed: the README's two settings, and all clean",
        {"steps": 10},
        _points("noise", [[0.0], [0.0, 0.3, 0.4, 0.5], [0.2, 0.4, 0.4, 0.4]]),
    ),
    "paper-guidance": ReadySweep(
        "Guidance: off, 3 as in all of the original's scripts, and its pipeline's 5",
        {"steps": 10},
        _points("guidance", [1.0, 3.0, 5.0]),
    ),
    "paper-fast": ReadySweep(
        "4 steps with a distilled LoRA (--fast) beside 10 and 30 steps without",
        {},
        (Point({"fast": True}), Point({"steps": 10}), Point({"steps": 30})),
    ),
}
"""Ready sweeps by name. Of guidance and of the noise of conditions, the paper has no figures."""
