"""Cancel, remove, restore, mark, move and repeat jobs in the queue for clients."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from pusa.server.jobs import admission, database, reading, records
from pusa.server.jobs.database import retried, transaction
from pusa.server.jobs.job import (
    UNFINISHED,
    Job,
    Status,
    end_values,
    job_from_row,
    not_removed,
    owned_by,
)

_table = database.jobs
_c = _table.c


class ClientChanges:
    """The part of `JobQueue` that changes jobs for clients. `owner` None stands for everyone's jobs."""

    engine: Engine
    _clock: Callable[[], float]
    _note_change: Callable[..., None]

    @retried
    def cancel(self, id: str, owner: str | None = None) -> Job:
        """Cancel a waiting job at once, or ask the worker of a running one; an ended job stays as it is.

        Raises KeyError for a job that does not exist.
        """
        with transaction(self.engine) as connection:
            admission.cancel(connection, [_c.id == id, *owned_by(owner)], self._clock())
            job = reading.find(connection, id, owner)
        if job is None:
            raise KeyError(id)
        self._note_change()
        return job

    @retried
    def cancel_all(self, owner: str) -> list[Job]:
        """Cancel every unfinished job of an owner as `cancel` does; return those that were unfinished."""
        own = [_c.owner == owner, _c.status.in_(UNFINISHED)]
        with transaction(self.engine, exclusive=True) as connection:
            seqs = list(connection.execute(sa.select(_c.seq).where(*own)).scalars())
            admission.cancel(connection, own, self._clock())
            rows = connection.execute(sa.select(_table).where(_c.seq.in_(seqs)).order_by(_c.seq.desc())).all()
        self._note_change()
        return [job_from_row(row) for row in rows]

    @retried
    def delete(self, id: str, owner: str | None = None, *, unchanged: Job | None = None) -> Job:
        """Delete the row, of a removed job too, and return its last state; the worker of a running one loses its lease.

        Raises KeyError for a job that does not exist, or has ended, been removed or restored since it was as in
        `unchanged`.
        """
        this = [_c.id == id, *owned_by(owner)]
        if unchanged is not None:
            this += [_c.completed_at.is_not_distinct_from(unchanged.completed_at)]
            this += [_c.undo_until.is_not_distinct_from(unchanged.undo_until)]
        with transaction(self.engine, exclusive=True) as connection:
            row = connection.execute(_table.delete().where(*this).returning(_table)).one_or_none()
            if row is None:
                raise KeyError(id)
            now = self._clock()
            records.record_deleted(connection, id, row.seq, row.owner, now)
            records.record_change(connection, id, row.owner, now)
        self._note_change()
        return job_from_row(row)

    @retried
    def remove(self, id: str, owner: str | None = None, *, undo_seconds: float) -> Job:
        """Hide a job from every list until it is restored or, after `undo_seconds`, deleted; return its new state.

        An unfinished one is cancelled at once: its worker loses its lease. Its idempotency key is free again. Raises
        KeyError for a job that does not exist or is removed already.
        """
        this = [_c.id == id, not_removed(), *owned_by(owner)]
        with transaction(self.engine, exclusive=True) as connection:
            now = self._clock()
            ended = end_values("cancelled", now)
            connection.execute(_table.update().where(*this, _c.status.in_(UNFINISHED)).values(**ended))
            values = {"undo_until": now + undo_seconds, "idempotency_key": None}
            row = connection.execute(_table.update().where(*this).values(**values).returning(_table)).one_or_none()
            if row is None:
                raise KeyError(id)
            records.record_change(connection, id, row.owner, now)
        self._note_change()
        return job_from_row(row)

    @retried
    def restore(self, id: str, owner: str | None = None) -> Job:
        """Undo a removal; a job that is not removed stays as it is. Raises KeyError for one that is gone."""
        return self._mark(id, owner, {"undo_until": None}, among_removed=True)

    @retried
    def update(self, id: str, owner: str | None = None, **values: Any) -> Job:
        """Change what an owner notes of a job, `favourite` and `batch`. Raises KeyError for one that does not exist."""
        return self._mark(id, owner, values)

    def _mark(self, id: str, owner: str | None, values: Mapping[str, Any], *, among_removed: bool = False) -> Job:
        this = [_c.id == id, *owned_by(owner), *([] if among_removed else [not_removed()])]
        with transaction(self.engine, exclusive=True) as connection:
            row = connection.execute(_table.update().where(*this).values(**values).returning(_table)).one_or_none()
            if row is None:
                raise KeyError(id)
            records.record_change(connection, id, row.owner, self._clock())
        self._note_change()
        return job_from_row(row)

    @retried
    def move(self, id: str, owner: str | None = None, *, before: str | None) -> Job:
        """Put a waiting job before another one of its owner, None: behind all of them.

        Only the owner's own waiting jobs change places among themselves. Raises KeyError, with the id, for a job that
        does not exist or does not wait.
        """
        with transaction(self.engine, exclusive=True) as connection:
            admission.move(connection, owner, id, before)
            job = reading.find(connection, id, owner)
        if job is None:
            raise KeyError(id)
        self._note_change()
        return job

    @retried
    def restart(
        self,
        id: str,
        owner: str | None = None,
        *,
        statuses: Collection[Status] = ("failed", "cancelled"),
        note: str | None = None,
        total_limit: int | None = None,
        key_limit: int | None = None,
    ) -> Job:
        """Queue an ended job once more, from the beginning and with the same seed; one in another status stays.

        `statuses` are those in which it is queued again, `note` joins its notes, the limits are those of `submit`.
        Raises KeyError for a job that does not exist, and QueueFull.
        """
        with transaction(self.engine, exclusive=True) as connection:
            job = reading.find(connection, id, owner)
            if job is None:
                raise KeyError(id)
            if job.status in statuses:
                admission.check_limits(connection, job.owner, total=total_limit, per_owner=key_limit)
                job = admission.restart(connection, job, note, self._clock())
        self._note_change()
        return job
