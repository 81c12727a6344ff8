"""Decide whether the queue accepts a job: find an earlier submission of it and enforce the limits."""

import statistics
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from pusa.server.jobs import database
from pusa.server.jobs.job import UNFINISHED, Job, NewJob, QueueFull, job_from_row, owned_by

_RECENT_JOBS = 20  # completed jobs whose median duration predicts the next one's
_FIRST_JOB_SECONDS = 30.0  # the prediction before any job has completed

_table = database.jobs
_c = _table.c


def find_earlier(connection: Connection, new: NewJob, *, fingerprint_since: float | None) -> Job | None:
    """Find the job that an earlier submission of `new` has made.

    It has the same id or the same idempotency key, or the same fingerprint if it was created at `fingerprint_since`
    (unix seconds; None: never) or later.
    """
    of_owner = sa.select(_table).where(_c.owner == new.owner)
    queries = [of_owner.where(_c.id == new.id)]
    if new.idempotency_key is not None:
        queries.append(of_owner.where(_c.idempotency_key == new.idempotency_key))
    if new.fingerprint is not None and fingerprint_since is not None:
        recent = of_owner.where(_c.fingerprint == new.fingerprint, _c.created_at >= fingerprint_since)
        queries.append(recent.order_by(_c.created_at.desc(), _c.seq.desc()).limit(1))
    for query in queries:  # one after the other: each has an index of its own
        if (row := connection.execute(query).one_or_none()) is not None:
            return job_from_row(row)
    return None


def check_limits(connection: Connection, owner: str, *, total: int | None, per_owner: int | None) -> None:
    """Raise QueueFull if the owner, or all owners together, have as many unfinished jobs as allowed (None: any)."""
    limits: tuple[tuple[int | None, Literal["total", "key"], str | None], ...] = (
        (per_owner, "key", owner),
        (total, "total", None),
    )
    for limit, scope, counted_owner in limits:
        if limit is None:
            continue
        unfinished = sa.select(sa.func.count()).where(_c.status.in_(UNFINISHED), *owned_by(counted_owner))
        if connection.execute(unfinished).scalar_one() >= limit:
            running = sa.select(sa.func.count()).where(_c.status == "in_progress")
            parallel = max(1, connection.execute(running).scalar_one())
            seconds = (median_seconds(connection) or _FIRST_JOB_SECONDS) / parallel
            raise QueueFull(limit, min(max(seconds, 1.0), 3600.0), scope)


def median_seconds(connection: Connection) -> float | None:
    """Return the median time from first claim to end of recently completed jobs; None before the first."""
    query = sa.select(_c.started_at, _c.completed_at).where(_c.status == "completed", _c.started_at.is_not(None))
    rows = connection.execute(query.order_by(_c.completed_at.desc()).limit(_RECENT_JOBS)).all()
    return statistics.median(row.completed_at - row.started_at for row in rows) if rows else None
