"""Make jobs for the queue's tests, and use the queue from other processes, which import this file without torch."""

import os
import signal
import sys
from typing import Any

import sqlalchemy as sa

from pusa.server.jobs.queue import JobQueue, NewJob


class Clock:
    """Unix seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def new_job(**changes: Any) -> NewJob:
    """A small job as the API submits it."""
    values: dict[str, Any] = {
        "request": {"prompt": "a red ball", "seed": 7, "conditions": []},
        "model": "mini",
        "prompt": "a red ball",
        "seconds": "2",
        "size": "128x128",
    }
    return NewJob(**values | changes)


def claim_everything(url: str, name: str) -> None:
    """Claim until nothing is left, once stdin is closed; the ids on stdout."""
    queue = JobQueue(url)
    print("open", flush=True)
    sys.stdin.read()
    while (job := queue.claim(name, lease_seconds=600)) is not None:
        print(job.id, flush=True)


def submit_without_end(url: str) -> None:
    """Submit until killed; the id of every job that was accepted on stdout."""
    queue = JobQueue(url)
    while True:
        job, _ = queue.submit(new_job())
        print(job.id, flush=True)


def die_before_commit(url: str) -> None:
    """Submit one job and be killed when it is written and not yet committed."""
    queue = JobQueue(url)
    print("open", flush=True)
    sa.event.listen(queue.engine, "commit", lambda connection: os.kill(os.getpid(), signal.SIGKILL))
    queue.submit(new_job())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
