"""Make the videos of a run in several processes of this machine, each with a card of its own.

The processes share nothing but the folder. They are new interpreters, which end with their parent, even if that is
killed, because the pipe to it closes.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pusa.data.workers import usable_cores
from pusa.errors import first_line
from pusa.evaluation.runs.claims import LEASE_SECONDS
from pusa.evaluation.runs.folder import RunFolder
from pusa.evaluation.runs.items import Item
from pusa.evaluation.runs.make import ATTEMPTS, Summary, items_of, make_videos, summarize, worker_of
from pusa.evaluation.runs.makers import Maker
from pusa.evaluation.runs.progress import NotesOnce, RunProgress
from pusa.events import Event, Note, Report, Step

_PROGRAM = "from pusa.evaluation.runs.processes import serve; serve()"
_STOP_SECONDS = 600.0  # a step of a large model, and the decoding of a long window


@dataclass(frozen=True)
class _Task:
    """Hold what one process does."""

    folder: Path
    maker: Maker
    names: frozenset[str]
    lease_seconds: float
    attempts: int


def cards() -> list[str]:
    """List this machine's cards as CUDA_VISIBLE_DEVICES names them; only those that it allows."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [card.strip() for card in visible.split(",") if card.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def environments(processes: int, cards: Sequence[str], cores: int) -> list[dict[str, str]]:
    """Return the environment variables of each process: its card, or its share of the cores where there is none.

    Raises:
        ValueError: there are fewer cards than processes.
    """
    if cards and processes > len(cards):
        raise ValueError(f"--processes {processes}: this machine has {len(cards)} cards: give 1..{len(cards)}")
    if cards:
        return [{"CUDA_VISIBLE_DEVICES": card} for card in cards[:processes]]
    if "OMP_NUM_THREADS" in os.environ:  # another number would round in another way
        return [{}] * processes
    return [{"OMP_NUM_THREADS": str(max(1, cores // processes))}] * processes


def make_in_processes(
    run_folder: Path,
    processes: int,
    *,
    maker: Maker,
    stop: Callable[[], bool] = lambda: False,
    report: Report = lambda event: None,
    items: Sequence[Item] | None = None,
    shard: tuple[int, int] | None = None,
    lease_seconds: float = LEASE_SECONDS,
    attempts: int = ATTEMPTS,
) -> Summary:
    """Make the missing videos of a run in several processes; see `make_videos`.

    A process that dies is started again, and its item tried again.

    Args:
        maker: is pickled; each process has a copy, and a ``CUDA_VISIBLE_DEVICES`` of its own.

    Raises:
        ValueError: this machine has fewer cards, or an argument is out of range.
        RuntimeError: the processes die whatever they do, or the first videos all failed.
        OSError: the disk is full.
    """
    run = RunFolder.open(run_folder)
    chosen = items_of(run, shard, items)
    places = environments(processes, cards(), usable_cores())
    task = _Task(run_folder, maker, frozenset(item.name for item in chosen), lease_seconds, attempts)
    start = time.monotonic()
    group = _Group(task, places, report)
    try:
        is_stopped = group.run(run, chosen, stop)
    finally:
        group.kill()
    seconds = time.monotonic() - start
    made_here = sum((record := run.record_of(item)) is not None and record.worker in group.workers for item in chosen)
    return summarize(run, chosen, attempts, made_here=made_here, is_stopped=is_stopped, seconds=seconds)


class _Group:
    """Run processes to their end, and start those again that die.

    Attributes:
        workers: names of all of them in records.
    """

    def __init__(self, task: _Task, places: Sequence[dict[str, str]], report: Report) -> None:
        self._task, self._report = task, report
        self._most_deaths = task.attempts + len(places)  # an item that kills its process is left out before
        self._notes = NotesOnce(report)  # each process has the same to say of the model
        self._deaths, self._made = 0, 0  # deaths in a row, since so many were made
        self._processes = [_Process(task, place) for place in places]
        self.workers = {process.worker for process in self._processes}

    def run(self, run: RunFolder, items: Sequence[Item], stop: Callable[[], bool]) -> bool:
        """Wait for the end of all, and report; True if `stop` ended them."""
        progress = RunProgress(run, items)
        progress.report(self._report)
        is_stopped, deadline = False, float("inf")
        error: Exception | None = None
        while self._processes and time.monotonic() < deadline:
            for process in list(self._processes):
                while (event := process.next_event()) is not None:
                    self._show(event, progress)
                if process.has_ended:
                    self._processes.remove(process)
                    error = error or process.error
                    if process.death is not None and not is_stopped and error is None:
                        error = self._replace(process, progress.made)
            progress.report(self._report, sometimes=True)
            if deadline == float("inf") and (stop() or error is not None):
                is_stopped, deadline = error is None, time.monotonic() + _STOP_SECONDS
                for process in self._processes:
                    process.stop()
            time.sleep(0.05)
        progress.report(self._report)
        if error is not None:
            raise error
        return is_stopped

    def kill(self) -> None:
        """End those at once that have not ended."""
        for process in self._processes:
            process.kill()

    def _show(self, event: Event, progress: RunProgress) -> None:
        if isinstance(event, Step):
            return progress.report(self._report)
        self._notes(event)

    def _replace(self, process: "_Process", made: int) -> Exception | None:
        """Start a process again that has died; an error if they die whatever they do."""
        self._deaths = self._deaths + 1 if made == self._made else 1
        self._made = made
        if self._deaths > self._most_deaths:
            return RuntimeError(f"{self._deaths} processes in a row have died, the last one: {process.death}")
        self._report(Note(f"a process has died and is started again: {process.death}"))
        new = _Process(self._task, process.place)
        self._processes.append(new)
        self.workers.add(new.worker)
        return None


class _Process:
    """Run a task in a process of its own.

    Attributes:
        place: its environment variables.
        worker: its name in records.
        error: what ended it, where it was able to tell.
        death: how it ended otherwise.
    """

    def __init__(self, task: _Task, place: dict[str, str]) -> None:
        self.place = place
        self.error: Exception | None = None
        self.death: str | None = None
        self._events = queue.SimpleQueue[Event]()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **place},
            start_new_session=True,  # Ctrl-C is for the parent, which tells
        )
        self.worker = worker_of(self._process.pid)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        with suppress(BrokenPipeError):
            pickle.dump(task, self._stdin)
            self._stdin.flush()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive() and self._events.empty()

    def next_event(self) -> Event | None:
        try:
            return self._events.get_nowait()
        except queue.Empty:
            return None

    def stop(self) -> None:
        """Let it end between two steps of the model."""
        with suppress(OSError):
            self._stdin.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        has_told = False
        assert self._process.stdout is not None
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                message = pickle.load(self._process.stdout)
                if isinstance(message, Exception):
                    self.error, has_told = message, True
                elif isinstance(message, Summary):
                    has_told = True
                else:
                    self._events.put(message)
        code = self._process.wait()
        if not has_told:
            self.death = self._describe(code)
        self._errors.close()

    def _describe(self, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}" + (f" ({lines[-1]})" if lines else "")


def serve() -> None:
    """Run the task on stdin, in a process that `make_in_processes` has started; tell of it on stdout."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    task = pickle.load(sys.stdin.buffer)
    parent_left = threading.Event()
    lock = threading.Lock()

    def wait_for_parent() -> None:
        sys.stdin.buffer.read()
        parent_left.set()

    def tell(message: Any) -> None:
        with lock, suppress(BrokenPipeError):
            pickle.dump(message, out)
            out.flush()

    threading.Thread(target=wait_for_parent, daemon=True).start()
    if hasattr(task.maker, "notes"):
        task.maker.notes.report = tell
    run = RunFolder.open(task.folder)
    items = [item for item in run.items if item.name in task.names]
    try:
        message: Any = make_videos(
            run,
            task.maker,
            stop=parent_left.is_set,
            report=tell,
            items=items,
            lease_seconds=task.lease_seconds,
            attempts=task.attempts,
        )
    except Exception as error:
        message = RuntimeError(first_line(error))
        if isinstance(error, OSError) and error.errno is not None:  # a full disk is told from others by its number
            message = OSError(error.errno, error.strerror, error.filename)
    tell(message)
