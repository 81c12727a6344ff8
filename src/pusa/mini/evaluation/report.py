"""Format measured figures as Markdown tables."""

from collections.abc import Mapping
from typing import Any

from pusa.evaluation.metrics import EQUAL_DB, Figure

_NOT_MEASURED = ""


def as_markdown(report: Mapping[str, Any]) -> str:
    """Format the report of `pusa.mini.evaluation.evaluate.evaluate`: a line about the model, then all tables."""
    settings = report["settings"]
    adapter = "no adapter" if settings["alpha"] is None else f"alpha {settings['alpha']:g}"
    lines = [
        f"Model `{settings['model']}`: {settings['size']}x{settings['size']} pixels, {settings['frames']} frames, "
        f"{settings['things']} things; {settings['steps']} steps, guidance {settings['guidance']:g}, {adapter}, "
        f"weights {settings['weights']}.",
    ]
    for part in report["parts"].values():
        for title, table in part["tables"].items():
            lines += ["", f"**{title[0].upper()}{title[1:]}**", "", format_table(table)]
    return "\n".join(lines) + "\n"


def format_table(table: Mapping[str, Mapping[str, Figure]]) -> str:
    """Format one table: a row per way to generate, its number of clips, and a column per measure."""
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    lines = ["| | clips | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, row in table.items():
        clips = max((figure.get("n", 0) for figure in row.values()), default=0)
        cells = [format_figure(row[column], column) if column in row else _NOT_MEASURED for column in columns]
        lines.append(f"| {name} | {clips or _NOT_MEASURED} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_figure(figure: Figure, column: str = "") -> str:
    """Format a figure: rates with their interval, means with their standard error."""
    value = figure["value"]
    if value is None:
        return _NOT_MEASURED
    if "low" in figure:
        return f"{100 * value:.0f} % ({100 * figure['low']:.0f}-{100 * figure['high']:.0f})"
    decibels = column.endswith("dB")
    if decibels and value >= EQUAL_DB - 0.5:
        return "equal"
    if set(figure) == {"value"}:  # chance
        return f"{100 * value:.0f} %"
    digits = 1 if decibels or abs(value) >= 10 else 2
    error = figure.get("error")
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
