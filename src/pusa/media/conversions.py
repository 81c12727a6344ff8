"""Write a video once more: as a GIF, as an animated WebP, or several one after another as one film."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from typing import BinaryIO, ClassVar, Literal

import numpy as np
from PIL import Image

from pusa.media.encoders import Encoder, GifEncoder, Mp4Encoder, Output, WebPEncoder
from pusa.media.reading import iter_video
from pusa.media.source import DEFAULT_LIMITS, MediaLimits, Source

Animation = Literal["gif", "webp"]
_ENCODERS: dict[Animation, type[Encoder]] = {"gif": GifEncoder, "webp": WebPEncoder}


class FilmEncoder(Mp4Encoder):
    """Encode an MP4 as `Mp4Encoder`, into an open file: its index is at the end."""

    muxing: ClassVar[dict[str, str]] = {}


def write_animation(
    source: Source,
    target: BinaryIO,
    kind: Animation,
    *,
    fps: Fraction,
    longest_side: int,
    xmp: bytes = b"",
    limits: MediaLimits = DEFAULT_LIMITS,
) -> int:
    """Write a video as a GIF or an animated WebP.

    Args:
        target: open for writing and seeking.
        fps: frames per second of the video.
        longest_side: pixels; a larger video is scaled down.
        xmp: a packet in UTF-8 for the file, or empty.

    Returns:
        The number of frames.

    Raises:
        MediaError: as `iter_video` does.
    """
    frames = iter_video(source, limits=limits)
    first = next(frames)
    height, width = first.shape[:2]
    scale = min(Fraction(1), Fraction(longest_side, max(width, height)))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    output = Output.to_file(target, *size, fps, xmp, lossless=False)
    return _encode(_ENCODERS[kind](output), (_scaled(frame, size) for frame in chain([first], frames)))


def write_film(
    sources: Sequence[Source],
    target: BinaryIO,
    *,
    size: tuple[int, int],
    fps: Fraction,
    xmp: bytes = b"",
    limits: MediaLimits = DEFAULT_LIMITS,
) -> int:
    """Write videos one after another as one MP4.

    Args:
        target: open for writing and seeking.
        size: width and height, even; a video of another size is scaled to fit, on black.
        fps: frames per second; of a video with another rate frames are repeated or left out.
        xmp: a packet in UTF-8 for the file, or empty.

    Returns:
        The number of frames.

    Raises:
        MediaError: as `iter_video` does.
    """
    frames = (_fitted(frame, size) for source in sources for frame in iter_video(source, fps=fps, limits=limits))
    return _encode(FilmEncoder(Output.to_file(target, *size, fps, xmp, lossless=False)), frames)


def _encode(encoder: Encoder, frames: Iterable[np.ndarray]) -> int:
    try:
        for frame in frames:
            encoder.write(np.ascontiguousarray(frame))
        encoder.close()
    except BaseException:
        encoder.abandon()
        raise
    return encoder.frames


def _scaled(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if (frame.shape[1], frame.shape[0]) == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def _fitted(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale a frame to fit a size, in the middle of black."""
    height, width = frame.shape[:2]
    if (width, height) == size:
        return frame
    scale = min(Fraction(size[0], width), Fraction(size[1], height))
    fitted = _scaled(frame, (max(1, round(width * scale)), max(1, round(height * scale))))
    whole = np.zeros((size[1], size[0], 3), np.uint8)
    top, left = (size[1] - fitted.shape[0]) // 2, (size[0] - fitted.shape[1]) // 2
    whole[top : top + fitted.shape[0], left : left + fitted.shape[1]] = fitted
    return whole
