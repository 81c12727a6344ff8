"""The records of a short run as a table in markdown: one row each, with the card's name."""

from collections.abc import Sequence
from typing import Any

COLUMNS = ("case", "card", "outcome", "seconds", "peak GB", "TFLOP/s", "beside it")
_REMARKS = (  # field, and how a person reads it
    ("why", "{}"),
    ("error", "{}"),
    ("attention", "attention {}"),
    ("equals_per_frame", "equal to per frame: {}"),
    ("difference_of_range", "difference {:.1e} of the range"),
    ("difference_from_native", "difference from native {:.1e}"),
    ("relative_error", "error {:.1e}"),
    ("times_as_fast_as_eager", "{:.2f} times as fast as eager"),
    ("graphs", "{} graphs"),
    ("merged_seconds", "merged {:.3f} s"),
    ("times_as_long_as_merged", "{:.2f} times as long as merged"),
    ("merge_seconds", "merging took {:.1f} s"),
    ("difference_from_merged", "difference from merged {:.1e}"),
    ("blocks", "{} blocks"),
    ("of_blocks", "of {}"),
    ("frames", "{} frames"),
    ("seconds_per_later_latent_frame", "{:.3f} s per later latent frame"),
    ("seconds_to_first_frame", "first frame after {:.2f} s"),
    ("agrees", "agrees: {}"),
)


def seconds_of(record: dict[str, Any]) -> float | None:
    """Give the time that a case is about, which not every case has."""
    return record.get("seconds_per_step", record.get("seconds"))


def number(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.4g}"


def row(record: dict[str, Any]) -> list[str]:
    remarks = [text.format(record[name]) for name, text in _REMARKS if record.get(name) is not None]
    remarks += ["NOT FINITE"] if record.get("finite") is False else []
    return [
        record["case"],
        record["card"],
        record.get("outcome", ""),
        number(seconds_of(record)),
        number(record.get("peak_bytes"), 1e9),
        number(record.get("flops_per_second"), 1e12),
        "; ".join(remarks),
    ]


def markdown(records: Sequence[dict[str, Any]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row(record) for record in records)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
