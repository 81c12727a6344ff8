"""The queue keeps what it has accepted, gives every job to one worker, and gives up on nothing that gets further."""

import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import queue_samples
from queue_samples import new_job

from pusa.server.jobs.queue import Job, JobQueue, LeaseLost, QueueFull, new_id


def submitted(queue: JobQueue, **changes: Any) -> Job:
    job, created = queue.submit(new_job(**changes))
    assert created
    return job


def claimed(queue: JobQueue, worker: str = "one", lease_seconds: float = 10, **options: Any) -> Job:
    job = queue.claim(worker, lease_seconds=lease_seconds, **options)
    assert job is not None
    return job


def started(*arguments: str) -> subprocess.Popen[str]:
    """A process of its own that does a function of queue_samples."""
    command = [sys.executable, queue_samples.__file__, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# ---- Accepting -------------------------------------------------------------------------------------------------------


def test_what_is_submitted_is_there_for_everyone_with_every_field(queue, url, clock):
    new = new_job(
        owner="f" * 64,
        inputs=("inputs/a/0.png", "inputs/a/1.png"),
        priority=3,
        parent=new_id(),
        idempotency_key="k",
        fingerprint="e" * 64,
        source="studio",
        traceparent="00-1-2-01",
        prompt="a ball “🎾” that\nbounces",
    )
    job, created = queue.submit(new)
    other = JobQueue(url, clock=clock)
    assert created
    assert other.get(new.id) == job
    assert {name: getattr(job, name) for name in new.__dataclass_fields__} == vars(new)
    assert (job.status, job.created_at, job.attempt, job.progress, job.results) == ("queued", clock.now, 0, 0, {})
    other.close()


def test_a_process_that_is_killed_before_the_commit_leaves_no_trace(queue, url):
    kept = submitted(queue)
    process = started("die_before_commit", url)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert process.stdout.read() == "open\n"
    after = submitted(queue)  # nothing is locked
    assert [job.id for job in queue.page(order="asc")[0]] == [kept.id, after.id]
    check_integrity(url)


def test_jobs_accepted_before_a_kill_are_on_disk(queue, url):
    process = started("submit_without_end", url)
    told = [process.stdout.readline().strip() for _ in range(20)]
    process.kill()
    told += [line.strip() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    process.wait(timeout=60)
    assert all(queue.get(id) is not None for id in told)
    assert queue.counts()["queued"] - len(told) in (0, 1)  # one may have been committed and not told
    check_integrity(url)


def check_integrity(url: str) -> None:
    if url.startswith("sqlite:///"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()


def test_limits_say_how_many_and_when_to_come_again(queue, clock):
    submitted(queue, owner="a")
    done = submitted(queue, owner="a")
    for limits, limit, scope in (({"key_limit": 2}, 2, "key"), ({"total_limit": 2, "key_limit": 9}, 2, "total")):
        with pytest.raises(QueueFull) as refused:
            queue.submit(new_job(owner="a"), **limits)
        assert (refused.value.limit, refused.value.scope, refused.value.retry_after_seconds) == (limit, scope, 30)
    assert queue.submit(new_job(owner="b"), key_limit=2)[1]  # another's key

    job = claimed(queue)
    clock.now += 7
    queue.finish(job, results={}, timings={})
    queue.cancel(done.id)
    assert queue.submit(new_job(owner="a"), key_limit=1)[1]  # what has ended does not count
    with pytest.raises(QueueFull, match=r"2 unfinished jobs, which is the limit: wait for one to end \(about 7 s\)"):
        queue.submit(new_job(), total_limit=2)


def test_limits_hold_when_many_submit_at_once(queue):
    def submit(number: int) -> bool:
        try:
            return queue.submit(new_job(), total_limit=5)[1]
        except QueueFull:
            return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(submit, range(24))) == 5


def test_an_idempotency_key_is_one_job_of_its_owner(queue):
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: queue.submit(new_job(owner="a", idempotency_key="k")), range(8)))
    assert len({job.id for job, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    theirs, created = queue.submit(new_job(owner="b", idempotency_key="k"))
    assert created
    assert theirs.id != answers[0][0].id

    first = claimed(queue)
    queue.finish(first, results={}, timings={})
    assert queue.submit(new_job(owner="a", idempotency_key="k"), total_limit=0)[0].id == first.id  # no limit on asking
    queue.delete(first.id)
    assert queue.submit(new_job(owner="a", idempotency_key="k"))[1]


def test_a_repeated_request_is_recognised_by_its_fingerprint_for_a_while(queue, clock):
    first = submitted(queue, owner="a", fingerprint="same")
    second = submitted(queue, owner="a", fingerprint="same")  # asked for twice, not repeated
    clock.now += 60
    again = queue.submit(new_job(owner="a", fingerprint="same"), same_fingerprint_seconds=60)
    assert again == (second, False)
    assert first != second
    assert queue.submit(new_job(owner="b", fingerprint="same"), same_fingerprint_seconds=60)[1]
    assert queue.submit(new_job(owner="a", fingerprint="other"), same_fingerprint_seconds=60)[1]
    clock.now += 1
    assert queue.submit(new_job(owner="a", fingerprint="same"), same_fingerprint_seconds=60)[1]


def test_submitting_the_same_job_twice_is_submitting_it_once(queue):
    new = new_job()
    assert queue.submit(new)[1]
    assert queue.submit(new)[1]  # as when the answer to the first was lost
    assert queue.counts()["queued"] == 1


# ---- Claiming --------------------------------------------------------------------------------------------------------


def test_first_come_first_served_unless_something_is_more_urgent(queue):
    jobs = [submitted(queue, priority=priority) for priority in (0, 1, 0, 1, -1)]
    assert [queue.position(job.id) for job in jobs] == [2, 0, 3, 1, 4]
    order = [claimed(queue).seq for _ in jobs]
    assert order == [jobs[i].seq for i in (1, 3, 0, 2, 4)]
    assert queue.claim("one", lease_seconds=10) is None
    assert [queue.position(job.id) for job in jobs] == [0] * 5
    assert queue.position("video_unknown") == 0


def test_a_worker_takes_only_jobs_of_its_models(queue):
    submitted(queue, model="large")
    small = submitted(queue, model="mini")
    assert claimed(queue, models=["mini", "other"]).id == small.id
    assert queue.claim("one", lease_seconds=10, models=["mini"]) is None
    assert queue.claim("one", lease_seconds=10, models=[]) is None
    assert claimed(queue).model == "large"


def test_a_claim_records_the_worker_and_the_end_of_its_lease(queue, clock):
    submitted(queue)
    clock.now += 5
    job = claimed(queue, "host/1", lease_seconds=20)
    assert (job.status, job.lease_owner, job.lease_until) == ("in_progress", "host/1", clock.now + 20)
    assert (job.attempt, job.started_at, job.started_at - job.created_at) == (1, clock.now, 5)
    assert queue.get(job.id) == job
    queue.release(job)
    clock.now += 5
    again = claimed(queue)
    assert (again.attempt, again.started_at) == (2, job.started_at)


def test_no_job_is_claimed_twice_by_many_threads_and_processes(url):
    queue = JobQueue(url)  # all by the same clock
    jobs = [submitted(queue) for _ in range(40)]
    processes = [started("claim_everything", url, f"process {n}") for n in range(2)]

    def claim_some(name: str) -> list[str]:
        found = []
        while (job := queue.claim(name, lease_seconds=600)) is not None:
            found.append(job.id)
        return found

    for process in processes:
        assert process.stdout.readline() == "open\n"
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(claim_some, [f"thread {n}" for n in range(4)])
        for process in processes:
            process.stdin.close()  # go
        given = [id for ids in found for id in ids]
    for process in processes:
        given += process.stdout.read().split()
        assert process.wait(timeout=60) == 0
    assert len(given) == len(set(given))
    assert set(given) == {job.id for job in jobs}
    assert {queue.get(id).attempt for id in given} == {1}
    queue.close()


# ---- Running ---------------------------------------------------------------------------------------------------------


def test_one_beat_is_heartbeat_progress_and_cancel(queue, clock):
    submitted(queue)
    job = claimed(queue, lease_seconds=10)
    clock.now += 9
    assert not queue.heartbeat(job, lease_seconds=10, stage="denoise", step=2, steps=8, progress=25, seconds_left=6.5)
    assert not queue.heartbeat(
        job, lease_seconds=10, resolved={"seed": 1}, notes=["rounded"], checkpoint="c", checkpoint_step=2
    )
    now = queue.get(job.id)
    assert (now.stage, now.step, now.steps, now.progress, now.seconds_left) == ("denoise", 2, 8, 25, 6.5)
    assert (now.resolved, now.notes, now.checkpoint, now.checkpoint_step) == ({"seed": 1}, ("rounded",), "c", 2)
    clock.now += 9
    assert queue.claim("two", lease_seconds=10) is None  # the beat has prolonged the lease
    assert queue.cancel(job.id).cancel_requested
    assert queue.heartbeat(job, lease_seconds=10)
    assert queue.heartbeat(job, lease_seconds=10)  # until it is done
    queue.confirm_cancel(job)
    ended = queue.get(job.id)
    assert (ended.status, ended.completed_at, ended.cancel_requested) == ("cancelled", clock.now, False)


@pytest.mark.parametrize(
    "say",
    [
        lambda queue, job: queue.heartbeat(job, lease_seconds=10, progress=50, checkpoint="late", checkpoint_step=50),
        lambda queue, job: queue.finish(job, results={"video": "late"}, timings={}),
        lambda queue, job: queue.fail(job, "late", "late", retry=True),
        lambda queue, job: queue.fail(job, "late", "late", retry=False),
        lambda queue, job: queue.confirm_cancel(job),
        lambda queue, job: queue.release(job),
    ],
    ids=["beat", "finish", "fail and retry", "fail", "cancelled", "release"],
)
@pytest.mark.parametrize("worker", ["one", "two"])
def test_a_worker_without_a_lease_changes_nothing(queue, clock, worker, say: Callable[[JobQueue, Job], Any]):
    submitted(queue)
    late = claimed(queue, "one", lease_seconds=10)
    clock.now += 11
    now = claimed(queue, worker, lease_seconds=10)
    assert now.id == late.id
    with pytest.raises(LeaseLost, match=f"attempt 1 of {late.id} is no longer one's: drop its result"):
        say(queue, late)
    assert queue.get(now.id) == now
    queue.delete(now.id)
    with pytest.raises(LeaseLost):
        say(queue, now)


def test_a_beat_that_is_late_but_first_keeps_the_job(queue, clock):
    submitted(queue)
    job = claimed(queue, lease_seconds=10)
    clock.now += 11
    queue.heartbeat(job, lease_seconds=10)
    assert queue.claim("two", lease_seconds=10) is None


def test_a_finished_job_keeps_its_results_and_has_no_lease(queue, clock):
    submitted(queue)
    job = claimed(queue)
    queue.heartbeat(job, lease_seconds=10, stage="decode", checkpoint="c", checkpoint_step=4, seconds_left=1)
    clock.now += 3
    for _ in range(2):  # once more, as when the answer was lost
        queue.finish(job, results={"video": "v"}, timings={"denoise": 2.5}, expires_at=clock.now + 60)
    done = queue.get(job.id)
    assert (done.status, done.ended, done.progress, done.completed_at) == ("completed", True, 100, clock.now)
    assert (done.results, done.timings, done.expires_at) == ({"video": "v"}, {"denoise": 2.5}, clock.now + 60)
    assert (done.lease_owner, done.lease_until, done.checkpoint, done.seconds_left) == (None, None, None, None)
    assert queue.seconds_per_job() == 3


# ---- Failing ---------------------------------------------------------------------------------------------------------


def test_attempts_without_progress_are_counted_and_the_last_one_fails_the_job(queue):
    submitted(queue)
    other = submitted(queue)
    for count in (1, 2):
        job = claimed(queue)
        assert queue.fail(job, "crash", f"crash {count}", retry=True, max_failures=3) == "queued"
        waiting = queue.get(job.id)
        assert (waiting.failures, waiting.error_code, waiting.error_message) == (count, "crash", f"crash {count}")
    job = claimed(queue)
    assert queue.fail(job, "crash", "crash 3", retry=True, max_failures=3) == "failed"
    assert queue.fail(job, "crash", "crash 3", retry=True, max_failures=3) == "failed"  # said twice, counted once
    failed = queue.get(job.id)
    assert (failed.status, failed.failures, failed.error_message) == ("failed", 3, "crash 3")
    assert claimed(queue).id == other.id  # nobody is blocked


def test_an_attempt_that_moved_the_checkpoint_costs_nothing(queue):
    submitted(queue)
    for number in range(8):
        job = claimed(queue)
        if number % 2:
            queue.heartbeat(job, lease_seconds=10, checkpoint="c", checkpoint_step=number)
            queue.heartbeat(job, lease_seconds=10)
        assert queue.fail(job, "crash", "crash", retry=True, max_failures=2) == "queued"
        assert queue.get(job.id).failures == (number + 1) % 2
    job = claimed(queue)
    assert (job.checkpoint, job.checkpoint_step) == ("c", 7)
    queue.heartbeat(job, lease_seconds=10, checkpoint="c", checkpoint_step=7)  # the same place again is no progress
    assert queue.fail(job, "crash", "crash", retry=True, max_failures=1) == "failed"


def test_what_cannot_succeed_is_not_tried_again(queue):
    submitted(queue)
    assert queue.fail(claimed(queue), "bad_input", "no", retry=False, max_failures=9) == "failed"
    assert queue.claim("one", lease_seconds=10) is None


def test_an_error_may_say_anything(queue):
    submitted(queue)
    message = "cannot open 'caf\udce9\0.png': " + "x" * 100_000
    queue.fail(claimed(queue), "crash", message, retry=False)
    failed = queue.page()[0][0]
    assert failed.error_message.startswith("cannot open 'caf?.png': xxx")
    assert len(failed.error_message) < 5000


def test_workers_that_vanish_fail_the_job_that_kills_them(queue, clock):
    poison, other = submitted(queue), submitted(queue)
    for attempt in (1, 2, 3):
        assert claimed(queue, max_failures=3).attempt == attempt
        clock.now += 11
    assert claimed(queue, max_failures=3).id == other.id
    failed = queue.get(poison.id)
    assert (failed.status, failed.error_code, failed.failures) == ("failed", "worker_lost", 3)
    assert "its worker ended 3 times in a row without getting further" in failed.error_message


def test_workers_that_vanish_after_a_checkpoint_cost_nothing(queue, clock):
    submitted(queue)
    for step in range(1, 6):
        job = claimed(queue, max_failures=1)
        queue.heartbeat(job, lease_seconds=10, checkpoint="c", checkpoint_step=step)
        clock.now += 11
    job = claimed(queue, max_failures=1)
    assert (job.attempt, job.failures, job.checkpoint_step) == (6, 0, 5)


def test_leases_of_a_dead_boot_are_taken_back_at_once(queue):
    jobs = {name: submitted(queue) for name in ("host/1/a", "host/1/b", "host/2", "100%_/1", "100xx/1")}
    for name in jobs:
        claimed(queue, name)
    queue.cancel(jobs["host/1/b"].id)
    assert queue.release_leases_of("host/1/") == 2
    assert queue.release_leases_of("100%_/") == 1  # not a pattern
    statuses = {name: queue.get(job.id).status for name, job in jobs.items()}
    assert statuses == {
        "host/1/a": "queued",
        "host/1/b": "cancelled",
        "host/2": "in_progress",
        "100%_/1": "queued",
        "100xx/1": "in_progress",
    }


def test_an_orderly_stop_counts_no_failure(queue):
    submitted(queue)
    assert queue.fail(claimed(queue), "crash", "crash", retry=True) == "queued"
    for _ in range(5):
        assert queue.release(claimed(queue)) == "queued"
    assert queue.get(claimed(queue).id).failures == 1


# ---- Cancelling and deleting -----------------------------------------------------------------------------------------


def test_a_waiting_job_is_cancelled_at_once_and_an_ended_one_stays(queue, clock):
    job = submitted(queue)
    cancelled = queue.cancel(job.id)
    assert (cancelled.status, cancelled.completed_at) == ("cancelled", clock.now)
    assert queue.claim("one", lease_seconds=10) is None
    clock.now += 1
    assert queue.cancel(job.id) == cancelled
    with pytest.raises(KeyError):
        queue.cancel("video_unknown")


@pytest.mark.parametrize("end", ["release", "fail", "lease"])
def test_a_job_to_be_cancelled_is_never_run_again(queue, clock, end):
    submitted(queue)
    job = claimed(queue)
    queue.cancel(job.id)
    if end == "release":
        assert queue.release(job) == "cancelled"
    elif end == "fail":
        assert queue.fail(job, "crash", "crash", retry=True) == "cancelled"
    else:
        clock.now += 11
    assert queue.claim("two", lease_seconds=10) is None
    assert queue.get(job.id).status == "cancelled"


def test_a_job_whose_worker_is_silent_is_cancelled_at_once(queue, clock):
    submitted(queue)
    job = claimed(queue)
    clock.now += 11
    assert queue.cancel(job.id).status == "cancelled"
    with pytest.raises(LeaseLost):
        queue.finish(job, results={"video": "v"}, timings={})


def test_a_deleted_job_is_gone_for_its_owner_and_its_worker(queue):
    job = submitted(queue, owner="a")
    running = claimed(queue)
    for verb in (queue.delete, queue.cancel):
        with pytest.raises(KeyError):
            verb(job.id, "b")
    assert queue.get(job.id, "b") is None
    assert queue.delete(job.id, "a") == running
    assert queue.get(job.id) is None
    with pytest.raises(KeyError):
        queue.delete(job.id)
    assert submitted(queue).seq > job.seq  # the place in the order is not given out again


# ---- Looking ---------------------------------------------------------------------------------------------------------


def test_pages_follow_one_another_in_either_order(queue):
    ids = [submitted(queue, owner="a" if n % 2 else "b").id for n in range(7)]

    def walk(owner: str | None, order: Any, limit: int = 3) -> list[str]:
        found: list[str] = []
        more = True
        while more:
            jobs, more = queue.page(owner, after=found[-1] if found else None, limit=limit, order=order)
            assert len(jobs) <= limit
            found += [job.id for job in jobs]
        return found

    assert walk(None, "asc") == ids
    assert walk(None, "desc") == ids[::-1]
    assert walk("a", "desc", limit=1) == ids[1::2][::-1]
    assert queue.page("nobody") == ([], False)
    assert queue.page(limit=7)[1] is False
    with pytest.raises(KeyError):
        queue.page("b", after=ids[1])  # not theirs
    queue.delete(ids[3])
    assert walk(None, "asc") == ids[:3] + ids[4:]


def test_counts_and_changes_are_seen(queue):
    assert queue.counts() == dict.fromkeys(["queued", "in_progress", "completed", "failed", "cancelled"], 0)
    assert queue.seconds_per_job() is None
    before = queue.change_count()
    submitted(queue)
    submitted(queue)
    job = claimed(queue)
    seen = queue.change_count()
    assert seen > before
    queue.get(job.id), queue.counts(), queue.page(), queue.position(job.id)
    assert queue.change_count() == seen
    queue.heartbeat(job, lease_seconds=10)
    assert queue.change_count() > seen
    assert (queue.counts()["queued"], queue.counts()["in_progress"]) == (1, 1)


def test_workers_say_that_they_are_there(queue, clock):
    queue.record_worker("b", {"stage": "load", "percent": 10})
    queue.record_worker("a", {"ready": False})
    clock.now += 30
    queue.record_worker("a", {"ready": True})
    assert [(w.name, w.seen_at, w.state) for w in queue.workers()] == [
        ("a", clock.now, {"ready": True}),
        ("b", clock.now - 30, {"stage": "load", "percent": 10}),
    ]
    assert [w.name for w in queue.workers(seen_within_seconds=10)] == ["a"]
    queue.forget_worker("a")
    assert [w.name for w in queue.workers()] == ["b"]


def test_workers_may_beat_at_the_same_time(queue):
    together = threading.Barrier(6)

    def beat(number: int) -> None:
        together.wait(timeout=30)
        queue.record_worker("same", {"number": number})

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(beat, range(6)))
    assert len(queue.workers()) == 1


def test_what_has_expired_and_what_is_in_use(queue, clock):
    done, failed, waiting = (submitted(queue, inputs=(f"inputs/{n}/0.png",)) for n in range(3))
    queue.finish(claimed(queue), results={"video": "results/0/1/video.mp4"}, timings={}, expires_at=clock.now + 50)
    queue.fail(claimed(queue), "x", "x", retry=False)
    running = claimed(queue)
    queue.heartbeat(running, lease_seconds=900, checkpoint="checkpoints/2/1.safetensors", checkpoint_step=1)
    assert running.id == waiting.id
    used = {
        "inputs/0/0.png",
        "inputs/1/0.png",
        "inputs/2/0.png",
        "results/0/1/video.mp4",
        "checkpoints/2/1.safetensors",
        f"previews/{waiting.id}.webp",
    }
    unused = {"inputs/3/0.png", "checkpoints/2/0.safetensors", f"previews/{done.id}.webp"}
    assert queue.keys_in_use(used | unused) == used
    now = clock.now
    assert queue.expired(now + 49) == []
    assert [job.id for job in queue.expired(now + 50)] == [done.id]
    assert [job.id for job in queue.expired(now + 50, unfinished_before=now + 1)] == [done.id, failed.id]
    assert queue.expired(now + 49, unfinished_before=now) == []
