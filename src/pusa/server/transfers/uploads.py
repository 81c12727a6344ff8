"""Spool uploaded files and read their metadata in a child process, which a malicious file may crash."""

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
from pusa.server.jobs.store import StorageUnavailableError

_PROBE_COMMAND = ("-m", "pusa.server.transfers.probe")
PROBES_AT_ONCE = 2  # each may use a core
_CHILD_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class UploadInfo:
    """Metadata of an image or a video; an image has 1 frame, no fps and 0 seconds."""

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
    """A file that a client sent.

    Args:
        name: the client's name for it; used in messages only, never in a path.
        path: the file in the spool, until a job has a copy.
        content_type: the client's claim; the content decides.
        size: in bytes.
        expected_kind: the kind that the request calls for, if it says so.
        info: metadata, once the file is probed.
    """

    name: str
    path: Path
    content_type: str = ""
    size: int = 0
    expected_kind: Literal["image", "video"] | None = None
    info: UploadInfo | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeLimits:
    """Limits for probing the files of one request; the first five are those of `pusa.media.MediaLimits`.

    `max_pixels` is the area of a picture; that of a video's frame has the default of `MediaLimits` above it.
    """

    max_bytes: int = 512 * 2**20
    max_pixels: int = 110_000_000
    max_frames: int = 20_000
    max_seconds: float = 1200.0
    max_decode_seconds: float = 10.0
    memory_bytes: int = 2 * 2**30
    wall_seconds: float = 30.0


class Prober:
    """Probe uploads in child processes, one for the files of one request.

    A child takes half a second to start, so a spare one is always started in advance. All methods are thread-safe.

    Args:
        limits: for the files of one request.
        command: arguments of Python that start the child.
    """

    def __init__(self, limits: ProbeLimits = ProbeLimits(), command: Sequence[str] = _PROBE_COMMAND) -> None:
        self.limits, self._command = limits, command
        self.spare: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(PROBES_AT_ONCE)
        self._closed = False

    def warm(self) -> None:
        """Start the child process for the next request."""
        with self._lock:
            if self._closed or (self.spare is not None and self.spare.poll() is None):
                return
            self.spare = self._start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            spare, self.spare = self.spare, None
        if spare is not None:
            _end(spare)

    def probe(self, uploads: Sequence[Upload]) -> list[UploadInfo]:
        """Read the metadata of each file.

        Raises:
            ServiceError: 400, with the client's name of the file, if one is neither image nor video, is damaged,
                exceeds a limit or crashes the child.
        """
        if not uploads:
            return []
        with self._free:
            with self._lock:
                child, self.spare = self.spare, None
            if child is None or child.poll() is not None:
                child = self._start()
            try:
                output = self._run(child, uploads)
            finally:
                _end(child)
                self.warm()
        answers = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for upload, answer in zip(uploads, answers, strict=False):
            if "error" in answer:
                raise ServiceError(400, "invalid_file", f"{display_name(upload)}: {answer['error']}", "input_reference")
        if len(answers) < len(uploads):
            raise ServiceError(
                400,
                "invalid_file",
                f"{display_name(uploads[len(answers)])}: reading it took more than {self.limits.wall_seconds:g} s or "
                f"{self.limits.memory_bytes / 2**30:g} GiB, or broke the reader: export it again, smaller",
                "input_reference",
            )
        return [UploadInfo(**answer) for answer in answers]

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **_CHILD_ENVIRONMENT},
            start_new_session=True,  # Ctrl-C in the terminal is the server's to handle
        )

    def _run(self, child: subprocess.Popen[str], uploads: Sequence[Upload]) -> str:
        limits = asdict(self.limits)
        task = {
            "files": [[str(upload.path), upload.expected_kind] for upload in uploads],
            "memory_bytes": limits.pop("memory_bytes"),
            "cpu_seconds": max(1, round(limits.pop("wall_seconds"))),
            "limits": limits,
        }
        try:
            output, _ = child.communicate(json.dumps(task) + "\n", timeout=self.limits.wall_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
        except BrokenPipeError:  # the child died before it read its task
            output = ""
        return output


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()


def display_name(upload: Upload) -> str:
    """Format the client's name for a file for a message: one line, at most 60 characters."""
    name = "".join(c if c.isprintable() else "?" for c in upload.name) or "the file"
    return name if len(name) <= 60 else name[:57] + "..."


class Spool:
    """A folder of this machine for files that are being received, under random names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """The folder, created if missing, with the one above it.

        Raises StorageUnavailableError if the folder above both is gone.
        """
        try:
            for folder in (self._folder.parent, self._folder):
                folder.mkdir(mode=0o700, exist_ok=True)
        except FileNotFoundError:
            raise StorageUnavailableError from None
        return self._folder

    def new(self) -> Path:
        """Return the path of a new file."""
        return self.folder / secrets.token_hex(16)
