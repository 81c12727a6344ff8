"""Curves of a run as one picture, drawn with Pillow: no plotting library is needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SCALE = 2  # drawn larger and reduced, for smooth lines
_WIDTH, _HEIGHT = 560, 320  # pixels of one panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 34, 44
_INK, _GRID, _PAPER = (40, 40, 44), (226, 226, 230), (255, 255, 255)
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
COLOURS = ((66, 110, 180), (222, 110, 40), (60, 150, 90), (150, 90, 170))
_PALE = 0.65  # towards white, of raw points behind a smoothed line


@dataclass(frozen=True)
class Curve:
    """Points ``(x, y)`` in the order of x. `smooth`: a running mean is drawn, over the points in a pale shade."""

    label: str
    points: Sequence[tuple[float, float]]
    smooth: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One diagram. The y axis begins at the lowest value shown, not at 0; so does x where it has no range."""

    title: str
    x: str
    curves: Sequence[Curve]
    x_range: tuple[float, float] | None = None


def draw(panels: Sequence[Panel]) -> Image.Image:
    """Panels beside each other, RGB. A panel without finite points says so."""
    if not panels:
        raise ValueError("there is no panel to draw")
    size = (_SCALE * _WIDTH * len(panels), _SCALE * _HEIGHT)
    picture = Image.new("RGB", size, _PAPER)
    for number, panel in enumerate(panels):
        _Drawing(picture, _SCALE * _WIDTH * number).panel(panel)
    return picture.resize((size[0] // _SCALE, size[1] // _SCALE), Image.Resampling.LANCZOS)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about as many as wanted: steps of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"no axis from {low} to {high}")
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [step * index for index in range(first, math.floor(high / step) + 1)]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean over a twentieth of the points to either side."""
    reach = max(1, len(points) // 20)
    return [
        (x, math.fsum(y for _, y in near) / len(near))
        for x, near in ((x, points[max(0, index - reach) : index + reach + 1]) for index, (x, _) in enumerate(points))
    ]


class _Drawing:
    """The panels' shared pen; lengths are in pixels of the finished picture."""

    def __init__(self, picture: Image.Image, left: int) -> None:
        self.draw = ImageDraw.Draw(picture)
        self.left = left
        self.font, self.small = (ImageFont.load_default(_SCALE * size) for size in (15, 11))

    def panel(self, panel: Panel) -> None:
        curves = [Curve(c.label, _finite(c.points), c.smooth, c.dots) for c in panel.curves]
        self.text(_LEFT, 8, panel.title, self.font)
        every = [point for curve in curves for point in curve.points]
        if not every:
            self.text(_LEFT, _HEIGHT / 2, "nothing was measured", self.small)
            return
        self.x_range = panel.x_range or _range([x for x, _ in every], margin=0.0)
        self.y_range = _range([y for _, y in every], margin=0.05)
        self.axes(panel.x)
        for number, curve in enumerate(curves):
            colour = COLOURS[number % len(COLOURS)]
            if curve.smooth:
                self.line(curve.points, _mixed(colour), 1)
                self.line(smoothed(curve.points), colour, 2)
            else:
                self.line(curve.points, colour, 2)
            if curve.dots or len(curve.points) == 1:
                self.dots(curve.points, colour)
        self.legend([curve.label for curve in curves])

    def axes(self, name: str) -> None:
        for value in ticks(*self.y_range):
            _, y = self.place(self.x_range[0], value)
            self.stroke([(_LEFT, y), (_WIDTH - _RIGHT, y)], _GRID, 1)
            self.text(_LEFT - 6, y, f"{value:.4g}", self.small, anchor="rm")
        for value in ticks(*self.x_range):
            x, _ = self.place(value, self.y_range[0])
            self.text(x, _HEIGHT - _BOTTOM + 6, f"{value:g}", self.small, anchor="mt")
        self.stroke([(_LEFT, _TOP), (_LEFT, _HEIGHT - _BOTTOM), (_WIDTH - _RIGHT, _HEIGHT - _BOTTOM)], _INK, 1)
        self.text(_WIDTH - _RIGHT, _HEIGHT - 6, name, self.small, anchor="rb")

    def legend(self, labels: Sequence[str]) -> None:
        y = _TOP + 4
        for number, label in enumerate(labels):
            x = _WIDTH - _RIGHT - self.small.getlength(label) / _SCALE - 4
            self.stroke([(x - 22, y + 7), (x - 6, y + 7)], COLOURS[number % len(COLOURS)], 3)
            self.text(x, y, label, self.small)
            y += 16

    def place(self, x: float, y: float) -> tuple[float, float]:
        (x_low, x_high), (y_low, y_high) = self.x_range, self.y_range
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + width * (x - x_low) / (x_high - x_low), _TOP + height * (y_high - y) / (y_high - y_low)

    def line(self, points: Sequence[tuple[float, float]], colour: tuple[int, ...], width: int) -> None:
        if len(points) > 1:
            self.stroke([self.place(x, y) for x, y in points], colour, width)

    def dots(self, points: Sequence[tuple[float, float]], colour: tuple[int, ...]) -> None:
        for x, y in (self.place(*point) for point in points):
            box = [self.left + _SCALE * (x - 3), _SCALE * (y - 3), self.left + _SCALE * (x + 3), _SCALE * (y + 3)]
            self.draw.ellipse(box, fill=colour)

    def stroke(self, path: Sequence[tuple[float, float]], colour: tuple[int, ...], width: int) -> None:
        corners = [(self.left + _SCALE * x, _SCALE * y) for x, y in path]
        self.draw.line(corners, fill=colour, width=_SCALE * width, joint="curve")

    def text(self, x: float, y: float, words: str, font: _Font, anchor: str = "la") -> None:
        self.draw.text((self.left + _SCALE * x, _SCALE * y), words, _INK, font, anchor=anchor)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    return low - margin * (high - low), high + margin * (high - low)


def _mixed(colour: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(round(part + (255 - part) * _PALE) for part in colour)


def panels_of(metrics: Sequence[Mapping[str, object]]) -> list[Panel]:
    """Losses over steps, and the held-out error by noise level at the first visit and at the last.

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
    visits = [entry for entry in metrics if entry.get("held_out_error_by_level")]
    chosen = visits if len(visits) < 2 else [visits[0], visits[-1]]
    by_level = [Curve(f"step {entry['step']}", levels(entry), dots=True) for entry in chosen]
    levels_panel = Panel("held-out error by noise level", "noise level", by_level, x_range=(0.0, 1.0))
    return [Panel("loss", "step", losses), levels_panel]
