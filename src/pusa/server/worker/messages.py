"""Define the messages between a worker and its engine process: plain, picklable, without torch.

A task's progress is reported by `pusa.events`, and its end by `Done`, `Error` or `Cancelled`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pusa.acceleration.decisions import Machine
from pusa.events import Done, Event
from pusa.provenance.options import MarkOptions

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
    preview_decoder: Path | None = None
    marks: MarkOptions = field(default_factory=MarkOptions)

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
class MachineFound:
    """Report the machine that the process runs on, before it loads the model."""

    machine: Machine


@dataclass(frozen=True)
class Alive:
    """Show that a process lives, also during a long step."""


@dataclass(frozen=True)
class ModelReady:
    """Report that the model is loaded."""

    model: str


@dataclass(frozen=True)
class LoadFailed:
    """Report that the model cannot be loaded; the process ends. `code` is one of `pusa.codes.ERRORS`."""

    message: str
    code: str = "model_not_loaded"


@dataclass(frozen=True)
class Error:
    """Report that a task has failed, as its last message.

    `code` is one of `pusa.codes.ERRORS`, such as ``out_of_memory``, with the `values` of its text; `retry` is True if
    another attempt may succeed; `latents` is a file for ``pusa decode``.
    """

    code: str
    message: str
    retry: bool
    latents: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cancelled:
    """Report that a task was cancelled, as its last message."""


Message = Event | Error | Cancelled
LAST = (Done, Error, Cancelled)
