"""Find what tests need of the system (PostgreSQL, a browser, a cluster), or skip the test with the reason.

``PUSA_REQUIRE=postgresql,chromium,ray`` turns such a skip into a failure: for CI, where nothing may go missing unseen.
"""

import importlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from ports import free_port

UNPRIVILEGED = ("postgres", "nobody")  # PostgreSQL refuses to run as root


def missing(what: str, reason: str) -> NoReturn:
    """Skip this test because `what` is not here, or fail it where it must be."""
    if what in os.environ.get("PUSA_REQUIRE", "").split(","):
        pytest.fail(f"{what} is required here and {reason}")
    pytest.skip(f"{what}: {reason}", allow_module_level=True)


def needed_module(name: str, install: str) -> Any:
    """The module; `missing` with the command that installs it where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing(name, f"it is not installed: {install}")


class PostgreSQL:
    """A server of its own in a temporary folder, on a loopback port; `url` is that of its database "postgres"."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries, self._data = binaries, folder / "data"
        self.port = free_port()
        self.url = f"postgresql://pusa@127.0.0.1:{self.port}/postgres"
        self._databases = 0
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = next(pwd.getpwnam(name) for name in UNPRIVILEGED if _exists(name))
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._run("initdb", "--username=pusa", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
        # Tests kill processes, not machines: without fsync they are quick, and what is asked of it stays the same.
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._options = options + " -c max_connections=60 -c shared_buffers=16MB"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log = str(self._data.parent / "log")
        self._run("pg_ctl", "start", "--wait", "--silent", f"--log={log}", "-o", self._options)

    def stop(self) -> None:
        """Stop it, breaking off every connection."""
        self._run("pg_ctl", "stop", "--wait", "--silent", "--mode=immediate")

    def new_database(self) -> str:
        """The URL of an empty one."""
        import psycopg

        self._databases += 1
        name = f"pusa_{self._databases}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url.replace("/postgres", f"/{name}")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), f"--pgdata={self._data}", *arguments]
        # pg_ctl's child keeps its output open: a pipe would never end, so it goes to a file.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(command, stdout=output, stderr=output, cwd="/", timeout=240, **self._as)
            output.seek(0)
            assert done.returncode == 0, f"{program}: {output.read().decode(errors='replace')}"


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """A running PostgreSQL; skips, or fails as `missing` says, where its programs are not installed."""
    binaries = _binaries()
    if binaries is None:
        missing("postgresql", "initdb is neither on the PATH nor in /usr/lib/postgresql: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="pusa-pg-") as folder:
        server = PostgreSQL(binaries, Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
