"""Convert between frames, latent frames and seconds of a clip, and divide a long one into windows.

A causal VAE makes one latent frame of the first frame and one of every `factor` frames after it. Wan's factor is 4, so
that 81 frames are latent frames 0..20; Mochi's is 6, and with a VAE of pictures it is 1: every frame is a latent frame.
Nothing here imports torch.
"""

import math
from dataclasses import dataclass
from typing import Literal, SupportsIndex

from pusa.codes import CodedError

Index = int | Literal["last"]


def latent_frames(num_frames: int, factor: int = 4) -> int:
    """Count the latent frames of `num_frames` frames: 1 for the first frame and 1 for every `factor` after it."""
    return (num_frames - 1) // factor + 1


def frames_of(latents: int, factor: int = 4) -> int:
    """Count the frames that `latents` latent frames decode to."""
    return factor * (latents - 1) + 1


def length_rule(factor: int) -> str:
    """Write which numbers of frames a video can have: ``4n + 1`` for a factor of 4."""
    return f"{factor}n + 1" if factor > 1 else "1 or more"


def nearest_of(value: int, multiple: int, offset: int = 0) -> int:
    """Round `value` to the nearest ``multiple * n + offset`` of at least 1; halves go up."""
    return max((value - offset + multiple // 2) // multiple * multiple, 0 if offset else multiple) + offset


@dataclass(frozen=True)
class Span:
    """Describe a window of a long video, in latent frames; its first `overlap` are the last of the window before."""

    start: int
    length: int
    overlap: int


def spans(total: int, window: int, overlap: int) -> list[Span]:
    """Cover `total` latent frames by windows of `window` that share `overlap`; the last may share more, to be full.

    Raises:
        ValueError: `overlap` is not in 1..window - 1.
    """
    if not 0 < overlap < window:
        raise ValueError(
            f"overlap={overlap} is outside 1..{window - 1}: a window of {window} must keep some and make some"
        )
    windows = [Span(0, min(window, total), 0)]
    while (end := windows[-1].start + windows[-1].length) < total:
        start = min(end - overlap, total - window)
        windows.append(Span(start, window, end - start))
    return windows


def latent_index_of(
    *,
    num_frames: int,
    latent_index: Index | None = None,
    frame_index: Index | None = None,
    seconds: float | Literal["last"] | None = None,
    fps: float = 16.0,
    factor: int = 4,
) -> int:
    """Return the latent frame that holds a position of a clip of `num_frames` frames; 0 without a position.

    Negative positions count from the end.

    Args:
        factor: frames per latent frame after the first.

    Raises:
        TypeError: the position is neither a number nor ``last``.
        ValueError: the position is outside the clip; the message has its value and the limits.
    """
    if latent_index is not None:
        return _index_in("latent_index", latent_index, latent_frames(num_frames, factor), "latent frames")
    if seconds is not None:
        if seconds != "last" and (not isinstance(seconds, int | float) or not math.isfinite(seconds)):
            raise TypeError(f"seconds={seconds!r} is neither a number nor 'last'")
        frame = seconds if seconds == "last" else round(seconds * fps)
        if seconds != "last" and seconds < 0:
            frame = min(frame, -1)  # the shortest time before the end is the last frame
        duration = num_frames / fps
        if frame != "last" and not -num_frames <= frame < num_frames:
            raise CodedError(
                "position_outside",
                f"seconds={seconds:g}: this video is {duration:g} s long ({num_frames} frames at {fps:g} fps)",
                value=f"{seconds:g}s",
                unit="second",
                count=num_frames,
                last=f"{(num_frames - 1) / fps:.3g}s",
            )
    else:
        frame = 0 if frame_index is None else frame_index
    frame = _index_in("frame_index", frame, num_frames, "frames")
    return (frame - 1) // factor + 1  # with a factor of 4: 0 -> 0, 1..4 -> 1, 5..8 -> 2


def _index_in(name: str, index: Index, count: int, unit: str) -> int:
    if index == "last":
        return count - 1
    if isinstance(index, bool) or not isinstance(index, SupportsIndex):
        raise TypeError(f"{name}={index!r} is neither a whole number nor 'last'")
    if not -count <= index < count:
        raise CodedError(
            "position_outside",
            f"{name}={index}: this video has {count} {unit} (0..{count - 1}, or -{count}..-1 from the end)",
            value=f"{index}f" if name == "frame_index" else str(index),
            unit="frame" if name == "frame_index" else "latent",
            count=count,
            last=str(count - 1),
        )
    return int(index) % count
