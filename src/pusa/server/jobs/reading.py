"""Read jobs inside the transactions of `JobQueue`; each query has an index, so that none reads the whole table."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from pusa.server.jobs import database, records
from pusa.server.jobs.job import Condition, Job, Status, job_from_row, owned_by

_table = database.jobs
_c = _table.c
_MOST_IDS = 10_000  # in one statement: databases have a limit

# Every change of an unfinished job changes one of these: a worker's changes extend the lease.
_SEEN = (_c.id, _c.status, _c.attempt, _c.lease_until, _c.cancel_requested, _c.not_before)


def find(connection: Connection, id: str, owner: str | None) -> Job | None:
    """Return a job if it exists and belongs to this owner (None: to anyone)."""
    row = connection.execute(sa.select(_table).where(_c.id == id, *owned_by(owner))).one_or_none()
    return None if row is None else job_from_row(row)


def page(
    connection: Connection,
    owner: str | None,
    after: str | None,
    limit: int,
    newest_first: bool,
    statuses: Collection[Status] | None,
) -> tuple[list[Job], bool]:
    """List jobs, see `JobQueue.page`."""
    conditions = owned_by(owner)
    if after is not None:
        place = records.find_place(connection, after, owner)
        if place is None:
            raise KeyError(after)
        conditions.append(_c.seq < place if newest_first else _c.seq > place)
    rows: list[Row[Any]] = []
    for status in [None] if statuses is None else statuses:  # one after the other: each has its index
        query = sa.select(_table).where(*conditions, *([] if status is None else [_c.status == status]))
        rows += connection.execute(query.order_by(_c.seq.desc() if newest_first else _c.seq.asc()).limit(limit + 1))
    rows.sort(key=lambda row: row.seq, reverse=newest_first)
    return [job_from_row(row) for row in rows[:limit]], len(rows) > limit


def changes(connection: Connection, known: Mapping[str, Job]) -> tuple[list[Job], list[str]]:
    """Read what has changed, see `JobQueue.read_changes`."""
    changed: list[Job] = []
    deleted, ids = set(known), list(known)
    for start in range(0, len(ids), _MOST_IDS):
        rows = connection.execute(sa.select(*_SEEN).where(_c.id.in_(ids[start : start + _MOST_IDS]))).all()
        deleted.difference_update(row.id for row in rows)
        new = [row.id for row in rows if any(getattr(known[row.id], c.name) != row._mapping[c] for c in _SEEN)]
        if new:
            changed += map(job_from_row, connection.execute(sa.select(_table).where(_c.id.in_(new))))
    return changed, list(deleted)


def any_of(connection: Connection, *groups: Sequence[Condition]) -> tuple[bool, ...]:
    """Tell for each group of conditions whether a job meets all of it."""
    return tuple(connection.execute(sa.select(*(sa.exists().where(*group) for group in groups))).one())


def position(connection: Connection, id: str) -> int:
    """Count the waiting jobs ahead of one, see `JobQueue.position`."""
    this = _table.alias("this")
    turn = sa.or_(_c.turn < this.c.turn, sa.and_(_c.turn == this.c.turn, _c.seq < this.c.seq))
    before = sa.or_(_c.priority > this.c.priority, sa.and_(_c.priority == this.c.priority, turn))
    ahead = (
        sa.select(sa.func.count())
        .select_from(this.join(_table, before))
        .where(this.c.id == id, this.c.status == "queued", _c.status == "queued")
    )
    return connection.execute(ahead).scalar_one()


def count(connection: Connection, statuses: Collection[Status]) -> dict[Status, int]:
    """Count the jobs of each of some statuses."""
    query = sa.select(_c.status, sa.func.count()).where(_c.status.in_(statuses)).group_by(_c.status)
    return dict.fromkeys(statuses, 0) | {row[0]: row[1] for row in connection.execute(query)}


def expired(connection: Connection, now: float, unfinished_before: float | None, limit: int) -> list[Job]:
    """List expired jobs, see `JobQueue.expired`."""
    ends: list[tuple[Status, sa.ColumnElement[Any], float]] = [("completed", _c.expires_at, now)]
    if unfinished_before is not None:
        before = math.nextafter(unfinished_before, -math.inf)
        ends += [("failed", _c.completed_at, before), ("cancelled", _c.completed_at, before)]
    rows: list[Row[Any]] = []
    for status, time_column, latest in ends:  # one after the other: each has its index
        query = sa.select(_table).where(_c.status == status, time_column <= latest)
        rows += connection.execute(query.order_by(time_column).limit(limit))
    return [job_from_row(row) for row in sorted(rows, key=lambda row: row.seq)[:limit]]
