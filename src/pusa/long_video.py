"""Denoise videos longer than the model's window: chains of windows in latent space, and an endless rolling wave.

Both continue from latents. Decoding and encoding again at every joint would add the VAE's loss each time, and colours
drift with it (users of every extension tool report this; Wan2.2 issue 172, VACE issue 44). Both yield latents as they
finish them, so memory does not depend on the length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pusa.conditions import PusaCondition, latent_indices_of
from pusa.positions import Span, frames_of, spans
from pusa.scheduler import shifted

if TYPE_CHECKING:
    from pusa.pipeline import PusaPipeline

__all__ = ["Span", "advance_by", "chain", "roll", "rolling_table", "spans"]


def chain(
    windows: Sequence[Span],
    denoise: Callable[[Span, list[PusaCondition]], Tensor],
    conditions: Sequence[PusaCondition] = (),
    *,
    fps: float = 16.0,
    factor: int = 4,
) -> Iterator[Tensor]:
    """Denoise windows one after another, each from the last latents of the one before it.

    Args:
        windows: from `spans`.
        denoise: returns the latents ``[1, C, length, h, w]`` of a window with these conditions.
        conditions: positions count in the whole video; each goes to the window that makes all of its latent frames.
        fps: frames per second, for positions in seconds.
        factor: frames of a latent frame after the first; `pipe.vae_scale_factor_temporal`.

    Yields:
        New latents ``[1, C, n, h, w]``, for one call of `pusa.models.vae.decode_chunks`.

    Raises:
        ValueError: no single window makes all latent frames of a condition; raised before the first window.
    """
    conditions_of: dict[Span, list[PusaCondition]] = {span: [] for span in windows}
    num_frames = frames_of(windows[-1].start + windows[-1].length, factor)
    for condition in conditions:
        indices = latent_indices_of(condition, num_frames=num_frames, fps=fps, factor=factor)
        span = _window_of(windows, indices)
        if span.start > 0:
            if len(indices) > 1 and indices != list(range(indices[0], indices[0] + len(indices))):
                raise ValueError("a video at places of its own must lie within the first window of a long video")
            condition = replace(condition, latent_index=indices[0] - span.start, frame_index=None, seconds=None)
        conditions_of[span].append(condition)
    return _chain(conditions_of, denoise)


def _chain(
    conditions_of: dict[Span, list[PusaCondition]], denoise: Callable[[Span, list[PusaCondition]], Tensor]
) -> Iterator[Tensor]:
    window = None
    for span, conditions in conditions_of.items():
        if window is not None:
            conditions = [*conditions, PusaCondition(latents=window[0, :, window.shape[2] - span.overlap :])]
        window = denoise(span, conditions)
        yield window[:, :, span.overlap :]


def _window_of(windows: Sequence[Span], indices: list[int]) -> Span:
    """Find the window that makes all of these latent frames."""
    for span in windows:
        if all(span.start + span.overlap <= index < span.start + span.length for index in indices):
            return span
    made = ", ".join(f"{s.start + s.overlap}..{s.start + s.length - 1}" for s in windows)
    raise ValueError(
        f"latent frames {min(indices)}..{max(indices)} are not made by one window of this video ({made}): "
        "split or shorten the condition, or give a larger window"
    )


def rolling_table(window: int, steps_per_frame: int, *, history: int = 0, shift: float = 5.0) -> Tensor:
    """Build the sigma table of one turn of an endless wave: ``[steps_per_frame + 1, history + window]``.

    After `history` clean frames, sigma rises over the window from nearly 0 to 1. In a turn every column goes down to
    the start of the column before it: the first frame of the window becomes clean, and the window moves on by one, to
    a frame of pure noise. (Rolling Diffusion Models, arXiv 2402.09470; FIFO-Diffusion, arXiv 2405.11473.)
    """
    steps = window * steps_per_frame
    rows = torch.arange(steps_per_frame + 1).unsqueeze(1)
    level = (torch.arange(1, window + 1) * steps_per_frame - rows) / steps  # [rows, window], from (f + 1) / window down
    return torch.cat([torch.zeros(len(rows), history), shifted(level, shift)], dim=1)


def roll(
    advance: Callable[[Tensor, Tensor], Tensor],
    first: Tensor,
    noise: Callable[[], Tensor],
    *,
    window: int,
    steps_per_frame: int,
    shift: float = 5.0,
) -> Iterator[Tensor]:
    """Denoise an endless video: each turn finishes one latent frame and appends one of pure noise.

    Args:
        advance: denoises latents ``[B, C, F, h, w]`` down a table ``[N + 1, F]`` from its first row to its last.
        first: the clean beginning, ``[B, C, n, h, w]`` with n above `window`, such as a finished clip: its last
            `window` frames get noise again to start the wave, those before them are its history.
        noise: returns a new frame ``[B, C, 1, h, w]`` of pure noise.
        window: latent frames in the wave; the model denoises history and window together.
        steps_per_frame: steps in a turn; a frame takes ``window * steps_per_frame`` in all.

    Yields:
        Finished latents ``[B, C, 1, h, w]``, from the frame after `first[:, :, :-window]` on, without end.
    """
    history = first.shape[2] - window
    if history < 1 or window < 1:
        raise ValueError(
            f"window={window} leaves no history in {first.shape[2]} latent frames: give 1..{first.shape[2] - 1}"
        )
    table = rolling_table(window, steps_per_frame, history=history, shift=shift)
    start = table[0].view(1, 1, -1, 1, 1).to(first)
    fresh = torch.cat([noise() for _ in range(first.shape[2])], dim=2)
    latents = (1 - start) * first + start * fresh
    while True:
        latents = advance(latents, table)
        yield latents[:, :, history : history + 1]
        latents = torch.cat([latents[:, :, 1:], noise()], dim=2)


def advance_by(pipe: "PusaPipeline", **call: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Make the `advance` of `roll` from a pipeline and the arguments of its call (prompt, size, guidance, ...)."""
    factor = pipe.vae_scale_factor_temporal
    if "prompt" in call:  # encode it once, not at every turn
        positive, negative = pipe.encode_prompt(
            call.pop("prompt"),
            call.pop("negative_prompt", None),
            max_sequence_length=call.get("max_sequence_length", pipe.defaults.max_sequence_length),
        )
        call |= {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def advance(latents: Tensor, table: Tensor) -> Tensor:
        # The latents are at the table's first row already: resume after a first step that changes nothing.
        return pipe(
            **call,
            num_frames=frames_of(latents.shape[2], factor),
            latents=latents,
            frame_sigmas=torch.cat([table[:1], table]),
            start_step=1,
            output_type="latent",
        ).frames

    return advance
