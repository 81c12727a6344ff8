"""The service below API and studio, and `pusa serve` as a process."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from api_samples import FRAMES, NearProber, clip, png, work
from fastapi.testclient import TestClient
from server_samples import open_all, quick_settings, wait_until

from pusa.cli import root as cli
from pusa.request import GenerationRequest
from pusa.server.app import create_app
from pusa.server.errors import ServiceError, is_disk_full, respond
from pusa.server.http.to_request import extension_length
from pusa.server.jobs.queue import Job, JobQueue, QueueUnavailable
from pusa.server.metrics import Metrics
from pusa.server.service import Upload, VideoService, model_name
from pusa.zoo import defaults_of


@pytest.fixture
def service(tmp_path: Path) -> VideoService:
    return make(tmp_path)


def make(folder: Path, **changes: Any) -> VideoService:
    settings = quick_settings(folder, model="tiny", min_free_bytes=0, **changes)
    service = VideoService(settings, *open_all(settings))
    service.submitter.prober = NearProber(service.submitter.prober.limits)
    return service


def picture(folder: Path, grey: int = 1) -> Upload:
    path = folder / f"{grey}.png"
    path.write_bytes(png(grey=grey))
    return Upload(name=path.name, path=path)


def run(awaitable: Any) -> Any:
    return asyncio.run(awaitable)


# ---- accepting -------------------------------------------------------------------------------------------------------


def test_an_accepted_job_and_its_inputs_are_on_disk(service: VideoService, tmp_path: Path) -> None:
    request = {"prompt": "a duck", "conditions": [{"file": "a"}]}
    job = run(service.create(request, {"a": picture(tmp_path)}))
    there = JobQueue(service.settings.database_url).get(job.id)
    assert there == job
    asked = GenerationRequest.model_validate(job.request)
    assert asked.conditions[0].kind == "image"
    assert asked.seed is not None  # drawn once: a run that goes on elsewhere is the same run
    assert service.files.get_bytes(job.inputs[0]) == png(grey=1)


def test_a_key_sent_ten_times_at_once_makes_one_job_with_one_set_of_inputs(
    service: VideoService, tmp_path: Path
) -> None:
    async def ten() -> list[Job]:
        request = {"prompt": "a duck", "conditions": [{"file": "a"}]}
        uploads = {"a": picture(tmp_path)}
        return await asyncio.gather(*(service.create(request, uploads, idempotency_key="key") for _ in range(10)))

    jobs = run(ten())
    assert len({job.id for job in jobs}) == 1
    assert [key for key, _ in service.files.keys("inputs")] == list(jobs[0].inputs)


def test_inputs_of_a_job_that_is_not_accepted_are_removed(service: VideoService, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise QueueUnavailable("no")

    service.queue.submit = unreachable  # type: ignore[method-assign, assignment]
    with pytest.raises(ServiceError) as refused:
        run(service.create({"prompt": "x", "conditions": [{"file": "a"}]}, {"a": picture(tmp_path)}))
    assert (refused.value.status, refused.value.code) == (503, "queue_unavailable")
    assert not list(service.files.keys("inputs"))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"conditions": [{"file": "b"}]}, "not sent along"),
        ({"conditions": []}, "not used"),
        ({"conditions": [{"file": "a", "kind": "video"}]}, "is an image, and a video is needed"),
        ({"conditions": [{"file": "a", "positions": [99]}]}, "latent frames"),
        ({"conditions": [{"file": "a"}], "model": "mini"}, "tiny"),
    ],
)
def test_requests_and_files_must_fit_together(
    service: VideoService, tmp_path: Path, request_: dict[str, Any], words: str
) -> None:
    with pytest.raises(ServiceError, match=words):
        run(service.create({"prompt": "x", **request_}, {"a": picture(tmp_path)}))


def test_models_and_loras_are_called_by_the_operators_names(tmp_path: Path) -> None:
    lora = tmp_path / "secret" / "steady.safetensors"
    service = make(tmp_path, lora=[str(lora)])
    for lora_field in ({}, {"lora": ["steady.safetensors"]}):
        job = run(service.create({"prompt": "x", **lora_field}, {}))
        assert job.request["lora"] == [str(lora)]
    for wrong in (str(lora), "other", "../secret/steady.safetensors"):
        with pytest.raises(ServiceError) as refused:
            run(service.create({"prompt": "x", "lora": [wrong]}, {}))
        assert refused.value.code == "lora_not_found"
        assert "secret" not in refused.value.message.replace(wrong[:60], "")
    (tmp_path / "my-model").mkdir()
    assert model_name(str(tmp_path / "my-model")) == "my-model"
    assert model_name("Wan-AI/Wan2.1-T2V-14B-Diffusers") == "wan2.1-14b"
    assert model_name("someone/something") == "someone/something"


def test_clients_write_strengths_and_experts_with_the_operators_names(tmp_path: Path) -> None:
    high, low = str(tmp_path / "secret" / "a_high.safetensors"), str(tmp_path / "secret" / "a_low.safetensors")
    service = make(tmp_path, lora=[f"high={high},low={low}@1.3"])
    job = run(service.create({"prompt": "x"}, {}))
    assert job.request["lora"] == [f"high={high},low={low}@1.3"]
    for asked, stored in (
        ("a_low.safetensors@0.5", f"{low}@0.5"),
        ("high=a_low.safetensors,low=a_high.safetensors@2", f"high={low},low={high}@2"),
    ):
        job = run(service.create({"prompt": "x", "lora": [asked]}, {}))
        assert job.request["lora"] == [stored]
        assert run(service.rerun(job.id)).request["lora"] == [stored]
    for wrong in (f"low={low}", "low=other,high=a_low.safetensors", f"{high}@1"):
        with pytest.raises(ServiceError, match="is not offered: there are high=a_high") as refused:
            run(service.create({"prompt": "x", "lora": [wrong]}, {}))
        assert refused.value.code == "lora_not_found"


def test_an_upright_picture_makes_an_upright_video(service: VideoService, tmp_path: Path) -> None:
    path = tmp_path / "upright.png"
    path.write_bytes(png(64, 96))
    upload = Upload(name="upright", path=path)
    job = run(service.create({"prompt": "x", "conditions": [{"file": "a"}]}, {"a": upload}))
    assert job.size == "64x96"


def test_lengths_of_extensions_are_of_what_is_added() -> None:
    tiny = defaults_of("tiny")
    for seconds in (0.1, 0.5, 1, 2, 5):
        length = extension_length(seconds, {}, tiny)
        request = GenerationRequest(
            task="extend", prompt="x", conditions=[{"kind": "video", "file": "a"}], **length
        ).resolved(tiny)
        assert request.overlap == length["overlap"]
        assert abs(request.frames - request.overlap - seconds * tiny.fps) <= 4


# ---- made from others ------------------------------------------------------------------------------------------------


def test_again_is_the_same_and_varied_only_in_its_seed(service: VideoService, tmp_path: Path) -> None:
    async def three() -> list[Job]:
        first = await service.create({"prompt": "x", "conditions": [{"file": "a"}]}, {"a": picture(tmp_path)})
        return [first, await service.rerun(first.id), await service.rerun(first.id, vary_seed=True)]

    first, same, varied = run(three())
    assert (same.parent, same.inputs != first.inputs) == (first.id, True)
    assert {**same.request, "conditions": None} == {**first.request, "conditions": None}
    assert len({job.request["conditions"][0]["sha256"] for job in (first, same, varied)}) == 1
    assert {**varied.request, "seed": 0, "conditions": None} == {**first.request, "seed": 0, "conditions": None}
    assert varied.request["seed"] != first.request["seed"]


@pytest.mark.parametrize("store", ["folder", "memory"])
def test_a_finished_video_is_extended_edited_and_joined_by_its_id(tmp_path: Path, store: str) -> None:
    service = make(tmp_path, **({"files": f"memory://{tmp_path.name}"} if store == "memory" else {}))
    first = run(service.create({"prompt": "a duck", "width": 96, "height": 64}, {}))
    with pytest.raises(ServiceError) as early:
        run(service.extend(first.id))
    assert (early.value.status, early.value.code) == (409, "not_ready")
    work(service)
    longer = run(service.extend(first.id, seconds=1, request={"seed": 3}))
    assert (longer.prompt, longer.parent, longer.request["task"]) == ("a duck", first.id, "extend")
    assert (longer.size, longer.request["seed"]) == ("96x64", 3)
    edited = run(service.edit([first.id], "in the snow"))
    assert (edited.request["frames"], edited.request["conditions"][0]["noise"]) == (FRAMES, [0.7])
    kept = run(service.edit([first.id], "in the snow", positions=[0, 1], noise=[0, 0.3]))
    assert (kept.request["conditions"][0]["positions"], kept.request["conditions"][0]["noise"]) == ([0, 1], [0, 0.3])
    joined = run(service.edit([first.id, Upload(name="b", path=clip(tmp_path))], "it becomes"))
    assert (joined.request["task"], len(joined.inputs)) == ("transition", 2)
    assert not list(service.spool.folder.iterdir())
    content = run(service.content(first.id))
    with content.open() as file:
        assert len(file.read()) == content.size
    run(service.delete(first.id))
    with pytest.raises(ServiceError) as refused:
        run(service.content(first.id))
    assert refused.value.status == 404
    assert service.files.exists(longer.inputs[0])  # a copy of its own


def test_a_video_whose_file_is_gone_is_not_found(service: VideoService) -> None:
    job = run(service.create({"prompt": "x"}, {}))
    work(service)
    service.files.delete_prefix(f"results/{job.id}")
    for attempt in (service.content(job.id), service.extend(job.id)):
        with pytest.raises(ServiceError) as gone:
            run(attempt)
        assert (gone.value.status, gone.value.code) == (404, "file_gone")


# ---- following -------------------------------------------------------------------------------------------------------


def test_a_watcher_sees_what_other_processes_change(service: VideoService) -> None:
    job = run(service.create({"prompt": "x"}, {}))
    elsewhere = JobQueue(service.settings.database_url)

    async def follow() -> list[str]:
        seen = []
        async for now in service.watch(job.id):
            seen.append(now.status)
            if now.status == "queued":
                claimed = elsewhere.claim("elsewhere", lease_seconds=30)
                assert claimed is not None
            elif now.status == "in_progress":
                elsewhere.finish(claimed, results={}, timings={})
        return seen

    assert run(asyncio.wait_for(follow(), 30)) == ["queued", "in_progress", "completed"]


def test_a_watcher_ends_with_its_job(service: VideoService) -> None:
    async def follow() -> int:
        job = await service.create({"prompt": "x"}, {})
        seen = 0
        async for _ in service.watch(job.id):
            seen += 1
            await service.delete(job.id)
        return seen

    assert run(asyncio.wait_for(follow(), 30)) == 1


def test_readiness_tells_the_stage_of_loading(service: VideoService) -> None:
    assert service.readiness().stage == "starting"
    say = service.queue.record_worker
    say("a", {"ready": False, "stage": "loading", "percent": 40.0, "model": "tiny", "error": None})
    state = service.readiness()
    assert (state.ready, state.stage, state.percent, state.workers) == (False, "loading", 40.0, 1)
    say("b", {"ready": False, "stage": "failed", "percent": None, "model": "tiny", "error": "no such file"})
    assert service.readiness().stage == "loading"
    say("b", {"ready": True, "stage": "ready", "percent": 100.0, "model": "tiny", "error": None})
    assert (service.readiness().ready, service.readiness().percent) == (True, 100.0)


def test_readiness_tells_why_a_model_cannot_be_loaded(tmp_path: Path) -> None:
    service = make(tmp_path, workers=0)
    assert "pusa worker" in service.readiness().message
    service.queue.record_worker("a", {"ready": False, "stage": "failed", "percent": None, "error": "disk is full"})
    assert "disk is full" in service.readiness().message
    values = {"reason": "disk is full"}
    assert service.readiness().error == {"code": "model_not_loaded", "values": values, "message": "disk is full"}
    state = {"ready": False, "stage": "failed", "error": "ResourcesError: 9 GB", "error_code": "model_too_large"}
    service.queue.record_worker("a", state)
    assert (service.readiness().error or {})["code"] == "model_too_large"
    service.queue.record_worker("a", {**state, "ready": True, "stage": "ready"})
    assert service.readiness().error is None


def test_metrics_count_what_has_ended_once_wherever_it_ran(service: VideoService) -> None:
    run(service.create({"prompt": "before"}, {}))
    work(service)
    metrics = Metrics(service)
    metrics.start()
    jobs = [run(service.create({"prompt": "x"}, {})) for _ in range(3)]
    run(service.cancel(jobs[2].id))
    work(service, jobs=2)
    for _ in range(2):
        metrics.count_ended()
    value = metrics.registry.get_sample_value
    labels = {"model_name": "tiny"}
    assert value("pusa:request_success_total", {**labels, "finished_reason": "completed"}) == 2
    assert value("pusa:request_success_total", {**labels, "finished_reason": "cancelled"}) == 1
    assert value("pusa:request_inference_time_seconds_sum", labels) == pytest.approx(2 * 1.7)
    assert value("pusa:denoise_step_seconds_sum", labels) == pytest.approx(2 * 0.5)
    assert value("pusa:num_requests_waiting", labels) == 0
    run(service.create({"prompt": "x"}, {}))
    assert value("pusa:num_requests_waiting", labels) == 1


def test_metrics_see_the_end_of_jobs_that_many_newer_ones_hide(service: VideoService) -> None:
    metrics = Metrics(service, newest_jobs=2)
    metrics.start()
    for n in range(6):
        run(service.create({"prompt": str(n)}, {}))
        metrics.count_ended()
    work(service, jobs=6)
    metrics.count_ended()
    sample = {"model_name": "tiny", "finished_reason": "completed"}
    assert metrics.registry.get_sample_value("pusa:request_success_total", sample) == 6


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_recognised_behind_other_errors() -> None:
    wrapped = RuntimeError("could not write")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert is_disk_full(wrapped)
    assert respond(wrapped).status_code == 507
    assert not is_disk_full(RuntimeError("could not write"))
    assert respond(RuntimeError("could not write")).status_code == 500


# ---- pusa serve ------------------------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code, capsys.readouterr().err  # type: ignore[return-value]


def test_a_port_in_use_is_an_error_that_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, told = refused(["serve", "--port", port, "--data", str(tmp_path)], capsys)
    assert code == 1
    assert told == f"pusa: port {port} is taken by another program: stop it, or give --port 0 for a free one\n"


def test_what_others_can_reach_needs_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = refused(["serve", "--host", "0.0.0.0", "--data", str(tmp_path)], capsys)
    assert code == 2
    assert "PUSA_API_KEYS" in told
    assert "host=0.0.0.0" in told


def test_options_are_the_settings_but_for_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    told = capsys.readouterr().out
    for option in ("--port", "--data", "--workers", "--queue-limit", "--allowed-host", "--no-studio", "--insecure"):
        assert option in told
    assert "--api-keys " not in told
    with pytest.raises(SystemExit):
        cli.main(["worker", "--help"])
    told = capsys.readouterr().out
    assert "--database" in told
    assert "--port" not in told


class Process:
    """`pusa serve` on a free port."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "pusa", "serve", "--data", str(folder), "--port", str(self.port), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)
        wait_until(self.is_alive)

    def is_alive(self) -> bool:
        assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def end(self) -> float:
        """Seconds that it took to end after SIGTERM."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        self.http.close()
        return time.monotonic() - began


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    started: list[Process] = []

    def start(*options: str) -> Process:
        started.append(Process(tmp_path, "--model", "tiny", "--min-free-bytes", "0", "--no-studio", *options))
        return started[-1]

    yield start
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
            process.process.communicate()


def test_serve_loads_no_library_that_takes_long(serve: Any) -> None:
    """Told by the compiled libraries in its memory: NumPy, Pillow, PyAV and PyTorch all have some."""
    server = serve("--workers", "0")
    assert server.http.get("/").status_code == 200
    files = [mapped.path for mapped in psutil.Process(server.process.pid).memory_maps()]
    compiled = {path.partition("/site-packages/")[2].partition("/")[0] for path in files if path.endswith(".so")}
    assert "pydantic_core" in compiled
    assert compiled <= {"", "httptools", "orjson", "psutil", "pydantic_core", "sqlalchemy", "uvloop"}
    server.end()


@pytest.mark.slow
def test_serve_makes_a_video_with_the_real_model_and_ends_in_good_order(serve: Any) -> None:
    server = serve()
    loading = server.http.get("/ready")
    assert loading.status_code in (200, 503)
    assert set(loading.json()) >= {"ready", "stage", "percent"}
    assert server.http.get("/").status_code == 200
    asked = {"prompt": "a duck", "num_inference_steps": 2, "num_frames": 9}
    first = server.http.post("/v1/videos", json=asked)
    assert first.status_code == 200  # accepted, whether the model is there or not
    id = first.json()["id"]
    wait_until(lambda: server.http.get(f"/v1/videos/{id}").json()["status"] == "completed", 120)
    assert server.http.get("/ready").json()["ready"]
    assert server.http.get(f"/v1/videos/{id}/content").content[4:8] == b"ftyp"
    files = {"input_reference": ("a.png", png(), "image/png")}
    second = server.http.post("/v1/videos", data=asked, files=files).json()["id"]
    wait_until(lambda: server.http.get(f"/v1/videos/{second}").json()["status"] == "completed", 120)

    long = server.http.post("/v1/videos", json={"prompt": "a duck", "num_inference_steps": 200}).json()["id"]
    wait_until(lambda: server.http.get(f"/v1/videos/{long}").json()["step"] > 0, 120)
    assert server.end() < 15
    assert server.process.returncode in (0, -signal.SIGTERM)

    again = serve("--workers", "0")
    video = again.http.get(f"/v1/videos/{long}").json()
    assert (video["status"], video["error"]) == ("queued", None)
    assert again.http.get("/ready").json()["stage"] == "no worker"
    again.end()


def test_create_app_tells_what_is_wrong_with_its_database(tmp_path: Path) -> None:
    settings = quick_settings(tmp_path, database="mysql://localhost/x")
    with pytest.raises(ValueError, match="the database's URL is not understood: write sqlite:///FILE or postgresql://"):
        create_app(settings)


# ---- the page and the paths beside it --------------------------------------------------------------------------------


@pytest.mark.parametrize("studio", [True, False])
def test_the_page_leaves_the_paths_of_the_api_alone(studio: bool, tmp_path: Path) -> None:
    settings = quick_settings(tmp_path, model="tiny", workers=0, studio=studio)
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert ('type="module"' in page.text, 'http-equiv="refresh"' in page.text) == (studio, not studio)
        assert client.get("/health").status_code == 200
        for path in ("/v1/nothing", "/v1/", "/metrics/", "/assets/x"):
            assert client.get(path).json()["error"]["code"] == "not_found"
        assert client.put("/v1/videos").status_code == 405


def test_behind_a_proxy_paths_have_its_prefix(tmp_path: Path) -> None:
    settings = quick_settings(tmp_path, model="tiny", workers=0, studio=False, root_path="/pusa", api_keys=["k" * 16])
    with TestClient(create_app(settings), base_url="http://localhost", root_path="/pusa") as client:
        assert client.get("/pusa/health").status_code == 200
        assert client.get("/pusa/v1/videos").status_code == 401
        page = client.get("/pusa/", auth=("", "k" * 16))
        assert 'href="/pusa/docs"' in page.text
