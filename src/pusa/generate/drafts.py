"""Condition every latent frame of a final on its draft, where nothing else is given.

All columns of the sigma table are scaled by the draft's noise multiplier, so that denoising starts from the enlarged
draft with noise at that level: the final keeps the draft's layout and motion, and has the model's detail.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pusa import media
from pusa.conditions import PusaCondition, latent_indices_of
from pusa.generate.inputs import Input
from pusa.positions import Span, frames_of
from pusa.request import ResolvedRequest


@dataclass(frozen=True)
class Draft:
    """Hold the frames of a draft that its final makes anew, uint8 ``[n, H, W, 3]``, and their noise multiplier."""

    frames: np.ndarray
    noise: float


def read(source: Input, request: ResolvedRequest) -> Draft:
    """Read the frames of a draft that a final's windows show: of an extension those from its overlap on.

    Raises:
        MediaError: the file cannot be read. ValueError: it has another number of frames than its final.
    """
    frames = media.read_video(source.source, fps=request.fps, last_frames=request.frames)
    if len(frames) < request.frames:
        raise ValueError(
            f"{source.condition.file} has {len(frames)} frames at {request.fps:g} fps, its final {request.frames}: "
            "a final has the frames of its draft"
        )
    return Draft(frames, source.condition.noise[0])


def follow(
    draft: Draft | None, conditions: Sequence[PusaCondition], total: int, fps: float, factor: int
) -> Callable[[Span], list[PusaCondition]]:
    """Return a function that conditions a window of a video of `total` latent frames on the draft.

    The frames of `conditions`, and those that a window takes over from the one before it, stay theirs.

    Args:
        factor: frames of a latent frame after the first.
    """
    if draft is None:
        return lambda span: []
    indices_of = partial(latent_indices_of, num_frames=frames_of(total, factor), fps=fps, factor=factor)
    given = {index for condition in conditions for index in indices_of(condition)}

    def condition(span: Span) -> list[PusaCondition]:
        free = [index for index in range(span.overlap, span.length) if span.start + index not in given]
        if not free:
            return []
        # The first latent frame of a window is one frame: the last of those that it stands for in the whole video.
        first = frames_of(span.start + 1, factor) - 1
        video = draft.frames[first : first + frames_of(span.length, factor)]
        return [PusaCondition(video=video, latent_index=free, noise_multiplier=draft.noise, fit="stretch")]

    return condition
