"""Run tasks in processes of this machine: one, or a group of ranks that share the work of a model.

Every rank has pipes of its own to the worker. All receive each task and each cancel; the first one's messages are those
of the task. The ranks find each other by the variables that torchrun sets (RANK, WORLD_SIZE, MASTER_ADDR...), on the
loopback. None works without the others: whatever happens to one ends the task and the whole group.
"""

import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pusa.acceleration.decisions import Machine
from pusa.events import Step
from pusa.server.worker.engine_process import PUSA_ENGINE
from pusa.server.worker.executor import Child, ChildExecutor
from pusa.server.worker.messages import (
    LAST,
    Alive,
    CancelTask,
    Error,
    LoadFailed,
    Loading,
    MachineFound,
    Message,
    ModelReady,
    Task,
)

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 2.0
_LOOK_SECONDS = 0.5  # between two looks for a silent rank
_SETTLE_SECONDS = 0.3  # after the end of a rank, for news of the others: the one that was killed is the cause
_LOADING_STAGES = ("starting", "importing", "loading")


@dataclass(frozen=True)
class Placement:
    """Hold the number of ranks, their environment variables, and the machine as they find it."""

    ranks: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    machine: Machine | None = None


class LocalExecutor(ChildExecutor):
    """Run tasks in a process of this machine, or in a group of them.

    Args:
        model, loras: names to load, as in a request.
        target: ``module:name`` of the `pusa.server.worker.engine_process.Engine` to run.
        ranks: processes in the group.
        env: environment variables to set in each of them.
        place: finds `ranks` and further variables, in a thread, each time before the processes start.
        silent_seconds: time without a sign of life after which a rank of a group counts as hung.
        join_seconds: time in which all ranks must end a task once one of them has.
        limits: see `ChildExecutor`.
    """

    def __init__(
        self,
        model: str,
        loras: Sequence[str] = (),
        *,
        target: str = PUSA_ENGINE,
        ranks: int = 1,
        env: Mapping[str, str] | None = None,
        place: Callable[[], Placement] | None = None,
        silent_seconds: float = 120.0,
        join_seconds: float = 10.0,
        **limits: float,
    ) -> None:
        command = [sys.executable, "-m", "pusa.server.worker.engine_start", str(os.getpid()), target, model, *loras]

        def placement() -> Placement:
            found = Placement(ranks) if place is None else place()
            return replace(found, env={**(env or {}), **found.env})

        def new_group() -> "_Group":
            return _Group(command, model, placement, silent_seconds=silent_seconds, join_seconds=join_seconds)

        super().__init__(new_group, model, **limits)


class _Rank:
    """Listen to a process of a group, in a thread, and hold what it has reported.

    Attributes:
        steps: denoising steps that it has done of the running task.
        last: the message that ended its part of the task.
        loading: how far loading is; None once it is ready.
    """

    def __init__(
        self,
        number: int,
        world_size: int,
        process: "subprocess.Popen[bytes]",
        report: "Callable[[_Rank, Any], None]",
    ) -> None:
        self.number, self.process = number, process
        self.label = f"rank {number} of {world_size} (pid {process.pid})"
        self.heard_at = time.monotonic()
        self.loading: Loading | None = Loading("starting")
        self.steps = 0
        self.last: Message | None = None
        self._write_lock = threading.Lock()
        self.listener = threading.Thread(target=self._listen, args=(report,), name="pusa-rank", daemon=True)
        self.listener.start()

    def _listen(self, report: Callable[["_Rank", Any], None]) -> None:
        """Report each message, and None once the process has ended."""
        assert self.process.stdout is not None
        try:
            while True:
                report(self, pickle.load(self.process.stdout))
        except (EOFError, OSError, pickle.UnpicklingError):
            pass  # it has ended, perhaps in the middle of a message
        self.process.kill()
        self.process.wait()
        self.close_input()
        self.process.stdout.close()
        report(self, None)

    def send(self, command: Task | CancelTask) -> None:
        assert self.process.stdin is not None
        with self._write_lock:
            try:
                pickle.dump(command, self.process.stdin)
                self.process.stdin.flush()
            except (OSError, ValueError):
                logger.info("the child process has ended and takes no more commands")

    def close_input(self) -> None:
        assert self.process.stdin is not None
        with self._write_lock, suppress(OSError):  # nobody reads what is still in the buffer
            self.process.stdin.close()

    def describe_end(self) -> str:
        """Say in what way the process has ended, for a group of several."""
        code = self.process.wait()
        if code >= 0:
            return f"{self.label} ended with status {code}"
        hint = ", perhaps the system was out of memory" if -code == signal.SIGKILL else ""
        return f"{self.label} was killed by signal {-code} ({_signal_name(-code)}{hint})"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


class _Group(Child):
    """Start the processes of a group, in a thread that handles their messages until all have ended."""

    def __init__(
        self,
        command: Sequence[str],
        model: str,
        place: Callable[[], Placement],
        *,
        silent_seconds: float,
        join_seconds: float,
    ) -> None:
        super().__init__(model)
        self._command, self._place = command, place
        self._silent_seconds, self._join_seconds = silent_seconds, join_seconds
        self._ranks: list[_Rank] = []
        self._messages: queue.SimpleQueue[tuple[_Rank, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of starting and killing
        self._killed = False
        self._reason = ""  # for which the group has ended
        self._join_by: float | None = None  # when all ranks must have ended the task
        self._ended = threading.Event()
        # The thread starts the processes: Linux kills them when it ends, see `engine_start.die_with_parent`.
        self._thread = threading.Thread(target=self._run, name="pusa-group", daemon=True)
        self._thread.start()

    # ---- life --------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._start(self._place())
            self._handle_messages()
        except Exception as error:  # such as no memory for a new process
            logger.exception("the processes of %s cannot be started", self.state.model)
            self._reason = self._reason or f"{type(error).__name__}: {error}"
        self._kill()
        for rank in self._ranks:
            rank.listener.join()
        self._ended.set()
        self._mark_ended()

    def _start(self, placement: Placement) -> None:
        world_size = placement.ranks
        self.state = replace(self.state, world_size=world_size, machine=placement.machine)
        common = {**os.environ, **placement.env}
        if world_size > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            common |= address | {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        for number in range(world_size):
            env = common | ({"RANK": str(number), "LOCAL_RANK": str(number)} if world_size > 1 else {})
            with self._lock:
                if self._killed:
                    return
                # A session of its own: Ctrl-C in a terminal must reach the server alone, which then stops its jobs.
                process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True
                )
                self._ranks.append(_Rank(number, world_size, process, self._report))
        self.state = replace(self.state, pids=tuple(rank.process.pid for rank in self._ranks))

    def _kill(self) -> None:
        with self._lock:
            self._killed = True
            for rank in self._ranks:
                rank.process.kill()

    def kill(self, reason: str | None = None) -> None:
        self._reason = self._reason or reason or ""
        super().kill(reason)

    def end(self) -> None:
        """Close the inputs, which makes the processes end by themselves; kill them after a moment."""
        self._is_ending = True
        with self._lock:
            ranks = list(self._ranks)
            self._killed = self._killed or not ranks
        for rank in ranks:
            rank.close_input()
        if not self._ended.wait(_CLOSE_SECONDS):
            self._kill()
        self._thread.join(_CLOSE_SECONDS)

    def send(self, command: Task | CancelTask) -> None:
        if isinstance(command, Task):
            for rank in self._ranks:
                rank.steps, rank.last = 0, None
        for rank in self._ranks:
            rank.send(command)

    def describe_end(self) -> str:
        self._ended.wait()
        if self._reason:
            return self._reason
        if len(self._ranks) == 1:
            code = self._ranks[0].process.wait()
            if code >= 0:
                return f"the process that holds the model ended with status {code}"
            hint = " (perhaps the system was out of memory)" if -code == signal.SIGKILL else ""
            return f"the process that holds the model was ended by {_signal_name(-code)}{hint}"
        return f"the {len(self._ranks)} processes that hold the model were ended"

    def describe_silence(self, seconds: float) -> str:
        if len(self._ranks) == 1:
            return super().describe_silence(seconds)
        behind, ahead = min(self._ranks, key=lambda r: r.steps), max(self._ranks, key=lambda r: r.steps)
        if behind.steps < ahead.steps and ahead.last is None:
            steps = f"it has done {behind.steps} steps, others {ahead.steps}"
            return f"{behind.label} has not answered for {seconds:g} s: {steps}"
        where = ", ".join(f"rank {rank.number} after {rank.steps} steps" for rank in self._ranks)
        return f"no rank of {len(self._ranks)} has reported anything for {seconds:g} s ({where})"

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _report(self, rank: _Rank, message: Any) -> None:
        self._messages.put((rank, message))

    def _handle_messages(self) -> None:
        """Handle the messages of all ranks until one of them has ended."""
        looked_at = time.monotonic()
        while self._ranks:
            wait_seconds = _LOOK_SECONDS
            if self._join_by is not None:
                wait_seconds = max(0.0, min(wait_seconds, self._join_by - time.monotonic()))
            try:
                rank, message = self._messages.get(timeout=wait_seconds)
            except queue.Empty:
                pass
            else:
                rank.heard_at = time.monotonic()
                if message is None:
                    self._handle_end(rank)
                    return
                self._handle(rank, message)
            now = time.monotonic()
            if now - looked_at > 2 * _LOOK_SECONDS + 1:  # this process itself stood still: it has heard nobody
                for rank in self._ranks:
                    rank.heard_at = now
            looked_at = now
            self._look_for_silence(now)
            if self._join_by is not None and now >= self._join_by:
                self._end_task_without_some()

    def _handle(self, rank: _Rank, message: Any) -> None:
        match message:
            case Alive():
                return
            case MachineFound():
                if rank.number == 0:
                    self._receive(message)
            case Loading() | ModelReady():
                self._handle_loading(rank, message)
            case LoadFailed(error, code):
                self._receive(LoadFailed(self._named(rank, error), code))
                self._reason = self._reason or self._named(rank, error)
                if len(self._ranks) > 1:
                    self._kill()  # the others wait for it
            case _:
                if isinstance(message, Step) and message.stage == "denoise":
                    rank.steps += 1
                if isinstance(message, LAST):
                    rank.last = message
                    self._handle_last()
                elif rank.number == 0:
                    self._receive(message)

    def _named(self, rank: _Rank, text: str) -> str:
        return f"{rank.label}: {text}" if len(self._ranks) > 1 else text

    def _handle_loading(self, rank: _Rank, message: Loading | ModelReady) -> None:
        """Show the slowest rank; the group is ready when all are."""
        rank.loading = message if isinstance(message, Loading) else None
        unready = [rank.loading for rank in self._ranks if rank.loading is not None]
        if not unready:
            self._receive(message)
        else:
            self._receive(min(unready, key=_loading_order))

    def _handle_last(self) -> None:
        """End the task when all ranks have ended it; after the first one the others have `join_seconds`."""
        lasts = [rank.last for rank in self._ranks]
        if all(lasts):
            self._join_by = None
            self._receive(self._result())
        elif self._join_by is None and (lasts[0] is not None or any(isinstance(last, Error) for last in lasts)):
            self._join_by = time.monotonic() + self._join_seconds

    def _result(self) -> Message:
        """Return the first rank's last message, or the error of another one that explains it better."""
        first = self._ranks[0].last
        assert first is not None
        if isinstance(first, Error) and first.code == "internal_error":  # perhaps of a connection that another closed
            first = self._error_of_others() or first
        return first

    def _error_of_others(self) -> Error | None:
        for rank in self._ranks[1:]:
            if isinstance(rank.last, Error) and rank.last.code != "internal_error":
                return self._named_error(rank, rank.last)
        return None

    def _named_error(self, rank: _Rank, error: Error) -> Error:
        return replace(error, message=self._named(rank, error.message), latents=None)

    def _end_task_without_some(self) -> None:
        """End a task that some ranks do not end, as they wait for those that have; kill the group."""
        self._join_by = None
        late = next(rank for rank in self._ranks if rank.last is None)
        logger.warning("%s does not end its task: the group is ended", late.label)
        ended = [rank for rank in self._ranks if rank.last is not None]
        if ended[0].number == 0:
            message = self._result()
        else:
            message = next(self._named_error(rank, rank.last) for rank in ended if isinstance(rank.last, Error))
        self.kill(f"{late.label} did not end its task with the others")
        self._receive(message)

    def _look_for_silence(self, now: float) -> None:
        if len(self._ranks) == 1 or self._killed:
            return
        rank = min(self._ranks, key=lambda rank: rank.heard_at)
        if now - rank.heard_at > self._silent_seconds:
            self.kill(f"{rank.label} has not answered for {self._silent_seconds:g} s")

    def _handle_end(self, rank: _Rank) -> None:
        """Find the rank that is the cause: one that was killed, rather than one that ended because of it."""
        ended = [rank]
        end = time.monotonic() + (_SETTLE_SECONDS if len(self._ranks) > 1 and not self._killed else 0.0)
        while (left := end - time.monotonic()) > 0:
            with suppress(queue.Empty):
                other, message = self._messages.get(timeout=left)
                if message is None:
                    ended.append(other)
                elif isinstance(message, LAST):
                    other.last = message
        if len(self._ranks) == 1 or self._is_ending or self._killed:
            return
        cause = next((rank for rank in ended if rank.process.wait() < 0), None)
        reason = (cause or rank).describe_end()
        logger.error("%s: the group is ended", reason)
        self.kill(reason)
        first = self._ranks[0].last
        if self._join_by is not None and first is not None and not (cause and isinstance(first, Error)):
            self._receive(self._result())


def _loading_order(loading: Loading) -> tuple[int, float]:
    known = loading.stage in _LOADING_STAGES
    return _LOADING_STAGES.index(loading.stage) if known else len(_LOADING_STAGES), loading.percent or 0.0


def _free_port() -> int:
    """Find a free port of the loopback; the first rank listens there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
