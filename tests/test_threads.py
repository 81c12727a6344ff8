"""Threads that computed for one thread do not slow another one down."""

import subprocess
import sys

import psutil
import pytest
import torch

from pusa.events import Done, as_events
from pusa.generate.waves import _Call
from pusa.threads import release_threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only GNU OpenMP keeps threads for each thread")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    release_threads()


def compute() -> int:
    """Compute in two threads; return the number of threads that this process has then."""
    torch.ones(2**21).add_(1)
    return count()


def count() -> int:
    return psutil.Process().num_threads()


def test_a_thread_computes_as_before_after_it_has_released_its_threads() -> None:
    release_threads()
    alone = count()
    assert compute() == alone + 1
    release_threads()
    assert count() == alone
    assert compute() == alone + 1


def test_while_a_run_computes_nothing_is_kept_for_the_thread_that_waits_for_it() -> None:
    """All of both together would be more than the cores of a small machine, and every operation would wait for them."""
    release_threads()
    alone = count()
    assert compute() == alone + 1
    seen: list[int] = []

    def run(report):
        seen.append(compute())
        report(Done({}))

    list(as_events(run))
    assert seen == [alone + 2]  # the run's own thread, and one that computes with it


def test_frames_that_are_decoded_between_steps_and_the_steps_take_turns_with_their_threads() -> None:
    release_threads()
    alone = count()
    seen: list[int] = []

    def steps(hand_over):
        for number in range(3):
            seen.append(compute())
            hand_over(number)

    for _ in _Call(steps):
        seen.append(compute())
    assert seen == [alone + 2] * 6


def test_without_torch_there_is_nothing_to_release() -> None:
    code = "import sys; from pusa.threads import release_threads; release_threads(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
