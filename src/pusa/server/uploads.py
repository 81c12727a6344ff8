"""Files that clients send: held until a job has them, and looked into by a process that may die of it."""

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pusa.server.errors import ServiceError

_CHILD = ["-m", "pusa.server.probe"]
PROBES_AT_ONCE = 2  # each may use a core
_CHILD_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Probed:
    """What a file is. `frames`, `fps` and `seconds` are a video's, 1, None and 0 for an image."""

    kind: Literal["image", "video"]
    suffix: str
    width: int
    height: int
    frames: int
    fps: float | None
    seconds: float

    def size(self) -> tuple[int, int]:
        return self.width, self.height


@dataclass(frozen=True)
class Upload:
    """A file as it came.

    Args:
        name: as the client calls it; for messages only, never part of a path.
        path: where it lies until the job is accepted.
        content_type: what the client says it is; its content decides.
        size: bytes.
        wanted: "image" or "video" where the request says which it has to be.
        probed: what it is, once looked at.
    """

    name: str
    path: Path
    content_type: str = ""
    size: int = 0
    wanted: Literal["image", "video"] | None = None
    probed: Probed | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeLimits:
    """What looking at the files of one request may cost; the first five as in `pusa.media.MediaLimits`."""

    max_bytes: int = 512 * 2**20
    max_pixels: int = 36_000_000
    max_frames: int = 20_000
    max_seconds: float = 1200.0
    max_decode_seconds: float = 10.0
    memory_bytes: int = 2 * 2**30
    wall_seconds: float = 30.0


class Prober:
    """Looks at uploads in child processes, one for the files of one request.

    A child takes half a second to start, so that the next one is started in advance: a request then waits for the
    look alone. All methods may be called from any thread.
    """

    def __init__(self, limits: ProbeLimits = ProbeLimits()) -> None:
        self.limits = limits
        self._spare: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(PROBES_AT_ONCE)
        self._closed = False

    def warm(self) -> None:
        """Start the child that the next request will use."""
        with self._lock:
            if self._closed or (self._spare is not None and self._spare.poll() is None):
                return
            self._spare = self._start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            spare, self._spare = self._spare, None
        if spare is not None:
            _end(spare)

    def probe(self, uploads: Sequence[Upload]) -> list[Probed]:
        """What each file is.

        Raises:
            ServiceError: 400 for a file that is no image or video, is damaged, passes a limit, or made its reader
                crash; it names the file as the client did.
        """
        if not uploads:
            return []
        with self._free:
            with self._lock:
                child, self._spare = self._spare, None
            if child is None or child.poll() is not None:
                child = self._start()
            try:
                output = self._ask(child, uploads)
            finally:
                _end(child)
                self.warm()
        answers = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for upload, answer in zip(uploads, answers, strict=False):
            if "error" in answer:
                raise ServiceError(400, "invalid_file", f"{shown_name(upload)}: {answer['error']}", "input_reference")
        if len(answers) < len(uploads):
            raise ServiceError(
                400,
                "invalid_file",
                f"{shown_name(uploads[len(answers)])}: reading it took more than {self.limits.wall_seconds:g} s or "
                f"{self.limits.memory_bytes / 2**30:g} GiB, or broke the reader: export it again, smaller",
                "input_reference",
            )
        return [Probed(**answer) for answer in answers]

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *_CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **_CHILD_ENVIRONMENT},
            start_new_session=True,  # Ctrl-C in the terminal is the server's to handle
        )

    def _ask(self, child: subprocess.Popen[str], uploads: Sequence[Upload]) -> str:
        limits = asdict(self.limits)
        task = {
            "files": [[str(upload.path), upload.wanted] for upload in uploads],
            "memory_bytes": limits.pop("memory_bytes"),
            "cpu_seconds": max(1, round(limits.pop("wall_seconds"))),
            "limits": limits,
        }
        try:
            output, _ = child.communicate(json.dumps(task) + "\n", timeout=self.limits.wall_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
        except BrokenPipeError:  # it died before it could be asked
            output = ""
        return output


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()


def shown_name(upload: Upload) -> str:
    """The client's name for a file, on one line and not too long."""
    name = "".join(c if c.isprintable() else "?" for c in upload.name) or "the file"
    return name if len(name) <= 60 else name[:57] + "..."


class Spool:
    """A folder for what is being received, of this machine's own. Names are random."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """It is there; housekeeping may have removed it with what a killed server has left."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def new(self) -> Path:
        """Where a file may be written that is not there yet."""
        return self.folder / secrets.token_hex(16)
