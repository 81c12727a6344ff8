"""Draw the curves of a training run with matplotlib."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

_WIDTH, _HEIGHT, _DPI = 560, 320, 100  # pixels of one panel
_COLOURS = ("#426eb4", "#de6e28", "#3c965a", "#965aaa")
_PALE = 0.35  # opacity of raw points behind a smoothed line


@dataclass(frozen=True)
class Curve:
    """Hold points ``(x, y)`` in the order of x; `smooth` draws their running mean over a pale line of the points."""

    label: str
    points: Sequence[tuple[float, float]]
    smooth: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """Hold the curves of one diagram. Both axes begin at the lowest value shown, x at its range if it has one."""

    title: str
    x: str
    curves: Sequence[Curve]
    x_range: tuple[float, float] | None = None


def draw(panels: Sequence[Panel]) -> Image.Image:
    """Draw panels side by side, RGB, 560 x 320 pixels each; a panel without finite points says so.

    Raises:
        ValueError: there is no panel.
        RuntimeError: matplotlib is not installed.
    """
    if not panels:
        raise ValueError("there is no panel to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("curves need matplotlib, which is not installed: pip install 'pusa[train]'") from error
    # Not pyplot, which keeps global state and is not safe in threads.
    figure = Figure((len(panels) * _WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        axes.set_title(panel.title, loc="left", fontsize=11)
        axes.set_xlabel(panel.x, loc="right")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        if panel.x_range is not None:
            axes.set_xlim(*panel.x_range)
        for curve, colour in zip(panel.curves, _COLOURS, strict=False):
            _plot(axes, curve, colour)
        if not axes.lines:
            axes.text(0.05, 0.5, "nothing was measured", transform=axes.transAxes)
        elif any(curve.label for curve in panel.curves):
            axes.legend(frameon=False)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def _plot(axes: Any, curve: Curve, colour: str) -> None:
    points = [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return
    if curve.smooth:
        axes.plot(*zip(*points, strict=True), color=colour, alpha=_PALE, linewidth=1)
        points = smoothed(points)
    marker = "o" if curve.dots or len(points) == 1 else None
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=2, marker=marker, label=curve.label)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Replace each y by the mean over a twentieth of the points to either side."""
    reach = max(1, len(points) // 20)
    return [
        (x, math.fsum(y for _, y in near) / len(near))
        for x, near in ((x, points[max(0, index - reach) : index + reach + 1]) for index, (x, _) in enumerate(points))
    ]


def panels_of(metrics: Sequence[Mapping[str, object]]) -> list[Panel]:
    """Make panels of the losses over steps, and of the held-out error by noise level at the first and last evaluation.

    Args:
        metrics: the entries of ``metrics.jsonl``.
    """

    def over_steps(name: str) -> list[tuple[float, float]]:
        return [(float(e["step"]), float(e[name])) for e in metrics if e.get(name) is not None]  # type: ignore[arg-type]

    def levels(entry: Mapping[str, object]) -> list[tuple[float, float]]:
        by_level: Mapping[str, float | None] = entry["held_out_error_by_level"]  # type: ignore[assignment]
        return [(float(level) + 0.05, value) for level, value in sorted(by_level.items()) if value is not None]

    losses = [Curve("training", over_steps("loss"), smooth=True)]
    if held_out := over_steps("held_out_loss"):
        losses.append(Curve("held out", held_out, dots=True))
    evaluations = [entry for entry in metrics if entry.get("held_out_error_by_level")]
    chosen = evaluations if len(evaluations) < 2 else [evaluations[0], evaluations[-1]]
    by_level = [Curve(f"step {entry['step']}", levels(entry), dots=True) for entry in chosen]
    levels_panel = Panel("held-out error by noise level", "noise level", by_level, x_range=(0.0, 1.0))
    return [Panel("loss", "step", losses), levels_panel]
