"""What a job is, and what its row says in each state. `pusa.server.jobs.queue` has the verbs."""

import uuid
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Row

from pusa.server.jobs import database

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("queued", "in_progress")
ENDED: tuple[Status, ...] = ("completed", "failed", "cancelled")


def new_id() -> str:
    """A job's name: ``video_`` and 32 hexadecimal digits, drawn at random."""
    return f"video_{uuid.uuid4().hex}"


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job as it is submitted.

    `request` is ``GenerationRequest.model_dump(mode="json")`` with keys of the FileStore as its files; `inputs` are
    these keys. `owner` is empty or the sha256 of an API key; `model`, `prompt`, `seconds` and `size` are what clients
    are shown. A higher `priority` comes first. `parent` is the job that this one remixes, extends or edits.
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


@dataclass(frozen=True, kw_only=True)
class Job(NewJob):
    """A row of the table: times are unix seconds, `progress` is 0..100 over all stages.

    `seq` is the order of arrival, `attempt` the fencing number, `failures` the attempts in a row that made no
    progress. `checkpoint` is a key of the FileStore with `checkpoint_step` steps done; `results` are keys by kind
    (video, thumbnail, spritesheet, contact_sheet); `resolved` is the ResolvedRequest once it is known.
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

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """What a worker last said of itself, and when (unix seconds)."""

    name: str
    seen_at: float
    state: dict[str, Any]


class QueueFull(Exception):  # noqa: N818 (a state that passes, not a mistake)
    """As many jobs wait or run as are allowed, in all (scope "total") or of this owner ("key")."""

    def __init__(self, limit: int, retry_after_seconds: float, scope: Literal["total", "key"]) -> None:
        self.limit, self.retry_after_seconds, self.scope = limit, retry_after_seconds, scope
        whose = "your key has" if scope == "key" else "the queue has"
        super().__init__(
            f"{whose} {limit} unfinished job{'s' if limit != 1 else ''}, which is the limit: wait for one to end "
            f"(about {retry_after_seconds:.0f} s) or cancel one"
        )


class LeaseLost(Exception):  # noqa: N818 (ends an attempt; nothing is wrong with it)
    """The attempt is no longer this worker's: it was late, or the job was deleted. Its result must be dropped."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"attempt {job.attempt} of {job.id} is no longer {job.lease_owner}'s: drop its result")


MAX_MESSAGE = 4000  # characters; a traceback of a native library may be longer

_c = database.jobs.c
_TUPLES = ("inputs", "notes")  # lists as JSON

Condition = sa.ColumnElement[bool]
"""Part of a WHERE."""


def job_of(row: Row[Any]) -> Job:
    """From a whole row of the table."""
    values = {f.name: row._mapping[f.name] for f in fields(Job)}
    return Job(**values | {name: tuple(values[name]) for name in _TUPLES})


def storable(message: str) -> str:
    """An error's words, which may hold anything, as text that both databases take."""
    return message[:MAX_MESSAGE].replace("\0", "").encode(errors="replace").decode()


def owned_by(owner: str | None) -> list[Condition]:
    """This owner's jobs; anyone's for None."""
    return [] if owner is None else [_c.owner == owner]


def overdue(now: float) -> list[Condition]:
    """Jobs whose workers have been silent for too long."""
    return [_c.status == "in_progress", _c.lease_until < now]


def held_as(job: Job) -> list[Condition]:
    """The fence: the row, as long as it is in this very attempt."""
    return [
        _c.id == job.id,
        _c.status == "in_progress",
        _c.lease_owner == job.lease_owner,
        _c.attempt == job.attempt,
    ]


def _without_lease(status: Status) -> dict[str, Any]:
    return {"status": status, "lease_owner": None, "lease_until": None, "stage": "", "seconds_left": None}


def ended_as(status: Status, now: float) -> dict[str, Any]:
    """What a row says when its job ends."""
    nothing = {"cancel_requested": False, "checkpoint": None, "error_code": None, "error_message": None}
    return _without_lease(status) | nothing | {"completed_at": now}


def back_in_queue() -> dict[str, Any]:
    """What a row says when its job waits for another attempt, which goes on from the checkpoint."""
    return _without_lease("queued")
