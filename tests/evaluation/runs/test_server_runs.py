"""Runs on a server: what is sent, restarts of the server and of the run, jobs that fail."""

import json
from pathlib import Path

import httpx
import pytest
from PIL import Image
from run_samples import make_fake_items, make_run, write_grey
from server_process import ServerProcess

from pusa.client import PusaClient
from pusa.evaluation.runs import RunFolder, make_videos
from pusa.evaluation.runs.server import ServerMaker, creation_of, server_makers
from pusa.request import ConditionSpec, GenerationRequest


def test_conditions_are_sent_with_their_places_and_noise(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    image = ConditionSpec(kind="image", file=str(tmp_path / "cat.png"), positions=["80f"], noise=[0.2], fit="letterbox")
    video = ConditionSpec(kind="video", file="clip.mp4", positions=[0, "1.5s"], noise=[0.0, 0.3], fit="letterbox")
    found = creation_of(GenerationRequest(prompt="a cat", steps=4, seed=3, conditions=[image, video]))
    (keyframe,) = found.pop("keyframes")
    assert (keyframe.image, keyframe.at, keyframe.noise) == (tmp_path / "cat.png", "80f", 0.2)
    assert found == {
        "prompt": "a cat",
        "model": "mini",
        "num_inference_steps": 4,
        "seed": 3,
        "fit": "letterbox",
        "video": Path("clip.mp4"),
        "cond_positions": "0,1.5s",
        "noise_multipliers": [0.0, 0.3],
    }
    with pytest.raises(ValueError, match="one fit for all"):
        creation_of(GenerationRequest(conditions=[image, video.model_copy(update={"fit": "crop"})]))
    two = [ConditionSpec(kind="video", file=name) for name in ("a.mp4", "b.mp4")]
    assert creation_of(GenerationRequest(task="transition", conditions=two)) == {
        "model": "mini",
        "fit": "crop",
        "videos": [Path("a.mp4"), Path("b.mp4")],
    }


def test_a_server_that_is_not_there_or_has_another_model_is_an_error_before_any_work(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(ValueError, match="no address"):
        server_makers("localhost:7860", None, run, 2)
    with pytest.raises(RuntimeError, match="start `pusa serve` there"):
        server_makers("http://127.0.0.1:9", None, run, 2)


def test_a_job_that_has_failed_is_made_once_more_under_its_key(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    write_grey(run.items[0], tmp_path / "made.mp4")
    asked: list[tuple[str, str | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((f"{request.method} {request.url.path}", request.headers.get("idempotency-key")))
        if request.url.path.endswith("/content"):
            return httpx.Response(200, content=(tmp_path / "made.mp4").read_bytes())
        has_retried = any("retry" in path for path, _ in asked)
        return httpx.Response(200, json={"id": "video_1", "status": "completed" if has_retried else "failed"})

    client = PusaClient("http://pusa.test", transport=httpx.MockTransport(answer))
    assert make_videos(run, ServerMaker(client, run)).made == 1
    assert asked == [
        ("POST /v1/videos", f"{run.id}-{run.items[0].id}"),
        ("POST /v1/videos/video_1/retry", None),
        ("GET /v1/videos/video_1", None),
        ("GET /v1/videos/video_1/content", None),
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_outlasts_restarts_of_the_server_and_its_own(tmp_path: Path) -> None:
    """Each item is one job, whatever happens; the videos come into the folder.

    The server is restarted while the run waits for its jobs; then the run ends, and another process goes on with it.
    """
    run = RunFolder.create(tmp_path / "run", "sample", {}, make_fake_items(6, steps=12, step_seconds=0.05))
    made_before: list[int] = []

    def made() -> int:
        return len(list(run.videos.iterdir()))

    with ServerProcess(tmp_path / "server", fake=True) as server:

        def restart(event: object) -> None:
            if not made_before and made():
                server.stop()
                made_before.append(made())
                server.start()

        makers = server_makers(server.url, None, run, 3)
        stopped = make_videos(run, makers, report=restart, stop=lambda: bool(made_before) and made() > made_before[0])
        assert stopped.is_stopped
        assert 1 <= made_before[0] < stopped.made < 6

        again = RunFolder.open(run.folder)
        summary = make_videos(again, server_makers(server.url, None, again, 3), poll_seconds=0.1)
        assert (summary.made, summary.made_here, summary.failed) == (6, 6 - stopped.made, ())
        with PusaClient(server.url) as client:
            jobs = [json.loads(job.prompt or "")["number"] for job in client.list()]
        assert sorted(jobs) == [0, 1, 2, 3, 4, 5]
    assert not run.problems(decode=True)
