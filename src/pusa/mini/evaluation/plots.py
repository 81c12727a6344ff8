"""Draw line charts as SVG text, without a plotting library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = ("#0b6e99", "#c8502d", "#8a8f2a", "#7a4fa3", "#2e8b57", "#b0894f", "#555555")
"""Colours of series, in their order."""

_WIDTH, _HEIGHT = 420, 300  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 34, 44  # around its axes
_LEGEND_LINE = 20


@dataclass(frozen=True)
class Series:
    """Points of one line, with bars of one standard error on either side if `errors` are given.

    A series of one value in `ys` and none in `xs` is a horizontal line.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[float | None] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    x_ticks: Sequence[float] = field(default_factory=tuple)


def figure(panels: Sequence[Panel], *, columns: int = 2) -> str:
    """Draw panels side by side over one legend; series of one name have one colour.

    Raises:
        ValueError: no panel, or one without a finite point.
    """
    if not panels:
        raise ValueError("a figure needs at least one panel")
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    per_line = max(1, columns * _WIDTH // 190)
    legend_height = _LEGEND_LINE * -(-len(names) // per_line) + 10
    width, height = columns * _WIDTH, rows * _HEIGHT + legend_height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        parts.append(f'<g transform="translate({column * _WIDTH} {row * _HEIGHT})">{_panel(panel, colours)}</g>')
    dashed = {series.name for panel in panels for series in panel.series if series.dashed}
    for index, name in enumerate(names):
        row, column = divmod(index, per_line)
        x, y = 12 + column * 190, rows * _HEIGHT + 12 + row * _LEGEND_LINE
        dash = ' stroke-dasharray="5 4"' if name in dashed else ""
        parts.append(f'<path d="M{x} {y}h22" stroke="{colours[name]}" stroke-width="2"{dash}/>')
        parts.append(_text(x + 28, y + 4, name))
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, colours: dict[str, str]) -> str:
    xs = [x for series in panel.series for x in series.xs]
    ends = [
        y + sign * (error or 0.0)
        for series in panel.series
        for y, error in zip(series.ys, _errors(series), strict=True)
        for sign in (-1, 1)
    ]
    if not xs or not all(map(math.isfinite, [*xs, *ends])):
        raise ValueError(f"{panel.title!r} has no points, or some that are not finite")
    ticks = ticks_of(min(ends), max(ends))
    low, high = min(ticks[0], *ends), max(ticks[-1], *ends)
    along = math.log if panel.log_x else float
    first, last = along(min(xs)), along(max(xs))
    first, last = (first - 0.5, last + 0.5) if first == last else (first, last)

    def x_of(x: float) -> float:
        return _LEFT + 10 + (along(x) - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT - 20)

    def y_of(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_WIDTH / 2, 20, panel.title, anchor="middle", weight="bold")]
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{tick:g}", anchor="end"))
    for tick in panel.x_ticks or sorted(set(xs)):
        parts.append(_text(x_of(tick), _HEIGHT - _BOTTOM + 18, f"{tick:g}", anchor="middle"))
    parts.append(_text(_WIDTH / 2, _HEIGHT - 8, panel.x_label, anchor="middle"))
    middle = (_HEIGHT + _TOP - _BOTTOM) / 2
    parts.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(panel.y_label)}</text>'
    )
    for series in panel.series:
        colour, dash = colours[series.name], ' stroke-dasharray="5 4"' if series.dashed else ""
        if not series.xs:
            line = f"M{_LEFT} {y_of(series.ys[0]):.1f}H{_WIDTH - _RIGHT}"
            parts.append(f'<path d="{line}" stroke="{colour}" stroke-width="2"{dash}/>')
            continue
        places = [(x_of(x), y_of(y)) for x, y in zip(series.xs, series.ys, strict=True)]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for (x, y), value, error in zip(places, series.ys, _errors(series), strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            if error:
                bar = f"M{x:.1f} {y_of(value - error):.1f}V{y_of(value + error):.1f}"
                parts.append(f'<path d="{bar}" stroke="{colour}"/>')
    return "".join(parts)


def _errors(series: Series) -> Sequence[float | None]:
    return series.errors or [None] * len(series.ys)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def ticks_of(low: float, high: float) -> list[float]:
    """Choose at most eight round numbers whose range includes low and high."""
    if low == high:
        low, high = low - (abs(low) or 1.0), high + (abs(high) or 1.0)
    span = high - low
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    return [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
