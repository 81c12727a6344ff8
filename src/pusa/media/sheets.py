"""Contact sheets: several videos at a glance, a row of frames for each, as one picture."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 6  # pixels between and around frames
_BACKGROUND, _TEXT, _FAINT, _HELD = (24, 24, 24), (235, 235, 235), (150, 150, 150), (255, 150, 40)
_FORMATS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Strip:
    """One row.

    Attributes:
        label: the line above it.
        frames: uint8 ``[n, H, W, 3]``.
        numbers: which frame of its video each one is; None: 0, 1, 2, ...
        held: those numbers that were given rather than generated; they are outlined.
    """

    label: str
    frames: np.ndarray
    numbers: Sequence[int] | None = None
    held: Collection[int] = ()

    def __post_init__(self) -> None:
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[3] != 3 or not len(self.frames):
            raise ValueError(f"frames {self.frames.dtype} {list(self.frames.shape)} are not uint8 [n, H, W, 3]")
        if self.numbers is not None and len(self.numbers) != len(self.frames):
            raise ValueError(f"{len(self.numbers)} numbers for {len(self.frames)} frames")


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` frames, the first and the last among them and the others evenly between."""
    if count < 1 or wanted < 1:
        raise ValueError(f"{wanted} of {count} frames: both must be at least 1")
    if wanted == 1:
        return [0]
    wanted = min(wanted, count)
    return [round(index * (count - 1) / max(wanted - 1, 1)) for index in range(wanted)]


def sheet(strips: Sequence[Strip], *, columns: int = 6, cell_width: int = 160, title: str = "") -> Image.Image:
    """The strips below each other, at most `columns` frames of each, evenly spread; RGB.

    Each frame is `cell_width` pixels wide, its height follows; frames of several sizes may be mixed.
    """
    if not strips:
        raise ValueError("a sheet needs at least one strip")
    if columns < 1 or not 16 <= cell_width <= 4096:
        raise ValueError(f"columns={columns}, cell_width={cell_width}: give at least 1, and 16..4096 pixels")
    font, small = ImageFont.load_default(14), ImageFont.load_default(10)
    line = 20
    chosen = [spread(len(strip.frames), columns) for strip in strips]
    heights = [max(1, round(cell_width * s.frames.shape[1] / s.frames.shape[2])) for s in strips]
    width = _GAP + max(map(len, chosen)) * (cell_width + _GAP)
    width = max(width, 240)
    top = _GAP + (line if title else 0)
    picture = Image.new("RGB", (width, top + sum(line + height + _GAP for height in heights)), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((_GAP, _GAP), _shortened(title, font, width - 2 * _GAP), _TEXT, font)
    for strip, indices, height in zip(strips, chosen, heights, strict=True):
        draw.text((_GAP, top), _shortened(strip.label, font, width - 2 * _GAP), _TEXT, font)
        top += line
        for column, index in enumerate(indices):
            number = index if strip.numbers is None else strip.numbers[index]
            left = _GAP + column * (cell_width + _GAP)
            frame = Image.fromarray(strip.frames[index]).resize((cell_width, height), Image.Resampling.LANCZOS)
            picture.paste(frame, (left, top))
            if number in strip.held:
                box = (left - 2, top - 2, left + cell_width + 1, top + height + 1)
                draw.rectangle(box, outline=_HELD, width=2)
            draw.text((left + 3, top + 1), str(number), "white", small, stroke_width=1, stroke_fill="black")
        top += height + _GAP
    return picture


def write_picture(picture: Image.Image, path: Path) -> Path:
    """Write a PNG, JPEG or WebP by its suffix; the name is there once the file is complete.

    Raises:
        ValueError: another suffix.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{path.name}: give one of {', '.join(_FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    picture.save(part, quality=90)  # which PNG ignores
    os.replace(part, path)
    return path


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """One line that fits; the built-in font has Latin letters only, and shows a box for others."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
