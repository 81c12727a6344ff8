"""Run tasks in other processes that hold the model: the interface, and what all executors share.

`pusa.server.worker.local` runs processes of this machine, `pusa.server.worker.ray` actors of a cluster. An executor
need not be durable, as the queue's lease and the checkpoint in the store are. If its process dies, the task ends with
an `Error`, and the worker's next attempt continues from the checkpoint.
"""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pusa.acceleration.decisions import Machine
from pusa.server.worker.engine_process import is_fatal
from pusa.server.worker.messages import (
    LAST,
    Cancelled,
    CancelTask,
    Error,
    LoadFailed,
    Loading,
    MachineFound,
    Message,
    ModelReady,
    Task,
)

_RESTART_SECONDS = (0.0, 2.0, 10.0, 30.0, 60.0)  # back-off by the number of starts in a row that failed


@dataclass(frozen=True, kw_only=True)
class ExecutorState:
    """Describe an executor for /ready and the metrics.

    `stage` is one of stopped, starting, importing, loading, ready and failed.

    A group of processes (`world_size` ranks, `pids` by rank) has one state: it is ready when every rank is, shows the
    percentage of the slowest, and has failed when one has. `machine` is where it runs, as it was before the model was
    loaded; None: unknown.
    """

    stage: str = "stopped"
    percent: float | None = None  # of the stage, 0..100; None: unknown
    model: str = ""
    pids: tuple[int, ...] = ()
    world_size: int = 1
    error: str | None = None
    error_code: str | None = None  # of `error`, where loading has failed by itself
    machine: Machine | None = None

    @property
    def ready(self) -> bool:
        return self.stage == "ready"


class Executor(Protocol):
    """Run one task at a time. One thread calls `run`; any thread may call the other methods.

    A group of ranks is one executor: `run` sends the task to every rank and yields the messages of the first, `cancel`
    stops all of them between the same two steps, and the death of one ends the task and the group, which `start`
    restarts. Only `ExecutorState.world_size` shows the number of processes.
    """

    @property
    def state(self) -> ExecutorState: ...

    def start(self) -> None:
        """Start to load the model, again if its process has died; return at once."""

    def run(self, task: Task) -> Iterator[Message]:
        """Yield a task's messages; the last is a `Done`, an `Error` or a `Cancelled`. The executor must be ready.

        Closing the iterator earlier kills the process that runs the task.
        """

    def cancel(self) -> None:
        """Cancel the running task between two steps, or kill it after a grace period; `run` yields its last message."""

    def close(self) -> None:
        """End the process."""


class Child(ABC):
    """Represent the processes that hold the model; `inbox` receives messages of a task, and None when they have ended.

    Args:
        model: its name.
        world_size: number of processes.
    """

    def __init__(self, model: str, world_size: int = 1) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.state = ExecutorState(stage="starting", model=model, world_size=world_size)
        self.was_ready = False
        self.began_at, self.ended_at = time.monotonic(), 0.0  # 0 while it lives
        self._is_ending = False

    def _receive(self, message: Any) -> None:
        """Put a message of a task into the inbox; apply one about loading to the state."""
        self.was_ready = self.was_ready or isinstance(message, ModelReady)
        state = _state_after(self.state, message)
        if state is None:
            self.inbox.put(message)
        elif self.state.stage != "failed":  # not killed in the meantime
            self.state = state

    def _mark_ended(self) -> None:
        """Set the final state and close the inbox with None."""
        stage, error = ("stopped", None) if self._is_ending else ("failed", self.state.error or self.describe_end())
        self.state = replace(self.state, stage=stage, percent=None, pids=(), error=error)
        self.ended_at = time.monotonic()
        self.inbox.put(None)

    @abstractmethod
    def send(self, command: Task | CancelTask) -> None:
        """Send a command; ignore one that a process which has ended cannot receive, as the inbox tells its end."""

    def kill(self, reason: str | None = None) -> None:
        """Kill the process at once; it is not ready any more when this returns."""
        self.state = replace(self.state, stage="failed", percent=None, error=reason, error_code=None)
        self._kill()

    @abstractmethod
    def _kill(self) -> None: ...

    @abstractmethod
    def end(self) -> None:
        """Let the process end by itself, and kill it after a moment."""

    @abstractmethod
    def describe_end(self) -> str:
        """Wait for the end and describe it for people."""

    def describe_silence(self, seconds: float) -> str:
        """Say that no message of a task came for some seconds, after which it is killed."""
        return f"nothing was heard of it for {seconds:g} s, so its process was ended"


class ChildExecutor:
    """Run tasks in one child, and start a new one after it has died.

    Args:
        new_child: starts a child.
        model: name of the model, for the state before there is a child.
        stall_seconds: time without any message of a task after which the child counts as hung and is killed. It must
            exceed one step of a large model and the decoding of a long window.
        grace_seconds: time from `cancel` to a kill.
        load_seconds: time from `start` to a kill, if the model is not loaded by then.
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
        self._failed_starts = 0
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
                wait_seconds = _RESTART_SECONDS[min(self._failed_starts, len(_RESTART_SECONDS) - 1)]
                if time.monotonic() < self._child.ended_at + wait_seconds:
                    return
                self._failed_starts += 1
            else:
                self._failed_starts = 1
            self._child = self._new_child()

    def run(self, task: Task) -> Iterator[Message]:
        with self._lock:  # a `cancel` is either before this task, and for another one, or after it
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
            for message in self._messages(child):
                ended = isinstance(message, LAST)
                if isinstance(message, Error) and is_fatal(message):
                    child.kill()  # before anybody sends it another task
                yield message
        finally:
            if not ended:
                child.kill()

    def _messages(self, child: Child) -> Iterator[Message]:
        """Yield messages up to the last one; make that one where the child does not send it."""
        stalls_at = time.monotonic() + self.stall_seconds
        while True:
            kill_at = self._kill_at
            deadline = stalls_at if kill_at is None else min(stalls_at, kill_at)
            try:
                message = child.inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                reason = child.describe_silence(self.stall_seconds)
                child.kill()
                if kill_at is not None and deadline == kill_at:
                    yield Cancelled()
                else:
                    yield Error("stalled", reason, retry=True)
                return
            if message is _DEADLINE_CHANGED:
                continue
            if message is None:
                yield Error("worker_lost", child.describe_end(), retry=True) if kill_at is None else Cancelled()
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
        child.inbox.put(_DEADLINE_CHANGED)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            child = self._child
        if child is not None:
            child.end()


_DEADLINE_CHANGED: Any = object()  # wakes `_messages` up


def _state_after(state: ExecutorState, message: Any) -> ExecutorState | None:
    """Return the state after a message about loading; None for the messages of a task."""
    match message:
        case Loading(stage, percent):
            return replace(state, stage=stage, percent=percent)
        case ModelReady(model):
            return replace(state, stage="ready", percent=100.0, model=model)
        case LoadFailed(error, code):
            return replace(state, error=error, error_code=code)
        case MachineFound(machine):
            return replace(state, machine=machine)
    return None
