"""Makers that run an executor of the server's worker: checkpoints, errors, readiness, stops."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from run_samples import make_items, make_run, write_grey

from pusa.evaluation.runs import make_videos
from pusa.evaluation.runs.ray import ExecutorMaker
from pusa.events import Checkpoint, Done, Event, Note
from pusa.server.worker.executor import ExecutorState
from pusa.server.worker.messages import Cancelled, Error, Message, Task


class PlayedExecutor:
    """Play the part of an executor: it is lost in its first task, after two checkpoints that arrive at once.

    Attributes:
        found: what each task found as its checkpoint.
    """

    def __init__(self, stages: Iterator[str], *, waits: bool = False) -> None:
        self.state = ExecutorState(stage="stopped")
        self.found: list[bytes | None] = []
        self._stages, self._waits = stages, waits
        self._cancelled = threading.Event()

    def start(self) -> None:
        self.state = replace(self.state, stage=next(self._stages), error="ValueError: no such model")

    def run(self, task: Task) -> Iterator[Message]:
        self.found.append(task.checkpoint.read_bytes() if task.checkpoint.exists() else None)
        if self._waits:
            assert self._cancelled.wait(20)
            yield Cancelled()
            return
        if len(self.found) == 1:
            task.checkpoint.write_bytes(b"step 8")
            yield Checkpoint(task.checkpoint, 4)
            yield Checkpoint(task.checkpoint, 8)
            yield Error("worker_lost", "its node has ended", retry=True)
            return
        item = next(item for item in make_items(2) if item.id == task.job_id)
        write_grey(item, task.folder / "made.mp4")
        yield Done({"video": task.folder / "made.mp4"})

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None: ...


def test_a_lost_executor_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1)
    executor = PlayedExecutor(iter(["starting", "loading", "ready"]))
    notes: list[Event] = []
    summary = make_videos(run, ExecutorMaker(executor), report=notes.append, poll_seconds=0.01)
    assert (summary.made, executor.found) == (1, [None, b"step 8"])
    messages = [event.message for event in notes if isinstance(event, Note)]
    assert messages == ["clip 0: its node has ended (attempt 1 of 3: it is tried again later)"]
    assert not list(run.parts.iterdir())


def test_a_model_that_never_loads_is_an_error_and_no_item_fails(tmp_path: Path) -> None:
    run = make_run(tmp_path, 2)
    executor = PlayedExecutor(iter(["starting", "failed"] * 6))
    with pytest.raises(RuntimeError, match="cannot be loaded: ValueError: no such model"):
        make_videos(run, ExecutorMaker(executor), poll_seconds=0.01)
    assert executor.found == []
    assert not run.failures()


def test_a_stop_cancels_the_task(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1)
    executor = PlayedExecutor(iter(["ready"]), waits=True)
    summary = make_videos(run, ExecutorMaker(executor), stop=lambda: bool(executor.found), poll_seconds=0.01)
    assert summary.is_stopped
    assert not run.failures()
