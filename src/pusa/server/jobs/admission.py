"""Let jobs into the queue: find an earlier submission, enforce the limits, give turns, and let jobs wait once more."""

import statistics
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from pusa.codes import detail_of
from pusa.server.jobs import database, records
from pusa.server.jobs.job import (
    ENDED,
    UNFINISHED,
    Condition,
    FileDigest,
    Job,
    NewJob,
    QueueFull,
    by_turn,
    end_values,
    job_from_row,
    not_removed,
    owned_by,
    requeue_values,
    restart_values,
)

_RECENT_JOBS = 20  # completed jobs whose median duration predicts the next one's
_FIRST_JOB_SECONDS = 30.0  # the prediction before any job has completed
_CLOCKS_DIFFER_SECONDS = 60.0  # at most, between servers; what is further ahead was written by a wrong clock

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
        recent = of_owner.where(_c.fingerprint == new.fingerprint, _c.created_at >= fingerprint_since, not_removed())
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


def next_turn(connection: Connection, owner: str) -> int:
    """Return the turn of this owner's next job, so that owners run in turns however many jobs each has submitted.

    That is one after the owner's last unfinished job, and after the job whose turn it is now: start-time fair queueing
    (Goyal, Vin and Cheng, 1996), in which every job has the same weight.
    """

    def read(turn: Any, *conditions: sa.ColumnElement[bool]) -> int | None:
        return connection.execute(sa.select(turn).where(*conditions)).scalar()

    last = read(sa.func.max(_c.turn), _c.owner == owner, _c.status.in_(UNFINISHED))
    running = read(sa.func.max(_c.turn), _c.status == "in_progress")
    waiting = read(sa.func.min(_c.turn), _c.status == "queued")
    now = max(running or 0, 0 if waiting is None else waiting - 1)
    return max(now, last or 0) + 1


def median_seconds(connection: Connection) -> float | None:
    """Return the median time from first claim to end of recently completed jobs; None before the first."""
    query = sa.select(_c.started_at, _c.completed_at).where(_c.status == "completed", _c.started_at.is_not(None))
    rows = connection.execute(query.order_by(_c.completed_at.desc()).limit(_RECENT_JOBS)).all()
    return statistics.median(row.completed_at - row.started_at for row in rows) if rows else None


def _creation_time(connection: Connection, owner: str, now: float) -> float:
    """Return `now`, or at least a millisecond after the owner's job before, so that times are in the order of arrival.

    Jobs come within a millisecond, and to several servers, whose clocks differ.
    """
    newest = sa.select(_c.created_at).where(_c.owner == owner).order_by(_c.seq.desc()).limit(1)
    last = connection.execute(newest).scalar()
    if last is None or last > now + _CLOCKS_DIFFER_SECONDS:
        return now
    return max(now, (round(1000 * last) + 1) / 1000)


def insert(connection: Connection, new: NewJob, digests: Mapping[str, FileDigest] | None, now: float) -> Job:
    """Add the row of a new job and those of its inputs; return it."""
    values = {f.name: getattr(new, f.name) for f in fields(NewJob)} | {"inputs": list(new.inputs)}
    values |= {"created_at": _creation_time(connection, new.owner, now), "turn": next_turn(connection, new.owner)}
    row = connection.execute(_table.insert().values(**values).returning(_table)).one()
    records.record_files(connection, row.seq, "input", new.inputs, digests)
    records.record_change(connection, row.id, row.owner, now)
    return job_from_row(row)


def claim(
    connection: Connection, claimable: list[Condition], worker: str, now: float, lease_seconds: float
) -> Row[Any] | None:
    """Give the job whose turn it is to a worker; return its row, or None if there is none."""
    first = sa.select(_c.seq).where(*claimable).order_by(*by_turn()).limit(1)
    update = _table.update().where(_c.seq == first.with_for_update(skip_locked=True).scalar_subquery())
    values = {
        "status": "in_progress",
        "lease_owner": worker,
        "lease_until": now + lease_seconds,
        "attempt": _c.attempt + 1,
        "progressed": False,
        "not_before": None,
        "started_at": sa.func.coalesce(_c.started_at, now),
    }
    return connection.execute(update.values(**values).returning(_table)).one_or_none()


def cancel(connection: Connection, this: list[Condition], now: float) -> None:
    """Ask the worker of a running job to stop, and end one that nobody runs."""
    held = sa.and_(_c.status == "in_progress", _c.lease_until >= now)
    connection.execute(_table.update().where(*this, held).values(cancel_requested=True))
    unheld = [_c.status.not_in(ENDED), sa.not_(held)]
    connection.execute(_table.update().where(*this, *unheld).values(**end_values("cancelled", now)))


def restart(connection: Connection, job: Job, note: str | None, now: float) -> Job:
    """Let an ended job wait once more, from the beginning; return it."""
    values = restart_values() | {"turn": next_turn(connection, job.owner)}
    if note and note not in job.notes:
        values |= {"notes": [*job.notes, note], "note_details": [*job.note_details, detail_of(note)]}
    row = connection.execute(_table.update().where(_c.seq == job.seq).values(**values).returning(_table)).one()
    records.record_files(connection, job.seq, "result", ())
    records.record_change(connection, job.id, job.owner, now)
    return job_from_row(row)


def move(connection: Connection, owner: str | None, id: str, before: str | None) -> None:
    """Put a waiting job before another of the same owner, or behind all of them; their places stay as they are.

    Raises KeyError, with the id, for a job that is none of the owner's or does not wait.
    """
    this = connection.execute(sa.select(_c.owner).where(_c.id == id, *owned_by(owner))).scalar()
    query = sa.select(_c.seq, _c.id, _c.priority, _c.turn).where(_c.owner == this, _c.status == "queued")
    rows = list(connection.execute(query.order_by(*by_turn()).with_for_update()))
    ids = [row.id for row in rows]
    for wanted in [id] if before is None else [id, before]:
        if wanted not in ids:
            raise KeyError(wanted)
    if before == id:
        return
    places: list[tuple[int, int]] = []
    for row in rows:  # jobs of an early version share a turn: there the order was that of arrival
        last = places[-1] if places else (row.priority + 1, 0)
        places.append((row.priority, row.turn if row.priority < last[0] else max(row.turn, last[1] + 1)))
    ordered = [row for row in rows if row.id != id]
    position = len(ordered) if before is None else [row.id for row in ordered].index(before)
    ordered.insert(position, rows[ids.index(id)])
    for row, (priority, turn) in zip(ordered, places, strict=True):
        if (row.priority, row.turn) != (priority, turn):
            update = _table.update().where(_c.seq == row.seq, _c.status == "queued")
            connection.execute(update.values(priority=priority, turn=turn))


def requeue(connection: Connection, leases: list[Condition], max_failures: int, now: float) -> int:
    """Let running jobs whose workers are gone wait once more, or end them; return how many there are.

    Args:
        leases: select them.
        max_failures: attempts in a row without a new checkpoint after which a job fails.
    """
    failures = sa.case((_c.progressed, 0), else_=_c.failures + 1)
    lost = {
        "error_code": "worker_lost",
        "error_message": f"its worker ended {max_failures} times in a row without getting further; the last time "
        "unexpectedly: see the worker's log, or try a smaller video",
    }
    steps: tuple[tuple[list[Condition], dict[str, Any]], ...] = (
        ([_c.cancel_requested], end_values("cancelled", now)),
        ([failures >= max_failures], end_values("failed", now) | lost),
        ([], requeue_values()),
    )
    return sum(
        connection.execute(_table.update().where(*leases, *also).values(**values, failures=failures)).rowcount
        for also, values in steps
    )
