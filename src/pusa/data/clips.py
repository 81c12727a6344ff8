"""Probe a media file, choose the clips to cut from it and decode their frames.

This module must not import torch: it runs in worker processes, which start often and should be small.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, log
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pusa.media import MediaLimits, iter_video, probe_image, probe_video, read_image
from pusa.media.pictures import on_white
from pusa.media.source import open_source

LIMITS = MediaLimits(
    max_bytes=16 * 2**30, max_frames=1_000_000, max_seconds=4 * 3600.0, max_decode_seconds=3600.0
)  # long videos are cut into clips; only frames of the clips being decoded are held

Content = Path | bytes
Size = tuple[int, int]


@dataclass(frozen=True)
class Media:
    """Describe a media file; width and height as displayed. A picture has neither fps nor seconds."""

    sha256: str
    kind: Literal["image", "video"]
    width: int
    height: int
    fps: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Scan:
    """Ask a worker to probe a file; `index` is the caller's number of it."""

    index: int
    content: Content


@dataclass(frozen=True)
class Cut:
    """Ask a worker to decode clips from one file, all of `frames` frames and `size` (width, height).

    `starts` are frame numbers at `fps`, in order; clips may overlap.
    """

    index: int
    content: Content
    kind: Literal["image", "video"]
    size: Size
    frames: int
    fps: float
    starts: tuple[int, ...]


@dataclass(frozen=True)
class DecodedClip:
    """Hold the pixels of one clip, uint8 [F, H, W, 3], and its first frame number."""

    start: int
    pixels: np.ndarray


def work(task: Scan | Cut) -> Iterator[Media | DecodedClip]:
    """Run a task for `Workers`: yield one `Media` for a `Scan`, a `DecodedClip` for each start of a `Cut`.

    Raises:
        MediaError, FileNotFoundError: the file cannot be read, or ends early, after its complete clips.
    """
    if isinstance(task, Scan):
        yield scan(task.content)
    else:
        yield from cut(task)


def scan(content: Content) -> Media:
    """Hash a file and decode its first frame. Raises as `pusa.media.read_image` and `probe_video` do."""
    with open_source(content, limits=LIMITS, what="file") as media:
        holds = media.kind.holds
        sha256 = hashlib.file_digest(media.file, "sha256").hexdigest()  # type: ignore[arg-type]
    if holds == "both":  # animated or not
        holds = "video" if probe_video(content, limits=LIMITS).frames > 1 else "picture"
    if holds == "picture":
        picture = probe_image(content, limits=LIMITS)
        width, height = picture.width, picture.height
        return Media(sha256, "image", width, height)
    info = probe_video(content, limits=LIMITS)
    return Media(sha256, "video", info.width, info.height, info.fps, info.seconds)


def frames_at(seconds: float, fps: float) -> int:
    """Count the frames that `pusa.media.iter_video` yields of a video at a rate; see there about its end."""
    return max(1, ceil(seconds * fps - 0.1))


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Choose the size that needs the least cropping and enlarging, each as a logarithm; of equals the largest."""

    def cost(size: Size) -> tuple[float, int]:
        cutting = abs(log(width / height) - log(size[0] / size[1]))
        enlarging = max(0.0, log(max(size[0] / width, size[1] / height)))
        return round(cutting + enlarging, 6), -size[0] * size[1]

    return min(sizes, key=cost)


def clip_starts(
    available: int, frames: int, fps: float, *, clips: int | None, stride_seconds: float | None
) -> list[int]:
    """Return the first frames of clips of `frames` frames in a video of `available` frames.

    Args:
        clips: at most so many; None: all that fit.
        stride_seconds: from one start to the next; None: clips follow each other.
    """
    stride = frames if stride_seconds is None else max(1, round(stride_seconds * fps))
    return list(range(0, available - frames + 1, stride))[:clips]


def cut(task: Cut) -> Iterator[DecodedClip]:
    """Decode the clips of a task in one pass. Raises as `work` does."""
    if task.kind == "image":
        picture = on_white(read_image(task.content, limits=LIMITS))
        yield DecodedClip(0, _cover(np.asarray(picture), task.size)[None])
        return
    width, height = task.size
    first = task.starts[0]
    # An exact fraction, so that a clip is the same whether the pass begins with it or before it.
    start: Any = Fraction(first) / Fraction(task.fps)
    waiting = list(task.starts)
    filling: dict[int, np.ndarray] = {}  # start -> [F, H, W, 3]
    number = first
    for number, frame in enumerate(
        iter_video(task.content, fps=task.fps, start_seconds=start, fit=task.size, limits=LIMITS), start=first
    ):
        if waiting and waiting[0] == number:
            filling[waiting.pop(0)] = np.empty((task.frames, height, width, 3), np.uint8)
        pixels = _cover(frame, task.size) if filling else frame
        for begin in list(filling):
            filling[begin][number - begin] = pixels
            if number - begin == task.frames - 1:
                yield DecodedClip(begin, filling.pop(begin))
        if not filling and not waiting:
            return
    raise ValueError(
        f"ends after {number + 1} frames at {task.fps:g} fps, fewer than its header says: "
        f"{len(filling) + len(waiting)} clips are not whole"
    )


def _cover(frame: np.ndarray, size: Size) -> np.ndarray:
    """Scale a frame to cover `size` (width, height) and crop its middle: uint8 [H, W, 3]."""
    width, height = size
    scale = max(width / frame.shape[1], height / frame.shape[0])
    scaled = max(width, round(frame.shape[1] * scale)), max(height, round(frame.shape[0] * scale))
    if scaled != (frame.shape[1], frame.shape[0]):
        frame = np.asarray(Image.fromarray(frame).resize(scaled, Image.Resampling.LANCZOS))
    top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    return frame[top : top + height, left : left + width]
