"""Several machines, as docs/deployment.md sets them up: one serves, others work, PostgreSQL and files are shared."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess, environment
from server_samples import wait_until

from pusa.client import PusaClient

QUICK = {"num_inference_steps": 2, "num_frames": 5}
Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def shared(postgresql_url: str, tmp_path: Path) -> dict[str, str]:
    return {
        "database": postgresql_url,
        "files": str(tmp_path / "shared"),
        "model": "tiny",
        "lease_seconds": "5",
        "poll_seconds": "0.1",
    }


@pytest.fixture
def start_worker(shared: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """``pusa worker`` with a data folder of its own, as on another machine."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pusa", "worker"],
                env=environment({**shared, "data": str(tmp_path / name)}),
                stdout=log,
                stderr=log,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
    for process in started:
        process.wait(60)


@pytest.mark.slow
def test_workers_come_and_go_beside_a_server_that_does_not_work(
    shared: dict[str, str], start_worker: Start, tmp_path: Path
) -> None:
    served = {**shared, "workers": "0", "studio": "false", "root_path": "/pusa"}  # the proxy takes /pusa off
    with ServerProcess(tmp_path / "api", **served) as server, PusaClient(server.url) as client:
        jobs = [client.create("a red ball", seed=n, **QUICK) for n in range(3)]  # accepted with no worker there
        assert not client.ready().ready
        first = start_worker("first")
        start_worker("second")
        wait_until(lambda: client.ready().details["workers"] == 2, 120)
        assert [client.wait(job.id).status for job in jobs] == ["completed"] * 3
        assert client.download(jobs[0].id)[4:8] == b"ftyp"

        alive = [sys.executable, "-m", "pusa.server.worker.healthcheck"]
        seen = subprocess.run(alive, env=environment(shared), capture_output=True, text=True, timeout=120, check=True)
        assert len(seen.stdout.splitlines()) == 2

        long = client.create("a red ball", seed=9, num_inference_steps=60, num_frames=17)
        wait_until(lambda: client.retrieve(long.id).status == "in_progress", 120)
        first.kill()  # with or without that job: the other one ends it
        assert client.wait(long.id).status == "completed"
        assert not list((tmp_path / "api").glob("files/**/*.mp4"))  # all files are in the shared store
