"""Denoise a video as a wave, and hand its latent frames on as they are finished."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pusa.conditions import PusaCondition, encode_by_frame, latent_indices_of, multipliers_by_frame
from pusa.events import RunEnded
from pusa.generate.checkpoint import DenoisingCheckpoint
from pusa.generate.progress import DenoisingProgress
from pusa.pipeline import PusaPipeline
from pusa.positions import frames_of
from pusa.request import ResolvedRequest
from pusa.scheduler import turn_sigmas
from pusa.threads import release_threads
from pusa.waves import Turn, Wave

Reached = Callable[[Tensor, int], None]
"""Receives the latents ``[1, C, F, h, w]`` of a window after a step, and the steps done in it."""


@dataclass(frozen=True)
class Table:
    """Hold the sigmas of a window, ``[N + 1, F]``, and what hears of each step."""

    sigmas: Tensor
    reached: Reached

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


class DenoiseByTable(Protocol):
    """Denoise the latents of a window, which have done `steps_done` steps of a table, to its last row."""

    def __call__(self, middle: float, latents: Tensor, steps_done: int, table: Table) -> Tensor: ...


class WaveDenoiser:
    """Denoise a video as a wave, turn by turn of a window that moves along.

    Args:
        denoise: receives the latent frame in the middle of those that move, whose prompt holds, before the others.
        total: latent frames of the video.
        conditions: their positions count in these.
        state: returns the latents and the steps done of the window, from which a call that was suspended goes on; None:
            from its beginning.
        window, history: latent frames of the window, and of those finished that stay in it.
        shows_early: True: pieces come as soon as they are finished; False: at the end of each turn, where the VAE
            would have to take turns with the transformer for each piece.

    Raises:
        ValueError: a position is outside the video; the wave does not fit into the window.
    """

    def __init__(
        self,
        request: ResolvedRequest,
        pipe: PusaPipeline,
        denoise: DenoiseByTable,
        *,
        state: Callable[[], tuple[Tensor, int] | None],
        total: int,
        conditions: Sequence[PusaCondition],
        window: int,
        history: int,
        progress: DenoisingProgress,
        generator: torch.Generator,
        checkpoint: DenoisingCheckpoint | None = None,
        shows_early: Callable[[], bool] = lambda: True,
    ) -> None:
        assert request.delay is not None
        self._request, self._pipe, self._denoise, self._conditions = request, pipe, denoise, list(conditions)
        factor = request.frames_per_latent
        self._clip: dict[str, Any] = {"num_frames": frames_of(total, factor), "fps": request.fps, "factor": factor}
        self._multipliers = multipliers_by_frame(self._conditions, **self._clip)
        self._clean: dict[int, Tensor] = {}  # latents of conditions, of frames that have not entered the window
        kept = frozenset(index for index, multiplier in self._multipliers.items() if multiplier == 0)
        self.wave = Wave(total, request.steps, request.delay, kept)
        self._turns = self.wave.turns(window, history)
        self._progress, self._generator, self._checkpoint = progress, generator, checkpoint
        self._shows_early, self._state = shows_early, state
        self._call: _Call | None = None

    def suspend(self) -> None:
        """End the call of the pipeline that waits between two pieces: what comes next begins another one there."""
        if self._call is not None:
            self._call.close()

    def pieces(self) -> Iterator[Tensor]:
        """Yield finished latents ``[1, C, n, h, w]``, n above 0, in the order of the video."""
        latents: Tensor | None = None
        before: Turn | None = None
        shown = 0
        for turn in self._turns:
            number, done = self._progress.windows_begun, self.wave.finished_in(turn, turn.last)
            stored, steps_done = (None, 0) if self._checkpoint is None else self._checkpoint.resume(number, turn.steps)
            if stored is not None:
                stored = stored.to(self._pipe._execution_device)
            if self._checkpoint is not None and self._checkpoint.is_past(number):
                assert stored is not None  # the frames finished in this turn alone
                self._progress.begin_window(turn.steps)
                if stored.shape[2]:
                    yield stored
            else:
                latents = self._enter(turn, before, latents) if stored is None else stored
                self._progress.begin_window(steps_done)
                if self._checkpoint is not None and turn.steps == 0:  # all of its frames are kept
                    self._checkpoint.save(number, latents, 0, 0, self._generator)
                first = shown
                for reached, finished in self._finish_frames(turn, latents, steps_done):
                    latents = reached
                    if finished > first:
                        yield latents[:, :, first - turn.start : finished - turn.start]
                        first = finished
                if self._checkpoint is not None:
                    self._checkpoint.trim(number, shown - turn.start, done - turn.start)
            before, shown = turn, done

    def _enter(self, turn: Turn, before: Turn | None, latents: Tensor | None) -> Tensor:
        """Return the latents of a turn's window at its first row: those that stay, and new ones."""
        begin = 0 if before is None else before.start + before.length
        frames = range(begin, turn.start + turn.length)
        request, factor = self._request, self._pipe.vae_scale_factor_spatial
        channels = (self._pipe.transformer or self._pipe.transformer_2).config.in_channels
        shape = (channels, self.wave.frames, request.height // factor, request.width // factor)
        device = self._pipe._execution_device
        new = randn_tensor((1, channels, len(frames), *shape[2:]), self._generator, device, torch.float32)
        here = [c for c in self._conditions if any(i in frames for i in latent_indices_of(c, **self._clip))]
        self._conditions = [c for c in self._conditions if all(c is not other for other in here)]
        size = {"height": request.height, "width": request.width}
        self._clean |= encode_by_frame(here, encode=self._pipe.encode_frames, shape=shape, **size, **self._clip)
        for place, frame in enumerate(frames):
            if frame in self._clean:
                sigma = self._multipliers[frame]
                noise = new[0, :, place : place + 1]
                clean = self._clean.pop(frame).to(noise)
                new[0, :, place : place + 1] = self._pipe.scheduler.mix(clean, noise, sigma)
        if latents is None or before is None:
            return new
        return torch.cat([latents[:, :, turn.start - before.start :], new], dim=2)

    def _finish_frames(self, turn: Turn, latents: Tensor, steps_done: int) -> Iterator[tuple[Tensor, int]]:
        """Yield the latents of a turn's window with the number of frames of the video that are finished by then."""
        frames = range(turn.start, turn.start + turn.length)
        factors = torch.tensor([self._multipliers.get(frame, 1.0) for frame in frames])
        sigmas = turn_sigmas(self.wave, turn, self._pipe.scheduler.base_sigmas(self.wave.steps)) * factors
        while steps_done < turn.steps:
            begun = latents, steps_done
            for reached in self._steps(turn, latents, steps_done, sigmas):
                latents, steps_done = reached
                yield latents, self.wave.finished_in(turn, turn.first + steps_done)
            if steps_done < turn.steps:  # the call was suspended
                before, (latents, steps_done) = steps_done, self._state() or begun
                self._progress.repeat(before - steps_done)
        yield latents, self.wave.finished_in(turn, turn.last)

    def _steps(self, turn: Turn, latents: Tensor, steps_done: int, sigmas: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield the latents, and the steps done, after each step that finishes frames, or only at the end."""
        begun = [frame for frame, start in self.wave.starts.items() if start < turn.last]
        middle = (self.wave.finished(turn.first) + max(begun, default=0)) / 2

        def work(hand_over: Callable[[tuple[Tensor, int]], None]) -> None:
            def reached(latents: Tensor, steps: int) -> None:
                step = turn.first + steps
                if shows_early and steps < turn.steps and self.wave.finished(step) > self.wave.finished(step - 1):
                    hand_over((latents, steps))
                    self._progress.go_on()

            hand_over((self._denoise(middle, latents, steps_done, Table(sigmas, reached)), turn.steps))

        shows_early = self._shows_early()
        if not shows_early:
            found: list[tuple[Tensor, int]] = []
            work(found.append)
            yield from found
            return
        self._call = _Call(work)
        try:
            yield from self._call
        finally:
            self._call.close()
            self._call = None


class _Call:
    """Run a function in a thread that stands still, after each value that it hands over, until the next is wanted.

    Frames can so be decoded between two steps of a call of the pipeline, while nothing else computes.
    """

    def __init__(self, work: Callable[[Callable[[Any], None]], None]) -> None:
        self._work = work
        self._found: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._wanted, self._is_closed = threading.Semaphore(0), False
        self._card = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, name="pusa-wave", daemon=True)

    def __iter__(self) -> Iterator[Any]:
        release_threads()
        self._thread.start()
        while not self._is_closed:
            kind, value = self._found.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
            release_threads()
            self._wanted.release()

    def close(self) -> None:
        """End the function where it stands."""
        self._is_closed = True
        self._wanted.release()
        if self._thread.ident is not None:
            self._thread.join()

    def _hand_over(self, value: Any) -> None:
        release_threads()
        self._found.put(("value", value))
        self._wanted.acquire()
        if self._is_closed:
            raise RunEnded

    def _run(self) -> None:
        if self._card is not None:
            torch.cuda.set_device(self._card)  # each thread has its own
        try:
            self._work(self._hand_over)
            self._found.put(("end", None))
        except BaseException as error:
            self._found.put(("error", error))
