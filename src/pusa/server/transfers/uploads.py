"""Spool uploaded files and read them in processes of their own, which a malicious file may crash."""

import json
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

from pusa.server.errors import ServiceError
from pusa.server.jobs.store import StorageUnavailableError
from pusa.server.transfers.readers import Readers

_PROBE_COMMAND = ("-m", "pusa.server.transfers.probe")
PROBES_AT_ONCE = 2  # each may use a core
_LONGEST_LINE = 2**16  # of a child's answer before the content
_CHUNK_BYTES = 2**20


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
    has_request: bool = False
    """True for a file that pusa has made and that holds the whole request."""

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
        parent: id of the job whose result it is, or a part of that; empty for any other.
    """

    name: str
    path: Path
    content_type: str = ""
    size: int = 0
    expected_kind: Literal["image", "video"] | None = None
    info: UploadInfo | None = None
    parent: str = ""


@dataclass(frozen=True, kw_only=True)
class ProbeLimits:
    """Limits for probing the files of one request; the first five are those of `pusa.media.MediaLimits`.

    `max_pixels` is the area of a picture; that of a video's frame has the default of `MediaLimits` above it.
    `made_frames` and `made_seconds` are for videos that the server made, which may be longer than uploads.
    """

    max_bytes: int = 512 * 2**20
    max_pixels: int = 110_000_000
    max_frames: int = 20_000
    max_seconds: float = 1200.0
    max_decode_seconds: float = 10.0
    memory_bytes: int = 2 * 2**30
    wall_seconds: float = 30.0
    made_frames: int = 20_000
    made_seconds: float = 20_000.0


class Prober:
    """Look at uploads in processes of their own, one for the files of one request, and make what is asked of them.

    All methods are thread-safe.

    Args:
        limits: for the files of one request.
        command: arguments of Python that start the process whose forks read files, see `Readers`.
    """

    def __init__(self, limits: ProbeLimits = ProbeLimits(), command: Sequence[str] = _PROBE_COMMAND) -> None:
        self.limits, self.readers = limits, Readers(command)
        self._probing = threading.BoundedSemaphore(PROBES_AT_ONCE)
        self._making = threading.BoundedSemaphore(PROBES_AT_ONCE)  # of its own: new uploads do not wait for it

    def warm(self) -> None:
        """Load what reads files before the first request."""
        self.readers.warm()

    def close(self) -> None:
        self.readers.close()

    def probe(self, uploads: Sequence[Upload]) -> list[UploadInfo]:
        """Read the metadata of each file.

        Raises:
            ServiceError: 400, with the client's name of the file, if one is neither image nor video, is damaged,
                exceeds a limit or crashes the child.
        """
        if not uploads:
            return []
        target = BytesIO()
        with self._probing:
            task = {"files": [[str(upload.path), upload.expected_kind] for upload in uploads]}
            self._ask(task, target, self.limits.wall_seconds, is_made=all(upload.parent for upload in uploads))
        answers = [json.loads(line) for line in target.getvalue().splitlines() if line.startswith(b"{")]
        for upload, answer in zip(uploads, answers, strict=False):
            if "error" in answer:
                raise _invalid_file(upload, answer)
        if len(answers) < len(uploads):
            raise self._broken(uploads[len(answers)], self.limits.wall_seconds)
        return [UploadInfo(**answer) for answer in answers]

    def make(
        self, upload: Upload, task: Mapping[str, Any], target: IO[bytes], *, wall_seconds: float | None = None
    ) -> dict[str, Any]:
        """Write what a task asks for of a file to `target`; return facts about it, see `making.make`.

        Args:
            task: without the path of the file.
            target: open for writing and reading, empty.
            wall_seconds: the limit for all of it; None takes that of a probe.

        Raises:
            ServiceError: 400 as `probe`; `target` may hold a part then.
        """
        seconds = self.limits.wall_seconds if wall_seconds is None else wall_seconds
        with self._making:
            named = {"make": {**task, "path": str(upload.path)}}
            answer = self._ask(named, target, seconds, is_made=bool(upload.parent))
        if "error" in answer:
            raise _invalid_file(upload, answer)
        if answer.pop("bytes", None) != target.tell():
            raise self._broken(upload, seconds)
        return answer

    def _broken(self, upload: Upload, seconds: float) -> ServiceError:
        memory = self.limits.memory_bytes / 2**30
        reason = (
            f"reading it took more than {seconds:g} s or {memory:g} GiB, or broke the reader: export it again, smaller"
        )
        return _invalid_file(upload, {"error": reason, "code": "file_breaks_reader"})

    def _ask(self, task: Mapping[str, Any], target: IO[bytes], seconds: float, *, is_made: bool) -> dict[str, Any]:
        """Give a task to a reader and write its answer to `target`; of ``make``, return the line before the content.

        Args:
            is_made: the files are videos that the server made.
        """
        limits = asdict(self.limits)
        made_frames, made_seconds = limits.pop("made_frames"), limits.pop("made_seconds")
        if is_made:
            limits["max_frames"] = max(limits["max_frames"], made_frames)
            limits["max_seconds"] = max(limits["max_seconds"], made_seconds)
        memory_bytes, _ = limits.pop("memory_bytes"), limits.pop("wall_seconds")
        limits["max_decode_seconds"] = max(limits["max_decode_seconds"], seconds)
        given = {"memory_bytes": memory_bytes, "cpu_seconds": max(1, round(seconds)), "limits": limits}
        answer: dict[str, Any] = {}
        with self.readers.open(seconds) as stream, suppress(OSError):  # it died while it was spoken to
            stream.write(json.dumps({**task, **given}).encode() + b"\n")
            stream.flush()
            if "make" in task:
                with suppress(ValueError):  # a line that it could not end
                    answer = json.loads(stream.readline(_LONGEST_LINE))
            for _ in range(0, memory_bytes, _CHUNK_BYTES):  # a broken one writes no more than it could hold
                if not (chunk := stream.read(_CHUNK_BYTES)):
                    break
                target.write(chunk)
        return answer


def _invalid_file(upload: Upload, answer: Mapping[str, Any]) -> ServiceError:
    """Make the error of a file by the answer of the child, with the client's name of the file."""
    name = display_name(upload)
    code, values = answer.get("code", "invalid_file"), {**answer.get("values", {}), "name": name}
    return ServiceError(400, code, f"{name}: {answer['error']}", "input_reference", values=values)


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
