"""Serve the API on a free port, with a worker that makes the same small video of every request."""

import io
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from PIL import Image
from server_samples import quick_settings, wait_until

from pusa.events import Checkpoint, Done, Frames, Note, Planned, Preview, Resolved, Stage, Step
from pusa.media import MediaError, MediaLimits, VideoWriter, contact_sheet, sprite_sheet, thumbnail
from pusa.server.app import create_app
from pusa.server.connections import Connections, uvicorn_options
from pusa.server.errors import ServiceError
from pusa.server.jobs.queue import Job
from pusa.server.plans import PlanFunction, plan_model
from pusa.server.service import VideoService
from pusa.server.transfers.probe import probe_file
from pusa.server.transfers.uploads import Prober, Upload, UploadInfo
from pusa.server.worker.executor import Executor, ExecutorState
from pusa.server.worker.messages import Cancelled, Error, Message, Task
from pusa.server.worker.worker import Worker

FRAMES, WIDTH, HEIGHT = 17, 96, 64


def png(width: int = WIDTH, height: int = HEIGHT, grey: int = 128) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (width, height), (grey, grey, grey)).save(target, "PNG")
    return target.getvalue()


def clip(folder: Path, frames: int = FRAMES, width: int = WIDTH, height: int = HEIGHT) -> Path:
    path = folder / f"{frames}x{width}x{height}.mp4"
    levels = np.linspace(0, 255, frames).astype(np.uint8)
    with VideoWriter(path, width=width, height=height, fps=16) as writer:
        writer.write(np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy())
    return path


class InstantExecutor:
    """In this process: two steps and a video; a prompt with "fail" fails, one with "wait" waits for `gate`."""

    def __init__(self, folder: Path, model: str = "tiny") -> None:
        self.gate = threading.Event()
        self.tasks: list[Task] = []
        self.state = ExecutorState(stage="ready", percent=100.0, model=model)
        self._cancelled = threading.Event()
        folder.mkdir(exist_ok=True)
        self._files = {"video": clip(folder)}
        pictures = {"thumbnail": thumbnail, "spritesheet": sprite_sheet, "contact_sheet": contact_sheet}
        for kind, make in pictures.items():
            self._files[kind] = folder / f"{kind}.webp"
            make(self._files["video"]).save(self._files[kind], "WEBP")

    def start(self) -> None:
        pass

    def close(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        self._cancelled.set()

    def run(self, task: Task) -> Iterator[Message]:
        self._cancelled.clear()
        self.tasks.append(task)
        prompt = task.request["prompt"]
        yield Stage("load")
        yield Resolved({"width": WIDTH, "height": HEIGHT, "fps": 16.0, **_set(task.request)})
        yield Planned("tiny: transformer on the CPU in float32")
        yield Note("as it was asked for")
        yield Stage("denoise")
        yield Step(1, 2, 1.0)
        yield Preview(self._files["thumbnail"].read_bytes())
        for number in range(2 if "grow" in prompt else 0):
            with (task.folder / "growing.mp4").open("ab") as file:
                file.write(b"part%d" % number)
            yield Frames(number + 1, 2, task.folder / "growing.mp4")
        while "wait" in prompt and not self.gate.is_set():
            if self._cancelled.wait(0.01):
                yield Cancelled()
                return
        if "fail" in prompt:
            yield Error("out_of_memory", "out of memory: ask for a smaller size", retry=False)
            return
        checkpoint = task.folder / "checkpoint.safetensors"
        checkpoint.write_bytes(b"latents")
        yield Checkpoint(checkpoint, 1)
        yield Step(2, 2, 0.0)
        yield Stage("decode")
        yield Done(
            dict(self._files), {"load": 0.1, "denoise": 1.0, "decode": 0.5, "finish": 0.1, "peak_memory_mb": 7.0}
        )


def _set(request: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if value is not None}


def work(service: VideoService, jobs: int = 1) -> None:
    """Run so many jobs of a service that has no worker."""
    executor = InstantExecutor(service.settings.data_folder / "executor")
    stop = threading.Event()
    worker = Worker(service.settings, service.queue, service.files, executor)
    thread = threading.Thread(target=worker.run, args=(stop,))
    done = service.queue.counts()["completed"] + jobs
    thread.start()
    wait_until(lambda: service.queue.counts()["completed"] >= done)
    stop.set()
    thread.join()


def ended(http: httpx.Client, id: str) -> dict[str, Any]:
    """Return what a server says of a video as soon as it is neither queued nor in progress."""

    def look_again() -> dict[str, Any] | None:
        video = http.get(f"/v1/videos/{id}").raise_for_status().json()
        return None if video["status"] in ("queued", "in_progress") else video

    return wait_until(look_again)


class NearProber(Prober):
    """Looks at files in this process: what the child adds is tested for itself."""

    def warm(self) -> None:
        pass

    def probe(self, uploads: Sequence[Upload]) -> list[UploadInfo]:
        limits = MediaLimits(max_pixels=self.limits.max_pixels, max_seconds=self.limits.max_seconds)
        found = []
        for upload in uploads:
            try:
                with upload.path.open("rb") as file:
                    found.append(UploadInfo(**probe_file(file, upload.expected_kind, limits)))
            except MediaError as error:
                values = {**error.values, "name": upload.name}
                message = f"{upload.name}: {error}"
                raise ServiceError(400, error.code, message, "input_reference", values=values) from None
        return found


@dataclass
class Served:
    """A running server and what is inside it."""

    url: str
    app: FastAPI
    executor: Any
    http: httpx.Client
    limits: Connections
    service: VideoService = field(init=False)

    def __post_init__(self) -> None:
        self.service = self.app.state.service

    def job(self, id: str) -> Job:
        job = self.service.queue.get(id)
        assert job is not None
        return job

    def create(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/videos", json={"prompt": "a duck", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def finished(self, **fields: Any) -> dict[str, Any]:
        id = self.create(**fields)["id"]
        return self.ended(id)

    def ended(self, id: str) -> dict[str, Any]:
        return ended(self.http, id)

    def refused(self, status: int, **fields: Any) -> dict[str, Any]:
        """The error of a create that must be refused so."""
        answer = self.http.post("/v1/videos", json={"prompt": "a duck", **fields})
        return refusal(answer, status)


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "values"}
    assert error["message"]
    assert error["type"]
    return error


@contextmanager
def serving(
    folder: Path,
    *,
    near_prober: bool = True,
    drain_seconds: float = 2.0,
    plan: PlanFunction = plan_model,
    executor: Executor | None = None,
    **changes: Any,
) -> Iterator[Served]:
    """A server with these settings; everything of it is below `folder`. `executor` None is an `InstantExecutor`."""
    folder.mkdir(exist_ok=True)
    executor = executor or InstantExecutor(folder / "executor")
    changes = {"model": "tiny", "studio": False, "min_free_bytes": 0, **changes}
    settings = quick_settings(folder / "data", **changes)
    app = create_app(settings, make_executor=lambda *_: executor, plan=plan, drain_seconds=drain_seconds)
    if near_prober:
        app.state.service.submitter.prober = NearProber(app.state.service.submitter.prober.limits)
    listener = socket.create_server(("127.0.0.1", 0))
    # asyncio does not see that it is TCP; each answer's body would wait 40 ms for the client's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    options = uvicorn_options(settings, 65_536)
    server = uvicorn.Server(uvicorn.Config(app, **{**options, "timeout_graceful_shutdown": 3}))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < end, "the server did not start"
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            yield Served(url, app, executor, http, options["http"].limits)
    finally:
        if isinstance(executor, InstantExecutor):
            executor.gate.set()
        app.state.stop()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"
