"""Send to Gradio's routes what the studio's page sends, with any value in any part, without a browser."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

KEYS = ("a-key-of-somebody", "a-key-of-another")
ELEMENTS = {
    "image": "image",
    "images": "images",
    "video": "video",
    "second_video": "second-video",
    "loop_image": "loop-image",
    "timeline": "timeline",
    "stage": "pusa-stage",
    "tab": "open-tab",
    "prompt": "prompt",
}


def owner(key: str | None) -> str:
    """Name the owner of a key as the server does."""
    return hashlib.sha256(key.encode()).hexdigest() if key else ""


def file_of(path: str, **more: Any) -> dict[str, Any]:
    """A file as Gradio's components send it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


@dataclass
class Page:
    """A page that somebody has opened."""

    client: httpx.Client
    key: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.client.get("/config", headers=self.headers).json()

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def part(self, name: str) -> dict[str, Any]:
        """A component by the name that `Actions` has for it."""
        elem_id = ELEMENTS.get(name, name.replace("_", "-"))
        return next(part for part in self.config["components"] if part["props"].get("elem_id") == elem_id)

    def event(self, part: str, event: str) -> dict[str, Any]:
        target = [self.part(part)["id"], event]
        return next(
            found for found in self.config["dependencies"] if target in found["targets"] and found["backend_fn"]
        )

    def body(self, part: str, event: str, values: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """Build the request that an event sends; parts are as on an untouched page but for `values`."""
        found = self.event(part, event)
        defaults = {one["id"]: one["props"].get("value") for one in self.config["components"]}
        given = {self.part(name)["id"]: value for name, value in (values or {}).items()}
        data = [given.get(id, defaults[id]) for id in found["inputs"]]
        return {"data": data, "fn_index": found["id"], "session_hash": "abcdefghij", "event_data": None, **more}

    def send(self, part: str, event: str, values: dict[str, Any] | None = None, **more: Any) -> httpx.Response:
        return self.post(self.body(part, event, values, **more))

    def post(self, body: Any, route: str = "run/predict") -> httpx.Response:
        headers = {"content-type": "application/json", **self.headers}
        return self.client.post(f"/gradio_api/{route}", content=json.dumps(body), headers=headers)

    def upload(self, name: str, content: bytes) -> str:
        """The path that the server gives an uploaded file."""
        answer = self.client.post("/gradio_api/upload", files={"files": (name, content)}, headers=self.headers)
        assert answer.status_code == 200, answer.text
        [path] = answer.json()
        return path

    def fetched(self, path: str) -> httpx.Response:
        return self.client.get(f"/gradio_api/file={path}", headers=self.headers)


def copies(folder: Path, marks: list[bytes]) -> list[Path]:
    """Files below a folder that hold one of some texts."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(mark in path.read_bytes() for mark in marks)]
