"""Ray actors as executors, on a cluster of two nodes with addresses of the loopback only."""

import os
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from needs import needed_module
from server_process import FAKE_ENGINE
from server_samples import submit, uninterrupted, video_of, wait_until

ray = needed_module("ray", "pip install 'pusa[ray]'")

from ray_cluster import Machines, running_machines  # noqa: E402 (after the check for ray)

from pusa.events import Checkpoint, Done, Step  # noqa: E402
from pusa.server.worker.messages import Error  # noqa: E402
from pusa.server.worker.ray import RayExecutor, pack, unpack  # noqa: E402


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with running_machines() as found:
        found.add()
        yield found


def executor(**options: Any) -> RayExecutor:
    return RayExecutor("fake", target=FAKE_ENGINE, gpus=0, resources={"video": 1}, **options)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_jobs_run_in_an_actor_of_another_process_and_can_be_cancelled(machines, house):
    first, second = submit(house.queue, steps=3), submit(house.queue, steps=100_000, step_seconds=0.02)
    worker = house.hire(executor(), preview_seconds=0.01)
    done = house.ended(first)
    assert (done.status, done.attempt) == ("completed", 1)
    assert video_of(house, done) == uninterrupted(house, steps=3)
    (pid,) = worker.state.pids
    assert pid != os.getpid()
    house.begun(second, 2)
    house.queue.cancel(second.id)
    assert house.ended(second).status == "cancelled"
    assert worker.state.pids == (pid,)
    house.dismiss()
    wait_until(lambda: not psutil.pid_exists(pid))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", ["actor", "machine"])
def test_a_killed_actor_or_machine_costs_no_more_than_the_steps_since_the_checkpoint(machines, house, killed):
    instructions = {"steps": 40, "step_seconds": 0.1}
    job = submit(house.queue, **instructions)
    worker = house.hire(executor())
    wait_until(lambda: house.job(job).checkpoint_step >= 6)
    if killed == "actor":
        psutil.Process(worker.state.pids[0]).kill()
    else:
        machines.pull_the_plug()
        wait_until(lambda: not worker.state.ready)
        machines.add()
    wait_until(lambda: house.job(job).attempt == 2)
    assert house.job(job).checkpoint_step >= 6
    done = house.ended(job)
    assert (done.status, done.attempt) == ("completed", 2)
    assert video_of(house, done) == uninterrupted(house, **instructions)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_that_cannot_be_loaded_is_an_error_in_the_state(machines):
    found = RayExecutor('{"load_fails": true}', target=FAKE_ENGINE, gpus=0, resources={"video": 1})
    found.start()
    wait_until(lambda: found.state.stage == "failed")
    assert found.state.error == "ValueError: no such model"
    found.close()


def test_messages_travel_with_their_files(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    for name in ("video.mp4", "thumbnail.webp", "checkpoint.safetensors"):
        (there / name).write_text(name)
    done = Done({"video": there / "video.mp4", "thumbnail": there / "thumbnail.webp"}, {"decode": 1.0})
    arrived = unpack(*pack(done), here)
    assert arrived == Done({"video": here / "video.mp4", "thumbnail": here / "thumbnail.webp"}, {"decode": 1.0})
    assert (here / "video.mp4").read_text() == "video.mp4"
    arrived = unpack(*pack(Checkpoint(there / "checkpoint.safetensors", 4)), here)
    assert arrived == Checkpoint(here / "checkpoint.safetensors", 4)
    error = Error("out_of_memory", "no", retry=False, latents=there / "checkpoint.safetensors")
    assert unpack(*pack(error), here).latents == here / "checkpoint.safetensors"
    assert unpack(*pack(Step(1, 2)), here) == Step(1, 2)
