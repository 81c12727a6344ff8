"""Leave latent frames that do not change out of most steps: they need their keys and values, but no queries.

A frame whose sigma stays (kept at 0, finished, or not begun yet in a wave) takes part in a step only by what the other
frames attend to. Its keys and values, stored from a step that computed it, serve the steps after it; its rows leave
self-attention's queries, cross-attention, the feed-forward and the head. They change a little as the other frames do,
so they are computed again now and then: docs/speed.md has the loss by `REFRESH_EVERY`. (SCOPE, arXiv 2604.02979, does
so in autoregressive models.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pusa.lora.sources import transformers_of

REFRESH_EVERY = 5
"""Steps between two that compute all frames, in the requests that do not ask for every frame at every step."""


@dataclass(frozen=True)
class StepFrames:
    """Hold the latent frames, in rising order, that a step computes, and those whose keys and values the next one uses.

    The frames it does not compute are the ones that the step before it has `kept`.
    """

    computed: tuple[int, ...]
    kept: tuple[int, ...]


class FrameSchedule:
    """Hold the latent frames that each step of a call computes; without steps, every step computes all."""

    def __init__(self, steps: Sequence[StepFrames] = ()) -> None:
        self.steps = tuple(steps)

    @classmethod
    def of(cls, moves: Tensor, refresh_every: int) -> "FrameSchedule":
        """Choose the frames to compute at each step: those that move, or have just stopped; all, now and then.

        All are computed at every step that is a multiple of `refresh_every`, and at the last one. A run that begins at
        such a step, from the latents reached there, goes on as one that was never interrupted.

        Args:
            moves: ``[N, F]`` bool on the CPU: the sigma of a frame changes in a step, in any sample; see
                `PusaFlowMatchEulerScheduler`.
            refresh_every: at least 1, which computes every frame at every step.

        Raises:
            ValueError: `refresh_every` is below 1.
        """
        if refresh_every < 1:
            raise ValueError(f"refresh_every={refresh_every} is below 1, which computes every frame at every step")
        rows, everything = moves.tolist(), tuple(range(moves.shape[1]))
        computed: list[tuple[int, ...]] = []
        for k, row in enumerate(rows):
            # A frame that has just stopped has a new value, and a new timestep, since it was computed.
            some = tuple(f for f in everything if row[f] or rows[k - 1][f])
            is_due = k % refresh_every == 0 or k == len(rows) - 1
            computed.append(everything if is_due or not some else some)
        kept = [tuple(f for f in everything if f not in later) for later in computed[1:]]
        steps = [StepFrames(*both) for both in zip(computed, [*kept, ()], strict=True)]
        return cls(steps if any(kept) else ())

    def at(self, step: int) -> StepFrames | None:
        """Return the frames of a step; None: every frame is computed, at every step."""
        return self.steps[step] if self.steps else None

    def can_resume_at(self, step: int) -> bool:
        """Tell if a run may begin anew at a step, or after the last one, and make the same video to the bit.

        A step that leaves out frames needs their keys and values from the step before it.
        """
        return not self.steps or step == 0 or not self.steps[step - 1].kept


def frame_obstacle(pipe: Any) -> str:
    """Return why every latent frame is computed at every step of a pipeline, whatever is asked; "" if nothing does."""
    return next((obstacle for model in transformers_of(pipe) if (obstacle := model.frame_obstacle)), "")


class FrameStore:
    """Hold the keys and values of latent frames from one step to the next, for one pass of the transformer.

    Attributes:
        computed: frames of the step that is running, in rising order.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Free the keys and values; the next step computes every frame."""
        self.computed: tuple[int, ...] = ()
        self._blocks: list[tuple[Tensor, Tensor]] = []  # of each block, rotated: [B, tokens of the frames, heads, d]
        self._frames: tuple[int, ...] = ()  # that they are of, in their order
        self._next_frames: tuple[int, ...] = ()
        self._last: tuple[str, int] | None = None  # expert and step

    @property
    def num_bytes(self) -> int:
        """Count the bytes of the keys and values."""
        return sum(tensor.nbytes for both in self._blocks for tensor in both)

    def begin(self, frames: StepFrames, expert: str, step: int, num_frames: int) -> bool:
        """Begin a step; return False if it computes every frame and stores nothing, so that it needs no store.

        A pass whose last step was not the one before this, or of the other expert, computes every frame.
        """
        is_next = self._last == (expert, step - 1)
        self._last = expert, step
        if is_next and sorted((*self._frames, *frames.computed)) == list(range(num_frames)):
            self.computed = frames.computed
        else:
            self.computed = tuple(range(num_frames))
        if len(self.computed) == num_frames:
            self._blocks, self._frames = [], ()
        if set(frames.kept) == set(self._frames):
            self._next_frames = self._frames
        else:
            own = [frame for frame in frames.kept if frame in self.computed]
            self._next_frames = *own, *(frame for frame in frames.kept if frame not in own)
        return bool(self._frames or frames.kept)

    def stored(self, block: int) -> tuple[Tensor, ...]:
        """Return the keys and values that the computed frames of a block attend to beside their own, if any."""
        return self._blocks[block] if self._frames else ()

    def keep(self, block: int, hidden_states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store what a block has computed for the next step; return its `hidden_states`, for the next block."""
        if self._next_frames and self._next_frames != self._frames:
            old = self.stored(block) or (None, None)
            self._blocks[block : block + 1] = [(self._selected(keys, old[0]), self._selected(values, old[1]))]
        return hidden_states

    def end(self) -> None:
        """End a step, after its last block."""
        self._frames = self._next_frames
        if not self._frames:
            self._blocks = []

    def _selected(self, new: Tensor, old: Tensor | None) -> Tensor:
        """Copy what is kept of the frames computed and of those stored: views would hold all that was computed."""
        own = [frame for frame in self._next_frames if frame in self.computed]
        pieces = [take(new, own, self.computed, dim=1)] if own else []
        if old is not None and len(own) < len(self._next_frames):
            pieces.append(take(old, self._next_frames[len(own) :], self._frames, dim=1))
        return torch.cat(pieces, dim=1)


def take(x: Tensor, frames: Sequence[int], of: Sequence[int], *, dim: int) -> Tensor:
    """Take frames of a tensor whose dimension `dim` holds equal numbers of rows of each of the frames `of`, in order.

    By slices, so that no index has to reach the device.
    """
    rows = x.shape[dim] // len(of)
    places = [of.index(frame) for frame in frames]
    starts = [n for n, place in enumerate(places) if n == 0 or place != places[n - 1] + 1]
    pieces = [
        x.narrow(dim, places[start] * rows, (end - start) * rows)
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def spread(x: Tensor, frames: Sequence[int], num_frames: int, *, dim: int) -> Tensor:
    """Put the rows of some frames in their places among `num_frames`; the other frames are 0."""
    rows = x.shape[dim] // len(frames)
    shape = list(x.shape)
    shape[dim] = num_frames * rows
    whole = x.new_zeros(shape)
    for place, frame in enumerate(frames):
        whole.narrow(dim, frame * rows, rows).copy_(x.narrow(dim, place * rows, rows))
    return whole
