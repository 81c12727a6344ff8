"""GET /v1/videos/{id}/request: what a video was made from, as a body that makes it once more."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_samples import Served, clip, png, refusal, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("requests"), workers=0) as served:
        yield served


@pytest.fixture(scope="module")
def video_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("clips"))


def submit(server: Served, fields: dict[str, Any], pictures: int = 0, videos: int = 0, clip_: Path = Path()) -> str:
    files: list[tuple[str, Any]] = [
        ("input_reference", (f"{number}.png", png(grey=10 * number), "image/png")) for number in range(pictures)
    ]
    if videos:
        files += [("input_reference", (f"{number}.mp4", clip_.read_bytes(), "video/mp4")) for number in range(videos)]
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    answer = server.http.post("/v1/videos", data={"seed": "3", **form}, files=files or None)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def request_of(server: Served, id: str) -> dict[str, Any]:
    answer = server.http.get(f"/v1/videos/{id}/request")
    assert answer.status_code == 200, answer.text
    return answer.json()["request"]


TASKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "words": ({"prompt": "a duck", "num_inference_steps": 3, "guidance_scale": 2}, 0, 0),
    "negative": ({"prompt": "a duck", "negative_prompt": "rain", "size": "128x80", "crf": 20, "exact": True}, 0, 0),
    "one picture": ({"prompt": "a duck", "noise_multiplier": "0.3", "fit": "letterbox"}, 1, 0),
    "two pictures": ({"prompt": "a duck", "preset": "creative"}, 2, 0),
    "pictures at positions": (
        {"prompt": "a duck", "cond_positions": "0,0.5s,-6f,last", "noise_multipliers": "0,0.2,0.4,0.6"},
        4,
        0,
    ),
    "one picture at several places": (
        {"prompt": "a duck", "keyframes": [{"frame": 0, "file": 0}, {"latent": "last", "file": 0, "noise": 0.5}]},
        1,
        0,
    ),
    "a whole video": ({"prompt": "a duck", "noise_multiplier": "0.6"}, 0, 1),
    "a video to complete": (
        {"prompt": "a duck", "cond_positions": "0,1,-1", "noise_multipliers": "0,0.3,0.4", "lora_alpha": 1.1},
        0,
        1,
    ),
    "a video and a picture": (
        {"prompt": "a duck", "cond_positions": "0,1", "keyframes": [{"time": 1.0, "file": 0, "encode": "repeat"}]},
        1,
        1,
    ),
    "extend": ({"prompt": "on", "task": "extend", "num_frames": 17, "overlap": 5, "noise_multipliers": "0,0.1"}, 0, 1),
    "transition": ({"prompt": "and", "task": "transition", "overlap": 5}, 0, 2),
    "loop": ({"prompt": "round", "task": "loop", "overlap": 5}, 0, 0),
    "loop with a picture": ({"prompt": "round", "task": "loop", "overlap": 5}, 1, 0),
    "draft": ({"prompt": "a duck", "draft": True}, 1, 0),
    "wave": ({"prompt": "a duck", "schedule": "wave:3", "metadata": "minimal"}, 0, 0),
    "story": ({"prompts": ["0s: a rocket stands", "1.5s: it flies"], "num_frames": 49, "overlap": 5}, 0, 0),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_same_body_makes_the_same_request(server: Served, video_file: Path, name: str) -> None:
    fields, pictures, videos = TASKS[name]
    id = submit(server, fields, pictures, videos, video_file)
    body = request_of(server, id)
    assert body["seed"] == 3
    frames = [frame["reference"] for frame in body.get("keyframes", []) if "reference" in frame]
    references = [*body.get("input_reference", []), *frames]
    numbers = range(pictures + videos)
    assert sorted(references, key=lambda one: one["input"]) == [{"video_id": id, "input": n} for n in numbers]
    answer = server.http.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    check_same(server, id, answer.json()["id"])


def check_same(server: Served, first: str, second: str) -> None:
    old, new = server.job(first), server.job(second)
    assert _with_contents(new.request) == _with_contents(old.request)
    assert new.size == old.size
    kept = server.service.files.get_bytes
    assert {kept(key) for key in new.inputs} == {kept(key) for key in old.inputs}


def test_the_final_of_a_draft_can_be_made_again(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        draft = submit(server, {"prompt": "a duck", "draft": True}, 1)
        server.ended(draft)
        final = server.http.post(f"/v1/videos/{draft}/final", json={"noise_multiplier": 0.6}).json()["id"]
        body = request_of(server, final)
        assert body["draft_reference"] == {"video_id": final, "input": 1}
        assert body["draft_noise_multiplier"] == 0.6
        answer = server.http.post("/v1/videos", json=body)
        assert answer.status_code == 200, answer.text
        check_same(server, final, answer.json()["id"])
        kinds = [spec["kind"] for spec in server.job(final).request["conditions"]]
        assert kinds == ["image", "draft"]


def test_a_draft_is_a_video_and_has_its_noise(server: Served) -> None:
    error = server.refused(400, draft_noise_multiplier=0.5)
    assert (error["code"], error["param"]) == ("needs_input", "draft_noise_multiplier")
    files = {"draft_reference": ("a.png", png(), "image/png")}
    refusal(server.http.post("/v1/videos", data={"prompt": "a"}, files=files), 400)


def _with_contents(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request whose conditions name no files: they have the sha256 of each."""
    return {**request, "conditions": [{**spec, "file": ""} for spec in request["conditions"]]}


def test_fields_with_their_defaults_are_left_out(server: Served) -> None:
    body = request_of(server, submit(server, {"prompt": "a duck"}))
    assert body == {"prompt": "a duck", "model": "tiny", "seed": 3, "metadata": "full"}


def test_a_video_that_is_not_there_has_no_request(server: Served) -> None:
    refusal(server.http.get(f"/v1/videos/video_{'0' * 32}/request"), 404)
