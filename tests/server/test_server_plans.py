"""What a request would need on the machines of the workers, before it is queued; no worker, and no GPU, is needed."""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_samples import Served, clip, serving
from queue_samples import new_job
from server_samples import quick_settings

from pusa import zoo
from pusa.acceleration.decisions import Card, LoadOptions, Machine, Parallel, PartPlan, Plan
from pusa.events import Planned
from pusa.request import GenerationRequest, ResolvedRequest
from pusa.server.jobs.queue import JobQueue
from pusa.server.plans import Planner, Size, has_shapes, machine_as_json, machine_from_json, tokens_of, windows_of

GB = 10**9
CARD_24 = Machine((Card(24 * GB, "RTX 4090", (8, 9)),), ram_bytes=64 * GB)
CARD_80 = Machine((Card(80 * GB, "H100", (9, 0)), Card(80 * GB, "H100", (9, 0))), ram_bytes=256 * GB)


def plan(model: str, size: Size, machine: Machine, options: LoadOptions, guidance: float) -> list[Plan]:
    """Plan by a rule of this test: a clip needs a byte of a card for each pixel, times a thousand."""
    need = 1000 * size[0] * size[1] * size[2]
    have = sum(card.memory_bytes for card in machine.cards)
    problem = f"{model} needs {need} bytes and there are {have}: ask for a smaller size" if need > have else ""
    part = PartPlan("bfloat16", "bfloat16", "cuda", reason="all of it fits")
    peaks = {"denoise": need, "decode": need // 2}
    return [
        Plan(model, options.memory, {"transformer": part}, False, ranks, peaks, 7 * GB, 1.0, problem, ("a note",))
        for ranks in ([Parallel(guidance=options.gpus)] if options.gpus else [Parallel(guidance=2), Parallel()])
    ]


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    found = JobQueue(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    yield found
    found.close()


def publish(queue: JobQueue, name: str, machine: Machine, ranks: int = 1) -> None:
    state = {"ready": True, "stage": "ready", "machine": machine_as_json(machine), "world_size": ranks}
    queue.record_worker(name, state)


def resolved(**fields: Any) -> ResolvedRequest:
    asked = GenerationRequest.model_validate({"model": "wan2.1-14b", "prompt": "a duck", **fields})
    return asked.resolved(zoo.defaults_of("wan2.1-14b"))


def planner_of(queue: JobQueue, folder: Path) -> Planner:
    return Planner(quick_settings(folder, model="wan2.1-14b"), queue, plan, kept_seconds=0.0)


def test_a_machine_travels_as_json() -> None:
    for machine in (CARD_24, CARD_80, Machine(ram_bytes=5)):
        assert machine_from_json(json.loads(json.dumps(machine_as_json(machine)))) == machine


def test_tokens_and_windows_are_those_that_are_denoised() -> None:
    default = resolved()
    assert tokens_of(default, 16) == 21 * 30 * 52 == 32_760
    assert windows_of(default) == 1
    long = resolved(frames=241, overlap=13)
    assert (tokens_of(long, 16), windows_of(long)) == (32_760, 4)  # 61 latent frames by 21, 17, 17 and the rest
    assert windows_of(resolved(task="loop", frames=81, overlap=13)) == 2  # the clip and its bridge
    assert tokens_of(resolved(width=1280, height=704), 32) == 21 * 22 * 40


def test_a_plan_is_for_the_machine_that_a_worker_has_published(queue: JobQueue, tmp_path: Path) -> None:
    planner = planner_of(queue, tmp_path)
    assert planner.plan_request(resolved()) is None  # nobody knows yet
    publish(queue, "small", CARD_24)
    small = planner.plan_request(resolved())
    assert small is not None
    assert "there are 24000000000" in small.problem
    publish(queue, "large", CARD_80)
    large = planner.plan_request(resolved())
    assert large is not None
    assert not large.problem  # one of the workers can make it


def test_a_plan_is_for_as_many_cards_as_share_each_job(queue: JobQueue, tmp_path: Path) -> None:
    planner = planner_of(queue, tmp_path)
    for ranks, where in ((3, "on 3 GPUs"), (2, "on 2 GPUs"), (1, "on the GPU")):
        publish(queue, "group", CARD_80, ranks)
        found = planner.plan_request(resolved(width=480, height=480, frames=17))
        assert found is not None
        assert where in found.summary


def test_processes_that_share_jobs_without_a_gpu_have_the_plan_of_one(queue: JobQueue, tmp_path: Path) -> None:
    planner = Planner(quick_settings(tmp_path, model="wan2.1-14b"), queue)
    publish(queue, "group", Machine(ram_bytes=256 * GB), 2)
    found = planner.plan_request(resolved())
    assert found is not None
    assert found.summary == "wan2.1-14b: transformer on the CPU in bfloat16, merged"


def test_a_model_that_nobody_knows_has_no_plan(queue: JobQueue, tmp_path: Path) -> None:
    publish(queue, "small", Machine(ram_bytes=5))
    unknown = Planner(quick_settings(tmp_path, model="somebody/their-model"), queue)
    assert unknown.plan_request(resolved()) is None  # so nothing is refused
    assert (found := Planner(quick_settings(tmp_path, model="wan2.1-14b"), queue).plan_request(resolved())) is not None
    assert found.problem
    folder = tmp_path / "folder" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert has_shapes(str(folder.parent))


def test_seconds_are_those_of_earlier_videos_of_as_many_tokens(queue: JobQueue, tmp_path: Path) -> None:
    planner = planner_of(queue, tmp_path)
    request = resolved(steps=10, seed=1)
    assert planner.estimate(request).seconds is None
    queue.submit(new_job())
    running = queue.claim("worker", lease_seconds=60)
    assert running is not None
    queue.heartbeat(running, lease_seconds=60, steps=10, step=10, resolved=request.model_dump(mode="json"))
    queue.finish(running, results={}, timings={"queue": 99.0, "denoise": 50.0, "decode": 8.1, "peak_memory_mb": 7.0})
    estimate = planner.estimate(resolved(steps=20))
    assert estimate.seconds == pytest.approx(20 * 5.0 + 8.1)
    assert (estimate.steps, estimate.tokens) == (20, 32_760)
    four = planner.estimate(resolved(steps=20, frames=241, overlap=13))
    assert four.seconds == pytest.approx(80 * 5.0 + 8.1 / 81 * 241)
    assert planner.estimate(resolved(steps=20, guidance=1.0)).seconds is None  # half as much to compute
    assert planner.estimate(resolved(width=480, height=480)).seconds is None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The API without workers, but with the machine of one that another machine has."""
    folder = tmp_path_factory.mktemp("plans")
    with serving(folder, plan=plan, workers=0, lease_seconds=3600.0) as served:
        machine = Machine((Card(200_000_000, "small card", (8, 6)),), ram_bytes=8 * GB)
        publish(served.service.queue, "elsewhere", machine)
        time.sleep(0.01)
        yield served


def test_an_estimate_tells_what_a_video_would_need_and_makes_no_job(server: Served) -> None:
    body = {"prompt": "a duck", "size": "96x64", "num_frames": 17, "num_inference_steps": 4}
    for answer in (
        server.http.post("/v1/videos/estimate", json=body),
        server.http.post("/v1/videos/estimate", data=body),
    ):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert (found["object"], found["model"], found["size"], found["num_frames"]) == (
            "video.estimate", "tiny", "96x64", 17,
        )  # fmt: skip
        assert (found["tokens"], found["windows"], found["num_inference_steps"]) == (5 * 4 * 6, 1, 4)
        assert found["plan"] == "tiny: transformer on the GPU in bfloat16"
        assert found["gpu_peak_bytes"] == {"denoise": 104_448_000, "decode": 52_224_000}
        assert (found["ram_peak_bytes"], found["seconds"], found["problem"]) == (7 * GB, None, None)
        assert found["problem_detail"] is None
        assert found["notes"] == ["a note"]
    assert server.http.get("/v1/videos").json()["data"] == []
    assert server.http.post("/v1/videos/estimate", json={**body, "size": "blue"}).json()["error"]["param"] == "size"
    assert server.http.get("/v1/videos/estimate").status_code == 405


def test_a_request_that_no_machine_can_make_is_refused_and_its_estimate_says_why(server: Served) -> None:
    large = {"size": "640x480", "num_frames": 81}
    error = server.refused(400, **large)
    assert (error["code"], error["param"]) == ("does_not_fit", "size")
    assert error["message"].endswith("ask for a smaller size")
    found = server.http.post("/v1/videos/estimate", json={"prompt": "a duck", **large}).json()
    assert found["problem"] == found["plan"] == error["message"]
    assert found["problem_detail"] == {name: error[name] for name in ("code", "message", "values")}
    assert {"problem", "lacks", "needs", "has", "way", "size", "frames"} == set(error["values"])
    assert server.http.get("/v1/videos").json()["data"] == []


def test_the_model_tells_its_plan_and_its_machine(server: Served) -> None:
    found = server.http.get("/v1/models/tiny").json()["plan"]
    assert found["summary"] == "tiny: transformer on the GPU in bfloat16"
    assert found["cards"] == [{"name": "small card", "memory_bytes": 200_000_000}]
    assert (found["ranks"], found["ram_bytes"], found["problem"]) == (1, 8 * GB, None)
    (part,) = found["parts"]
    assert part == {
        "part": "transformer",
        **dataclasses.asdict(PartPlan("bfloat16", "bfloat16", "cuda", reason="all of it fits")),
    }
    assert server.http.get("/v1/models").json()["data"][0]["plan"] == found


def test_a_video_shorter_than_its_overlap_is_refused_before_it_is_queued(server: Served, tmp_path: Path) -> None:
    short = clip(tmp_path, frames=5)
    for route, count in (("extensions", 1), ("edits", 2)):
        files = [("video[]" if count > 1 else "video", (short.name, short.read_bytes(), "video/mp4"))] * count
        fields = {"prompt": "it goes on", "overlap": "9", "num_frames": "17", "fps": "16", "size": "96x64"}
        fields |= {"num_frames": "65", "window": "65"} if count > 1 else {}
        answer = server.http.post(f"/v1/videos/{route}", data=fields, files=files)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "overlap"
        assert "has 5 frames at 16 fps, 9 are taken over" in answer.json()["error"]["message"]
    enough = server.http.post(
        "/v1/videos/extensions",
        data={"prompt": "it goes on", "overlap": "5", "num_frames": "17", "fps": "16", "size": "96x64"},
        files=[("video", (short.name, short.read_bytes(), "video/mp4"))],
    )
    assert enough.status_code == 200, enough.text
    server.http.delete(f"/v1/videos/{enough.json()['id']}")


def test_a_running_job_says_how_the_model_runs(queue: JobQueue) -> None:
    job, _ = queue.submit(new_job())
    running = queue.claim("worker", lease_seconds=60)
    assert running is not None
    queue.heartbeat(running, lease_seconds=60, plan=Planned("tiny: transformer on the CPU").summary)
    found = queue.get(job.id)
    assert found is not None
    assert found.plan == "tiny: transformer on the CPU"
