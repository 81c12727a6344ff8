"""Read 5 seconds of a video as Physics-IQ compares them: a quarter of the real video's size, with motion masks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from pusa import media
from pusa.evaluation.physics_iq.dataset import SECONDS
from pusa.evaluation.physics_iq.masks import motion_masks, resize

_SHRINK = 4  # of the real video's sides
_SET = 127  # grey levels of a mask above which a pixel moves


@dataclass(frozen=True)
class Clip:
    """Hold 5 seconds of a video.

    Attributes:
        frames: uint8 ``[F, h, w, 3]``.
        masks: bool ``[F, h, w]``, True where something moves.
    """

    frames: np.ndarray
    masks: np.ndarray


def scored_size(real: Path) -> tuple[int, int]:
    """Return width and height of the frames that are compared: a quarter of a real video's. Raises MediaError."""
    info = media.probe_video(real)
    return max(info.width // _SHRINK, 1), max(info.height // _SHRINK, 1)


def read_clip(video: Path, masks: Path | None, *, fps: int, size: tuple[int, int]) -> Clip:
    """Read the first 5 seconds of a video.

    A video at another rate is brought to `fps` as the benchmark does it, by blending neighbouring frames.

    Args:
        masks: a video of its motion masks at `fps`; None computes them, at the video's full size.
        size: width and height of the result.

    Raises:
        MediaError: a file cannot be read.
        ValueError: a video is shorter than 5 seconds.
    """
    wanted = SECONDS * fps
    frames = np.empty((wanted, size[1], size[0], 3), np.uint8)
    moving = np.empty((wanted, size[1], size[0]), bool)
    for index, frame in enumerate(_exactly(_at_rate(video, fps), wanted, video)):
        frames[index] = resize(frame, *size)
    if masks is None:
        pictures = (mask.astype(np.uint8) * 255 for mask in motion_masks(_at_rate(video, fps)))
    else:
        pictures = (frame[..., 0] for frame in media.iter_video(masks, max_frames=wanted))
    for index, picture in enumerate(_exactly(pictures, wanted, masks or video)):
        moving[index] = resize(picture, *size) > _SET
    return Clip(frames, moving)


def _exactly(frames: Iterable[np.ndarray], wanted: int, video: Path) -> Iterator[np.ndarray]:
    count = 0
    for frame in islice(frames, wanted):
        yield frame
        count += 1
    if count < wanted:
        raise ValueError(f"{video} has {count} frames, and {wanted} are compared: it must last {SECONDS} s")


def _at_rate(video: Path, fps: int) -> Iterator[np.ndarray]:
    """Yield the frames of the first 5 seconds at `fps`, uint8 ``[H, W, 3]``."""
    stored = media.probe_video(video).fps
    count = round(stored * SECONDS)
    frames = _exactly(media.iter_video(video), count, video)
    return frames if round(stored, 3) == fps else blended(frames, count, SECONDS * fps)


def blended(frames: Iterable[np.ndarray], count: int, wanted: int) -> Iterator[np.ndarray]:
    """Spread `wanted` frames evenly over `count`, the first on the first and the last on the last.

    One that falls between two is their mean, weighted by its distance to them.
    """
    source = iter(frames)
    index, first = 0, next(source)
    second = next(source, first)
    for number in range(wanted):
        place = number * (count - 1) / max(wanted - 1, 1)
        while index < int(place):
            index, first, second = index + 1, second, next(source, second)
        weight = np.float32(place - int(place))
        yield (first * (1 - weight) + second * weight).astype(np.uint8) if weight else first
