"""Making the videos of a run: claims, failures, stops, workers that die."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_samples import GreyMaker, make_run, write_grey

from pusa.evaluation.runs import Item, RunFolder, make_videos
from pusa.evaluation.runs.claims import Claims
from pusa.evaluation.runs.make import TooManyFailuresError
from pusa.events import Event, Note, Step
from pusa.worker_names import worker_name


def test_videos_are_made_once_and_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    events: list[Event] = []
    summary = make_videos(run, GreyMaker(), report=events.append)
    assert (summary.total, summary.made, summary.made_here, summary.failed) == (3, 3, 3, ())
    assert sorted(path.name for path in run.videos.iterdir()) == ["clip 0.mp4", "clip 1.mp4", "clip 2.mp4"]
    assert not list(run.parts.iterdir())
    assert not list(run.claims.iterdir())
    record = run.record_of(run.items[1])
    assert record is not None
    assert (record.name, record.seed, record.attempts) == ("clip 1", run.items[1].request.seed, 1)
    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.step, step.steps, step.stage) for step in steps][-1] == (3, 3, "videos")

    again = make_videos(RunFolder.open(tmp_path), maker := GreyMaker())
    assert maker.made == []
    assert (again.made, again.made_here) == (3, 0)


def test_one_bad_item_does_not_stop_the_rest(tmp_path: Path) -> None:
    run = make_run(tmp_path)

    def fail(item: Item) -> None:
        if item.name == "clip 0":
            raise RuntimeError("the picture is broken")

    notes: list[Event] = []
    summary = make_videos(run, maker := GreyMaker(fail), attempts=2, report=notes.append)
    assert maker.made == ["clip 0", "clip 1", "clip 2", "clip 0"]
    assert summary.made == 2
    assert [(failure.name, failure.error, failure.attempts) for failure in summary.failed] == [
        ("clip 0", "the picture is broken", 2)
    ]
    assert sum(isinstance(event, Note) for event in notes) == 2

    make_videos(run, maker := GreyMaker(), attempts=2)
    assert maker.made == []  # it has failed as often as it is tried
    run.forget_failures()
    assert make_videos(run, GreyMaker(), attempts=2).made == 3
    assert not run.failures()
    assert not run.missing()


def test_a_video_that_is_not_what_was_asked_for_is_a_failure(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1)

    class Short:
        def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
            write_grey(item, output, frames=4)

    summary = make_videos(run, Short(), attempts=1)
    assert summary.failed[0].error == "the video is not what was asked for: it has 4 frames and not 5"
    assert not list(run.videos.iterdir())
    assert not list(run.parts.iterdir())


def test_a_cause_that_is_not_the_items_ends_the_call(tmp_path: Path) -> None:
    def fail(item: Item) -> None:
        raise RuntimeError("there is no such model")

    with pytest.raises(TooManyFailuresError, match=r"the first 3 videos failed.*no such model"):
        make_videos(make_run(tmp_path, 5), maker := GreyMaker(fail), give_up_after=3)
    assert len(maker.made) == 3


def test_a_full_disk_ends_the_call_and_leaves_no_rest(tmp_path: Path) -> None:
    run = make_run(tmp_path)

    def fill(item: Item) -> None:
        if item.name == "clip 1":
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        make_videos(run, GreyMaker(fill))
    assert [path.name for path in run.videos.iterdir()] == ["clip 0.mp4"]
    assert not run.failures()
    assert not list(run.claims.iterdir())
    assert not list(run.parts.iterdir())


def test_a_place_that_cannot_be_written_ends_the_call_before_any_work(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.videos.rmdir()
    with pytest.raises(PermissionError, match="videos"):
        make_videos(run, maker := GreyMaker())
    assert maker.made == []
    assert not run.failures()


def test_a_stop_ends_the_call_between_two_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    begun = threading.Event()

    class Slow:
        def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
            begun.set()
            while not stop():
                time.sleep(0.01)

    summary = make_videos(run, Slow(), stop=begun.is_set)
    assert summary.is_stopped
    assert summary.made == 0
    assert not run.failures()
    assert not list(run.claims.iterdir())
    assert not list(run.parts.iterdir())


def test_two_workers_never_make_the_same_item(tmp_path: Path) -> None:
    run = make_run(tmp_path, 12)
    together = [GreyMaker(lambda item: time.sleep(0.01)) for _ in range(4)]
    calls = [threading.Thread(target=make_videos, args=(RunFolder.open(tmp_path), together[n : n + 2])) for n in (0, 2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert sorted(name for maker in together for name in maker.made) == sorted(item.name for item in run.items)
    assert not run.problems()


def test_shards_divide_the_items(tmp_path: Path) -> None:
    run = make_run(tmp_path, 20)
    made = []
    for shard in ((1, 3), (2, 3), (3, 3)):
        make_videos(run, maker := GreyMaker(), shard=shard)
        assert 3 <= len(maker.made) <= 11
        made += maker.made
    assert sorted(made) == sorted(item.name for item in run.items)
    with pytest.raises(ValueError, match="shard 4/3"):
        make_videos(run, GreyMaker(), shard=(4, 3))


def test_a_silent_worker_loses_its_item_and_leaves_the_result_of_another_alone(tmp_path: Path) -> None:
    """A worker of another machine is silent for longer than its lease."""
    run = make_run(tmp_path, 1)
    item = run.items[0]
    lock = run.claims / f"{item.id}.lock"
    lock.write_text("elsewhere/boot/7-1.00/0 token\n")
    with Claims(run.claims, lease_seconds=60) as claims:
        assert claims.take(item.id) is None
        os.utime(lock, (time.time() - 61,) * 2)
        claim = claims.take(item.id)
        assert claim is not None
        assert claim.took_over
        lock.write_text("elsewhere/boot/7-1.00/0 another\n")  # taken over in turn
        claim.renew()
        assert claim.is_lost
    assert lock.exists()  # it is not this worker's any more


def test_a_worker_that_sleeps_past_its_lease_leaves_the_video_of_another_alone(tmp_path: Path) -> None:
    """It finds its item taken over when it has finished, or when its files have been cleared away."""
    run = make_run(tmp_path, 2)
    quick = make_run(tmp_path / "quick", 2)
    make_videos(quick, GreyMaker())

    class Sleepy:
        def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
            write_grey(item, output)
            (run.claims / f"{item.id}.lock").unlink()
            shutil.copy(quick.video_of(item), part := run.parts / "part.mp4")
            run.commit(item, part, seconds=1.0, worker="elsewhere")
            if item.name == "clip 1":
                raise FileNotFoundError("the folder has been cleared away")

    summary = make_videos(run, Sleepy())
    assert (summary.made, summary.made_here, summary.failed) == (2, 0, ())
    records = [run.record_of(item) for item in run.items]
    assert [(record.worker, record.attempts) for record in records if record] == [("elsewhere", 1)] * 2
    assert not run.failures()
    assert not run.problems()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00"])
def test_a_damaged_claim_ends_with_its_lease(tmp_path: Path, content: bytes) -> None:
    run = make_run(tmp_path, 1)
    lock = run.claims / f"{run.items[0].id}.lock"
    lock.write_bytes(content)
    os.utime(lock, (time.time() - 61,) * 2)
    with Claims(run.claims) as claims:
        assert claims.take(run.items[0].id) is not None


def test_progress_counts_the_videos_that_are_there(tmp_path: Path) -> None:
    """Not the records of those that have been removed."""
    run = make_run(tmp_path)
    make_videos(run, GreyMaker())
    run.video_of(run.items[0]).unlink()
    events: list[Event] = []
    make_videos(run, GreyMaker(), report=events.append)
    assert [event.step for event in events if isinstance(event, Step)] == [2, 3]


def test_an_item_that_kills_its_process_is_left_out(tmp_path: Path) -> None:
    """The dead are noticed at once where they ran on this machine, long before their lease ends."""
    run = make_run(tmp_path, 2)
    machine = worker_name().rpartition("/")[0].rpartition("/")[0]
    dead = f"{machine}/999999999-1.00/0 token\n"
    (run.claims / f"{run.items[0].id}.lock").write_text(dead)
    run.fail(run.items[0], "its process has ended")  # and once more before
    summary = make_videos(run, maker := GreyMaker(), attempts=2)
    assert maker.made == ["clip 1"]
    assert summary.failed[0].attempts == 2
    assert "has ended" in summary.failed[0].error
