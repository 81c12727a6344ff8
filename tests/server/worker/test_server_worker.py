"""The worker: a claimed job ends completed, failed or cancelled, or goes on elsewhere; whatever happens on the way."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from paths import SUPPORT
from server_samples import fake_executor, request, submit, uninterrupted, video_of, wait_until

from pusa import media
from pusa.events import Checkpoint
from pusa.server.jobs.queue import JobQueue, NewJob, QueueUnavailable
from pusa.server.jobs.store import FileStore, StorageFullError, fragment_key
from pusa.server.worker.attempt import Attempt, Delays
from pusa.server.worker.messages import Message, Task
from pusa.server.worker.progress import AttemptProgress, StageRatios
from pusa.server.worker.worker import is_dead, worker_name

# ---- jobs that end well ----------------------------------------------------------------------------------------------


def test_a_job_is_completed_with_its_files_notes_timings_and_resolved_request(house):
    job = submit(house.queue, steps=3)
    house.hire()
    done = house.ended(job)
    assert done.status == "completed"
    assert done.results == {
        kind: f"results/{job.id}/1/{name}"
        for kind, name in (
            ("video", "video.mp4"),
            ("thumbnail", "thumbnail.webp"),
            ("spritesheet", "thumbnail.webp"),
            ("contact_sheet", "thumbnail.webp"),
        )
    }
    assert (done.step, done.steps, done.progress) == (3, 3, 100.0)
    assert done.resolved is not None
    assert done.resolved["prompt"] == job.prompt
    assert done.notes == ("made by a fake",)
    assert {"queue", "load", "denoise", "decode"} <= done.timings.keys()
    assert media.probe_video(house.files.local(done.results["video"])).frames == 8
    wait_until(lambda: house.stored() == set(done.results.values()))  # no checkpoint, no preview
    scratch = house.settings.scratch_folder / house.workers[0].name.replace("/", "_")
    wait_until(lambda: not list(scratch.iterdir()))


def test_jobs_run_one_after_another_in_the_same_process(house):
    jobs = [submit(house.queue, steps=2, number=number) for number in range(3)]
    worker = house.hire()
    pids = {house.ended(job).status: worker.state.pids for job in jobs}
    assert pids == {"completed": worker.state.pids}
    assert len({video_of(house, house.job(job)) for job in jobs}) == 3


def test_two_workers_never_run_the_same_attempt(house):
    jobs = [submit(house.queue, steps=3, number=number) for number in range(8)]
    house.hire()
    house.hire()
    assert [house.ended(job).attempt for job in jobs] == [1] * 8


def test_previews_are_stored_while_it_runs_and_gone_after_it(house):
    job = submit(house.queue, steps=1000, step_seconds=0.02)
    house.hire(preview_seconds=0.01)
    key = f"previews/{job.id}.webp"
    wait_until(lambda: house.files.exists(key))
    assert house.files.get_bytes(key)[8:12] == b"WEBP"
    house.queue.cancel(job.id)
    house.ended(job)
    wait_until(lambda: not house.files.exists(key))


def test_parts_of_a_growing_video_are_stored_while_it_runs_and_gone_after_it(house):
    job = submit(house.queue, steps=1000, step_seconds=0.02, grows=True)
    house.hire()
    key = fragment_key(job.id, 1, 2)
    wait_until(lambda: house.files.exists(key))
    parts = b"".join(house.files.get_bytes(fragment_key(job.id, 1, number)) for number in range(3))
    assert parts == bytes(range(1, len(parts) + 1))
    assert house.queue.keys_in_use([key]) == {key}  # housekeeping leaves it
    house.queue.cancel(job.id)
    house.ended(job)
    wait_until(lambda: not house.files.exists(key))


# ---- what dies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["segfault", "raise"])
def test_a_job_whose_process_dies_goes_on_from_its_checkpoint_and_the_video_is_the_same(how, house):
    said = {"steps": 6, "at_step": 5, "then": how}
    job = submit(house.queue, **said)
    house.hire()
    done = house.ended(job)
    assert (done.status, done.attempt, done.failures) == ("completed", 2, 0)
    assert video_of(house, done) == uninterrupted(house, **said)
    assert done.error_code is None


def test_a_job_that_kills_its_process_every_time_fails_with_its_reason_and_the_next_one_runs(house):
    poisoned = submit(house.queue, steps=3, at_step=0, then="segfault", times=100)
    good = submit(house.queue, steps=3)
    house.hire(max_failures=2)
    failed = house.ended(poisoned)
    assert (failed.status, failed.error_code, failed.attempt) == ("failed", "worker_lost", 2)
    assert failed.error_message is not None
    assert "SIGSEGV" in failed.error_message
    assert house.ended(good).status == "completed"


def test_attempts_that_get_further_cost_nothing(house):
    job = submit(house.queue, steps=8, at_step=2, then="kill", times=1)  # after a checkpoint: progress
    house.hire(max_failures=1)
    assert house.ended(job).status == "completed"


def test_a_hung_step_is_ended_by_the_stall_limit(house):
    job = submit(house.queue, steps=4, at_step=3, then="hang")
    house.hire(stall_seconds=1.0)
    done = house.ended(job)
    assert (done.status, done.attempt) == ("completed", 2)


def test_a_job_that_takes_too_long_is_ended(house):
    job = submit(house.queue, steps=100_000, step_seconds=0.01)
    house.hire(job_seconds=1.0, max_failures=1, checkpoint_steps=200)
    failed = house.ended(job)
    assert (failed.status, failed.error_code) == ("failed", "timed_out")


@pytest.mark.parametrize(("then", "code"), [("invalid", "invalid_request"), ("out_of_memory", "out_of_memory")])
def test_what_another_attempt_cannot_mend_fails_at_once(then, code, house):
    job = submit(house.queue, steps=3, at_step=1, then=then)
    house.hire()
    failed = house.ended(job)
    assert (failed.status, failed.error_code, failed.attempt) == ("failed", code, 1)
    wait_until(lambda: not house.stored())


@pytest.mark.slow  # the child imports torch
def test_latents_that_could_not_be_decoded_are_kept(house):
    job = submit(house.queue, steps=3, at_step=3, then="decode_memory")
    house.hire()
    failed = house.ended(job)
    assert (failed.status, failed.error_code) == ("failed", "out_of_memory")
    assert house.files.get_bytes(failed.results["latents"]) == b"latents"
    assert house.queue.keys_in_use([failed.results["latents"]]) == {failed.results["latents"]}


def test_a_job_whose_input_is_gone_fails_and_names_the_cause(house):
    asked = request(steps=1) | {"conditions": [{"kind": "image", "file": "inputs/gone/0.png"}]}
    job, _ = house.queue.submit(
        NewJob(request=asked, inputs=("inputs/gone/0.png",), model="fake", prompt="", seconds="1", size="64x48")
    )
    house.hire()
    failed = house.ended(job)
    assert (failed.error_code, failed.attempt) == ("input_gone", 1)


# ---- cancel, stop, lost leases ---------------------------------------------------------------------------------------


def test_cancel_ends_a_running_job_and_frees_the_worker(house):
    job = submit(house.queue, steps=100_000, step_seconds=0.01)
    worker = house.hire()
    house.begun(job, 3)
    before = worker.state.pids
    house.queue.cancel(job.id)
    assert house.ended(job).status == "cancelled"
    assert house.ended(submit(house.queue, steps=2)).status == "completed"
    assert worker.state.pids == before
    wait_until(lambda: not house.stored("checkpoints"))


def test_cancel_kills_a_step_that_does_not_end(house):
    job = submit(house.queue, steps=4, at_step=2, then="hang")
    house.hire(cancel_seconds=0.3)
    house.begun(job, 2)
    house.queue.cancel(job.id)
    assert house.ended(job).status == "cancelled"
    assert house.ended(submit(house.queue, steps=2)).status == "completed"


def test_an_orderly_stop_gives_the_job_back_and_another_worker_goes_on(house):
    said = {"steps": 60, "step_seconds": 0.02}
    job = submit(house.queue, **said)
    house.hire()
    wait_until(lambda: house.job(job).checkpoint_step >= 4)
    house.dismiss()
    released = house.job(job)
    assert (released.status, released.failures, released.lease_owner) == ("queued", 0, None)
    assert house.queue.workers() == []
    reached = released.checkpoint_step
    house.hire()
    done = house.ended(job)
    assert (done.status, done.attempt) == ("completed", 2)
    assert reached >= 4
    assert video_of(house, done) == uninterrupted(house, **said)


def test_a_deleted_job_is_dropped_and_leaves_no_files(house):
    job = submit(house.queue, steps=100_000, step_seconds=0.01)
    house.hire()
    house.begun(job, 3)
    house.queue.delete(job.id)
    assert house.ended(submit(house.queue, steps=2)).status == "completed"
    assert not [key for key in house.stored() if job.id in key]


def test_a_result_whose_lease_was_lost_is_not_published(house, monkeypatch):
    """Another worker has taken the job while this one was decoding."""
    job = submit(house.queue, steps=2, decode_seconds=0.5)
    put_file, taken = FileStore.put_file, []

    def put_and_lose(self: FileStore, key: str, path: Path) -> None:
        put_file(self, key, path)
        if key.startswith("results/") and not taken:
            taken.append(key)
            house.queue.release_leases_of(house.workers[0].name)

    monkeypatch.setattr(FileStore, "put_file", put_and_lose)
    house.hire()
    done = house.ended(job)
    assert done.attempt == 2
    wait_until(lambda: house.stored("results") == set(done.results.values()))  # nothing of attempt 1
    assert taken[0].startswith(f"results/{job.id}/1/")


def test_a_step_longer_than_the_lease_does_not_lose_it(house):
    job = submit(house.queue, steps=2, step_seconds=2.0)
    house.hire(lease_seconds=0.6)
    house.begun(job, 1)
    done = house.ended(job)
    assert (done.status, done.attempt) == ("completed", 1)


def test_a_database_that_does_not_answer_for_a_while_costs_nothing(house, monkeypatch):
    job = submit(house.queue, steps=40, step_seconds=0.02)
    heartbeat, finish, refused = JobQueue.heartbeat, JobQueue.finish, []

    def sometimes(verb: Callable[..., Any], count: int) -> Callable[..., Any]:
        def call(self: JobQueue, *arguments: Any, **options: Any) -> Any:
            if len([name for name in refused if name == verb.__name__]) < count:
                refused.append(verb.__name__)
                raise QueueUnavailable("the server is restarting")
            return verb(self, *arguments, **options)

        return call

    monkeypatch.setattr(JobQueue, "heartbeat", sometimes(heartbeat, 5))
    monkeypatch.setattr(JobQueue, "finish", sometimes(finish, 3))
    house.hire(delays=Delays(queue_seconds=0.05))
    done = house.ended(job)
    assert (done.status, done.attempt) == ("completed", 1)
    assert done.resolved is not None  # reported by a later heartbeat
    assert len(refused) == 8


def test_a_cancel_reaches_the_executor_with_the_next_heartbeat_and_again_until_the_task_ends(house, tmp_path):
    submit(house.queue)
    job = house.queue.claim("one", lease_seconds=30)
    cancels: list[bool] = []
    executor = SimpleNamespace(cancel=lambda: cancels.append(True))
    parts = house.settings, house.queue, house.files, executor
    attempt = Attempt(*parts, job, tmp_path, StageRatios(), threading.Event(), Delays())
    attempt.heartbeat()
    attempt.supervise()
    assert len(cancels) == 0
    house.queue.cancel(job.id)
    attempt.heartbeat(stage="denoise")
    assert len(cancels) == 1
    attempt.supervise()  # at the first the task may not have begun
    attempt.supervise()
    assert len(cancels) == 3


# ---- a full disk -----------------------------------------------------------------------------------------------------


FULL = StorageFullError(28, "no space")


def break_store(monkeypatch: pytest.MonkeyPatch, error_of: Callable[[str], Exception | None]) -> None:
    """Let the store raise the error that belongs to a key, if there is one, instead of storing a file."""
    put_file = FileStore.put_file

    def put(self: FileStore, key: str, path: Path) -> None:
        if (error := error_of(key)) is not None:
            raise error
        put_file(self, key, path)

    monkeypatch.setattr(FileStore, "put_file", put)


def test_a_full_disk_keeps_the_job_until_there_is_room(house, monkeypatch):
    job = submit(house.queue, steps=4)
    full = threading.Event()
    full.set()
    break_store(monkeypatch, lambda key: FULL if full.is_set() and key.startswith("results/") else None)
    house.hire(delays=Delays(disk_full_seconds=0.1), max_failures=1)
    wait_until(lambda: house.job(job).attempt >= 3)
    full.clear()
    done = house.ended(job)
    assert (done.status, done.failures) == ("completed", 0)


def test_a_checkpoint_that_does_not_fit_does_not_stop_the_job(house, monkeypatch):
    job = submit(house.queue, steps=4)
    break_store(monkeypatch, lambda key: FULL if key.startswith("checkpoints/") else None)
    house.hire()
    done = house.ended(job)
    assert (done.status, done.attempt, done.checkpoint_step) == ("completed", 1, 0)


def test_a_full_disk_of_the_child_keeps_the_job_as_well(house):
    job = submit(house.queue, steps=4, at_step=3, then="disk_full", times=2)
    house.hire(delays=Delays(disk_full_seconds=0.1), max_failures=1)
    done = house.ended(job)
    assert (done.status, done.attempt, done.failures) == ("completed", 3, 0)


def test_a_store_that_is_out_of_reach_for_a_while_costs_nothing(house, monkeypatch):
    job = submit(house.queue, steps=4)
    refused: list[str] = []

    def unreachable(key: str) -> Exception | None:
        if len(refused) == 6:
            return None
        refused.append(key)
        return ConnectionError("no route to host")

    break_store(monkeypatch, unreachable)
    house.hire(delays=Delays(store_seconds=(0.01,) * 5))
    done = house.ended(job)
    assert (done.status, done.attempt) == ("completed", 1)
    assert {key.split("/")[0] for key in refused} == {"checkpoints", "results"}


def test_a_checkpoint_that_is_removed_before_it_was_stored_costs_nothing(house, monkeypatch):
    """A quick engine is done while the worker still waits for the database."""
    job = submit(house.queue, steps=4)
    executor = fake_executor()
    run = executor.run

    def run_and_remove(task: Task) -> Iterator[Message]:
        for message in run(task):
            if isinstance(message, Checkpoint):
                message.path.unlink(missing_ok=True)
            yield message

    monkeypatch.setattr(executor, "run", run_and_remove)
    house.hire(executor)
    done = house.ended(job)
    assert (done.status, done.attempt, done.checkpoint_step) == ("completed", 1, 0)


def test_a_store_that_keeps_failing_fails_the_job_with_storage_error(house, monkeypatch):
    job = submit(house.queue, steps=2)
    break_store(monkeypatch, lambda _: PermissionError("the bucket says no"))
    house.hire(delays=Delays(store_seconds=(0.01,) * 3), max_failures=2)
    failed = house.ended(job)
    assert (failed.status, failed.error_code, failed.attempt) == ("failed", "storage_error", 2)


# ---- who is there ----------------------------------------------------------------------------------------------------


def test_a_worker_records_its_name_and_its_state(house):
    job = submit(house.queue, steps=100_000, step_seconds=0.01)
    worker = house.hire()
    house.begun(job)
    (record,) = wait_until(lambda: [r for r in house.queue.workers() if r.state["job"] == job.id])
    assert record.name == worker.name
    assert (record.state["ready"], record.state["model"], record.state["world_size"]) == (True, "fake", 1)
    house.queue.cancel(job.id)


def test_a_name_tells_whether_its_process_still_runs():
    name = worker_name()
    assert not is_dead(name)
    assert worker_name() != name
    machine, pid, number = name.rsplit("/", 2)
    assert is_dead(f"{machine}/{pid.partition('-')[0]}-1.00/{number}")  # the number was given out again
    assert is_dead(f"{machine}/999999999-1.00/{number}")
    assert not is_dead(f"elsewhere/boot/999999999-1.00/{number}")  # nothing is known of it
    assert not is_dead("a worker of another kind")


@pytest.mark.parametrize("is_idle_one_there", [False, True])
def test_a_killed_worker_leaves_its_job_to_another_one_soon(is_idle_one_there, house):
    """Long before its lease ends: to one that starts, and to one that was there all the time."""
    said = {"steps": 30, "step_seconds": 0.1}
    job = submit(house.queue, **said)
    program = (
        "import sys, threading; from pathlib import Path; from server_samples import *\n"
        "from pusa.server.worker.worker import Worker\n"
        "settings = quick_settings(Path(sys.argv[1]), lease_seconds=600.0); queue, files = open_all(settings)\n"
        "Worker(settings, queue, files, fake_executor()).run(threading.Event())"
    )
    env = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    command = [sys.executable, "-c", program, str(house.settings.data_folder)]
    with subprocess.Popen(command, env=env) as victim:
        try:
            wait_until(lambda: house.job(job).checkpoint_step >= 4)
            (child,) = psutil.Process(victim.pid).children()
            scratch = list(house.settings.scratch_folder.iterdir())
            if is_idle_one_there:
                house.hire(delays=Delays(reclaim_seconds=0.1))
        finally:
            victim.kill()  # also where the test fails: it would run for ever
    wait_until(lambda: not child.is_running())
    if not is_idle_one_there:
        house.hire()  # its lease is far from over
    wait_until(lambda: house.job(job).attempt == 2)
    done = house.ended(job)
    assert done.status == "completed"
    assert video_of(house, done) == uninterrupted(house, **said)
    assert not any(folder.exists() for folder in scratch)


# ---- progress --------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_weighs_stages_by_what_they_took_before_and_never_falls():
    clock, pace = Clock(), StageRatios()
    pace.learn_all([{"load": 0.0, "denoise": 10.0, "decode": 8.0, "finish": 2.0}] * 3)
    progress = AttemptProgress(pace, clock=clock)
    progress.stage("load")
    assert progress.percent == 0
    progress.stage("encode")
    assert progress.percent == 0
    progress.stage("denoise")
    clock.now = 10.0
    progress.step(2, 4, 10.0)
    assert progress.percent == 25  # half of denoising, which is half of all
    assert progress.seconds_left == 10 + 20 * (0.8 + 0.2)
    clock.now = 20.0
    progress.step(4, 4, 0.0)
    assert progress.percent == 50
    progress.stage("decode")
    clock.now = 28.0
    assert progress.percent == 70
    assert progress.seconds_left == 12
    clock.now = 1000.0
    assert progress.percent == pytest.approx(50 + 40 * 0.95)
    progress.stage("finish")
    assert progress.percent == 90
    progress.stage("decode")
    assert progress.percent == 90


def test_encoding_comes_between_loading_and_denoising():
    pace = StageRatios()
    pace.learn({"load": 2.0, "encode": 3.0, "denoise": 10.0, "decode": 4.0, "finish": 1.0})
    progress = AttemptProgress(pace, clock=Clock())
    progress.stage("encode")
    assert progress.percent == 10
    progress.step(1, 2, 5.0)
    assert progress.percent == 50


def test_an_attempt_that_goes_on_from_a_checkpoint_begins_there():
    pace = StageRatios()
    pace.learn({"load": 0.0, "denoise": 10.0, "decode": 10.0, "finish": 0.0})
    progress = AttemptProgress(pace, 0.5, clock=Clock())
    assert progress.percent == 25
    progress.stage("load")
    assert progress.percent == 25


def test_the_first_windows_of_a_long_video_do_not_count_as_decoded():
    progress = AttemptProgress(StageRatios(), clock=Clock())
    progress.step(4, 12, 8.0)
    before = progress.percent
    progress.stage("decode")
    assert progress.percent == before < 40


def test_a_job_that_denoised_nothing_teaches_nothing():
    pace = StageRatios()
    before = pace.ratio("decode")
    pace.learn(json.loads('{"denoise": 0.0, "decode": 100.0}'))
    assert pace.ratio("decode") == before
