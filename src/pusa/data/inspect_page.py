"""How a dataset is shown: the page, from its template, and the contact sheet."""

import base64
import io
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageDraw, ImageFont

from pusa.data.format import ClipInfo
from pusa.resources import readable

TEMPLATE = Path(__file__).with_name("inspect.html")

_GAP = 4  # pixels between frames
_MARGIN = 20  # around the clips of a sheet
_BACKGROUND, _TEXT, _FAINT = (22, 24, 28), (236, 238, 242), (148, 155, 168)


@dataclass(frozen=True)
class Strip:
    """Frames of one clip, in order and of one size, with what was measured of it."""

    clip: ClipInfo
    motion: float | None
    detail: float
    frames: list[Image.Image]

    @property
    def words(self) -> str:
        """``fox.mp4 at 2.50 s: 81 frames, motion 0.31, detail 0.52``."""
        start = f" at {self.clip.start_seconds:.2f} s" if self.clip.start_seconds else ""
        parts = [f"{self.clip.frames} frames" if self.clip.frames > 1 else "picture"]
        parts += [] if self.motion is None else [f"motion {self.motion:.2f}"]
        return f"{self.clip.source or self.clip.id}{start}: {', '.join([*parts, f'detail {self.detail:.2f}'])}"

    def image(self) -> Image.Image:
        """The frames side by side."""
        width, height = self.frames[0].size
        strip = Image.new("RGB", (len(self.frames) * (width + _GAP) - _GAP, height), _BACKGROUND)
        for number, frame in enumerate(self.frames):
            strip.paste(frame, (number * (width + _GAP), 0))
        return strip

    def as_uri(self) -> str:
        buffer = io.BytesIO()
        self.image().save(buffer, "JPEG", quality=85)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(facts: dict[str, Any], strips: list[Strip]) -> str:
    """One HTML file that needs no other. Captions and names may hold anything: the template escapes all it is given."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"bytes": readable, "duration": duration}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(strips=strips, **facts)


def duration(seconds: float) -> str:
    """``2 h 5 min``, ``3 min 20 s`` or ``8.0 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def contact_sheet(strips: list[Strip], *, columns: int = 2) -> Image.Image:
    """Strips in columns, each with its name, caption and measures below it."""
    images = [strip.image() for strip in strips]
    columns = min(columns, len(images))
    width = max(image.width for image in images)
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    text_height = 46
    rows = [images[at : at + columns] for at in range(0, len(images), columns)]
    heights = [max(image.height for image in row) + text_height for row in rows]
    sheet = Image.new(
        "RGB",
        (columns * (width + _MARGIN) + _MARGIN, sum(heights) + (len(rows) + 1) * _MARGIN),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, height in enumerate(heights):
        for column, image in enumerate(rows[row]):
            strip = strips[row * columns + column]
            left = _MARGIN + column * (width + _MARGIN)
            sheet.paste(image, (left, top))
            below = top + height - text_height + 6
            draw.text((left, below), _cut(strip.clip.caption, width, font), _TEXT, font)
            draw.text((left, below + 20), _cut(strip.words, width, small), _FAINT, small)
        top += height + _MARGIN
    return sheet


def _cut(text: str, width: int, font: Any) -> str:
    """`text`, or as much of it as fits into `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    share = width / font.getlength(text)
    kept = max(1, ceil(len(text) * share))
    while kept > 1 and font.getlength(text[:kept] + "...") > width:
        kept -= 1
    return text[:kept] + "..."
