"""Define a job, its row in each state and the conditions that select rows. `pusa.server.jobs.queue` changes them."""

import uuid
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Row

from pusa.fsutil import sha256_of
from pusa.server.jobs import database

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("queued", "in_progress")
ENDED: tuple[Status, ...] = ("completed", "failed", "cancelled")
_STAGES = ("load", "encode", "denoise", "decode", "finish")  # whose durations `Job.timings` holds


def new_id() -> str:
    """Draw a random job id: ``video_`` and 32 hexadecimal digits."""
    return f"video_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class FileDigest:
    """Hold what a stored file must be: its size and the sha256 of its content in hexadecimal digits."""

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        """Read a local file."""
        return cls(path.stat().st_size, sha256_of(path))


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """Hold a job as it is submitted.

    `request` is ``GenerationRequest.model_dump(mode="json")`` with keys of the FileStore as its files; `inputs` are
    these keys. `owner` is empty or the sha256 of an API key; `model`, `prompt`, `seconds` and `size` are shown to
    clients. A higher `priority` comes first. `parent` is the job that this one remixes, extends or edits, `batch` the
    client's name for jobs made together.
    """

    id: str = field(default_factory=new_id)
    owner: str = ""
    request: dict[str, Any]
    model: str
    prompt: str
    seconds: str
    size: str
    inputs: tuple[str, ...] = ()
    priority: int = 0
    parent: str | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None
    source: str = "api"
    traceparent: str | None = None
    batch: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job(NewJob):
    """Hold a row of the table: times are unix seconds, `progress` is 0..100 over all stages.

    `seq` is the order of arrival, `attempt` the fencing token, `failures` counts attempts in a row without
    progress. `checkpoint` is a key of the FileStore with `checkpoint_step` steps done; `results` are keys by kind
    (video, thumbnail, spritesheet, contact_sheet); `resolved` is the ResolvedRequest once it is known. Owners take
    turns: of the waiting jobs with the highest priority the one with the lowest `turn` runs first. After a failed
    attempt a job waits until `not_before`. `plan` is one line about how the model runs on the worker's machine.
    A job that its owner has removed can be restored until `undo_until`. `note_details` are the notes as codes with
    values, `error_values` those of the error's code.
    """

    seq: int
    status: Status
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    attempt: int = 0
    failures: int = 0
    lease_owner: str | None = None
    lease_until: float | None = None
    cancel_requested: bool = False
    stage: str = ""
    step: int = 0
    steps: int = 0
    progress: float = 0.0
    seconds_left: float | None = None
    checkpoint: str | None = None
    checkpoint_step: int = 0
    resolved: dict[str, Any] | None = None
    results: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    error_code: str | None = None
    error_message: str | None = None
    turn: int = 0
    not_before: float | None = None
    plan: str | None = None
    favourite: bool = False
    undo_until: float | None = None
    note_details: tuple[dict[str, Any], ...] = ()
    error_values: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def inference_seconds(self) -> float:
        """Sum up the durations of all stages, without the wait in the queue."""
        return sum(self.timings.get(stage, 0.0) for stage in _STAGES)


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """Hold the last state a worker has reported, and when (unix seconds)."""

    name: str
    seen_at: float
    state: dict[str, Any]


class QueueFull(Exception):  # noqa: N818 (a state that passes)
    """Report that the limit of unfinished jobs is reached: in all (scope "total") or of this owner ("key")."""

    def __init__(self, limit: int, retry_after_seconds: float, scope: Literal["total", "key"]) -> None:
        self.limit, self.retry_after_seconds, self.scope = limit, retry_after_seconds, scope
        subject = "your key has" if scope == "key" else "the queue has"
        super().__init__(
            f"{subject} {limit} unfinished job{'s' if limit != 1 else ''}, which is the limit: wait for one to end "
            f"(about {retry_after_seconds:.0f} s) or cancel one"
        )


class LeaseLost(Exception):  # noqa: N818 (ends an attempt, which is no error)
    """Report that an attempt has lost its lease: it was late, or the job was deleted. Drop its result."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"attempt {job.attempt} of {job.id} is no longer {job.lease_owner}'s: drop its result")


MAX_MESSAGE = 4000  # characters; a traceback of a native library may be longer

_c = database.jobs.c
_TUPLES = ("inputs", "notes", "note_details")  # lists as JSON
_ERROR = ("error_code", "error_message", "error_values")

Condition = sa.ColumnElement[bool]
"""One condition of a WHERE clause."""


def job_from_row(row: Row[Any]) -> Job:
    """Convert a whole row of the table to a Job."""
    values = {f.name: row._mapping[f.name] for f in fields(Job)}
    return Job(**values | {name: tuple(values[name]) for name in _TUPLES})


def storable(message: str) -> str:
    """Convert an error message, which may hold any character, to text that both databases accept."""
    return message[:MAX_MESSAGE].replace("\0", "").encode(errors="replace").decode()


def owned_by(owner: str | None) -> list[Condition]:
    """Select this owner's jobs; everyone's for None."""
    return [] if owner is None else [_c.owner == owner]


def not_removed() -> Condition:
    """Select the jobs that their owners have not removed."""
    return _c.undo_until.is_(None)


def overdue(now: float) -> list[Condition]:
    """Select running jobs whose leases have ended."""
    return [_c.status == "in_progress", _c.lease_until < now]


def held_by(job: Job) -> list[Condition]:
    """Select the job's row as long as this attempt holds its lease (the fence)."""
    return [
        _c.id == job.id,
        _c.status == "in_progress",
        _c.lease_owner == job.lease_owner,
        _c.attempt == job.attempt,
    ]


def _without_lease(status: Status) -> dict[str, Any]:
    return {"status": status, "lease_owner": None, "lease_until": None, "stage": "", "seconds_left": None}


def end_values(status: Status, now: float) -> dict[str, Any]:
    """Return the values of a row whose job ends."""
    cleared = {"cancel_requested": False, "checkpoint": None, "not_before": None}
    return _without_lease(status) | cleared | dict.fromkeys(_ERROR) | {"completed_at": now}


def requeue_values(not_before: float | None = None) -> dict[str, Any]:
    """Return the values of a row whose job waits for another attempt, which continues from the checkpoint."""
    return _without_lease("queued") | {"not_before": not_before}


def restart_values() -> dict[str, Any]:
    """Return the values of a row whose ended job is made again from the beginning."""
    begun = {"step": 0, "progress": 0.0, "checkpoint_step": 0, "failures": 0, "started_at": None}
    ended = {"completed_at": None, "expires_at": None} | dict.fromkeys(_ERROR)
    return requeue_values() | begun | ended | {"results": {}, "timings": {}}


def step_values(step: int) -> dict[str, Any]:
    """Return the values of a row whose checkpoint is now at this step; beyond the last one that is progress."""
    is_further = _c.checkpoint_step < step
    return {
        "checkpoint_step": step,
        "failures": sa.case((is_further, 0), else_=_c.failures),
        "progressed": sa.case((is_further, sa.true()), else_=_c.progressed),
    }


def waiting(now: float) -> list[Condition]:
    """Select the jobs that a worker may claim now."""
    return [_c.status == "queued", sa.or_(_c.not_before.is_(None), _c.not_before <= now)]


def by_turn() -> tuple[sa.ColumnElement[Any], ...]:
    """Order waiting jobs as workers claim them."""
    return _c.priority.desc(), _c.turn, _c.seq
