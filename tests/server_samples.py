"""For tests of the server's parts: a queue and a store in a folder, quick settings, jobs of the fake engine."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pusa.server.executor import LocalExecutor
from pusa.server.files import FileStore
from pusa.server.jobs import Job, JobQueue, NewJob
from pusa.server.settings import ServerSettings

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where fake_engine is
FAKE = "fake_engine:FakeEngine"
PATIENCE_SECONDS = 60.0  # a machine may be busy; nothing here waits that long by design


def quick_settings(folder: Path, **changes: Any) -> ServerSettings:
    quick = {
        "data": str(folder),
        "model": "fake",
        "lease_seconds": 30.0,
        "poll_seconds": 0.02,
        "checkpoint_steps": 2,
        "checkpoint_seconds": 0.0,
        "preview_seconds": 0.0,
        "cancel_seconds": 1.0,
    }
    return ServerSettings.model_validate(quick | changes)


def open_all(settings: ServerSettings) -> tuple[JobQueue, FileStore]:
    settings.data_folder.mkdir(parents=True, exist_ok=True)
    return JobQueue(settings.database_url), FileStore(settings.files_url)


def fake_executor(model: str = "fake", **options: Any) -> LocalExecutor:
    return LocalExecutor(model, target=FAKE, env={"PYTHONPATH": str(BENCHMARKS)}, **options)


def request(**said: Any) -> dict[str, Any]:
    """Of the fake engine: what it is to do is the prompt."""
    return {"model": "fake", "prompt": json.dumps(said), "conditions": [], "seed": 1}


def submit(queue: JobQueue, asked: dict[str, Any] | None = None, **said: Any) -> Job:
    asked = asked or request(**said)
    job, _ = queue.submit(NewJob(request=asked, model="fake", prompt=asked["prompt"], seconds="1", size="64x48"))
    return job


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """What the condition answers as soon as it is true; a failed test if that takes too long."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return answer
