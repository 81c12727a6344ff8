"""Convert between frames, latent frames and seconds of a clip.

Wan's causal VAE makes one latent frame of the first frame and one of every four after it, so 81 frames are latent
frames 0..20. Nothing here imports torch.
"""

import math
from typing import Literal, SupportsIndex

Index = int | Literal["last"]


def latent_frames(num_frames: int, factor: int = 4) -> int:
    """Count the latent frames of `num_frames` frames: 1 for the first frame and 1 for every `factor` after it."""
    return (num_frames - 1) // factor + 1


def frames_of(latents: int, factor: int = 4) -> int:
    """Count the frames that `latents` latent frames decode to."""
    return factor * (latents - 1) + 1


def nearest_of(value: int, multiple: int, offset: int = 0) -> int:
    """Round `value` to the nearest ``multiple * n + offset`` of at least 1; halves go up."""
    return max((value - offset + multiple // 2) // multiple * multiple, 0 if offset else multiple) + offset


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
            raise ValueError(
                f"seconds={seconds:g}: this video is {duration:g} s long ({num_frames} frames at {fps:g} fps)"
            )
    else:
        frame = 0 if frame_index is None else frame_index
    frame = _index_in("frame_index", frame, num_frames, "frames")
    return (frame - 1) // factor + 1  # 0 -> 0, 1..4 -> 1, 5..8 -> 2


def _index_in(name: str, index: Index, count: int, unit: str) -> int:
    if index == "last":
        return count - 1
    if isinstance(index, bool) or not isinstance(index, SupportsIndex):
        raise TypeError(f"{name}={index!r} is neither a whole number nor 'last'")
    if not -count <= index < count:
        raise ValueError(
            f"{name}={index}: this video has {count} {unit} (0..{count - 1}, or -{count}..-1 from the end)"
        )
    return int(index) % count
