"""Draw previews of videos: a thumbnail, a contact sheet of one video or of several, a sprite sheet for a seek bar."""

import base64
import io
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pusa.media.pictures import read_image
from pusa.media.reading import first_picture, iter_video, probe_video
from pusa.media.source import DEFAULT_LIMITS, MAX_FPS, MediaLimits, Source

BACKGROUND, TEXT = (24, 24, 24), (235, 235, 235)
_MARGIN = 4  # pixels between and around the frames of one video's sheet
_GAP = 6  # pixels between and around the frames of a sheet of strips
_LINE = 20  # pixels of a line of text above a strip
_HELD = (255, 150, 40)
_FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def thumbnail(video: Source | np.ndarray, size: int = 320, *, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """Return the frame in the middle of a video, RGB, its longest side at most `size` pixels.

    video: uint8 frames [F, H, W, 3], or any video `read_video` takes, or a folder of PNG frames. The middle, because
    the first frame of an image-to-video clip is the picture one already has. Raises as `read_video` does.
    """
    frame, _ = _sample(video, 1, size, 16.0, limits)[0]
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
    """Draw at most `frames` frames, evenly spread, in `columns` columns, each marked with its time in seconds; RGB.

    video: as for `thumbnail`; `fps` gives the times for frames that come without (an array or a folder of PNG). The
    sheet is at most `max_width` pixels wide. Raises as `read_video` does.
    """
    if frames < 1 or columns < 1 or max_width < columns * 4 * _MARGIN:
        raise ValueError(f"frames={frames}, columns={columns}, max_width={max_width} make no sheet; use larger numbers")
    cell_width = (max_width - _MARGIN) // columns - _MARGIN
    sampled = _sample(video, frames, cell_width, fps, limits)
    cells = _scaled([frame for frame, _ in sampled], cell_width)
    font = ImageFont.load_default(max(10, cells[0].height // 12))
    for cell, (_, seconds) in zip(cells, sampled, strict=True):
        label = f"{seconds:.2f} s"
        ImageDraw.Draw(cell).text((4, 2), label, "white", font, stroke_width=2, stroke_fill="black")
    return grid(cells, columns, gap=_MARGIN, margin=_MARGIN)


def sprite_sheet(
    video: Source | np.ndarray,
    *,
    frames: int = 25,
    columns: int = 5,
    max_width: int = 1280,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Image.Image:
    """Draw at most `frames` frames, evenly spread, edge to edge in `columns` columns, for a player's seek bar; RGB.

    video: as for `thumbnail`. The sheet is at most `max_width` pixels wide. Raises as `read_video` does.
    """
    if frames < 1 or columns < 1 or max_width < columns:
        raise ValueError(f"frames={frames}, columns={columns}, max_width={max_width} make no sheet; use larger numbers")
    cell_width = max_width // columns
    return grid(_scaled([frame for frame, _ in _sample(video, frames, cell_width, 16.0, limits)], cell_width), columns)


def _sample(
    video: Source | np.ndarray, count: int, size: int, fps: float, limits: MediaLimits
) -> list[tuple[Image.Image, float]]:
    """Read at most `count` frames with their times in seconds, each from the middle of its share of the video."""
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


def _scaled(frames: Sequence[Image.Image], max_width: int) -> list[Image.Image]:
    """Scale frames of one size down to `max_width` pixels; smaller ones keep their size."""
    scale = min(Fraction(max_width, frames[0].width), Fraction(1))
    width, height = (max(1, round(side * scale)) for side in frames[0].size)
    return [frame.resize((width, height), Image.Resampling.LANCZOS) for frame in frames]


# ---- sheets of several videos ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """Frames of one video in a sheet of several.

    Attributes:
        label: the line of text that describes the video.
        frames: uint8 ``[n, H, W, 3]``.
        numbers: the position of each frame in its video; None: 0, 1, 2, ...
        held: those of `numbers` that the model was given rather than generated; they are outlined.
        title: a short name before the label, such as the task.
    """

    label: str
    frames: np.ndarray
    numbers: Sequence[int] | None = None
    held: Collection[int] = ()
    title: str = ""

    def __post_init__(self) -> None:
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[3] != 3 or not len(self.frames):
            raise ValueError(f"frames {self.frames.dtype} {list(self.frames.shape)} are not uint8 [n, H, W, 3]")
        if self.numbers is not None and len(self.numbers) != len(self.frames):
            raise ValueError(f"{len(self.numbers)} numbers for {len(self.frames)} frames")

    @property
    def heading(self) -> str:
        """Title and label in one line."""
        return f"{self.title}: {self.label}" if self.title else self.label


def spread(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of `count` frames, evenly spread from the first to the last.

    Raises:
        ValueError: a number below 1.
    """
    if count < 1 or wanted < 1:
        raise ValueError(f"{wanted} of {count} frames: both must be at least 1")
    if wanted == 1:
        return [0]
    wanted = min(wanted, count)
    return [round(index * (count - 1) / max(wanted - 1, 1)) for index in range(wanted)]


def strip_sheet(strips: Sequence[Strip], *, columns: int = 6, cell_width: int = 160, title: str = "") -> Image.Image:
    """Draw strips below each other, at most `columns` frames of each, evenly spread; RGB.

    Each frame is `cell_width` pixels wide, its height follows; frames of several sizes may be mixed.

    Raises:
        ValueError: no strip, no column, or a `cell_width` outside 16..4096.
    """
    if not strips:
        raise ValueError("a sheet needs at least one strip")
    if columns < 1 or not 16 <= cell_width <= 4096:
        raise ValueError(f"columns={columns}, cell_width={cell_width}: give at least 1, and 16..4096 pixels")
    small = ImageFont.load_default(10)
    chosen = [spread(len(strip.frames), columns) for strip in strips]
    heights = [max(1, round(cell_width * s.frames.shape[1] / s.frames.shape[2])) for s in strips]
    width = max(_GAP + max(map(len, chosen)) * (cell_width + _GAP), 240)
    top = _GAP + (_LINE if title else 0)
    picture = Image.new("RGB", (width, top + sum(_LINE + height + _GAP for height in heights)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    if title:
        draw_label(picture, (_GAP, _GAP), title, width - 2 * _GAP)
    for strip, indices, height in zip(strips, chosen, heights, strict=True):
        draw_label(picture, (_GAP, top), strip.heading, width - 2 * _GAP)
        top += _LINE
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


# ---- parts of sheets -------------------------------------------------------------------------------------------------


def grid(images: Sequence[Image.Image], columns: int, *, gap: int = 0, margin: int = 0) -> Image.Image:
    """Paste images row by row; all columns are as wide as the widest image, each row as high as its highest; RGB.

    Args:
        columns: at most so many images side by side.
        gap: pixels between images.
        margin: pixels around all of them.
    """
    rows = [images[at : at + columns] for at in range(0, len(images), columns)]
    width, heights = max(image.width for image in images), [max(image.height for image in row) for row in rows]
    size = (len(rows[0]) * (width + gap) - gap + 2 * margin, sum(heights) + (len(rows) - 1) * gap + 2 * margin)
    picture = Image.new("RGB", size, BACKGROUND)
    top = margin
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            picture.paste(image, (margin + column * (width + gap), top))
        top += height + gap
    return picture


def draw_label(
    image: Image.Image,
    position: tuple[int, int],
    text: str,
    width: int,
    *,
    sizes: Iterable[int] = (14,),
    colour: tuple[int, int, int] = TEXT,
) -> None:
    """Draw one line of text, at most `width` pixels wide, in the first of the font `sizes` that fits.

    Text that fits in none of them is cut in the last one. The built-in font has Latin letters only and shows a box for
    others.
    """
    text = " ".join(text.split())
    for size in sizes:
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            break
    else:
        while text and font.getlength(f"{text}...") > width:
            text = text[:-1]
        text = f"{text.rstrip()}..."
    ImageDraw.Draw(image).text(position, text, colour, font)


def as_data_uri(picture: Image.Image, *, quality: int) -> str:
    """Encode a picture as a JPEG ``data:`` URI, for pages that need no other file; quality in 0..95, as Pillow's."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_picture(picture: Image.Image, path: Path) -> Path:
    """Write a picture so that `path` never holds half of it; make its folder.

    Raises:
        ValueError: a suffix other than .png, .jpg, .jpeg and .webp.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{path.name}: give one of {', '.join(_FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    picture.save(part, quality=90)  # which PNG ignores
    os.replace(part, path)
    return path
