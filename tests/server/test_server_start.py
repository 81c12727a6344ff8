"""Start a server, and see what it puts off: the page is there before the model."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from api_samples import InstantExecutor
from fastapi import FastAPI
from fastapi.testclient import TestClient
from server_samples import quick_settings, wait_until

from pusa.cli.serve import bind_listener, run_server
from pusa.server.app import create_app
from pusa.server.jobs.queue import JobQueue
from pusa.server.service import VideoService

FOR_EVER = 10_000.0


@contextmanager
def starting(folder: Path, head_start_seconds: float) -> Iterator[TestClient]:
    settings = quick_settings(folder, model="tiny", min_free_bytes=0)
    executor = InstantExecutor(folder / "executor")
    app = create_app(settings, make_executor=lambda *_: executor, head_start_seconds=head_start_seconds)
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def queue_of(client: TestClient) -> JobQueue:
    assert isinstance(client.app, FastAPI)
    return client.app.state.service.queue


def test_a_page_is_served_before_a_worker_begins_and_a_job_does_not_wait(tmp_path: Path) -> None:
    with starting(tmp_path, FOR_EVER) as client:
        assert client.get("/").status_code == 200
        assert client.get("/ready").json()["stage"] == "starting"
        assert queue_of(client).workers() == []
        id = client.post("/v1/videos", json={"prompt": "a duck"}).json()["id"]
        wait_until(lambda: client.get(f"/v1/videos/{id}").json()["status"] == "completed")


def test_a_page_that_is_there_ends_the_head_start(tmp_path: Path) -> None:
    async def is_allowed() -> bool:
        return True

    async def follow_until_ready(service: VideoService) -> None:
        async for text in service.follow_all("", is_allowed):
            if b'"ready":true' in text.replace(b" ", b""):
                return

    with starting(tmp_path, FOR_EVER) as client:
        assert not client.get("/ready").json()["ready"]
        assert isinstance(client.app, FastAPI)
        asyncio.run(asyncio.wait_for(follow_until_ready(client.app.state.service), 60))


def test_the_head_start_has_an_end(tmp_path: Path) -> None:
    with starting(tmp_path, 0.2) as client:
        wait_until(lambda: client.get("/ready").json()["ready"])


def test_a_server_that_ends_does_not_wait_for_the_head_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with starting(tmp_path, FOR_EVER):
        pass
    assert "does not end" not in caplog.text


@pytest.mark.parametrize("studio", [True, False])
def test_only_a_page_is_given_a_head_start(studio: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[float, bool]] = []

    def refuse(*_: Any, head_start_seconds: float) -> None:
        made.append((head_start_seconds, gc.isenabled()))
        raise RuntimeError("enough is known")

    monkeypatch.setattr("pusa.server.app.create_app", refuse)
    settings = quick_settings(tmp_path, studio=studio, port=0, files=str(tmp_path / "files"))
    with bind_listener(settings) as listener, pytest.raises(RuntimeError, match="enough is known"):
        run_server(settings, listener)
    assert made == [(1.5 if studio else 0.0, False)]
    assert gc.isenabled()
