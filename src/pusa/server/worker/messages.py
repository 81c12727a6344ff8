"""Define the messages between a worker and its engine process: plain, picklable, without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Request one attempt at a job.

    `request` is a GenerationRequest as JSON whose conditions name keys of the FileStore; `inputs` are local files by
    key. The engine writes every file to `folder`, which may hold the checkpoint of an earlier attempt.
    """

    job_id: str
    attempt: int
    request: dict[str, Any]
    folder: Path
    inputs: dict[str, Path] = field(default_factory=dict)
    checkpoint_every: int = 4  # steps
    checkpoint_seconds: float = 0.0  # minimum time between two
    preview_seconds: float = 0.0  # minimum time between two; 0: none

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT_FILE


@dataclass(frozen=True)
class CancelTask:
    """Request the end of the task between two steps."""


@dataclass(frozen=True)
class Loading:
    """Report a stage of loading and its progress (0..100; None if unknown)."""

    stage: str
    percent: float | None = None


@dataclass(frozen=True)
class Ready:
    """Report that the model is loaded."""

    model: str


@dataclass(frozen=True)
class LoadFailed:
    """Report that the model cannot be loaded; the process ends."""

    message: str


@dataclass(frozen=True)
class Stage:
    """Of a task: "load", "denoise", "decode" or "finish"."""

    stage: str


@dataclass(frozen=True)
class Step:
    """The `step`-th of `steps` is done, over all windows of the video."""

    step: int
    steps: int
    seconds_left: float | None = None


@dataclass(frozen=True)
class Note:
    """For the person who asked: what was rounded or left aside."""

    message: str


@dataclass(frozen=True)
class Resolved:
    """The request with nothing left open, as JSON; its files are keys again."""

    request: dict[str, Any]


@dataclass(frozen=True)
class Preview:
    """The video so far as one WebP picture."""

    image: bytes


@dataclass(frozen=True)
class Checkpoint:
    """A whole file with what `step` steps (or more, by the time it is read) have made."""

    path: Path
    step: int


@dataclass(frozen=True)
class Done:
    """The last message of a task that succeeded: files by kind, and what they took (seconds, and peak_memory_mb)."""

    files: dict[str, Path]
    timings: dict[str, float]


@dataclass(frozen=True)
class Error:
    """The last message of one that failed.

    `code` is for programs (``invalid_request``, ``out_of_memory``, ``disk_full``, ``worker_lost``, ``stalled``,
    ``internal_error``); `retry` says whether another attempt may succeed; `latents` is a file for ``pusa decode``.
    """

    code: str
    message: str
    retry: bool
    latents: Path | None = None


@dataclass(frozen=True)
class Cancelled:
    """The last message of one that was to end."""


Message = Stage | Step | Note | Resolved | Preview | Checkpoint | Done | Error | Cancelled
LAST = (Done, Error, Cancelled)
