"""Who runs a task: the interface, and the usual executor, one child process that holds the model.

An executor is not durable and need not be: the queue's lease and the checkpoint in the store are. Whatever happens to
it ends a task with an `Error`, and the worker's next attempt goes on from the checkpoint.
"""

import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pusa.server.worker.engine_process import PUSA_ENGINE, is_ruinous
from pusa.server.worker.messages import LAST, Cancelled, CancelTask, Error, LoadFailed, Loading, Message, Ready, Task

logger = logging.getLogger(__name__)

_RESTART_SECONDS = (0.0, 2.0, 10.0, 30.0, 60.0)  # after so many starts in a row that ended before the model was there
_CLOSE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class ExecutorState:
    """What an executor is doing, for /ready and the metrics.

    `stage` is one of stopped, starting, importing, loading, ready and failed.

    One state for a group of processes (`world_size` ranks, `pids` by rank): it is ready when every rank is, at the
    percentage of the slowest, and failed when one is.
    """

    stage: str = "stopped"
    percent: float | None = None  # of the stage, 0..100; None: not known
    model: str = ""
    pids: tuple[int, ...] = ()
    world_size: int = 1
    error: str | None = None

    @property
    def ready(self) -> bool:
        return self.stage == "ready"


class Executor(Protocol):
    """Runs one task at a time; `run` is for one thread, the rest for any.

    A group of ranks is one executor: `run` hands the task to every rank and yields the messages of the first, `cancel`
    asks all of them between the same two steps, and the death of one ends the task and the group, which `start` makes
    anew. Nothing outside knows how many processes there are but by `ExecutorState.world_size`.
    """

    @property
    def state(self) -> ExecutorState: ...

    def start(self) -> None:
        """Begin to load the model, or begin again after what held it has died; returns at once."""

    def run(self, task: Task) -> Iterator[Message]:
        """A task's messages; the last is a `Done`, an `Error` or a `Cancelled`. The executor must be ready.

        Closing the iterator before that kills what runs the task.
        """

    def cancel(self) -> None:
        """End the task that runs between two steps, or by force after a grace period; its last message tells."""

    def close(self) -> None:
        """End everything."""


class Child(ABC):
    """A process that holds the model, wherever it is; what it says arrives in `inbox`, and None when it has ended."""

    def __init__(self, model: str) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.state = ExecutorState(stage="starting", model=model)
        self.was_ready = False
        self.began_at, self.ended_at = time.monotonic(), 0.0  # 0 while it lives
        self._is_ending = False

    def _take(self, message: Any) -> None:
        """What it has said: of loading into the state, of a task into the inbox."""
        self.was_ready = self.was_ready or isinstance(message, Ready)
        state = _state_after(self.state, message)
        if state is None:
            self.inbox.put(message)
        elif self.state.stage != "failed":  # killed in the meantime
            self.state = state

    def _is_over(self) -> None:
        """It has ended: the last that is heard of it."""
        stage, error = ("stopped", None) if self._is_ending else ("failed", self.state.error or self.how_it_ended())
        self.state = replace(self.state, stage=stage, percent=None, pids=(), error=error)
        self.ended_at = time.monotonic()
        self.inbox.put(None)

    @abstractmethod
    def send(self, command: Task | CancelTask) -> None:
        """One that cannot be sent is for a process that has ended, which is told by the inbox."""

    def kill(self, why: str | None = None) -> None:
        """At once; it is no longer ready when this returns."""
        self.state = replace(self.state, stage="failed", percent=None, error=why)
        self._kill()

    @abstractmethod
    def _kill(self) -> None: ...

    @abstractmethod
    def end(self) -> None:
        """In good order, or by force after a moment."""

    @abstractmethod
    def how_it_ended(self) -> str:
        """For people; waits for the end."""


class ChildExecutor:
    """An executor of one child, which is made anew after it has died.

    Args:
        new_child: starts one.
        model: what it loads, to be told before there is one.
        stall_seconds: without any message in a task for so long, the child is taken for hung and killed. One step of a
            large model, or the decoding of a long window, must fit.
        grace_seconds: from `cancel` to a kill.
        load_seconds: from `start` to a kill, if the model is not there by then.
    """

    def __init__(
        self,
        new_child: Callable[[], Child],
        model: str,
        *,
        stall_seconds: float = 1800.0,
        grace_seconds: float = 10.0,
        load_seconds: float = 3600.0,
    ) -> None:
        self.model = model
        self.stall_seconds, self.grace_seconds, self.load_seconds = stall_seconds, grace_seconds, load_seconds
        self._new_child = new_child
        self._lock = threading.RLock()
        self._child: Child | None = None
        self._starts_in_vain = 0
        self._kill_at: float | None = None
        self._closed = False

    @property
    def state(self) -> ExecutorState:
        child = self._child
        return ExecutorState(model=self.model) if child is None else child.state

    def start(self) -> None:
        with self._lock:
            if self._closed:
                return
            if self._child is not None and not self._child.ended_at:
                if not self._child.was_ready and time.monotonic() - self._child.began_at > self.load_seconds:
                    self._child.kill(f"the model was not loaded within load_seconds={self.load_seconds:g}")
                return
            if self._child is not None and not self._child.was_ready:
                wait_seconds = _RESTART_SECONDS[min(self._starts_in_vain, len(_RESTART_SECONDS) - 1)]
                if time.monotonic() < self._child.ended_at + wait_seconds:
                    return
                self._starts_in_vain += 1
            else:
                self._starts_in_vain = 1
            self._child = self._new_child()

    def run(self, task: Task) -> Iterator[Message]:
        with self._lock:  # a cancel comes before the task, and is for another one, or after it
            child, self._kill_at = self._child, None
            if child is not None and child.state.ready:
                child.send(task)
            else:
                child = None
        if child is None:
            yield Error("worker_lost", "the process that holds the model is not there", retry=True)
            return
        ended = False
        try:
            for message in self._received(child):
                ended = isinstance(message, LAST)
                if isinstance(message, Error) and is_ruinous(message):
                    child.kill()  # at once, so that it is not given another task
                yield message
        finally:
            if not ended:
                child.kill()

    def _received(self, child: Child) -> Iterator[Message]:
        """To the last message, which is made up where the child does not send it."""
        stalls_at = time.monotonic() + self.stall_seconds
        while True:
            kill_at = self._kill_at
            deadline = stalls_at if kill_at is None else min(stalls_at, kill_at)
            try:
                message = child.inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                child.kill()
                if kill_at is not None and deadline == kill_at:
                    yield Cancelled()
                else:
                    told = f"nothing was heard of it for {self.stall_seconds:g} s, so its process was ended"
                    yield Error("stalled", told, retry=True)
                return
            if message is _LOOK_AGAIN:
                continue
            if message is None:
                yield Error("worker_lost", child.how_it_ended(), retry=True) if kill_at is None else Cancelled()
                return
            stalls_at = time.monotonic() + self.stall_seconds
            yield message
            if isinstance(message, LAST):
                return

    def cancel(self) -> None:
        with self._lock:
            child = self._child
            if child is None or self._kill_at is not None:
                return
            self._kill_at = time.monotonic() + self.grace_seconds
        child.send(CancelTask())
        child.inbox.put(_LOOK_AGAIN)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            child = self._child
        if child is not None:
            child.end()


_LOOK_AGAIN: Any = object()


def _state_after(state: ExecutorState, message: Any) -> ExecutorState | None:
    """What a message about loading changes; None for the messages of a task."""
    match message:
        case Loading(stage, percent):
            return replace(state, stage=stage, percent=percent)
        case Ready(model):
            return replace(state, stage="ready", percent=100.0, model=model)
        case LoadFailed(why):
            return replace(state, error=why)
    return None


class LocalExecutor(ChildExecutor):
    """A child process on this machine.

    Args:
        model, loras: what it loads, as in a request.
        target: ``module:name`` of the `pusa.server.worker.engine_process.Engine` in it.
        env: variables to set in the child, such as CUDA_VISIBLE_DEVICES.
        limits: as for `ChildExecutor`.
    """

    def __init__(
        self,
        model: str,
        loras: Sequence[str] = (),
        *,
        target: str = PUSA_ENGINE,
        env: Mapping[str, str] | None = None,
        **limits: float,
    ) -> None:
        command = [sys.executable, "-m", "pusa.server.worker.engine_process", target, model, *loras]
        super().__init__(lambda: _Process(command, model, {**os.environ, **(env or {})}), model, **limits)


class _Process(Child):
    """The child process, with a thread that takes in what it says."""

    def __init__(self, command: Sequence[str], model: str, env: Mapping[str, str]) -> None:
        super().__init__(model)
        self._write = threading.Lock()
        # A session of its own: Ctrl-C in a terminal is for the server, which then ends its jobs in good order.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(env), start_new_session=True
        )
        self.state = replace(self.state, pids=(self._process.pid,))
        threading.Thread(target=self._listen, name="pusa-child", daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            while True:
                self._take(pickle.load(self._process.stdout))
        except (EOFError, OSError, pickle.UnpicklingError):
            pass  # it has ended, perhaps in the middle of a message
        self._process.kill()
        self._process.wait()
        self._close_input()
        self._process.stdout.close()
        self._is_over()

    def send(self, command: Task | CancelTask) -> None:
        assert self._process.stdin is not None
        with self._write:
            try:
                pickle.dump(command, self._process.stdin)
                self._process.stdin.flush()
            except (OSError, ValueError):
                logger.info("the child process has ended and takes no more commands")

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with self._write, suppress(OSError):  # what is still in the buffer has nowhere to go
            self._process.stdin.close()

    def _kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """It ends by itself when its input does."""
        self._is_ending = True
        self._close_input()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def how_it_ended(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"the process that holds the model ended with status {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        why = " (perhaps the system was out of memory)" if -code == signal.SIGKILL else ""
        return f"the process that holds the model was ended by {name}{why}"
