"""Make parts of a server: a queue and a store in a folder, quick settings, jobs of the fake engine."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from paths import SUPPORT
from server_process import FAKE_ENGINE

from pusa.events import Done
from pusa.server.jobs.queue import Job, JobQueue, NewJob
from pusa.server.jobs.store import FileStore
from pusa.server.settings import ServerSettings
from pusa.server.worker.attempt import Delays
from pusa.server.worker.executor import Executor
from pusa.server.worker.local import LocalExecutor
from pusa.server.worker.messages import Task
from pusa.server.worker.worker import Worker

PATIENCE_SECONDS = 60.0  # a machine may be busy; nothing here waits that long by design


def quick_settings(folder: Path, **changes: Any) -> ServerSettings:
    quick = {
        "data": str(folder),
        "model": "fake",
        "lease_seconds": 30.0,
        "poll_seconds": 0.05,
        "checkpoint_steps": 2,
        "checkpoint_seconds": 0.0,
        "preview_seconds": 0.0,
        "cancel_seconds": 1.0,
        "backoff_seconds": 0.0,
    }
    return ServerSettings.model_validate(quick | changes)


def open_all(settings: ServerSettings) -> tuple[JobQueue, FileStore]:
    settings.data_folder.mkdir(parents=True, exist_ok=True)
    return JobQueue(settings.database_url), FileStore(settings.files_url)


def fake_executor(model: str = "fake", **options: Any) -> LocalExecutor:
    return LocalExecutor(model, target=FAKE_ENGINE, env={"PYTHONPATH": str(SUPPORT)}, **options)


def is_running(pid: int) -> bool:
    """Tell if a process lives: one that ended and waits for its parent does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def request(**instructions: Any) -> dict[str, Any]:
    """Make a request whose prompt holds the instructions of the fake engine, as JSON."""
    return {"model": "fake", "prompt": json.dumps(instructions), "conditions": [], "seed": 1}


def submit(queue: JobQueue, values: dict[str, Any] | None = None, **instructions: Any) -> Job:
    values = values or request(**instructions)
    job, _ = queue.submit(NewJob(request=values, model="fake", prompt=values["prompt"], seconds="1", size="64x48"))
    return job


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """Return the condition's value as soon as it is true; fail the test if that takes too long."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return answer


class House:
    """Hold a queue, a store and the workers on them."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.queue, self.files = open_all(settings)
        self.workers: list[Worker] = []
        self._stops: list[threading.Event] = []
        self._threads: list[threading.Thread] = []

    def hire(self, executor: Executor | None = None, delays: Delays | None = None, **changes: Any) -> Worker:
        """Start a worker with changed settings; `executor` None runs the fake engine."""
        settings = self.settings.model_copy(update=changes)
        executor = executor or fake_executor(
            grace_seconds=settings.cancel_seconds, stall_seconds=settings.stall_seconds
        )
        worker = Worker(settings, self.queue, self.files, executor, delays=delays)
        stop = threading.Event()
        thread = threading.Thread(target=worker.run, args=(stop,))
        thread.start()
        self.workers.append(worker)
        self._stops.append(stop)
        self._threads.append(thread)
        return worker

    def dismiss(self) -> None:
        for stop in self._stops:
            stop.set()
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive()

    def job(self, job: Job) -> Job:
        found = self.queue.get(job.id)
        assert found is not None
        return found

    def ended(self, job: Job) -> Job:
        wait_until(lambda: self.job(job).ended)
        return self.job(job)

    def begun(self, job: Job, step: int = 1) -> Job:
        wait_until(lambda: self.job(job).step >= step)
        return self.job(job)

    def stored(self, prefix: str = "") -> set[str]:
        return {key for key, _ in self.files.keys(prefix)}


def video_of(house: House, job: Job) -> bytes:
    return house.files.get_bytes(job.results["video"])


def uninterrupted(house: House, **instructions: Any) -> bytes:
    """Make the video of the same prompt in an attempt that is too late to misbehave."""
    from fake_engine import FakeEngine

    folder = house.settings.data_folder / "uninterrupted"
    folder.mkdir()
    values = {**request(**instructions), "metadata": house.settings.metadata}  # as a worker sends it
    task = Task(job_id="video_0", attempt=99, request=values, folder=folder)
    *_, done = FakeEngine("fake").run(task, lambda: False)
    assert isinstance(done, Done)
    return done.files["video"].read_bytes()
