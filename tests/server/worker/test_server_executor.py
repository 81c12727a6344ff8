"""The child process that holds the model: whatever happens to it is told, and the next task finds a new one."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine
from paths import SUPPORT
from server_samples import fake_executor, is_running, quick_settings, request, wait_until

from pusa import media
from pusa.acceleration.decisions import LoadOptions
from pusa.acceleration.ranks import RankError
from pusa.events import Checkpoint, Done, Note, Resolved, Stage, Step
from pusa.models.files import DamagedFileError, MissingFilesError, WrongArchitectureError
from pusa.models.finite import NotFiniteError
from pusa.models.vae import DecodeError, DecodeMemoryError
from pusa.resources import ResourcesError
from pusa.server.worker.engine_process import (
    Inbox,
    PusaEngine,
    ReportLoading,
    error_message,
    make_engine,
    percent_of,
    rename_files,
    run_task,
    work,
)
from pusa.server.worker.local import LocalExecutor
from pusa.server.worker.messages import Cancelled, Error, LoadFailed, Task
from pusa.server.worker.worker import make_executor


@pytest.fixture
def started() -> Iterator[Callable[..., LocalExecutor]]:
    """``started(model="fake", **options)``: an executor that is ready."""
    made: list[LocalExecutor] = []

    def start(*arguments: Any, **options: Any) -> LocalExecutor:
        made.append(fake_executor(*arguments, **options))
        made[-1].start()
        wait_until(lambda: made[-1].state.ready)
        return made[-1]

    yield start
    for executor in made:
        executor.close()


def task(folder: Path, attempt: int = 1, *, inputs: dict[str, Path] | None = None, **said: Any) -> Task:
    folder.mkdir(exist_ok=True)
    asked = request(**said)
    return Task(
        job_id="video_1", attempt=attempt, request=asked, folder=folder, inputs=inputs or {}, checkpoint_every=2
    )


def run(executor: LocalExecutor, asked: Task) -> list[Any]:
    return list(executor.run(asked))


def restarted(executor: LocalExecutor) -> LocalExecutor:
    def is_ready() -> bool:
        executor.start()
        return executor.state.ready

    wait_until(is_ready)
    return executor


def test_a_task_tells_its_stages_steps_and_files_and_the_process_stays_for_the_next(started, tmp_path):
    executor = started()
    messages = run(executor, task(tmp_path / "a", steps=3))
    assert [m.stage for m in messages if isinstance(m, Stage)] == ["load", "denoise", "decode"]
    assert [(m.step, m.steps) for m in messages if isinstance(m, Step)] == [(1, 3), (2, 3), (3, 3)]
    assert [m.step for m in messages if isinstance(m, Checkpoint)] == [2, 3]
    assert isinstance(messages[-1], Done)
    assert media.probe_video(messages[-1].files["video"]).frames == 8
    before = executor.state.pids
    assert isinstance(run(executor, task(tmp_path / "b"))[-1], Done)
    assert executor.state.pids == before
    assert executor.state.world_size == 1


@pytest.mark.parametrize("how", ["segfault", "kill", "exit"])
def test_a_process_that_dies_ends_its_task_at_once_and_the_next_attempt_goes_on(how, started, tmp_path):
    executor = started()
    whole = run(executor, task(tmp_path / "whole", steps=6, at_step=5, then=how, times=0))[-1].files["video"]
    asked = {"steps": 6, "at_step": 5, "then": how, "times": 0}
    messages = run(executor, task(tmp_path / "cut", **{**asked, "times": 1}))
    end = messages[-1]
    assert isinstance(end, Error)
    assert (end.code, end.retry) == ("worker_lost", True)
    assert {"segfault": "SIGSEGV", "kill": "SIGKILL", "exit": "status 3"}[how] in end.message
    assert not executor.state.ready
    again = run(restarted(executor), task(tmp_path / "cut", attempt=2, **{**asked, "times": 1}))
    assert [m.step for m in again if isinstance(m, Step)] == [5, 6]
    uninterrupted = run(executor, task(tmp_path / "other", attempt=2, **{**asked, "times": 1}))[-1].files["video"]
    assert again[-1].files["video"].read_bytes() == uninterrupted.read_bytes() != whole.read_bytes()


def test_one_that_says_nothing_for_too_long_is_killed(started, tmp_path):
    executor = started(stall_seconds=1.0)
    end = run(executor, task(tmp_path / "a", at_step=2, then="hang"))[-1]
    assert (end.code, end.retry) == ("stalled", True)
    assert isinstance(run(restarted(executor), task(tmp_path / "a", attempt=2, at_step=2, then="hang"))[-1], Done)


def test_cancel_ends_a_task_between_two_steps_and_keeps_the_process(started, tmp_path):
    executor = started()
    before, seen = executor.state.pids, []
    for message in executor.run(task(tmp_path / "a", steps=1000, step_seconds=0.01)):
        seen.append(message)
        if message == Step(2, 1000, getattr(message, "seconds_left", None)):
            executor.cancel()
    assert isinstance(seen[-1], Cancelled)
    assert len(seen) < 900
    assert isinstance(run(executor, task(tmp_path / "b"))[-1], Done)
    assert executor.state.pids == before


def test_a_task_that_ignores_a_cancel_is_killed_after_the_grace_period(started, tmp_path):
    executor = started(grace_seconds=0.3)
    for message in executor.run(task(tmp_path / "a", at_step=2, then="hang")):
        if isinstance(message, Step) and message.step == 2:
            executor.cancel()
    assert isinstance(message, Cancelled)
    assert not executor.state.ready
    assert isinstance(run(restarted(executor), task(tmp_path / "b"))[-1], Done)


def test_a_task_that_nobody_follows_any_more_is_ended(started, tmp_path):
    executor = started()
    messages = executor.run(task(tmp_path / "a", steps=1000, step_seconds=0.05))
    next(messages)
    messages.close()
    assert isinstance(run(restarted(executor), task(tmp_path / "b"))[-1], Done)


def test_an_error_of_unknown_kind_costs_the_process_and_one_of_the_request_does_not(started, tmp_path):
    executor = started()
    before = executor.state.pids
    given = tmp_path / "0.png"
    given.touch()
    end = run(executor, task(tmp_path / "a", at_step=1, then="invalid", inputs={"inputs/1/0.png": given}))[-1]
    assert end == Error("invalid_request", "0.png is not an image", retry=False)
    assert executor.state.pids == before
    end = run(executor, task(tmp_path / "b", at_step=1, then="raise"))[-1]
    assert end == Error("internal_error", "RuntimeError: the engine broke", retry=True)
    assert not executor.state.ready
    assert run(executor, task(tmp_path / "c"))[-1].code == "worker_lost"  # not given to what is about to end
    assert restarted(executor).state.pids != before


def test_loading_tells_how_far_it_is_and_why_it_failed(tmp_path):
    executor = fake_executor('{"load_seconds": 2}')
    seen = set()

    def is_ready() -> bool:
        seen.add((executor.state.stage, executor.state.percent))
        return executor.state.ready

    executor.start()
    wait_until(is_ready)
    executor.close()
    assert ("ready", 100.0) in seen
    assert len([1 for stage, percent in seen if stage == "loading" and 0 < percent < 100]) > 1
    assert executor.state.stage == "stopped"

    executor = fake_executor('{"load_fails": true}')
    executor.start()
    wait_until(lambda: executor.state.stage == "failed")
    assert (executor.state.error, executor.state.error_code) == ("ValueError: no such model", "model_not_loaded")
    executor.close()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ResourcesError("9 GB of RAM are missing"), "model_too_large"),
        (MissingFilesError("vae/config.json"), "model_files_missing"),
        (KeyError("transformer"), "model_not_loaded"),
    ],
)
def test_why_a_model_cannot_be_loaded_has_a_code(error: Exception, code: str) -> None:
    class Failing(FakeEngine):
        def load(self, report: ReportLoading) -> str:
            raise error

    sent: list[Any] = []
    assert work(Failing("{}"), Inbox(), sent.append) == 1
    assert sent == [LoadFailed(f"{type(error).__name__}: {error}", code)]


def test_a_model_that_takes_too_long_to_load_is_given_up(tmp_path):
    executor = fake_executor('{"load_seconds": 100}', load_seconds=0.5)

    def is_given_up() -> bool:
        executor.start()
        return executor.state.stage == "failed"

    wait_until(is_given_up)
    assert executor.state.error == "the model was not loaded within load_seconds=0.5"
    executor.close()


def test_the_process_ends_when_the_one_that_started_it_is_killed(tmp_path):
    program = (
        "import sys, time; from server_samples import fake_executor; e = fake_executor(); e.start()\n"
        "while not e.state.ready: time.sleep(0.01)\n"
        "print(e.state.pids[0], flush=True); time.sleep(100)"
    )
    env = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.send_signal(signal.SIGKILL)
        wait_until(lambda: not is_running(child))


def test_a_process_that_has_lost_its_parent_before_it_starts_ends_at_once():
    command = [sys.executable, "-m", "pusa.server.worker.engine_start", "1", "fake_engine:FakeEngine", "fake"]
    env = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        assert child.stdout.read() == b""  # no sign of life, though its input is open
        assert child.wait() == 0


def test_importing_the_worker_loads_no_torch():
    program = "import sys, pusa.server.worker.worker, pusa.server.worker.engine_process; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


# ---- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "retry"),
    [
        (media.MediaError("x.png is no picture"), "invalid_file", False),
        (FileNotFoundError("x"), "invalid_request", False),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory", False),
        (MemoryError(), "out_of_memory", False),
        (RankError("rank 1 of 2 has failed: out of memory", 1), "out_of_memory", False),
        (RankError("rank 1 of 2 was killed", 1), "internal_error", True),
        (ResourcesError("it needs 30 GB"), "out_of_memory", False),
        (DecodeMemoryError("no", torch.zeros(1)), "out_of_memory", False),
        (OSError(28, "No space left on device"), "disk_full", True),
        (RuntimeError("CUDA error: device-side assert triggered"), "internal_error", True),
        (NotFiniteError("the transformer has computed NaN", "transformer"), "internal_error", False),
        (
            DecodeError("the vae has decoded NaN; the denoised latents are in x", torch.zeros(1)),
            "internal_error",
            False,
        ),
        (DamagedFileError("x.safetensors holds NaN or infinity"), "internal_error", False),
        (WrongArchitectureError("the vae is not exactly its checkpoint"), "internal_error", False),
    ],
)
def test_errors_by_what_can_be_done_about_them(error, code, retry, tmp_path):
    message = error_message(error, task(tmp_path))
    assert (message.code, message.retry) == (code, retry)
    assert str(tmp_path) not in message.message


def test_latents_that_could_not_be_decoded_come_with_the_error(tmp_path):
    (tmp_path / "video.latents.safetensors").write_bytes(b"")
    told = error_message(DecodeMemoryError("no", torch.zeros(1)), task(tmp_path))
    assert told.latents == tmp_path / "video.latents.safetensors"


def test_the_real_engine_makes_what_the_request_says_and_goes_on_from_its_checkpoint(tmp_path):
    from PIL import Image

    Image.new("RGB", (48, 32), "red").save(tmp_path / "0.png")
    asked = {
        "model": "tiny",
        "prompt": "a cat",
        "frames": 9,
        "width": 48,
        "height": 32,
        "steps": 4,
        "conditions": [{"kind": "image", "file": "inputs/video_1/0.png"}],
    }

    def made(folder: str, request: dict[str, Any], end: Callable[[Any], bool] = lambda message: False) -> list[Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        ended: list[bool] = []
        seen = []
        for message in run_task(
            engine,
            Task(
                job_id="video_1",
                attempt=1,
                request=request,
                folder=tmp_path / folder,
                inputs={"inputs/video_1/0.png": tmp_path / "0.png"},
                checkpoint_every=2,
                preview_seconds=0.001,
            ),
            lambda: bool(ended),
        ):
            seen.append(message)
            ended.extend([True] if end(message) else [])
        return seen

    engine = make_engine("pusa.server.worker.engine_process:PusaEngine", "tiny")
    assert isinstance(engine, PusaEngine)
    assert engine.load(lambda stage, percent: None) == "tiny"
    cut = made("cut", asked, lambda message: isinstance(message, Checkpoint))
    assert isinstance(cut[-1], Cancelled)
    (resolved,) = [m.request for m in cut if isinstance(m, Resolved)]
    assert resolved["conditions"][0]["file"] == "inputs/video_1/0.png"
    again, whole = made("cut", resolved), made("whole", resolved)
    assert isinstance(again[-1], Done)
    assert again[-1].files["video"].read_bytes() == whole[-1].files["video"].read_bytes()
    assert not [m for m in again if isinstance(m, Note) and "checkpoint" in m.message]
    assert set(whole[-1].files) == {"video", "thumbnail", "spritesheet", "contact_sheet"}
    assert Image.open(whole[-1].files["spritesheet"]).size[1] == 2 * 32  # 9 frames in 5 columns
    assert set(whole[-1].timings) == {"load", "encode", "denoise", "decode", "finish", "peak_memory_mb"}
    assert any(type(m).__name__ == "Preview" for m in whole)


def test_loading_progress_is_the_share_of_the_weights_that_is_read():
    told: list[tuple[str, float | None]] = []
    progress = percent_of(lambda stage, percent: told.append((stage, percent)))
    for done in (0, 5, 10, 10, 500, 504, 1000):
        progress(done, 1000)
    assert told == [("loading", 1.0), ("loading", 50.0), ("loading", 99.0)]  # never 100 before it is ready


def test_a_worker_s_settings_reach_its_processes_over_the_variables_that_these_inherit(monkeypatch, tmp_path):
    monkeypatch.setenv("PUSA_MEMORY", "fastest")
    monkeypatch.setenv("PUSA_QUANTIZE", "fp8")
    monkeypatch.setenv("PUSA_GPUS", "2")
    settings = quick_settings(tmp_path, memory="balanced", gpus=0)
    given: dict[str, str] = {}
    monkeypatch.setattr("pusa.server.worker.worker.LocalExecutor", lambda *_, env, **__: given.update(env))
    make_executor(settings)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert PusaEngine("tiny").load_options == settings.load_options == LoadOptions(compile="auto")


def test_a_request_gets_the_local_names_of_its_files():
    asked = {"prompt": "x", "conditions": [{"file": "inputs/1/0.png", "noise": [0.2]}, {"file": "other"}]}
    assert rename_files(asked, {"inputs/1/0.png": "/scratch/0.png"})["conditions"] == [
        {"file": "/scratch/0.png", "noise": [0.2]},
        {"file": "other"},
    ]
