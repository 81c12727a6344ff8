"""Draw frames of files and cut parts out of them, in the confined child process of `probe`."""

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

from pusa.media import MediaError, MediaLimits, read_image, read_metadata, read_xmp
from pusa.media.conversions import Animation, write_animation, write_film
from pusa.media.pictures import on_white
from pusa.media.stills import read_stills, write_piece
from pusa.provenance.marks import read_marks
from pusa.provenance.xmp import COMPOSITE, GENERATED, InputMark, Mark, write_packet

_QUALITY = 80  # of WebP, for pictures that are looked at in small
_MAX_WEBP_SIDE = 16_383
_PNG_COMPRESSION = 3  # of 9: half the time of the default 6


def make(file: BinaryIO, task: Mapping[str, Any], limits: MediaLimits) -> tuple[dict[str, Any], bytes]:
    """Make what a task asks for of a file at its start; return facts about it and its content.

    Args:
        task: ``make`` is frame, strip, picture, piece, animation, last_frame, film or request; the other values are
            those of that function.

    Raises:
        MediaError: the file cannot be read, or what is made exceeds a limit.
    """
    values = {name: value for name, value in task.items() if name not in ("make", "path")}
    match task["make"]:
        case "frame":
            return {}, _frame(file, limits, **values)
        case "strip":
            return {}, _strip(file, limits, **values)
        case "picture":
            return {}, _picture(file, limits, **values)
        case "piece":
            return _piece(file, limits, **values)
        case "animation":
            return {}, _animation(file, limits, **values)
        case "last_frame":
            return {}, _last_frame(file, limits, **values)
        case "film":
            return _film(limits, **values)
        case "request":
            return {}, _request(file, limits)
    raise ValueError(f"nothing is known of {task['make']!r}")


def _frame(
    file: BinaryIO, limits: MediaLimits, *, kind: str, seconds: float | None, width: int, size: Sequence[int]
) -> bytes:
    """Draw a frame of a clip, or a picture, of this size at most `width` pixels wide as WebP."""
    if kind == "image":
        picture = _small(file, limits, Fraction(width, size[0]), size)
    else:
        picture = Image.fromarray(read_stills(file, [seconds or 0.0], fit=(width, 1), limits=limits)[0])
    return _webp(_scaled(picture, min(Fraction(width, picture.width), Fraction(1))))


def _strip(
    file: BinaryIO,
    limits: MediaLimits,
    *,
    kind: str,
    seconds: float,
    count: int,
    height: int,
    size: Sequence[int],
) -> bytes:
    """Draw `count` frames of a clip, evenly spread, side by side, at most `height` pixels high as WebP."""
    if kind == "image":
        frames = [np.asarray(_small(file, limits, Fraction(height, size[1]), size))] * count
    else:
        times = [Fraction(seconds) * (2 * number + 1) / (2 * count) for number in range(count)]
        frames = read_stills(file, times, fit=(1, height), limits=limits)
    first = Image.fromarray(frames[0])
    scale = min(Fraction(height, first.height), Fraction(_MAX_WEBP_SIDE // count, first.width), Fraction(1))
    cells = [_scaled(Image.fromarray(frame), scale) for frame in frames]
    strip = Image.new("RGB", (count * cells[0].width, cells[0].height))
    for number, cell in enumerate(cells):
        strip.paste(cell, (number * cell.width, 0))
    return _webp(strip)


def _small(file: BinaryIO, limits: MediaLimits, scale: Fraction, size: Sequence[int]) -> Image.Image:
    """Read a picture for a drawing of so much of its size, decoding no more of it than twice each side of that."""
    pixels = ceil(size[0] * size[1] * min(2 * scale, Fraction(1)) ** 2)
    return on_white(read_image(file, limits=replace(limits, max_pixels=min(pixels, limits.max_pixels))))


def _picture(
    file: BinaryIO, limits: MediaLimits, *, kind: str, seconds: float | None, box: Sequence[int] | None, sha256: str
) -> bytes:
    """Write a picture, or a frame of a clip, or a region of it, as PNG with the mark of its file."""
    xmp = _mark_of_part(file, sha256)
    if kind == "image":
        picture = read_image(file, limits=limits)
    else:
        picture = Image.fromarray(read_stills(file, [seconds or 0.0], limits=limits)[0])
    if box is not None:
        left, top, right, bottom = box
        picture = picture.crop((left, top, right, bottom))
    return _png(Image.fromarray(np.asarray(picture)), xmp)


def _png(picture: Image.Image, xmp: bytes) -> bytes:
    """Write a picture as PNG with an XMP packet, if it is not empty."""
    info = PngImagePlugin.PngInfo()
    if xmp:
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    target = io.BytesIO()
    picture.save(target, "PNG", pnginfo=info, compress_level=_PNG_COMPRESSION)
    return target.getvalue()


def _piece(
    file: BinaryIO,
    limits: MediaLimits,
    *,
    first: int,
    frames: int,
    fps: Sequence[int],
    box: Sequence[int] | None,
    sha256: str,
    max_bytes: int,
) -> tuple[dict[str, Any], bytes]:
    """Write a piece of a clip, or a region of it, as MP4 without loss, with the mark of its file."""
    xmp = _mark_of_part(file, sha256)
    region = None if box is None else (box[0], box[1], box[2], box[3])
    target = io.BytesIO()
    rate = Fraction(fps[0], fps[1])
    written = write_piece(
        file, target, first=first, frames=frames, fps=rate, box=region, xmp=xmp, max_bytes=max_bytes, limits=limits
    )
    return {"frames": written}, target.getvalue()


def _animation(file: BinaryIO, limits: MediaLimits, *, kind: Animation, fps: Sequence[int], longest_side: int) -> bytes:
    """Write a result as a GIF or a WebP with its own mark."""
    xmp = _own_mark(file, limits)
    target = io.BytesIO()
    rate = Fraction(fps[0], fps[1])
    write_animation(file, target, kind, fps=rate, longest_side=longest_side, xmp=xmp, limits=limits)
    return target.getvalue()


def _last_frame(file: BinaryIO, limits: MediaLimits, *, seconds: float) -> bytes:
    """Write the last frame of a result, which lasts so long, as PNG with its own mark."""
    xmp = _own_mark(file, limits)
    return _png(Image.fromarray(read_stills(file, [seconds], limits=limits)[0]), xmp)


def _film(
    limits: MediaLimits, *, paths: Sequence[str], sha256: Sequence[str], size: Sequence[int], fps: Sequence[int]
) -> tuple[dict[str, Any], bytes]:
    """Write results one after another as one MP4, whose mark names theirs."""
    target = io.BytesIO()
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb")) for path in paths]
        xmp = _mark_of_film(files, sha256)
        rate = Fraction(fps[0], fps[1])
        frames = write_film(files, target, size=(size[0], size[1]), fps=rate, xmp=xmp, limits=limits)
    return {"frames": frames}, target.getvalue()


def _mark_of_film(files: Sequence[BinaryIO], sha256: Sequence[str]) -> bytes:
    """Return the XMP packet of a film; empty if none of its videos has a mark. Leaves the files at their starts."""
    found = []
    for file in files:
        found.append(read_marks(file).mark)
        file.seek(0)
    marks = [mark for mark in found if mark is not None]
    if not marks:
        return b""
    is_generated = len(marks) == len(found) and all(mark.source_type == GENERATED for mark in marks)
    inputs = tuple(
        InputMark(mark.source_type, mark.system, mark.version, digest)
        for mark, digest in zip(found, sha256, strict=True)
        if mark is not None
    )
    first = marks[0]
    source_type = GENERATED if is_generated else COMPOSITE
    return write_packet(Mark(source_type, first.system, first.version, tool=first.tool, inputs=inputs))


def _own_mark(file: BinaryIO, limits: MediaLimits) -> bytes:
    """Return the XMP packet of a file, or nothing. Leaves it at its start."""
    xmp = read_xmp(file, limits=limits)
    file.seek(0)
    return xmp


def _request(file: BinaryIO, limits: MediaLimits) -> bytes:
    """Read the request that pusa has stored in a file, and the inputs beside it, as JSON."""
    stored = read_metadata(file, limits=limits) or {}
    if "pusa" not in stored or not isinstance(stored.get("request"), dict):
        raise MediaError(
            "the file holds no request of pusa: only videos that it made with metadata=full do", "no_request"
        )
    return json.dumps({"request": stored["request"], "inputs": stored.get("inputs") or {}}).encode()


def _mark_of_part(file: BinaryIO, sha256: str) -> bytes:
    """Return the XMP packet for a part of a file that was made with AI; empty for any other. Leaves it at its start."""
    try:
        mark = read_marks(file).as_input(sha256)
    except MediaError:  # that of its pixels says what is wrong
        mark = None
    file.seek(0)
    if mark is None or not mark.source_type:
        return b""
    return write_packet(Mark(mark.source_type, mark.system, mark.version, original_sha256=mark.sha256))


def _scaled(picture: Image.Image, scale: Fraction) -> Image.Image:
    if scale == 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _webp(picture: Image.Image) -> bytes:
    target = io.BytesIO()
    picture.save(target, "WEBP", quality=_QUALITY, method=2)
    return target.getvalue()
