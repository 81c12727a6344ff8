"""Run processes that may crash. This file must not import torch: the processes import it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pusa.data.workers import Failure, Workers


def counted(task: Any) -> Iterator[Any]:
    """A task is how far to count; "kill" and "raise" do what they say after the first number."""
    yield 0
    if task == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise ValueError("so it is\nin two lines")
    yield from range(1, task)


@pytest.mark.parametrize("count", [0, 2])
def test_a_task_that_fails_tells_why_and_the_others_go_on(count):
    with Workers(counted, count) as workers:
        results = list(workers.run([3, "raise", 2]))
    assert [r for t, r in results if t == 3] == [0, 1, 2]
    assert [r for t, r in results if t == 2] == [0, 1]
    assert [r for t, r in results if t == "raise"] == [0, Failure("so it is")]


def test_a_process_that_dies_costs_one_task():
    with Workers(counted, 1) as workers:
        results = list(workers.run([2, "kill", 3]))
        later = [result for _, result in workers.run([2])]
    assert [r for t, r in results if t == 3] == [0, 1, 2]
    [first, failure] = [r for t, r in results if t == "kill"]
    assert first == 0
    assert "ended by SIGKILL, perhaps for want of memory" in failure.reason
    assert later == [0, 1]


def test_tasks_are_taken_when_somebody_is_free():
    taken = []

    def tasks() -> Iterator[int]:
        for number in range(6):
            taken.append(number)
            yield 1

    with Workers(counted, 2) as workers:
        results = workers.run(tasks())
        next(results)
        assert len(taken) < 4
        assert len(list(results)) == 5


def endless(task: Any) -> Iterator[Any]:
    yield os.getpid()
    while True:
        yield bytes(1 << 20)


def test_processes_end_with_their_parent():
    code = (
        "import os, signal\nfrom pusa.data.workers import Workers\nfrom test_data_workers import endless\n"
        "workers = Workers(endless, 1)\n"
        "print(next(workers.run([0]))[1], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    program = [sys.executable, "-c", code]
    out = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}).stdout
    worker = int(out)
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("a worker outlived its parent")
