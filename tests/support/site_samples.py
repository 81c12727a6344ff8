"""For tests of the studio's page: a server with a page, and files that its visitors must not get from it."""

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from api_samples import NearProber, png
from fastapi.testclient import TestClient
from page_samples import KEYS, Page, copies, owner
from studio_samples import settings_of

from pusa.request import GenerationRequest
from pusa.server.app import create_app
from pusa.server.jobs.queue import NewJob

SECRET = b"a-secret-of-this-machine-0123456789"
FIELDS = ("image", "images", "video", "second_video", "loop_image")


@dataclass
class Site:
    """Hold a server with a page, and the files that nobody may get from it."""

    app: Any
    client: TestClient
    pages: list[Page]
    cache: Path
    forbidden: dict[str, str]
    asked: list[bytes]

    def is_unread(self) -> bool:
        """Tell whether no forbidden file has come into the folder that the page is served from."""
        there = {Path(path) for path in self.forbidden.values() if not path.startswith("http")}
        marks = [SECRET, os.environ["PUSA_TEST_SECRET"].encode()]
        return not [path for path in copies(self.cache, marks) if path not in there]


@contextmanager
def open_site(folder: Path, keys: Sequence[str]) -> Iterator[Site]:
    """Serve the page, to the owners of these keys alone if there are any."""
    key_file = folder / "keys.txt"
    key_file.write_bytes(b"".join(key.encode() + b"\n" for key in KEYS) + SECRET)
    with pytest.MonkeyPatch.context() as patch, listening() as (url, asked):
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "cache"))
        patch.setenv("PUSA_TEST_SECRET", "in-the-environment-" + "x" * 8)
        app = create_app(settings_of(folder / "data", workers=0, api_keys=keys, min_free_bytes=0))
        app.state.service.submitter.prober = NearProber(app.state.service.submitter.prober.limits)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            pages = [Page(client, key) for key in (keys or (None,))]
            forbidden = {
                "the environment": "/proc/self/environ",
                "the keys": str(key_file),
                "the database": str(folder / "data" / "jobs.sqlite"),
                "passwords": "/etc/shadow",
                "a relative path": "../" * 12 + "etc/passwd",
                "a file below an upload": f"{pages[0].upload('a.png', png())}/../../../../../../../../etc/passwd",
                "an address": f"{url}/a.png",
                "a stored input": stored_input(app, owner(KEYS[1])),
            }
            if keys:
                forbidden["another key's upload"] = pages[1].upload("b.png", png(grey=1) + SECRET)
            yield Site(app, client, pages, folder / "cache", forbidden, asked)


class listening:  # noqa: N801
    """Listen on a port and record its requests: there should be none."""

    def __enter__(self) -> tuple[str, list[bytes]]:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.asked: list[bytes] = []
        threading.Thread(target=self._answer, daemon=True).start()
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}", self.asked

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(1000))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")

    def __exit__(self, *_: object) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def stored_input(app: Any, of: str) -> str:
    """Store an input of somebody else's job, and return its path."""
    service, key = app.state.service, "inputs/video_" + "a" * 32 + "/0.png"
    service.files.put_bytes(key, png(grey=2) + SECRET)
    request = GenerationRequest.model_validate(
        {"prompt": "x", "seed": 1, "conditions": [{"kind": "image", "file": key}]}
    ).model_dump(mode="json")
    service.queue.submit(
        NewJob(owner=of, request=request, model="mini", prompt="x", seconds="1", size="96x96", inputs=(key,))
    )
    return str(service.files.local(key))


def values_of(field: str, file: Any) -> dict[str, Any]:
    """Return the values of a page that holds a file in a field, with its tab open."""
    mode = {"video": "complete", "second_video": "transition", "loop_image": "loop"}.get(field, "complete")
    tab = {"image": "tab_image", "images": "tab_images"}.get(field, "tab_video")
    value = [{"image": file, "caption": None}] if field == "images" else file
    return {"tab": tab, "mode": mode, "prompt": "a duck", "positions": "0", "multipliers": "0.2", field: value}
