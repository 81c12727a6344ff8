"""Draw charts of lines with matplotlib, as PNG or SVG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pusa.fsutil import replacing

_WIDTH, _HEIGHT, _DPI = 560, 320, 100  # pixels of one panel
_COLOURS = ("#426eb4", "#de6e28", "#3c965a", "#965aaa", "#8a8f2a", "#555555")
_PALE = 0.35  # opacity of raw points behind a smoothed line

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """Hold the points ``(x, y)`` of one line, in the order of x.

    Attributes:
        errors: the standard error of each point, drawn as a bar to either side; empty: no bars.
        smooth: draw the running mean over a pale line of the points.
        dots: mark the points.
    """

    name: str
    points: Points
    errors: Sequence[float | None] = ()
    smooth: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """Hold the lines of one diagram. With `log_x`, x is logarithmic and labelled at the points."""

    title: str
    x_label: str
    series: Sequence[Series]
    y_label: str = ""
    log_x: bool = False
    x_range: tuple[float, float] | None = None


def load_figure_class() -> Any:
    """Import matplotlib's `Figure`. Raises RuntimeError, which names the extra, without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps global state
    except ImportError as error:
        raise RuntimeError(
            "charts need matplotlib, which is not installed: pip install 'pusa[train]' or 'pusa[eval]'"
        ) from error
    return Figure


def write_chart(panels: Sequence[Panel], path: Path, *, columns: int | None = None) -> Path:
    """Draw panels of 560 x 320 pixels each; series of one name have one colour, and equal panels give equal bytes.

    A panel without finite points says so.

    Args:
        path: the file, ``.png`` or ``.svg``, replaced at once.
        columns: panels side by side; None: all.

    Raises:
        ValueError: there is no panel.
        RuntimeError: matplotlib is not installed.
    """
    if not panels:
        raise ValueError("a chart needs at least one panel")
    figure_class = load_figure_class()
    import matplotlib

    columns = min(columns or len(panels), len(panels))
    rows = -(-len(panels) // columns)
    figure = figure_class((columns * _WIDTH / _DPI, rows * _HEIGHT / _DPI), dpi=_DPI, layout="constrained")
    names = dict.fromkeys(series.name for panel in panels for series in panel.series)
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    for number, panel in enumerate(panels, start=1):
        _draw_panel(figure.add_subplot(rows, columns, number), panel, colours)
    kind = path.suffix.removeprefix(".")
    with matplotlib.rc_context({"svg.hashsalt": "pusa", "svg.fonttype": "none"}), replacing(path) as part:
        figure.savefig(part, format=kind, metadata={"Date": None} if kind == "svg" else {})
    return path


def _draw_panel(axes: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_xlabel(panel.x_label, loc="right")
    axes.set_ylabel(panel.y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    if panel.x_range is not None:
        axes.set_xlim(*panel.x_range)
    for series in panel.series:
        _draw_series(axes, series, colours[series.name])
    if not axes.lines:
        axes.text(0.05, 0.5, "nothing was measured", transform=axes.transAxes)
        return
    if panel.log_x:
        ticks = sorted({x for series in panel.series for x, _ in series.points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    if any(series.name for series in panel.series):
        axes.legend(frameon=False)


def _draw_series(axes: Any, series: Series, colour: str) -> None:
    errors = series.errors or [None] * len(series.points)
    finite = [
        (x, y, error or 0.0)
        for (x, y), error in zip(series.points, errors, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if not finite:
        return
    xs, ys, bars = map(list, zip(*finite, strict=True))
    if series.smooth:
        axes.plot(xs, ys, color=colour, alpha=_PALE, linewidth=1)
        ys = [y for _, y in smooth(list(zip(xs, ys, strict=True)))]
    if any(bars):
        axes.errorbar(xs, ys, bars, color=colour, fmt="none", elinewidth=1)
    marker = "o" if series.dots or len(xs) == 1 else None
    axes.plot(xs, ys, color=colour, linewidth=2, marker=marker, markersize=5, label=series.name)


def smooth(points: Points) -> list[tuple[float, float]]:
    """Replace each y by the mean over a twentieth of the points to either side."""
    reach = max(1, len(points) // 20)
    return [(x, fmean(y for _, y in points[max(0, i - reach) : i + reach + 1])) for i, (x, _) in enumerate(points)]


# ---- curves of a run -------------------------------------------------------------------------------------------------


def points_of(entries: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Collect ``(step, value)`` of the log entries with this value; the last one of a step that a resume repeated."""
    return sorted({float(e["step"]): float(e[name]) for e in entries if e.get(name) is not None}.items())


def loss_series(entries: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Make the series of a run's training loss and, if there is one, of its held-out loss."""
    held_out = points_of(entries, "held_out_loss")
    series = [Series("training", points_of(entries, "loss"), smooth=True)]
    return [*series, Series("held out", held_out, dots=True)] if held_out else series


def panels_of(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Make panels of the losses over steps, and of the held-out error by noise level at the first and last evaluation.

    Args:
        metrics: the entries of ``metrics.jsonl``.
    """

    def levels(entry: Mapping[str, Any]) -> list[tuple[float, float]]:
        by_level = entry["held_out_error_by_level"]
        return [(float(level) + 0.05, value) for level, value in sorted(by_level.items()) if value is not None]

    evaluations = [entry for entry in metrics if entry.get("held_out_error_by_level")]
    chosen = evaluations if len(evaluations) < 2 else [evaluations[0], evaluations[-1]]
    by_level = [Series(f"step {entry['step']}", levels(entry), dots=True) for entry in chosen]
    levels_panel = Panel("held-out error by noise level", "noise level", by_level, x_range=(0.0, 1.0))
    return [Panel("loss", "step", loss_series(metrics)), levels_panel]
