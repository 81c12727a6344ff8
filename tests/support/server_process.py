"""Run a server in a process of its own: the real one, or the same app and worker with the fake engine in its child.

python tests/support/server_process.py        # the latter; settings as `pusa serve` reads them from PUSA_...
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx
import psutil
from ports import free_port

FOLDER = Path(__file__).resolve().parent
FAKE_ENGINE = "fake_engine:FakeEngine"


class ServerProcess:
    """A server in a process of its own, in a folder of its own.

    Args:
        data: its data folder; what it logs is in ``server.log`` beside it.
        fake: use the fake engine, whose prompts are JSON.
        settings: of `ServerSettings`, as text.
    """

    def __init__(self, data: Path, *, fake: bool = False, **settings: str) -> None:
        self.data, self.fake = data, fake
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data.with_name(f"{data.name}.log")
        self._settings = {"port": str(self.port), "data": str(data), **settings}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(Path(__file__).resolve())] if self.fake else ["-m", "pusa", "serve"]
        self._process = start_python(command, self._settings, self.log)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self) -> None:
        """Wait until the process has ended."""
        assert self._process is not None
        self._process.wait()

    def rss_mb(self) -> float:
        """Return the memory of the process that answers requests, without the child that holds the model."""
        return psutil.Process(self.pid).memory_info().rss / 2**20

    def cpu_seconds(self) -> float:
        """Return the CPU time of this process, without its children."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def wait_until_alive(self, timeout_seconds: float = 120.0) -> float:
        """Wait until ``/health`` answers and return the seconds that took.

        Raises RuntimeError, with the end of the log, if the server ended or does not answer in time.
        """
        start = time.monotonic()
        while time.monotonic() - start < timeout_seconds:
            if not self.is_running:
                break
            try:
                if httpx.get(f"{self.url}/health", timeout=2.0).is_success:
                    return time.monotonic() - start
            except httpx.TransportError:
                time.sleep(0.02)
        raise RuntimeError(f"the server does not answer:\n{self.log.read_text(errors='replace')[-3000:]}")

    def stop(self, timeout_seconds: float = 60.0) -> int:
        """Send SIGTERM, as systemd would, and return the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def __enter__(self) -> Self:
        self.start()
        self.wait_until_alive()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_running:
            self.stop()


def start_python(arguments: Sequence[str], settings: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start Python with these arguments and settings (of `ServerSettings`, as text) in a new session."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with these settings and no others, and this folder among Python's paths."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PUSA_")}
    paths = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    return outer | {"PYTHONPATH": paths} | {f"PUSA_{name.upper()}": value for name, value in settings.items()}


def serve_fake() -> None:
    """Serve the app with an executor whose processes run the fake engine."""
    from functools import partial

    import uvicorn

    from pusa.server.app import create_app
    from pusa.server.connections import raise_file_limit, uvicorn_options
    from pusa.server.logs import configure_logging
    from pusa.server.settings_sources import load_settings
    from pusa.server.worker.worker import make_executor

    settings = load_settings()
    configure_logging(settings.log_format, settings.log_level)
    app = create_app(settings, make_executor=partial(make_executor, target=FAKE_ENGINE))
    uvicorn.run(app, host=settings.host, port=settings.port, **uvicorn_options(settings, raise_file_limit()))


if __name__ == "__main__":
    serve_fake()
