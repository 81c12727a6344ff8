"""Serve a model of each base: one job of each kind, its events and preview."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api_samples import NearProber, ended
from fastapi.testclient import TestClient
from near_engine import NearExecutor
from server_samples import quick_settings
from studied_bases import NOT_WAN, Studied

from pusa import media
from pusa.server.app import create_app


@dataclass(repr=False)
class Client:
    """Send jobs that are as small as the base allows."""

    studied: Studied
    http: TestClient

    @property
    def fields(self) -> dict[str, Any]:
        side = self.studied.base.side
        small = {"size": f"{side}x{side}", "num_inference_steps": 2, "fps": 16, "seed": 1}
        return {"prompt": self.studied.base.prompt, "num_frames": self.studied.length(5), **small}

    def made(self, path: str = "/v1/videos", **request: Any) -> dict[str, Any]:
        answer = self.http.post(path, **request)
        assert answer.status_code == 200, answer.text
        return self.ended(answer.json()["id"])

    def ended(self, id: str) -> dict[str, Any]:
        video = ended(self.http, id)
        assert video["status"] == "completed", video
        return video

    def length(self, video: dict[str, Any], folder: Path) -> int:
        path = folder / f"{video['id']}.mp4"
        path.write_bytes(self.http.get(f"/v1/videos/{video['id']}/content").content)
        return len(media.read_video(path))


@contextmanager
def serving(studied: Studied, folder: Path, **changes: Any) -> Iterator[Client]:
    settings = quick_settings(folder, model=str(studied.folder), min_free_bytes=0, preview_seconds=0.001, **changes)
    app = create_app(settings, make_executor=lambda *_: NearExecutor(str(studied.folder)))
    app.state.service.submitter.prober = NearProber(app.state.service.submitter.prober.limits)
    with TestClient(app, base_url="http://127.0.0.1") as http:
        yield Client(studied, http)


@NOT_WAN
def test_a_job_of_each_kind(studied: Studied, tmp_path: Path) -> None:
    length, factor = studied.length, studied.base.factor
    with serving(studied, tmp_path / "data", studio=False) as client:
        files = {"input_reference": ("a.png", studied.pictures[0].read_bytes(), "image/png")}
        image = client.made(data={name: str(value) for name, value in client.fields.items()}, files=files)
        assert client.length(image, tmp_path) == length(5)

        shared = client.fields | {"overlap": length(2)}
        longer = client.made("/v1/videos/extensions", json={**shared, "video": {"id": image["id"]}})
        assert client.length(longer, tmp_path) == length(5) + length(5) - length(2)
        videos = [{"id": image["id"]}, {"id": image["id"]}]
        joined = client.made("/v1/videos/edits", json={**shared, "video": videos})
        assert client.length(joined, tmp_path) == 2 * length(5) + length(5) - length(2) - 2 * factor
        loop = client.made(json={**shared, "task": "loop", "num_frames": length(7), "window": length(5)})
        assert client.length(loop, tmp_path) == length(7)

        asked = client.http.post("/v1/videos", json=client.fields | {"schedule": "wave", "num_frames": length(5) + 1})
        with client.http.stream("GET", f"/v1/videos/{asked.json()['id']}/events") as stream:
            told = [line.partition(": ")[2] for line in stream.iter_lines() if line.startswith(("event", "data"))]
        events = [(name, json.loads(data)) for name, data in zip(told[::2], told[1::2], strict=True)]
        assert events[-1] == ("end", {"reason": "completed"})
        assert any(name == "preview" and data["image"].startswith("data:image/webp") for name, data in events)
        wave = client.ended(asked.json()["id"])
        assert client.length(wave, tmp_path) == (length(5) + 1 if factor == 1 else length(5))


def test_a_prompt_is_asked_for_where_the_model_reads_text(studied: Studied, tmp_path: Path) -> None:
    with serving(studied, tmp_path / "data", studio=False, workers=0) as client:
        empty = client.http.post("/v1/videos", json=client.fields | {"prompt": ""})
        words = client.http.post("/v1/videos", json=client.fields | {"prompt": "a cat"})
    has_text = studied.pipe.base.has_text
    assert (empty.status_code, words.status_code) == ((400, 200) if has_text else (200, 400))
    refused = (empty if has_text else words).json()["error"]
    assert refused["code"] in ({"prompt_missing"} if has_text else {"prompt_not_empty", "class_unknown"})
    assert refused["message"].startswith("the prompt is empty" if has_text else "prompt='a cat': this model")
