"""Read single frames of videos by their times, and write a piece of a video without loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any, BinaryIO

import numpy as np

from pusa.media.decoding import Decoder, open_video
from pusa.media.encoders import LosslessEncoder, Output
from pusa.media.source import DEFAULT_LIMITS, MediaError, MediaLimits, Source

_WORTH_SEEKING_SECONDS = 1.0  # of video that would be decoded for nothing
_GROWTH = 3.0  # of that for a file whose key frames are further apart


def read_stills(
    source: Source,
    seconds: Sequence[float | Fraction],
    *,
    fit: tuple[int, int] | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> list[np.ndarray]:
    """Read the frames shown at these times, which ascend, as uint8 [H, W, 3] each.

    A time before the first frame gives the first, one after the end the last. `fit` and errors: see `iter_video`.
    """
    with open_video(source, limits) as decoder:
        return [decoder.rgb(frame, fit) for frame in _shown_at(decoder, (Fraction(time) for time in seconds))]


def write_piece(
    source: Source,
    target: BinaryIO,
    *,
    first: int,
    frames: int,
    fps: Fraction,
    box: tuple[int, int, int, int] | None = None,
    xmp: bytes = b"",
    max_bytes: int,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> int:
    """Write a piece of a video as an MP4 that keeps every pixel (H.264 in RGB, without sound).

    Args:
        target: open for writing and seeking.
        first, frames: where the piece begins and how long it is, in frames at `fps`.
        box: the region to keep: left, top, right and bottom in pixels; None keeps all.
        xmp: a packet in UTF-8 for the file, or empty.
        max_bytes: limit for the file.

    Returns:
        The number of frames written: fewer where the video ends before.

    Raises:
        MediaError: as `iter_video` does, and for more than `max_bytes`.
    """
    times = ((Fraction(2 * number + 1, 2) / fps) for number in range(first, first + frames))
    with open_video(source, limits) as decoder:
        shown = _shown_at(decoder, times, ends=True)
        pixels = (_cut_out(decoder.rgb(frame, None), box) for frame in shown)
        start = next(pixels, None)
        if start is None:
            raise MediaError(
                f"{decoder.media.name}: ends before the piece begins; begin it earlier",
                "part_outside",
                name=decoder.media.name,
                seconds=decoder.info.seconds,
            )
        output = Output.to_file(target, start.shape[1], start.shape[0], fps, xmp)
        encoder = LosslessEncoder(output)
        try:
            for picture in chain([start], pixels):
                encoder.write(np.ascontiguousarray(picture))
                if target.tell() > max_bytes:
                    raise MediaError(
                        f"{decoder.media.name}: the piece takes more than {max_bytes / 2**20:.4g} MiB without loss; "
                        "take a shorter one, or a smaller region",
                        "part_too_large",
                        name=decoder.media.name,
                        limit=max_bytes / 2**20,
                    )
            encoder.close()
        except BaseException:
            encoder.abandon()
            raise
    return encoder.frames


def _cut_out(pixels: np.ndarray, box: tuple[int, int, int, int] | None) -> np.ndarray:
    if box is None:
        return pixels
    left, top, right, bottom = box
    return pixels[top:bottom, left:right]


def _shown_at(decoder: Decoder, times: Iterable[Fraction], *, ends: bool = False) -> Iterator[Any]:
    """Yield the frame shown at each of some ascending times, not converted yet.

    Args:
        ends: stop at a time after the end, instead of repeating the last frame.
    """
    frames = decoder.frames()
    shown, following = next(frames, None), next(frames, None)
    worth = _WORTH_SEEKING_SECONDS
    for time in times:
        if following is not None and time - following[0] > worth and decoder.seek(time):
            reached = following[0]
            frames = decoder.frames()
            shown, following = next(frames, None), next(frames, None)
            worth *= _GROWTH if shown is not None and shown[0] <= reached else 1
        while following is not None and following[0] <= time:
            shown, following = following, next(frames, None)
        if shown is None or (ends and following is None and time > decoder.end_seconds):
            return
        yield shown[1]
