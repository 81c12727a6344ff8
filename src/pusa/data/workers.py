"""Run slow tasks that may crash in worker processes; a crash costs one task.

A worker holds at most one result that the caller has not read yet, so memory does not grow with the number of tasks.
Workers end with their parent, even if that is killed, because their pipe closes. Unlike those of `multiprocessing` they
are new interpreters that import only what they need: no torch, no forked locks, no ``__main__`` guard in scripts.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from pusa.errors import first_line

T = TypeVar("T")

_END = None
_PROGRAM = "import sys; from pusa.data.workers import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True)
class Failure:
    """Explain in one line why a task has no further results."""

    reason: str


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(Generic[T]):
    """Run ``work(task)``, a generator function of a module, on tasks in `count` processes; 0: in this process.

    On Windows, where processes do not inherit pipes, all tasks run in this process.

        with Workers(decode, 4) as workers:
            for task, result in workers.run(tasks):
                ...

    Tasks and results are pickled. Processes start when the first tasks need them.
    """

    def __init__(self, work: Callable[[T], Iterable[Any]], count: int) -> None:
        if count < 0:
            raise ValueError(f"workers={count} is below 0")
        self._work = work
        self._count = count if os.name == "posix" else 0
        self._idle: list[tuple[Connection, subprocess.Popen[bytes]]] = []
        self._busy: dict[Connection, tuple[subprocess.Popen[bytes], T]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        workers = [*self._idle, *((connection, process) for connection, (process, _) in self._busy.items())]
        self._idle, self._busy = [], {}
        for connection, process in workers:
            connection.close()
            process.kill()
        for _, process in workers:
            process.wait()

    def run(self, tasks: Iterable[T]) -> Generator[tuple[T, Any], None, None]:
        """Yield (task, result) as results come, and (task, `Failure`) as the last of a task that failed."""
        if self._count == 0:
            for task in tasks:
                for result in _results(self._work, task):
                    yield task, result
            return
        waiting = iter(tasks)
        while True:
            while len(self._busy) < self._count:
                try:
                    task = next(waiting)
                except StopIteration:
                    break
                self._begin(task)
            if not self._busy:
                return
            for connection in wait(list(self._busy)):
                assert isinstance(connection, Connection)
                process, task = self._busy[connection]
                try:
                    result = connection.recv()
                except (EOFError, OSError):  # the worker died
                    del self._busy[connection]
                    connection.close()
                    yield task, Failure(_describe_exit(process.wait()))
                    continue
                if result is _END:
                    del self._busy[connection]
                    self._idle.append((connection, process))
                else:
                    yield task, result

    def _begin(self, task: T) -> None:
        while self._idle:
            connection, process = self._idle.pop()
            try:
                connection.send(task)
            except (BrokenPipeError, ConnectionResetError):  # the worker died while idle
                connection.close()
                process.wait()
            else:
                self._busy[connection] = process, task
                return
        connection, child_connection = Pipe()
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(child_connection.fileno())],
            pass_fds=[child_connection.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # the parent alone handles Ctrl-C
        )
        child_connection.close()  # so that the pipe closes when the worker ends
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died, which `recv` reports
            connection.send(self._work)
            connection.send(task)
        self._busy[connection] = process, task


def serve(descriptor: int) -> None:
    """Run the worker process: read tasks from an inherited pipe and send results until the parent ends."""
    connection = Connection(descriptor)
    try:
        work = connection.recv()
        while True:
            for result in _results(work, connection.recv()):
                connection.send(result)
            connection.send(_END)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent ended
        return


def _results(work: Callable[[T], Iterable[Any]], task: T) -> Iterator[Any]:
    try:
        yield from work(task)
    except (ValueError, OSError) as error:  # raised by media readers with a readable message
        yield Failure(first_line(error))
    except Exception as error:
        yield Failure(f"{type(error).__name__}: {first_line(error)}")


def _describe_exit(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        memory = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"the process that read it was ended by {name}{memory}"
    return f"the process that read it ended with code {code}"
