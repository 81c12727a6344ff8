"""Release the threads that computed for one thread, so that they do not slow another one down."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from pusa.events import Done, Report, as_events
from pusa.generate.waves import _Call
from pusa.threads import release_threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only GNU OpenMP keeps threads for each thread")


@pytest.fixture
def new_threads() -> Iterator[Callable[[], int]]:
    """Compute in two threads, and count those that this process has beyond those of now."""
    before_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    release_threads()
    before = set(os.listdir("/proc/self/task"))

    def compute_and_count() -> int:
        torch.ones(2**21).add_(1)
        return len(set(os.listdir("/proc/self/task")) - before)

    yield compute_and_count
    release_threads()
    torch.set_num_threads(before_threads)


def test_a_thread_computes_as_before_after_it_has_released_its_threads(new_threads: Callable[[], int]) -> None:
    assert new_threads() == 1
    at_work = set(os.listdir("/proc/self/task"))
    release_threads()
    assert len(at_work - set(os.listdir("/proc/self/task"))) >= 1
    assert new_threads() == 1


def test_while_a_run_computes_nothing_is_kept_for_the_thread_that_waits_for_it(new_threads: Callable[[], int]) -> None:
    """Keep both together from being more than the cores of a small machine: every operation would wait for them."""
    assert new_threads() == 1
    seen: list[int] = []

    def run(report: Report) -> None:
        seen.append(new_threads())
        report(Done({}))

    list(as_events(run))
    assert seen == [2]  # the run's own thread, and one that computes with it


def test_frames_that_are_decoded_between_steps_and_the_steps_take_turns_with_their_threads(
    new_threads: Callable[[], int],
) -> None:
    seen: list[int] = []

    def steps(hand_over: Callable[[int], None]) -> None:
        for number in range(3):
            seen.append(new_threads())
            hand_over(number)

    for _ in _Call(steps):
        seen.append(new_threads())
    assert seen == [2] * 6


def test_without_torch_there_is_nothing_to_release() -> None:
    code = "import sys; from pusa.threads import release_threads; release_threads(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
