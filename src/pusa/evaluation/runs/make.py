"""Make the videos of a run: claim an item, make it, check it, put it in its place; until nothing is left to make.

Any number of processes may do this at the same time, on machines that share the folder. What is made stays made: the
same call goes on where another one ended, however it ended.
"""

import os
import queue
import secrets
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pusa.errors import first_line
from pusa.evaluation.runs.checks import expect, problem_of
from pusa.evaluation.runs.claims import LEASE_SECONDS, Claim, Claims
from pusa.evaluation.runs.cut import cut_video
from pusa.evaluation.runs.folder import Failure, RunFolder
from pusa.evaluation.runs.items import SUFFIX, Item, shard_of
from pusa.evaluation.runs.makers import Maker
from pusa.evaluation.runs.progress import RunProgress
from pusa.events import Event, Note, Report, RunEnded
from pusa.fsutil import is_full

ATTEMPTS = 3

_INTERRUPT_SECONDS = 2.0  # from an interrupt to the end of the call
_DIED = "the process that made it has ended"


@dataclass(frozen=True)
class Summary:
    """Hold what a call of `make_videos` did.

    Attributes:
        total: items of the run, or of the shard.
        made: items that are made, by anybody.
        made_here: those of them that this call has made.
        failed: items that have failed as often as they are tried.
        is_stopped: `stop` has ended the call.
        seconds: that it took.
    """

    total: int
    made: int
    made_here: int
    failed: tuple[Failure, ...]
    is_stopped: bool
    seconds: float


def worker_of(process: int) -> str:
    """Name a process of this machine for the records."""
    return f"{socket.gethostname()}:{process}"


class TooManyFailuresError(RuntimeError):
    """Report that so many items in a row have failed that the cause is not theirs."""


def check_shard(shard: tuple[int, int] | None) -> None:
    """Raise ValueError unless a shard is (I, N) with I in 1..N."""
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard {shard[0]}/{shard[1]} is none: write I/N with I in 1..N, such as 1/4")


def items_of(run: RunFolder, shard: tuple[int, int] | None, items: Sequence[Item] | None = None) -> list[Item]:
    """Select the items of a shard. Raises ValueError for a shard that is none."""
    check_shard(shard)
    chosen = run.items if items is None else items
    return [item for item in chosen if shard is None or shard_of(item, shard[1]) == shard[0]]


def make_videos(
    run: RunFolder,
    maker: Maker | Sequence[Maker],
    *,
    stop: Callable[[], bool] = lambda: False,
    report: Report = lambda event: None,
    items: Sequence[Item] | None = None,
    shard: tuple[int, int] | None = None,
    lease_seconds: float = LEASE_SECONDS,
    attempts: int = ATTEMPTS,
    give_up_after: int = 10,
    poll_seconds: float = 1.0,
) -> Summary:
    """Make the missing videos of a run, and wait for those that other processes are making.

    An item that fails is tried again after the others, and left out after `attempts`; `RunFolder.failures` has its
    error, and `RunFolder.forget_failures` lets it be tried again. One that a process has died over counts as failed.

    Args:
        maker: makes one video at a time; several work side by side, each in a thread.
        stop: called about once a second; True ends the call between two steps of the model.
        report: called in this thread, with a ``Step`` of the stage "videos" for each item that is made (by anybody) and
            a ``Note`` for each that fails.
        items: make only these of the run's.
        shard: (I, N): make only every N-th item, for machines that share no folder. An item's shard depends on its
            name alone.
        lease_seconds: silence after which another process counts as dead, see `pusa.evaluation.runs.claims`.
        attempts: how often an item is tried.
        give_up_after: failures in a row, before any success, that end the call.
        poll_seconds: time between two looks for items that others have given free.

    Raises:
        ValueError: the shard or `attempts` is out of range.
        TooManyFailuresError: the first `give_up_after` items failed.
        OSError: the disk is full, or the folder cannot be written.
    """
    if attempts < 1:
        raise ValueError(f"attempts={attempts} is below 1")
    makers = list(maker) if isinstance(maker, Sequence) else [maker]
    chosen = items_of(run, shard, items)
    run.check_places()
    start = time.monotonic()
    with Claims(run.claims, lease_seconds) as claims:
        work = _Work(run, chosen, claims, stop, attempts, give_up_after, poll_seconds)
        is_stopped = work.run(makers, report)
    seconds = time.monotonic() - start
    return summarize(run, chosen, attempts, made_here=work.made_here, is_stopped=is_stopped, seconds=seconds)


def summarize(
    run: RunFolder, items: Sequence[Item], attempts: int, *, made_here: int, is_stopped: bool, seconds: float
) -> Summary:
    """Look at what is made of some items of a run, and what has failed."""
    left = [item for item in items if not run.is_made(item)]
    failed = [found for item in left if (found := run.failure_of(item)) and found.attempts >= attempts]
    return Summary(len(items), len(items) - len(left), made_here, tuple(failed), is_stopped, seconds)


class _Work:
    """Share the items of one call among its makers."""

    def __init__(
        self,
        run: RunFolder,
        items: Sequence[Item],
        claims: Claims,
        stop: Callable[[], bool],
        attempts: int,
        give_up_after: int,
        poll_seconds: float,
    ) -> None:
        self._run, self._claims, self._stop = run, claims, stop
        self._attempts, self._give_up_after, self._poll_seconds = attempts, give_up_after, poll_seconds
        self._items = items
        self._pending = deque(sorted(items, key=lambda item: run.failure_of(item) is not None))
        if any(run.claims.glob("*.lock")):  # others are at work: begin elsewhere
            self._pending.rotate(-secrets.randbelow(max(1, len(items))))
        self._lock = threading.Lock()
        self._events = queue.SimpleQueue[Event | None]()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._given_up: Exception | None = None
        self._failures_in_a_row = 0
        self.made_here = 0

    def run(self, makers: Sequence[Maker], report: Report) -> bool:
        """Run the makers to their end, and report; True if `stop` ended them."""
        threads = [threading.Thread(target=self._make_all, args=(maker,), daemon=True) for maker in makers]
        for thread in threads:
            thread.start()
        progress = RunProgress(self._run, self._items)
        is_stopped = False
        try:
            progress.report(report)
            while any(thread.is_alive() for thread in threads):
                try:
                    event = self._events.get(timeout=min(0.2, self._poll_seconds))
                    progress.report(report) if event is None else report(event)
                except queue.Empty:
                    progress.report(report, sometimes=True)
                if not is_stopped and self._stop():
                    is_stopped = True
                    self._ended.set()
        except BaseException:
            self._ended.set()
            end = time.monotonic() + _INTERRUPT_SECONDS
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
            raise
        while not self._events.empty():
            event = self._events.get()
            progress.report(report) if event is None else report(event)
        if self._given_up is not None and self._pending and not is_stopped:
            self._error = self._error or self._given_up
        if self._error is not None:
            raise self._error
        return is_stopped

    def _make_all(self, maker: Maker) -> None:
        try:
            is_ready = getattr(maker, "is_ready", lambda: True)
            while not self._ended.is_set():
                try:
                    ready = is_ready()
                except Exception as error:
                    self._given_up = error
                    self._events.put(Note(f"one of the makers gives up: {first_line(error)}"))
                    return
                if not ready:
                    if not self._pending:
                        return
                    self._ended.wait(self._poll_seconds)
                    continue
                claimed = self._next()
                if claimed is not None:
                    item, claim = claimed
                    try:
                        self._make(maker, item, claim)
                    finally:
                        self._claims.release(claim)
                elif self._pending:
                    self._ended.wait(self._poll_seconds)  # for those that others have claimed
                else:
                    return
        except BaseException as error:  # a full disk, or a fault of this module
            self._error = self._error or error
            self._ended.set()

    def _next(self) -> tuple[Item, Claim] | None:
        """Claim the next item that is to be made; None if others have claimed all that are left."""
        with self._lock:
            for item in list(self._pending):
                if self._ended.is_set():
                    return None
                if self._is_over(item):
                    self._pending.remove(item)
                    continue
                claim = self._claims.take(item.id)
                if claim is None:
                    continue
                if self._is_over(item):  # while the claim was another one's
                    self._claims.release(claim)
                    self._pending.remove(item)
                    continue
                return item, claim
        return None

    def _is_over(self, item: Item) -> bool:
        failure = self._run.failure_of(item)
        return (failure is not None and failure.attempts >= self._attempts) or self._run.is_made(item)

    def _make(self, maker: Maker, item: Item, claim: Claim) -> None:
        if claim.took_over and not getattr(maker, "survives_crashes", False) and self._fail(item, _DIED):
            return
        for old in self._run.parts.glob(f"{item.id}.*"):
            if old.is_dir():  # of a worker that has died
                shutil.rmtree(old, ignore_errors=True)
        folder = self._run.parts / f"{item.id}.{secrets.token_hex(4)}"
        start = time.monotonic()
        try:
            folder.mkdir()
            part = folder / f"video{SUFFIX}"
            maker.make(item, part, lambda: self._ended.is_set() or claim.is_lost)
            if item.cut is not None and part.exists():
                cut_video(part, item.cut)
            if self._is_whole(part, item, claim):
                self._run.commit(item, part, seconds=time.monotonic() - start, worker=worker_of(os.getpid()))
                with self._lock:
                    self.made_here += 1
                    self._failures_in_a_row = 0
                    self._give_up_after = 0  # the cause of further failures is the items'
                self._events.put(None)
        except RunEnded:
            pass
        except Exception as error:
            if _is_full_disk(error):
                raise
            claim.renew()
            if not (claim.is_lost or self._ended.is_set()):  # what comes of a stop is no fault of the item
                self._fail(item, first_line(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _is_whole(self, part: Path, item: Item, claim: Claim) -> bool:
        """Check what a maker has written; False if it was stopped, or the item is another worker's by now."""
        if not part.exists():
            if claim.is_lost or self._ended.is_set():
                return False
            raise RuntimeError("no video was written")
        if problem := problem_of(part, expect(item.request, item.cut), decode=True):
            raise RuntimeError(f"the video is not what was asked for: {problem}")
        claim.renew()  # last: the machine may have slept until now
        return not claim.is_lost

    def _fail(self, item: Item, error: str) -> bool:
        """Count a failed attempt; True if the item is left out now. Raises TooManyFailuresError."""
        failure = self._run.fail(item, error)
        is_last = failure.attempts >= self._attempts
        rest = "it is left out" if is_last else "it is tried again later"
        self._events.put(Note(f"{item.name}: {error} (attempt {failure.attempts} of {self._attempts}: {rest})"))
        with self._lock:
            self._pending.remove(item)
            if not is_last:
                self._pending.append(item)
            self._failures_in_a_row += 1
            if self._failures_in_a_row == self._give_up_after:
                raise TooManyFailuresError(f"the first {self._give_up_after} videos failed, the last one with: {error}")
        return is_last


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if is_full(error):
            return True
        error = error.__cause__
    return False
