"""The page as it is served: its files, what a browser may keep, and what it may ask; without a browser."""

import gzip
import json
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner
from fastapi import FastAPI
from fastapi.testclient import TestClient
from ports import free_port
from server_samples import wait_until
from studio_samples import settings_of

from pusa.cli import studio as cli_studio
from pusa.server.app import create_app
from pusa.server.settings import ServerSettings
from pusa.server.studio import examples
from pusa.server.studio.page import WEB

MOST_BYTES = 350_000
PREFIX = re.compile(r'src="(studio/[0-9a-f]{16})/app\.js"')


def app_in(folder: Path, **changes: object) -> FastAPI:
    """Without workers."""
    return create_app(settings_of(folder, workers=0, **changes))


@contextmanager
def client_of(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with client_of(app_in(tmp_path_factory.mktemp("page"))) as client:
        yield client


def prefix(client: TestClient) -> str:
    found = PREFIX.search(client.get("/").text)
    assert found is not None
    return found[1]


def test_the_page_loads_its_parts_from_this_server_and_forbids_all_others(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    addresses = re.findall(r'(?:href|src)="([^"]+)"', answer.text)
    assert len(addresses) > 40
    assert [address for address in addresses if client.get(f"/{address}").status_code != 200] == []
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]


def test_a_browser_keeps_files_for_ever_and_asks_for_the_page_each_time(client: TestClient) -> None:
    assert client.get("/").headers["cache-control"] == "no-cache"
    kept = client.get(f"/{prefix(client)}/core/store.js")
    assert "immutable" in kept.headers["cache-control"]
    assert kept.headers["content-type"].startswith("text/javascript")
    assert client.get("/studio/0000000000000000/core/store.js").status_code == 404


def test_all_that_the_page_loads_is_small(client: TestClient) -> None:
    page = client.get("/").text
    names = {*re.findall(r'(?:href|src)="([^"]+\.(?:js|css|svg))"', page), f"{prefix(client)}/locales/fr.json"}
    sizes = {name: len(gzip.compress(client.get(f"/{name}").content)) for name in names}
    assert sum(sizes.values()) + len(gzip.compress(page.encode())) <= MOST_BYTES


@pytest.mark.parametrize("path", ["..%2Fpage.py", "../page.py", "%2e%2e/page.py", "locales", "", "core/%00"])
def test_only_files_that_are_meant_to_be_fetched_are(client: TestClient, path: str) -> None:
    assert client.get(f"/{prefix(client)}/examples/penguin.png").status_code == 200
    assert client.get(f"/{prefix(client)}/{path}").status_code == 404


def test_the_api_stays_where_it_is_and_lists_no_page(client: TestClient) -> None:
    assert client.get("/v1/videos").json()["object"] == "list"
    assert client.get("/health").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert [path for path in paths if path == "/" or path.startswith("/studio")] == []


def test_the_page_reveals_nothing_about_this_machine(client: TestClient) -> None:
    text = client.get("/").text
    assert str(Path.home()) not in text
    assert str(WEB) not in text


def test_the_page_needs_no_key_and_what_it_shows_does(tmp_path: Path) -> None:
    with client_of(app_in(tmp_path, api_keys=["a-key-of-somebody"])) as client:
        assert client.get("/").status_code == 200
        assert client.get(f"/{prefix(client)}/app.js").status_code == 200
        assert client.get("/v1/videos").status_code == 401


def test_a_server_without_the_studio_shows_none(tmp_path: Path) -> None:
    with client_of(app_in(tmp_path, studio=False)) as client:
        assert PREFIX.search(client.get("/").text) is None


def test_the_studio_loads_no_torch() -> None:
    code = "import sys, pusa.server.studio.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_every_example_has_its_files_and_every_tab_has_one() -> None:
    files = examples.public_files()
    shown = examples.as_json()
    assert {example["tab"] for example in shown} == {"image", "images", "video", "text"}
    assert [name for example in shown for name in (*example["files"], *example["shows"]) if name not in files] == []
    assert json.dumps(shown)


def test_the_browser_is_opened_while_the_server_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.open", opened.put)

    def start(settings: ServerSettings, listener: socket.socket) -> None:
        address = opened.get(timeout=60)
        assert address == f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with socket.create_connection(listener.getsockname(), timeout=60):  # is not refused: it waits for the server
            assert not listener.get_inheritable()
        listener.close()

    monkeypatch.setattr(cli_studio, "run_server", start)
    arguments = ["--port", "0", "--workers", "0", "--data", str(tmp_path)]
    CliRunner().invoke(cli_studio.studio, arguments, catch_exceptions=False)


def test_a_server_that_is_there_already_is_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.open", opened.append)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app_in(tmp_path), port=port, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    result = CliRunner().invoke(cli_studio.studio, ["--port", str(port), "--data", str(tmp_path)])
    server.should_exit = True
    thread.join(20)
    assert result.exit_code == 0
    assert opened == [f"http://127.0.0.1:{port}/"]


def test_every_file_of_the_page_is_in_the_package() -> None:
    folder = Path(examples.__file__).parent
    names = {path.name for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {"fr.json", "zh.json", "en.json", "favicon.svg", "apple.mp4", "app.js", "preact.js", "base.css"} <= names
