"""Change the row of a job for the attempt that holds its lease, inside the transactions of `JobQueue`."""

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from pusa.server.jobs import database, records
from pusa.server.jobs.job import FileDigest, Job, LeaseLost, Status, end_values, held_by, requeue_values

_table = database.jobs
_c = _table.c
_MOST_DOUBLINGS = 5  # of the pause before another attempt


def update(
    connection: Connection,
    job: Job,
    values: Mapping[str, Any],
    returning: sa.ColumnElement[Any],
    also: Callable[[Connection, int], None] | None,
) -> Any:
    """Update the row if this attempt still holds its lease, and then do `also`; return a column of the row.

    Raises LeaseLost.
    """
    statement = _table.update().where(*held_by(job)).values(**values).returning(returning)
    updated = connection.execute(statement).one_or_none()
    if updated is None:
        return _repeated_status(connection, job, (values.get("status"),))
    if also is not None:
        also(connection, job.seq)
    return updated[0]


def end(
    connection: Connection,
    job: Job,
    outcome: Callable[[Row[Any]], dict[str, Any]],
    digests: Mapping[str, FileDigest] | None,
) -> Status:
    """End an attempt with values that `outcome` computes from its locked row; return the new status.

    Raises LeaseLost.
    """
    row = connection.execute(sa.select(_table).where(*held_by(job)).with_for_update()).one_or_none()
    if row is None:
        return _repeated_status(connection, job, ("queued", "failed", "cancelled"))
    values = outcome(row)
    connection.execute(_table.update().where(_c.seq == row.seq).values(**values))
    records.record_files(connection, row.seq, "result", values.get("results", {}).values(), digests)
    status: Status = values["status"]
    return status


def after_failure(
    row: Row[Any],
    *,
    now: float,
    error: Mapping[str, Any],
    files: Mapping[str, Any],
    max_failures: int,
    retry_seconds: float,
) -> dict[str, Any]:
    """Return the values of a row after a failed attempt; see `JobQueue.fail`."""
    failures = 0 if row.progressed else row.failures + 1
    if failures >= max_failures:
        return {**end_values("failed", now), **error, **files, "failures": failures}
    if row.cancel_requested:
        return end_values("cancelled", now)
    pause_seconds = retry_seconds * 2 ** min(failures - 1, _MOST_DOUBLINGS) if failures else 0.0
    return {**requeue_values(now + pause_seconds if pause_seconds else None), **error, "failures": failures}


def _repeated_status(connection: Connection, job: Job, expected: tuple[str | None, ...]) -> Status:
    """Return the status if this attempt has ended in an expected one (a retried call); else raise LeaseLost."""
    row = connection.execute(sa.select(_c.status, _c.attempt).where(_c.id == job.id)).one_or_none()
    if row is None or row.attempt != job.attempt or row.status not in expected:
        raise LeaseLost(job)
    status: Status = row.status
    return status
