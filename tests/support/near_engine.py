"""Run the real engine in the process of the test, which has imported the libraries: a new process takes 10 s for that.

What the process of its own adds, from its start to its crash, is in tests/server/worker and test_server_service.py.
"""

import threading
from collections.abc import Iterator

from pusa.server.worker.engine_process import PusaEngine
from pusa.server.worker.executor import ExecutorState
from pusa.server.worker.messages import Message, Task


class NearExecutor:
    """Run tasks by `PusaEngine` in this process."""

    def __init__(self, model: str) -> None:
        self._engine, self._cancelled = PusaEngine(model), threading.Event()
        machine = self._engine.find_machine()
        self.state = ExecutorState(stage="ready", percent=100.0, model=model, machine=machine)

    def start(self) -> None:
        pass

    def close(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        self._cancelled.set()

    def run(self, task: Task) -> Iterator[Message]:
        self._cancelled.clear()
        yield from self._engine.run(task, self._cancelled.is_set)
