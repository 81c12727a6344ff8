"""Write the results of a sweep as JSON, CSV, Markdown and plots."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pusa.evaluation.metrics import format_figure
from pusa.evaluation.runs.files import write_whole
from pusa.evaluation.sweep.grid import as_number, format_value
from pusa.evaluation.sweep.job import Result
from pusa.markdown import markdown_table
from pusa.training.reports.charts import Panel, Series, write_chart

JSON_FILE, CSV_FILE, MARKDOWN_FILE = "sweep-results.json", "sweep.csv", "sweep.md"
_PUBLISHED = "published"
_LOG_AXES = ("steps",)

Head = Mapping[str, Any]


def write_report(results: Sequence[Result], folder: Path, about: str, source: str = "") -> list[Path]:
    """Write all files of a sweep.

    Args:
        about: a line on what was swept.
        source: where published figures are from.

    Returns:
        Their paths, plots included. Without matplotlib there are no plots, and the Markdown says so.
    """
    plots, note = {}, ""
    try:
        plots = _write_plots(results, folder / "plots")
    except RuntimeError as error:  # matplotlib is missing: hours of work are worth a table
        note = str(error)
    texts = {
        JSON_FILE: json.dumps({"about": about, "source": source, "points": [asdict(r) for r in results]}, indent=1)
        + "\n",
        CSV_FILE: as_csv(results),
        MARKDOWN_FILE: as_markdown(
            results, about, source, {name: path.relative_to(folder).as_posix() for name, path in plots.items()}, note
        ),
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [*(folder / name for name in texts), *plots.values()]


# ---- tables ----------------------------------------------------------------------------------------------------------


def groups_of(results: Sequence[Result]) -> dict[str, list[str]]:
    """Return the names of all figures by group: that of ``i2v/seam`` is ``i2v``; of a name without one, empty."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for result in results for name in (*result.figures, *result.published)):
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    return groups


def title_of(name: str) -> str:
    """Return a figure's name without its group, for people."""
    return name.rpartition("/")[2].replace("_", " ")


def axes_of(results: Sequence[Result]) -> list[str]:
    """List what the points differ in, or have."""
    return list(dict.fromkeys(name for result in results for name in result.values))


def as_markdown(
    results: Sequence[Result], about: str, source: str = "", plots: Mapping[str, str] | None = None, note: str = ""
) -> str:
    """Format a table for each group of figures, points in rows, with published figures beside ours."""
    lines = ["# Sweep", "", about + " ± is the standard error."]
    if source:
        lines += ["", f"Published: {source}."]
    if note:
        lines += ["", f"No plots: {note}."]
    for group, names in groups_of(results).items():
        head, *rows = table_of(results, names)
        lines += ["", *([f"## {group}", ""] if group else []), *markdown_table(head, rows)]
        if group in (plots or {}):
            lines += ["", f"![{group or 'figures'}]({(plots or {})[group]})"]
    failed = [f"- {result.name}: {result.error}" for result in results if result.error]
    return "\n".join([*lines, *(["", "## Not complete", "", *failed] if failed else [])]) + "\n"


def table_of(results: Sequence[Result], names: Iterable[str]) -> list[list[str]]:
    """Format figures as rows; the first is the head."""
    axes, names = axes_of(results), list(names)
    heads, cells = [], []
    for name in names:
        title = title_of(name)
        if any(name in result.figures for result in results):
            heads.append(title)
            figures = [result.figures.get(name) for result in results]
            cells.append(
                ["" if figure is None else format_figure(figure, name, decibel_digits=2) for figure in figures]
            )
        if any(name in result.published for result in results):
            heads.append(f"{title}, {_PUBLISHED}")
            cells.append([f"{result.published[name]:.2f}" if name in result.published else "" for result in results])
    rows = [
        [
            *(format_value(result.values[axis]) if axis in result.values else "" for axis in axes),
            f"{result.made}/{result.videos}" if result.videos else "failed",
            "" if result.seconds is None else f"{result.seconds:.1f}",
            *(column[number] for column in cells),
        ]
        for number, result in enumerate(results)
    ]
    return [[*axes, "videos", "s/video", *heads], *rows]


def as_csv(results: Sequence[Result]) -> str:
    """Format one line for each point and figure: the point's values, then figure, value, error, n, published."""
    axes = axes_of(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*axes, "figure", "value", "error", "n", _PUBLISHED])
    for result in results:
        values = [format_value(result.values[axis]) if axis in result.values else "" for axis in axes]
        for name in dict.fromkeys((*result.figures, *result.published)):
            figure = result.figures.get(name, {})
            cells = [figure.get(key) for key in ("value", "error", "n")]
            writer.writerow([*values, name, *cells, result.published.get(name)])
    return text.getvalue()


# ---- plots -----------------------------------------------------------------------------------------------------------


def _write_plots(results: Sequence[Result], folder: Path) -> dict[str, Path]:
    plots = {}
    for group, names in groups_of(results).items():
        if panels := make_panels(results, names):
            folder.mkdir(parents=True, exist_ok=True)
            plots[group] = write_chart(panels, folder / f"{group or 'figures'}.svg", columns=3)
    return plots


def make_panels(results: Sequence[Result], names: Sequence[str]) -> list[Panel]:
    """Make a panel for each figure: the first axis of numbers across, a line for each combination of the others."""
    axis = next((name for name in axes_of(results) if _is_numeric(results, name)), None)
    if axis is None:
        return []
    panels = []
    for name in names:
        lines = [*_lines(results, name, axis), *_published_line(results, name, axis)]
        if lines:
            panels.append(Panel(title_of(name), axis, lines, log_x=axis in _LOG_AXES))
    return panels


def _is_numeric(results: Sequence[Result], axis: str) -> bool:
    numbers = [as_number(result.values.get(axis)) for result in results]
    return None not in numbers and len(set(numbers)) > 1


def _lines(results: Sequence[Result], name: str, axis: str) -> list[Series]:
    lines: dict[str, list[tuple[float, float, float | None]]] = {}
    for result in results:
        figure, x = result.figures.get(name), as_number(result.values[axis])
        if figure is None or figure["value"] is None or x is None:
            continue
        others = ", ".join(f"{key} {format_value(value)}" for key, value in result.values.items() if key != axis)
        lines.setdefault(others, []).append((x, figure["value"], figure.get("error")))
    return [
        Series(label, [(x, y) for x, y, _ in sorted(points)], [error for *_, error in sorted(points)], dots=True)
        for label, points in lines.items()
    ]


def _published_line(results: Sequence[Result], name: str, axis: str) -> list[Series]:
    points = [
        (x, r.published[name]) for r in results if name in r.published and (x := as_number(r.values[axis])) is not None
    ]
    return [Series(_PUBLISHED, sorted(points), dots=True)] if points else []
