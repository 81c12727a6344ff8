"""The scripts in examples/ run against the real server: the official client, unmodified, old and new, and our own."""

import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import missing
from paths import ROOT
from server_process import ServerProcess

from pusa.demo import PICTURES

KEY = "a-key-of-twenty-characters"
QUICK = ["--steps", "2", "--frames", "5"]
IMAGE = PICTURES / "rabbit.png"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`pusa serve` with the tiny model, on a free port, with a key."""
    folder = tmp_path_factory.mktemp("server")
    with ServerProcess(folder / "data", model="tiny", api_keys=KEY, studio="false", key_queue_limit="100") as server:
        yield server


def run_example(python: Path | str, name: str, url: str, folder: Path) -> str:
    """Run a script and return its output. Unexpected warnings are errors, as in strict test suites."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PUSA_", "OPENAI_"))}
    done = subprocess.run(
        [
            *(str(python), "-W", "error", str(ROOT / "examples" / name)),
            *("--url", url, "--key", KEY, "--image", str(IMAGE), "--folder", str(folder), *QUICK),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_openai_example(said: str, version: str, folder: Path) -> None:
    lines = said.splitlines()
    assert lines[0] == f"openai {version}"
    done = [line.split()[0] for line in lines if " completed " in line]
    later = [] if version == "2.2.0" else ["extended", "edited"]  # calls that 2.2.0 does not have yet
    assert done[: 5 + len(later)] == ["text", "image", "keyframes", "remix", *later, "listed"]
    assert next(line for line in lines if line.startswith("cancelled")).split()[2] == "failed"
    assert sum(line.startswith("listed") for line in lines) == 5 + len(later)  # of all pages
    assert [line.split()[2] for line in lines if line.startswith("deleted")] == ["True", "True"]
    assert lines[-1].split() == ["and", "gone", "video_not_found"]
    assert (folder / "rabbit.mp4").read_bytes()[4:8] == b"ftyp"
    assert (folder / "rabbit.webp").read_bytes()[8:12] == b"WEBP"
    assert (folder / "rabbit-sheet.webp").read_bytes()[8:12] == b"WEBP"


def remove_all(server: ServerProcess) -> None:
    from pusa.client import PusaClient

    with PusaClient(server.url, KEY) as client:
        for video in list(client.list()):
            client.delete(video.id)


def python_with(requirement: str, folder: Path) -> Path:
    """Return the Python of a new environment that has only this; skip, or fail as `missing` says, where pip cannot."""
    venv.create(folder)  # without a pip of its own, which takes most of the time
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, requirement], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        missing("pip", f"{requirement} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
def test_the_installed_openai_client_works_unmodified(server: ServerProcess, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    said = run_example(sys.executable, "openai_client.py", f"{server.url}/v1", tmp_path)
    check_openai_example(said, openai.__version__, tmp_path)
    remove_all(server)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.2.0", "2.48.0"])  # the first with videos, one of the last before 3.0
def test_older_openai_clients_work_unmodified(version: str, server: ServerProcess, tmp_path: Path) -> None:
    python = python_with(f"openai=={version}", tmp_path / "environment")
    said = run_example(python, "openai_client.py", f"{server.url}/v1", tmp_path)
    check_openai_example(said, version, tmp_path)
    remove_all(server)


def test_the_example_expects_that_one_warning_and_no_other() -> None:
    """The message is the one of the installed package, and nothing else is filtered."""
    openai = pytest.importorskip("openai")
    text = (ROOT / "examples" / "openai_client.py").read_text()
    (filtered,) = re.findall(r"warnings\.\w+\((.*?)\n?\)\n", text, re.S)
    (message,) = re.findall(r'"ignore", message="([^"]{40,})", category=DeprecationWarning', " ".join(filtered.split()))
    said = openai.resources.videos.Videos.create.__deprecated__
    assert said.startswith(message)


@pytest.mark.slow
def test_pusas_client_works(server: ServerProcess, tmp_path: Path) -> None:
    said = run_example(sys.executable, "pusa_client.py", server.url, tmp_path)
    assert "ready: ready | models: tiny" in said
    assert sum(" completed 100 %" in line for line in said.splitlines()) > 10
    assert "  cancelled" in said
    assert "  deleted: video_not_found" in said
    assert (tmp_path / "first.mp4").read_bytes()[4:8] == b"ftyp"
    remove_all(server)
