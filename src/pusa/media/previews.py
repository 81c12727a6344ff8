"""A video at a glance: one thumbnail, or a sheet of frames with their times."""

import os
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pusa.media.reading import first_picture, iter_video, probe_video, read_image
from pusa.media.source import DEFAULT_LIMITS, MAX_FPS, MediaLimits, Source

_MARGIN = 4  # pixels between and around the frames of a sheet
_BACKGROUND = (24, 24, 24)


def thumbnail(video: Source | np.ndarray, size: int = 320, *, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """The frame in the middle of a video, RGB, its longest side at most `size` pixels.

    video: uint8 frames [F, H, W, 3], or any video `read_video` takes, or a folder of PNG frames. The middle, because
    the first frame of an image-to-video clip is the picture one already has. Raises as `read_video` does.
    """
    frame, _ = _spread(video, 1, size, 16.0, limits)[0]
    frame.thumbnail((size, size), Image.Resampling.LANCZOS)
    return frame


def contact_sheet(
    video: Source | np.ndarray,
    *,
    frames: int = 12,
    columns: int = 4,
    max_width: int = 1280,
    fps: float = 16.0,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Image.Image:
    """At most `frames` frames, evenly spread, in `columns` columns, each marked with its time in seconds; RGB.

    video: as for `thumbnail`; `fps` gives the times for frames that come without (an array or a folder of PNG). The
    sheet is at most `max_width` pixels wide. Raises as `read_video` does.
    """
    if frames < 1 or columns < 1 or max_width < columns * 4 * _MARGIN:
        raise ValueError(f"frames={frames}, columns={columns}, max_width={max_width} make no sheet; use larger numbers")
    cell_width = (max_width - _MARGIN) // columns - _MARGIN
    cells = _spread(video, frames, cell_width, fps, limits)
    scale = min(Fraction(cell_width, cells[0][0].width), Fraction(1))
    width, height = (max(1, round(side * scale)) for side in cells[0][0].size)
    columns = min(columns, len(cells))
    rows = ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(max(10, height // 12))
    for index, (frame, seconds) in enumerate(cells):
        left = _MARGIN + index % columns * (width + _MARGIN)
        top = _MARGIN + index // columns * (height + _MARGIN)
        sheet.paste(frame.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        draw.text((left + 4, top + 2), f"{seconds:.2f} s", "white", font, stroke_width=2, stroke_fill="black")
    return sheet


def sprite_sheet(
    video: Source | np.ndarray,
    *,
    frames: int = 25,
    columns: int = 5,
    max_width: int = 1280,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Image.Image:
    """At most `frames` frames, evenly spread, edge to edge in `columns` columns: for a player's seek bar; RGB.

    video: as for `thumbnail`. The sheet is at most `max_width` pixels wide. Raises as `read_video` does.
    """
    if frames < 1 or columns < 1 or max_width < columns:
        raise ValueError(f"frames={frames}, columns={columns}, max_width={max_width} make no sheet; use larger numbers")
    cells = [frame for frame, _ in _spread(video, frames, max_width // columns, 16.0, limits)]
    scale = min(Fraction(max_width // columns, cells[0].width), Fraction(1))
    width, height = (max(1, round(side * scale)) for side in cells[0].size)
    columns = min(columns, len(cells))
    sheet = Image.new("RGB", (columns * width, ceil(len(cells) / columns) * height))
    for index, frame in enumerate(cells):
        cell = frame.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(cell, (index % columns * width, index // columns * height))
    return sheet


def _spread(
    video: Source | np.ndarray, count: int, size: int, fps: float, limits: MediaLimits
) -> list[tuple[Image.Image, float]]:
    """At most `count` (frame, seconds), each from the middle of its share of the video."""
    if isinstance(video, np.ndarray):
        return [(Image.fromarray(video[i]), i / fps) for i in _middles(len(video), count)]
    if isinstance(video, (str, os.PathLike)) and Path(video).is_dir():
        paths = sorted(first_picture(Path(video)).parent.glob("*.png"))
        return [(read_image(paths[i], limits=limits).convert("RGB"), i / fps) for i in _middles(len(paths), count)]
    info = probe_video(video, limits=limits)
    count = min(count, info.frames)
    step = max(Fraction(info.seconds) / count, Fraction(1, MAX_FPS))
    start = max((step - 1 / Fraction(info.fps)) / 2, Fraction(0))  # frames are found by when they begin
    frames = iter_video(video, fps=1 / step, start_seconds=float(start), max_frames=count, fit=(size, 1), limits=limits)
    return [(Image.fromarray(frame), float(start + index * step)) for index, frame in enumerate(frames)]


def _middles(length: int, count: int) -> list[int]:
    count = min(length, count)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]
