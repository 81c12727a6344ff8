"""Videos longer than the model's window: chains of extensions in latent space, and a wave that never ends.

Both keep what they continue as latents. Decoding and encoding again at every joint would add the VAE's loss each time,
and colours drift with it (users of every extension tool report this; Wan2.2 issue 172, VACE issue 44). Memory does
not depend on the length: pieces are handed out as they are finished.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pusa.conditions import PusaCondition, places_of
from pusa.positions import frames_of
from pusa.scheduler import shifted

if TYPE_CHECKING:
    from pusa.pipeline import PusaPipeline


@dataclass(frozen=True)
class Span:
    """One window of a long video, in latent frames: where it starts, and how many of its frames exist already."""

    start: int
    length: int
    overlap: int


def spans(total: int, window: int, overlap: int) -> list[Span]:
    """Cover `total` latent frames by windows of `window` that share `overlap`; the last shares more, not to be short.

    Raises:
        ValueError: windows that never advance.
    """
    if not 0 < overlap < window:
        raise ValueError(
            f"overlap={overlap} is outside 1..{window - 1}: a window of {window} must keep some and make some"
        )
    covered = [Span(0, min(window, total), 0)]
    while (end := covered[-1].start + covered[-1].length) < total:
        start = min(end - overlap, total - window)
        covered.append(Span(start, window, end - start))
    return covered


def chain(
    covered: Sequence[Span],
    denoise: Callable[[Span, list[PusaCondition]], Tensor],
    conditions: Sequence[PusaCondition] = (),
    *,
    fps: float = 16.0,
) -> Iterator[Tensor]:
    """Each window continues the latents of the one before it.

    Args:
        covered: from `spans`.
        denoise: makes a window, ``[1, C, length, h, w]``, from what is known of it.
        conditions: with places in the whole video; each goes to the window that makes all of its places.
        fps: frames per second, for places in seconds.

    Yields:
        New latents ``[1, C, n, h, w]``, to be decoded in one stream (`pusa.models.vae.decode_chunks`).

    Raises:
        ValueError: at once, before any window is made: a condition whose places no single window makes.
    """
    owned: dict[Span, list[PusaCondition]] = {span: [] for span in covered}
    num_frames = frames_of(covered[-1].start + covered[-1].length)
    for condition in conditions:
        places = places_of(condition, num_frames=num_frames, fps=fps)
        span = _owner(covered, places)
        if span.start > 0:
            if len(places) > 1 and places != list(range(places[0], places[0] + len(places))):
                raise ValueError("a video at places of its own must lie within the first window of a long video")
            condition = replace(condition, latent_index=places[0] - span.start, frame_index=None, seconds=None)
        owned[span].append(condition)
    return _chained(owned, denoise)


def _chained(
    owned: dict[Span, list[PusaCondition]], denoise: Callable[[Span, list[PusaCondition]], Tensor]
) -> Iterator[Tensor]:
    window = None
    for span, known in owned.items():
        if window is not None:
            known = [*known, PusaCondition(latents=window[0, :, window.shape[2] - span.overlap :])]
        window = denoise(span, known)
        yield window[:, :, span.overlap :]


def _owner(covered: Sequence[Span], places: list[int]) -> Span:
    """The window that makes all of these places."""
    for span in covered:
        if all(span.start + span.overlap <= place < span.start + span.length for place in places):
            return span
    made = ", ".join(f"{s.start + s.overlap}..{s.start + s.length - 1}" for s in covered)
    raise ValueError(
        f"latent frames {min(places)}..{max(places)} are not made by one window of this video ({made}): "
        "split or shorten the condition, or give a larger window"
    )


def rolling_table(window: int, steps_per_frame: int, *, history: int = 0, shift: float = 5.0) -> Tensor:
    """One turn of a wave that never ends: ``[steps_per_frame + 1, history + window]``.

    Behind `history` clean frames, noise rises with the frame from nearly clean to pure noise. In a turn every column
    walks down to where the one before it began, so the first frame of the wave becomes clean, the window can move on by
    one and a frame of pure noise joins at its end. (Rolling Diffusion Models, arXiv 2402.09470; FIFO-Diffusion,
    arXiv 2405.11473.)
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
    """Endless video: each turn finishes one latent frame and takes in a new one of pure noise.

    Args:
        advance: denoises latents ``[B, C, F, h, w]`` down a table ``[N + 1, F]`` from its first row to its last.
        first: the clean beginning, ``[B, C, n, h, w]`` with n above `window`, such as a finished clip: its last
            `window` frames are noised again to start the wave, those before them are the wave's history.
        noise: a new frame ``[B, C, 1, h, w]`` of pure noise.
        window: latent frames in the wave; history and window together are what the model sees at once.
        steps_per_frame: steps in a turn: a frame takes ``window * steps_per_frame`` in all.

    Yields:
        Finished latents ``[B, C, 1, h, w]``, from the frame after `first[:, :, :-window]` on, for ever.
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
    """`roll`'s `advance` by a pipeline; `call` are the arguments of its call (prompt, size, guidance, ...)."""
    factor = pipe.vae_scale_factor_temporal
    if "prompt" in call:  # encoded once, not at every turn
        positive, negative = pipe.encode_prompt(
            call.pop("prompt"),
            call.pop("negative_prompt", None),
            max_sequence_length=call.get("max_sequence_length", pipe.defaults.max_sequence_length),
        )
        call |= {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def advance(latents: Tensor, table: Tensor) -> Tensor:
        # The latents are at the table's first row already: they are handed over as reached after one step that stays.
        return pipe(
            **call,
            num_frames=frames_of(latents.shape[2], factor),
            latents=latents,
            frame_sigmas=torch.cat([table[:1], table]),
            start_step=1,
            output_type="latent",
        ).frames

    return advance
