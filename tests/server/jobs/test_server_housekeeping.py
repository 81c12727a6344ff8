"""Test housekeeping: it deletes expired jobs with their files and old files that no row names, and nothing in use."""

import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from queue_samples import Clock, new_job

from pusa.server.jobs.housekeeping import (
    Housekeeping,
    HousekeepingCounts,
    check_space,
    expire,
    remove_files,
    sweep_orphans,
    sweep_scratch,
)
from pusa.server.jobs.queue import Job, JobQueue, new_id
from pusa.server.jobs.store import FileStore, StorageFullError


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.now = time.time()  # the age of files is theirs
    return clock


@pytest.fixture
def queue(tmp_path: Path, clock: Clock) -> Iterator[JobQueue]:
    queue = JobQueue(f"sqlite:///{tmp_path / 'jobs.sqlite'}", clock=clock)
    yield queue
    queue.close()


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "files"))


def keys(files: FileStore) -> set[str]:
    return {key for key, _ in files.keys("")} - {"queue-identity"}


def completed(queue: JobQueue, files: FileStore, clock: Clock, *, keep_seconds: float | None, **changes: Any) -> Job:
    id = new_id()
    uploaded = f"inputs/{id}/0.png"
    files.put_bytes(uploaded, b"image")
    queue.submit(new_job(id=id, inputs=(uploaded,), **changes))
    job = queue.claim("one", lease_seconds=60)
    video = f"results/{id}/1/video.mp4"
    for key in (video, f"checkpoints/{id}/1.safetensors", f"previews/{id}.webp"):
        files.put_bytes(key, b"x")
    expires_at = None if keep_seconds is None else clock.now + keep_seconds
    queue.finish(job, results={"video": video}, timings={}, expires_at=expires_at)
    return queue.get(id)


def test_expired_jobs_go_with_all_their_files_and_others_stay(queue, files, clock):
    old = completed(queue, files, clock, keep_seconds=10)
    kept = completed(queue, files, clock, keep_seconds=None)
    failed, _ = queue.submit(new_job())
    queue.fail(queue.claim("one", lease_seconds=60), "x", "x", retry=False)
    assert expire(queue, files, now=clock.now + 9, keep_seconds=100) == 0
    assert expire(queue, files, now=clock.now + 10, keep_seconds=None) == 1
    assert queue.get(old.id) is None
    assert not [key for key in keys(files) if old.id in key]
    assert files.exists(kept.results["video"])
    assert expire(queue, files, now=clock.now + 99, keep_seconds=100) == 0
    assert expire(queue, files, now=clock.now + 101, keep_seconds=100) == 1
    assert queue.get(failed.id) is None
    assert queue.get(kept.id) == kept


def test_an_input_that_another_job_uses_outlives_its_job(queue, files, clock):
    old = completed(queue, files, clock, keep_seconds=10)
    remix, _ = queue.submit(new_job(inputs=(*old.inputs, old.results["video"]), parent=old.id))
    assert expire(queue, files, now=clock.now + 11, keep_seconds=None) == 1
    assert keys(files) == {*old.inputs, old.results["video"]}
    queue.delete(remix.id)
    remove_files(queue, files, [old])
    assert keys(files) == set()


def test_many_jobs_expire_at_once(queue, files, clock, monkeypatch):
    monkeypatch.setattr(queue, "expired", partial(queue.expired, limit=3))  # more than are looked up at once
    for _ in range(7):
        queue.cancel(queue.submit(new_job())[0].id)
    assert expire(queue, files, now=clock.now + 11, keep_seconds=10) == 7
    assert queue.page() == ([], False)


def test_only_old_files_without_a_job_are_orphans(queue, files, clock):
    job = completed(queue, files, clock, keep_seconds=None)
    waiting, _ = queue.submit(new_job())
    unfinished = f"previews/{waiting.id}.webp"
    files.put_bytes(unfinished, b"x")
    nobody = new_id()
    lost = {f"inputs/{nobody}/0.png", f"results/{nobody}/2/video.mp4", f"previews/{nobody}.webp"}
    late = f"results/{job.id}/7/video.mp4"  # of an attempt that lost its lease
    strangers = {"backup/video.mp4", "inputs/readme.txt", "inputs/video_1/0.png", "results-old/a.mp4"}
    for key in (*lost, late, *strangers):
        files.put_bytes(key, b"x")

    assert sweep_orphans(queue, files, now=clock.now, older_than_seconds=3600) == 0
    gone = {*lost, late, f"checkpoints/{job.id}/1.safetensors", f"previews/{job.id}.webp"}
    before = keys(files)
    assert sweep_orphans(queue, files, now=clock.now + 3700, older_than_seconds=3600) == len(gone)
    assert before - keys(files) == gone
    assert files.exists(unfinished)
    assert strangers < keys(files)


def test_a_submit_beside_the_sweep_keeps_its_files(queue, files, clock, monkeypatch):
    id = new_id()
    uploaded = f"inputs/{id}/0.png"
    files.put_bytes(uploaded, b"image")  # on disk, its row not yet
    assert sweep_orphans(queue, files, now=clock.now + 60, older_than_seconds=3600) == 0

    # And however slow its client: the row that is committed while the sweep looks is seen by it.
    listed = files.keys

    def then_submitted(prefix: str = "") -> Any:
        yield from listed(prefix)
        if prefix == "inputs":
            queue.submit(new_job(id=id, inputs=(uploaded,)))

    monkeypatch.setattr(files, "keys", then_submitted)
    assert sweep_orphans(queue, files, now=clock.now + 7200, older_than_seconds=3600) == 0
    assert files.exists(uploaded)


def test_files_of_another_database_are_left_alone(queue, files, tmp_path, clock, caplog):
    job = completed(queue, files, clock, keep_seconds=None)
    lost = f"inputs/{new_id()}/0.png"
    files.put_bytes(lost, b"x")
    assert sweep_orphans(queue, files, now=clock.now, older_than_seconds=3600) == 0
    wrong = JobQueue(f"sqlite:///{tmp_path / 'wrong.sqlite'}", clock=clock)
    later = {"now": clock.now + 7200, "older_than_seconds": 3600}
    assert sweep_orphans(wrong, files, **later) == 0
    assert files.exists(lost)
    assert files.exists(job.results["video"])
    assert "the files belong to another job database: orphans are left alone" in caplog.text
    files.delete("queue-identity")
    assert sweep_orphans(queue, files, **later) == 3  # the lost one, a preview and a checkpoint that are done with
    wrong.close()


def test_unfinished_writes_of_dead_processes_are_orphans_too(queue, files, tmp_path, clock):
    part = tmp_path / "files/inputs/.part-0123"
    part.parent.mkdir()
    part.write_bytes(b"half")
    assert sweep_orphans(queue, files, now=clock.now, older_than_seconds=3600) == 0
    assert sweep_orphans(queue, files, now=clock.now + 3700, older_than_seconds=3600) == 1
    assert not part.exists()


def test_orphans_of_a_remote_store_are_swept_as_well(queue, clock):
    files = FileStore("memory://sweep/pusa")
    lost = f"inputs/{new_id()}/0.png"
    files.put_bytes(lost, b"x")
    files.put_bytes("elsewhere/0.png", b"x")
    assert sweep_orphans(queue, files, now=clock.now, older_than_seconds=3600) == 0
    assert sweep_orphans(queue, files, now=clock.now + 3700, older_than_seconds=3600) == 1
    assert keys(files) == {"elsewhere/0.png"}


def test_scratch_is_swept_of_what_is_old(tmp_path, clock):
    scratch = tmp_path / "scratch"
    old, new, link = scratch / "uploads/job-1/a.bin", scratch / "uploads/job-2/b.bin", scratch / "uploads/link"
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in (old, new):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    link.symlink_to(outside, target_is_directory=True)
    for path in (old, old.parent, old.parent.parent):
        os.utime(path, (clock.now - 5000, clock.now - 5000))
    assert sweep_scratch(scratch, now=clock.now, older_than_seconds=3600) == 1
    assert not old.exists()
    assert new.exists()
    os.utime(new, (0, 0))
    assert sweep_scratch(scratch, now=clock.now + 4000, older_than_seconds=3600) == 2
    assert sweep_scratch(scratch, now=clock.now + 9000, older_than_seconds=3600) == 0
    assert [path.name for path in scratch.rglob("*")] == ["uploads"]  # the folder that is written to stays
    assert outside.is_dir()
    assert sweep_scratch(tmp_path / "none", now=clock.now, older_than_seconds=1) == 0


def test_a_disk_without_space_refuses_new_jobs(files, tmp_path, monkeypatch):
    check_space(files, 0, tmp_path)
    check_space(FileStore("memory://x"), 2**60)  # nobody knows
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=300 * 2**20))
    check_space(files, 300 * 2**20, tmp_path)
    with pytest.raises(StorageFullError, match="300 MiB of disk are free and 512 MiB are to stay so: delete videos"):
        check_space(FileStore("memory://x"), 512 * 2**20, tmp_path)


def test_the_thread_does_its_rounds_and_outlives_a_failure(queue, files, tmp_path, clock, monkeypatch, caplog):
    lost, _ = queue.submit(new_job())
    queue.claim("gone", lease_seconds=5)
    queue.record_worker("gone", {})
    queue.record_worker("here", {})
    clock.now += 100_000
    queue.record_worker("here", {})
    keeper = Housekeeping(queue, files, every_seconds=0.01, scratch=tmp_path / "scratch", clock=clock)
    assert keeper.round() == HousekeepingCounts(expired=0, orphans=0, scratch=0, recovered=1)
    assert queue.get(lost.id).status == "queued"
    assert [worker.name for worker in queue.workers()] == ["here"]

    rounds = []

    def fails_once() -> HousekeepingCounts:
        rounds.append(len(rounds))
        if len(rounds) == 1:
            raise OSError("the disk is on fire")
        return HousekeepingCounts(0, 0, 0, 0)

    monkeypatch.setattr(keeper, "round", fails_once)
    keeper.start()
    give_up_at = time.monotonic() + 30
    while len(rounds) < 3 and time.monotonic() < give_up_at:
        time.sleep(0.01)
    keeper.close()
    assert len(rounds) >= 3
    assert "housekeeping could not be done: the disk is on fire" in caplog.text
