"""Choose the clips and draw the noise of every training step, ahead of the model, in threads.

A step has a number of slots, its clips over all processes. The content of a slot (clip, noise levels, noise, whether
the caption is dropped) follows from the seed, the step and the slot alone. So no random state is lost, a run resumes
exactly where it stopped, and one process with four passes sees the same clips as four processes with one pass each.
"""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pusa.models.bases import WAN, Base
from pusa.training.config import TrainConfig
from pusa.training.objective import NoiseRange, draw_sigmas

Shape = tuple[int, int, int, int]  # of latents: C, F, h, w

_BLOCK_STEPS = 1024


class Data(Protocol):
    """Describe what training reads of a dataset, such as a `pusa.data.dataset.LatentDataset`."""

    @property
    def buckets(self) -> Mapping[Shape, Sequence[int]]: ...
    @property
    def empty_embeds(self) -> Tensor: ...
    @property
    def max_sequence_length(self) -> int: ...
    @property
    def hash(self) -> str: ...
    def __len__(self) -> int: ...
    def latents(self, index: int) -> Tensor: ...
    def embeds(self, index: int) -> Tensor: ...
    def split(self, held_out_share: float, seed: int = 0) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Batch:
    """Hold clips of one shape for one pass.

    Attributes:
        latents, noise: fp32 ``[B, C, F, h, w]``.
        sigmas: fp32 ``[B, F]``.
        embeds: fp32 ``[B, L, D]``, zeros behind the text.
        counted: how many of the clips count; the rest only fill up the batch.
    """

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    embeds: Tensor
    counted: int

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = (self.latents, self.noise, self.sigmas, self.embeds)
        latents, noise, sigmas, embeds = map(change, tensors)
        return Batch(latents, noise, sigmas, embeds, self.counted)


@dataclass(frozen=True)
class StepPlan:
    """List the clips of one step, slot by slot over all processes and passes, cut to `frames` latent frames."""

    step: int
    frames: int
    clips_per_pass: int
    clips: tuple[int, ...]

    def slots(self, data_rank: int, data_parallel: int, accumulated: int) -> range:
        """Return the slots of one process in its pass number `accumulated`.

        Slots are numbered by pass, then by process, so that the order of clips does not depend on how many processes
        there are.
        """
        start = (accumulated * data_parallel + data_rank) * self.clips_per_pass
        return range(start, start + self.clips_per_pass)


class BatchPlan:
    """Choose the clips of every step.

    A step draws one bucket (latent shape) in proportion to its clips and continues where the last step of that bucket
    stopped; after each pass over the bucket its clips are shuffled anew. So all clips are seen equally often.

    Args:
        buckets: latent shape -> clips.
        data_parallel: processes with clips of their own.
    """

    def __init__(self, buckets: Mapping[Shape, Sequence[int]], config: TrainConfig, data_parallel: int) -> None:
        if not any(buckets.values()):
            raise ValueError("the dataset has no clip to train on")
        self.config = config
        self.shapes = sorted(shape for shape, clips in buckets.items() if clips)
        self.clips = [list(buckets[shape]) for shape in self.shapes]
        self.data_parallel = data_parallel
        self.accumulation = config.accumulation(data_parallel)
        sizes = np.array([len(clips) for clips in self.clips], dtype=float)
        self._shares = sizes / sizes.sum()
        self._block: list[tuple[int, int, int]] = []  # (bucket, latent frames, first place in the bucket's stream)
        self._block_index = -1
        self._places = [0] * len(self.clips)  # of each bucket's stream, at the end of the block
        self._lock = threading.Lock()

    def step(self, step: int) -> StepPlan:
        with self._lock:
            index = step // _BLOCK_STEPS
            if index < self._block_index:
                self._block_index, self._places = -1, [0] * len(self.clips)
            while self._block_index < index:
                self._next_block()
            bucket, frames, place = self._block[step % _BLOCK_STEPS]
        per_pass = self.config.clips_per_pass(frames)
        slots = self._slots(frames)
        return StepPlan(step, frames, per_pass, tuple(self._clip(bucket, place + slot) for slot in range(slots)))

    def _slots(self, frames: int) -> int:
        return self.config.clips_per_pass(frames) * self.data_parallel * self.accumulation

    def _next_block(self) -> None:
        self._block_index += 1
        rng = np.random.default_rng([self.config.seed, 0, self._block_index])
        buckets = rng.choice(len(self.clips), size=_BLOCK_STEPS, p=self._shares).tolist()
        lengths = self.config.data.lengths or (math.inf,)
        chosen = rng.integers(len(lengths), size=_BLOCK_STEPS).tolist()
        self._block = []
        for bucket, choice in zip(buckets, chosen, strict=True):
            frames = int(min(lengths[choice], self.shapes[bucket][1]))
            self._block.append((bucket, frames, self._places[bucket]))
            self._places[bucket] += self._slots(frames)

    def _clip(self, bucket: int, place: int) -> int:
        clips = self.clips[bucket]
        turn, index = divmod(place, len(clips))
        return clips[_shuffled(self.config.seed, bucket, turn, len(clips))[index]]


@lru_cache(maxsize=64)
def _shuffled(seed: int, bucket: int, turn: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, 1, bucket, turn]).permutation(size)


def generator_of(seed: int, *place: int | str) -> Generator:
    """Seed a random generator that no other purpose or place shares."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Reader:
    """Read clips and draw their noise levels and noise."""

    def __init__(self, data: Data, config: TrainConfig, noise_range: NoiseRange, base: Base = WAN) -> None:
        self.data = data
        self.config = config
        self.noise_range = noise_range
        self.base = base
        self.empty = data.empty_embeds if config.objective.caption_dropout > 0 else None
        self._lock = threading.Lock()  # datasets keep files open and need not be safe to share

    def batch(
        self, clips: Sequence[int], frames: int, generators: Sequence[Generator], *, training: bool, counted: int
    ) -> Batch:
        """Read clips, cut them to `frames` and draw their noise; captions are dropped only in training."""
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        objective = self.config.objective
        for clip, generator in zip(clips, generators, strict=True):
            with self._lock:
                latents, embeds = self.data.latents(clip)[:, :frames].float(), self.data.embeds(clip).float()
            sigmas = draw_sigmas(latents.shape[1], objective, generator, self.noise_range, self.base)
            dropped = torch.rand((), generator=generator) < objective.caption_dropout
            if training and dropped and self.empty is not None:
                embeds = self.empty.float()
            embeds = F.pad(embeds, (0, 0, 0, self.data.max_sequence_length - len(embeds)))
            parts.append((latents, torch.randn(latents.shape, generator=generator), sigmas, embeds))
        latents, noise, sigmas, embeds = (torch.stack(column) for column in zip(*parts, strict=True))
        return Batch(latents, noise, sigmas, embeds, counted)


class Loader:
    """Make the training batches of one process ahead in threads; `waited_seconds` sums the time spent waiting for them.

    with Loader(reader, plan, data_rank=0, first_step=0, device=device) as loader:
        batch = loader.next()
    """

    def __init__(
        self, reader: Reader, plan: BatchPlan, *, data_rank: int, first_step: int, device: torch.device
    ) -> None:
        self.reader, self.plan, self.data_rank, self.device = reader, plan, data_rank, device
        self.waited_seconds = 0.0
        self._positions = ((step, i) for step in count(first_step) for i in range(plan.accumulation))
        self._pool = ThreadPoolExecutor(plan.config.data.workers, thread_name_prefix="pusa-data")
        self._ahead: list[Future[Batch]] = []

    def __enter__(self) -> "Loader":
        while len(self._ahead) < self.plan.config.data.prefetch:
            self._submit()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def next(self) -> Batch:
        """Return the next batch on the device. Raises the error of the thread that read it."""
        began = time.monotonic()
        batch = self._ahead.pop(0).result()
        self.waited_seconds += time.monotonic() - began
        self._submit()
        return batch.to(self.device)

    def _submit(self) -> None:
        self._ahead.append(self._pool.submit(self._make, *next(self._positions)))

    def _make(self, step: int, accumulated: int) -> Batch:
        plan, seed = self.plan.step(step), self.plan.config.seed
        slots = plan.slots(self.data_rank, self.plan.data_parallel, accumulated)
        batch = self.reader.batch(
            [plan.clips[slot] for slot in slots],
            plan.frames,
            [generator_of(seed, "train", step, slot) for slot in slots],
            training=True,
            counted=len(slots),
        )
        return batch.pinned() if self.device.type == "cuda" else batch


def held_out_batches(reader: Reader, *, data_rank: int, data_parallel: int) -> Iterator[Batch]:
    """Yield every held-out clip, `report.held_out_draws` times, at levels and noises that never change.

    Processes share the work and each gets equally many batches of the same shapes, as sharded models need; clips that
    fill up the last batches are not counted.
    """
    config = reader.config
    for shape, clips in sorted(reader.data.buckets.items()):
        items = [(clip, draw) for clip in clips for draw in range(config.report.held_out_draws)]
        per_pass = min(config.clips_per_pass(shape[1]), math.ceil(len(items) / data_parallel))
        turns = math.ceil(len(items) / (per_pass * data_parallel))
        for turn in range(turns):
            start = (turn * data_parallel + data_rank) * per_pass
            mine = items[start : start + per_pass]
            filled = mine + [items[0]] * (per_pass - len(mine))
            yield reader.batch(
                [clip for clip, _ in filled],
                shape[1],
                [generator_of(config.seed, "held out", clip, draw) for clip, draw in filled],
                training=False,
                counted=len(mine),
            )
