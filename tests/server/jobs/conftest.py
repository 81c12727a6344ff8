"""Queues on both databases, and a clock to set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from queue_samples import Clock

from pusa.server.jobs.queue import JobQueue


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: Any, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql_url")
    return f"sqlite:///{tmp_path / 'jobs.sqlite'}"


@pytest.fixture
def queue(url: str, clock: Clock) -> Iterator[JobQueue]:
    queue = JobQueue(url, clock=clock)
    yield queue
    queue.close()
