"""What owners do with their jobs: find, mark, move, remove and restore them."""

import time
from pathlib import Path
from typing import Any

import pytest
from queue_samples import Clock, new_job

from pusa.server.jobs.housekeeping import expire
from pusa.server.jobs.queue import Job, JobFilter, JobQueue, LeaseLost, QueueFull
from pusa.server.jobs.reading import fold
from pusa.server.jobs.store import FileStore


def submitted(queue: JobQueue, **changes: Any) -> Job:
    return queue.submit(new_job(**changes))[0]


def asked(queue: JobQueue, prompt: str = "a red ball", **request: Any) -> Job:
    values = {"prompt": prompt, "seed": 7, "conditions": [], **request}
    return submitted(queue, owner="a", prompt=prompt, request=values)


def found(queue: JobQueue, owner: str | None = "a", **filter: Any) -> list[str]:
    return [job.id for job in queue.page(owner, filter=JobFilter(**filter), limit=100)[0]]


def waiting(queue: JobQueue, owner: str | None = None) -> list[str]:
    """In the order in which they would run."""
    jobs = [job for job in queue.page(owner, limit=100)[0] if job.status == "queued"]
    return [job.id for job in sorted(jobs, key=lambda job: queue.position(job.id))]


# ---- order -------------------------------------------------------------------------------------------------------


def test_jobs_of_one_moment_are_created_one_after_another(queue):
    together = [submitted(queue, owner="a") for _ in range(5)]
    times = [round(1000 * job.created_at) for job in together]
    assert times == list(range(times[0], times[0] + 5))
    assert submitted(queue, owner="b").created_at == together[0].created_at  # another owner's list
    assert found(queue) == [job.id for job in reversed(together)]


def test_an_order_follows_clocks_that_differ_but_not_wrong_ones(queue, clock):
    first = submitted(queue, owner="a")
    clock.now -= 5  # of another server
    second = submitted(queue, owner="a")
    assert second.created_at > first.created_at
    clock.now -= 3600
    assert submitted(queue, owner="a").created_at == clock.now


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_a_search_finds_all_words_in_any_case_and_accents(queue):
    first = asked(queue, "Un ÉLÉPHANT traverse la rivière")
    second = asked(queue, "一只红色的球 rolls")
    story = asked(queue, "", prompts=["0s: a rocket stands", "2s: it flies"])
    submitted(queue, owner="b", prompt="un éléphant")
    assert found(queue, words="riviere elephant") == [first.id]
    assert found(queue, words="红色") == [second.id]
    assert found(queue, words="FLIES rocket") == [story.id]
    assert found(queue, words="elephant rolls") == []
    assert found(queue, words="  ") == [story.id, second.id, first.id]
    assert found(queue, words="100%_\\") == []


def test_a_search_takes_no_longer_for_heaps_of_accents():
    hostile = ("e" + "\u0315\u0327\u0301" * 3000 + "\u0f73" * 1000)[:10_000]
    began = time.process_time()
    folded = [fold(hostile) for _ in range(20)]
    assert time.process_time() - began < 1  # 8 s where the accents are sorted
    assert folded == ["e"] * 20


def test_a_search_goes_on_from_page_to_page_past_what_it_holds_at_once(queue, monkeypatch):
    monkeypatch.setattr("pusa.server.jobs.reading._SEARCHED", 3)
    ids = [asked(queue, "a cat" if n % 4 == 0 else "a dog").id for n in range(13)]
    for order, expected in (("desc", ids[::4][::-1]), ("asc", ids[::4])):
        after, seen, more = None, [], True
        while more:
            jobs, more = queue.page("a", after=after, limit=1, order=order, filter=JobFilter(words="CAT"))
            after = jobs[-1].id
            seen.append(after)
        assert seen == expected


def test_lists_of_a_task_of_favourites_and_of_a_batch(queue):
    plain = asked(queue)
    longer = asked(queue, task="extend")
    variant = submitted(queue, owner="a", batch="v")
    queue.update(longer.id, "a", favourite=True)
    assert found(queue, task="extend") == [longer.id]
    assert found(queue, task="generate") == [variant.id, plain.id]
    assert found(queue, favourite=True) == [longer.id]
    assert found(queue, favourite=False) == [variant.id, plain.id]
    assert found(queue, batch="v") == [variant.id]
    assert found(queue, owner="b", batch="v") == []
    queue.update(variant.id, "a", batch=None)
    assert found(queue, batch="v") == []
    queue.cancel(plain.id)
    jobs, more = queue.page("a", statuses=("cancelled",), filter=JobFilter(task="generate"))
    assert ([job.id for job in jobs], more) == ([plain.id], False)


def test_marks_are_the_owners(queue):
    job = asked(queue)
    for change in (
        lambda: queue.update(job.id, "b", favourite=True),
        lambda: queue.remove(job.id, "b", undo_seconds=9),
        lambda: queue.restore(job.id, "b"),
        lambda: queue.move(job.id, "b", before=None),
    ):
        with pytest.raises(KeyError):
            change()
    assert queue.get(job.id) == job
    assert queue.cancel_all("b") == []


# ---- places ----------------------------------------------------------------------------------------------------------


def test_moving_a_job_leaves_the_places_of_others_as_they_are(queue):
    mine = [submitted(queue, owner="a").id for _ in range(3)]
    theirs = [submitted(queue, owner="b").id for _ in range(3)]
    one, two, three = mine
    x, y, z = theirs
    assert waiting(queue) == [one, x, two, y, three, z]
    assert queue.move(three, "a", before=one).id == three
    assert waiting(queue) == [three, x, one, y, two, z]
    queue.move(three, "a", before=None)
    assert waiting(queue) == [one, x, two, y, three, z]
    queue.move(two, "a", before=two)
    assert waiting(queue) == [one, x, two, y, three, z]
    assert [queue.claim("w", lease_seconds=9).id for _ in range(6)] == [one, x, two, y, three, z]


def test_a_job_takes_the_place_it_is_moved_to_with_its_priority(queue):
    low, high = submitted(queue, owner="a", priority=-1).id, submitted(queue, owner="a").id
    other = submitted(queue, owner="b", priority=-1).id
    assert waiting(queue) == [high, low, other]
    queue.move(low, "a", before=high)
    assert waiting(queue) == [low, high, other]
    assert (queue.get(low).priority, queue.get(high).priority) == (0, -1)


def test_only_waiting_jobs_of_the_owner_move(queue):
    running = submitted(queue, owner="a")
    queue.claim("w", lease_seconds=9)
    job, theirs = submitted(queue, owner="a"), submitted(queue, owner="b")
    for id, before in ((running.id, job.id), (job.id, running.id), (job.id, theirs.id), ("video_unknown", job.id)):
        with pytest.raises(KeyError) as error:
            queue.move(id, "a", before=before)
        assert error.value.args == (id if id != job.id else before,)


def test_jobs_of_an_early_version_that_share_a_turn_move_too(queue):
    ids = [submitted(queue, owner="a").id for _ in range(3)]
    with queue.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET turn = 0")
    queue.move(ids[2], "a", before=ids[0])
    assert waiting(queue) == [ids[2], ids[0], ids[1]]


# ---- removal ---------------------------------------------------------------------------------------------------------


def test_a_removed_job_is_nowhere_and_comes_back_as_it_was(queue, clock):
    job = asked(queue)
    queue.finish(queue.claim("w", lease_seconds=9), results={"video": "v"}, timings={}, expires_at=clock.now + 999)
    queue.update(job.id, favourite=True)
    before = queue.get(job.id)
    removed = queue.remove(job.id, "a", undo_seconds=30)
    assert removed.undo_until == clock.now + 30
    assert queue.get(job.id) is None
    assert found(queue) == found(queue, favourite=True) == []
    assert queue.keys_in_use(["v"]) == {"v"}
    for change in (lambda: queue.remove(job.id, undo_seconds=9), lambda: queue.update(job.id, favourite=False)):
        with pytest.raises(KeyError):
            change()
    assert queue.restore(job.id, "a") == before
    assert queue.restore(job.id, "a") == before  # nothing left to undo
    assert found(queue) == [job.id]


def test_a_running_job_stops_at_once_and_comes_back_cancelled(queue):
    asked(queue)
    job = queue.claim("w", lease_seconds=9)
    queue.remove(job.id, undo_seconds=30)
    with pytest.raises(LeaseLost):
        queue.heartbeat(job, lease_seconds=9)
    with pytest.raises(KeyError):
        queue.restart(job.id)
    assert queue.restore(job.id).status == "cancelled"
    assert queue.restart(job.id).status == "queued"
    again = queue.claim("w", lease_seconds=9)
    assert (again.id, again.attempt) == (job.id, 2)
    with pytest.raises(LeaseLost):
        queue.finish(job, results={"video": "v"}, timings={})


def test_a_request_whose_job_was_removed_makes_a_new_one(queue):
    first = submitted(queue, owner="a", idempotency_key="k", fingerprint="f")
    queue.remove(first.id, undo_seconds=30)
    second, is_new = queue.submit(new_job(owner="a", idempotency_key="k", fingerprint="f"), same_fingerprint_seconds=60)
    assert is_new
    queue.restore(first.id)
    assert found(queue) == [second.id, first.id]


def test_removed_jobs_make_room_in_the_queue(queue):
    job = submitted(queue, owner="a")
    with pytest.raises(QueueFull):
        queue.submit(new_job(owner="a"), key_limit=1)
    queue.remove(job.id, undo_seconds=30)
    queue.submit(new_job(owner="a"), key_limit=1)


def test_a_removed_job_goes_with_its_files_when_its_time_is_over(queue, clock, tmp_path: Path):
    files = FileStore(str(tmp_path / "files"))
    kept, gone = (submitted(queue) for _ in range(2))
    for job in (kept, gone):
        files.put_bytes(f"results/{job.id}/1/video.mp4", b"x")
        queue.remove(job.id, undo_seconds=30)
    assert expire(queue, files, now=clock.now + 29, keep_seconds=None) == 0
    queue.restore(kept.id)
    assert expire(queue, files, now=clock.now + 30, keep_seconds=None) == 1
    with pytest.raises(KeyError):
        queue.restore(gone.id)
    assert [key for key, _ in files.keys("results")] == [f"results/{kept.id}/1/video.mp4"]


def test_a_job_that_is_restored_meanwhile_does_not_go(queue, clock, tmp_path: Path, monkeypatch):
    files, job = FileStore(str(tmp_path / "files")), submitted(queue)
    queue.remove(job.id, undo_seconds=30)
    listed = queue.expired

    def then_restored(*arguments: Any, **options: Any) -> list[Job]:
        jobs = listed(*arguments, **options)
        queue.restore(job.id)
        return jobs

    monkeypatch.setattr(queue, "expired", then_restored)
    expire(queue, files, now=clock.now + 60, keep_seconds=None)
    assert queue.get(job.id) is not None


def test_a_page_begins_after_a_removed_job(queue):
    ids = [asked(queue).id for _ in range(3)]
    queue.remove(ids[1], undo_seconds=30)
    assert [job.id for job in queue.page("a", after=ids[1])[0]] == [ids[0]]
    with pytest.raises(KeyError):
        queue.page("a", after="video_\0")


def test_all_of_an_owners_jobs_are_cancelled_together(queue):
    submitted(queue, owner="a")
    running = queue.claim("w", lease_seconds=9)
    mine, theirs = submitted(queue, owner="a"), submitted(queue, owner="b")
    assert [(job.id, job.status) for job in queue.cancel_all("a")] == [
        (mine.id, "cancelled"),
        (running.id, "in_progress"),
    ]
    assert queue.heartbeat(running, lease_seconds=9)  # its worker is asked to stop
    assert queue.get(theirs.id).status == "queued"


# ---- looks -----------------------------------------------------------------------------------------------------------


def test_a_look_finds_what_another_process_has_changed(url):
    clock = Clock()
    here, there = JobQueue(url, clock=clock), JobQueue(url, clock=clock)
    before = here.look(None, ())
    job, theirs = submitted(there, owner="a"), submitted(there, owner="b")

    def changed() -> tuple[list[str], list[str]]:
        nonlocal before
        before = here.look(before, ("a",))
        return [job.id for job in before.changed], list(before.deleted)

    assert changed() == ([job.id], [])
    assert changed() == ([], [])
    there.update(job.id, favourite=True)
    there.update(theirs.id, favourite=True)
    assert changed() == ([job.id], [])
    there.remove(job.id, undo_seconds=9)
    assert changed() == ([], [job.id])
    there.restore(job.id)
    assert changed() == ([job.id], [])
    there.restart(job.id)
    assert changed() == ([job.id], [])
    there.finish(there.claim("w", lease_seconds=9), results={}, timings={})  # it began and ended between two looks
    assert changed() == ([job.id], [])
    there.delete(job.id)
    assert changed() == ([], [job.id])
    there.forget_deleted(clock.now + 1)
    late = submitted(there, owner="a")
    assert changed() == ([late.id], [])  # numbers go on
    here.close(), there.close()
