"""How a dataset is shown: the page, from its template, and the contact sheet."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageOps

from pusa.data.format import ClipInfo
from pusa.media.previews import BACKGROUND, draw_label, grid
from pusa.resources import readable

TEMPLATE = Path(__file__).with_name("inspect.html")

_GAP = 4  # pixels between frames
_MARGIN = 20  # around the clips of a sheet
_FAINT = (148, 155, 168)
_TEXT_HEIGHT = 46  # pixels of the two lines below a clip


@dataclass(frozen=True)
class ClipPreview:
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
        return grid(self.frames, len(self.frames), gap=_GAP)

    def as_uri(self) -> str:
        buffer = io.BytesIO()
        self.image().save(buffer, "JPEG", quality=85)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(facts: dict[str, Any], strips: list[ClipPreview]) -> str:
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


def contact_sheet(strips: list[ClipPreview], *, columns: int = 2) -> Image.Image:
    """Strips in columns, each with its name, caption and measures below it."""
    images = [strip.image() for strip in strips]
    width = max(image.width for image in images)
    cells = []
    for strip, image in zip(strips, images, strict=True):
        cell = ImageOps.expand(image, (0, 0, width - image.width, _TEXT_HEIGHT), BACKGROUND)
        draw_label(cell, (0, image.height + 6), strip.clip.caption, width, sizes=(15,))
        draw_label(cell, (0, image.height + 26), strip.words, width, sizes=(13,), colour=_FAINT)
        cells.append(cell)
    return grid(cells, columns, gap=_MARGIN, margin=_MARGIN)
