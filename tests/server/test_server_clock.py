"""A clock that jumps ahead removes nothing; one that is set back is followed."""

from pathlib import Path

import pytest
from queue_samples import new_job

from pusa.server.clock import TrustedClock, steady_seconds
from pusa.server.jobs.housekeeping import Housekeeping
from pusa.server.jobs.queue import JobQueue
from pusa.server.jobs.store import FileStore

DAY = 86_400.0


class Machine:
    """Its clocks; `jump` sets the wall clock alone."""

    def __init__(self) -> None:
        self.steady, self.offset = 500.0, 1_000_000.0

    def wall(self) -> float:
        return self.steady + self.offset

    def seconds(self) -> float:
        return self.steady

    def jump(self, seconds: float) -> None:
        self.offset += seconds


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def clock(machine: Machine) -> TrustedClock:
    return TrustedClock(machine.wall, machine.seconds)


def test_time_that_passes_is_told(machine, clock):
    for seconds in (0.0, 1.0, 30 * DAY):
        machine.steady += seconds
        assert clock() == machine.wall()
    assert steady_seconds() <= steady_seconds()


def test_a_jump_ahead_is_not_followed_and_said(machine, clock, caplog):
    before = clock()
    machine.jump(9 * DAY)
    machine.steady += 10.0
    assert clock() == before + 10.0
    machine.steady += 10.0
    assert clock() == before + 20.0
    assert caplog.text.count("the clock jumped 777600 s ahead: what has expired by it is kept for 24.0 hours") == 1
    machine.jump(-9 * DAY)
    assert clock() == machine.wall()


def test_a_correction_ahead_is_followed_when_it_has_lasted_a_day(machine, clock):
    machine.jump(9 * DAY)
    for _ in range(24):
        assert clock() < machine.wall() - 8 * DAY
        machine.steady += 3600.0
    clock()
    assert clock() == machine.wall()


def test_a_clock_that_goes_on_jumping_is_never_followed(machine, clock):
    for _ in range(50):
        machine.jump(DAY)
        machine.steady += 7200.0
        assert clock() == 500.0 + machine.steady - 500.0 + 1_000_000.0


def test_a_clock_that_is_set_back_is_followed_at_once(machine, clock):
    machine.jump(-3 * DAY)
    assert clock() == machine.wall()


def test_small_steps_are_no_jumps(machine, clock, caplog):
    machine.jump(40.0)
    assert machine.wall() - 40.0 == clock()
    assert not caplog.text


# ---- what housekeeping makes of it ----


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "files"))


def kept_jobs(tmp_path: Path, machine: Machine, files: FileStore, count: int) -> JobQueue:
    queue = JobQueue(f"sqlite:///{tmp_path / 'jobs.sqlite'}", clock=machine.wall)
    for _ in range(count):
        queue.submit(new_job())
        job = queue.claim("one", lease_seconds=60)
        queue.finish(job, results={}, timings={}, expires_at=machine.wall() + 7 * DAY)
    return queue


def test_a_jump_of_nine_days_removes_no_result(tmp_path, machine, clock, files):
    queue = kept_jobs(tmp_path, machine, files, 3)
    lost = "inputs/video_" + "0" * 32 + "/0.png"
    files.put_bytes(lost, b"x")
    keeper = Housekeeping(queue, files, clock=clock, steady=machine.seconds)
    machine.steady += 3600.0
    machine.jump(9 * DAY)
    for _ in range(3):
        assert keeper.round().expired == 0
        machine.steady += 600.0
    assert len(queue.page()[0]) == 3
    machine.jump(-9 * DAY)
    machine.steady += 7 * DAY
    assert keeper.round().expired == 3
    queue.close()


def test_a_start_with_a_wrong_clock_removes_nothing_in_the_first_minutes_and_little_after(tmp_path, machine, files):
    queue = kept_jobs(tmp_path, machine, files, 5)
    machine.jump(9 * DAY)
    late = TrustedClock(machine.wall, machine.seconds)
    keeper = Housekeeping(queue, files, clock=late, steady=machine.seconds, most_expired=2)
    assert keeper.round().expired == 0
    machine.steady += 299.0
    assert keeper.round().expired == 0
    machine.steady += 1.0
    assert [keeper.round().expired for _ in range(4)] == [2, 2, 1, 0]
    queue.close()
