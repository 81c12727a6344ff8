"""Queue jobs durably in a database table. A method's change is on disk when it returns.

A worker claims a job for the length of a lease, which its heartbeats extend. Every claim gives the job a new attempt
number, and every call of a worker names its attempt: a worker that has lost its lease and comes back changes nothing
(`LeaseLost`). Attempts that advance the job's checkpoint are free; the queue counts those in a row that do not, and a
job that reaches the limit fails.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from pusa.server.jobs import admission, database
from pusa.server.jobs.database import QueueUnavailable, SchemaError, not_retried, retried, transaction
from pusa.server.jobs.job import (
    ENDED,
    Condition,
    Job,
    LeaseLost,
    NewJob,
    QueueFull,
    Status,
    WorkerRecord,
    end_values,
    held_by,
    job_from_row,
    new_id,
    overdue,
    owned_by,
    requeue_values,
    storable,
)

__all__ = [
    "ENDED",
    "MAX_FAILURES",
    "Job",
    "JobQueue",
    "LeaseLost",
    "NewJob",
    "QueueFull",
    "QueueUnavailable",
    "SchemaError",
    "Status",
    "WorkerRecord",
    "new_id",
]

MAX_FAILURES = 3  # attempts in a row without progress

_table, _worker_table = database.jobs, database.workers
_c = _table.c


class JobQueue:
    """Queue jobs in a database, `engine`; safe from any thread and any process.

    Every method raises `QueueUnavailable` if the database cannot be reached or stays busy.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        """Open the database and create its tables if it has none.

        Args:
            url: ``sqlite:///FILE`` on a local disk, or ``postgresql://USER:PASSWORD@HOST/DATABASE``.
            clock: returns unix seconds. Machines compare leases, so their clocks must agree to a few seconds.

        Raises:
            ValueError: the URL is of another kind, or names a file on a network share.
            SchemaError: the tables are newer than this program.
        """
        self.engine = database.connect(url)
        self._clock = clock
        self._changes = 0
        self._lock = threading.Lock()
        with self.engine.connect() as connection:
            self.identity: str = connection.execute(sa.select(database.schema_version.c.identity)).scalar_one()
            """Random id of the database, written when its tables were made."""

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        self.engine.dispose()

    def change_count(self) -> int:
        """Return a number that grows with every change this object makes, for readers that poll."""
        return self._changes

    # ---- Clients -----------------------------------------------------------------------------------------------------

    @retried
    def submit(
        self,
        new: NewJob,
        *,
        total_limit: int | None = None,
        key_limit: int | None = None,
        same_fingerprint_seconds: float | None = None,
    ) -> tuple[Job, bool]:
        """Accept a job; it is on disk when this returns.

        Args:
            total_limit: maximum number of unfinished jobs.
            key_limit: the same for this owner.
            same_fingerprint_seconds: a job of this owner with the same fingerprint, at most this old, counts as the
                same: the client repeats a request whose answer was lost.

        Returns:
            The job and whether it is new. An `idempotency_key` that the owner has used returns the older job, as does
            `same_fingerprint_seconds`; the caller compares `fingerprint` where that matters.

        Raises:
            QueueFull: one of the limits is reached.
        """
        now = self._clock()
        with transaction(self.engine, exclusive=True) as connection:
            since = None if same_fingerprint_seconds is None else now - same_fingerprint_seconds
            earlier = admission.find_earlier(connection, new, fingerprint_since=since)
            if earlier is not None:
                return earlier, earlier.id == new.id  # the same id: the first try of this very call
            admission.check_limits(connection, new.owner, total=total_limit, per_owner=key_limit)
            values = {f.name: getattr(new, f.name) for f in fields(NewJob)} | {"inputs": list(new.inputs)}
            row = connection.execute(_table.insert().values(**values, created_at=now).returning(_table)).one()
        self._note_change()
        return job_from_row(row), True

    @retried
    def get(self, id: str, owner: str | None = None) -> Job | None:
        """Return the job if it exists and belongs to this owner (None: to anyone)."""
        with self.engine.connect() as connection:
            return self._find(connection, id, owner)

    @retried
    def page(
        self,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[list[Job], bool]:
        """List jobs in order of arrival ("desc": the newest first) and tell whether there are more.

        Raises KeyError for an `after` that does not exist.
        """
        query = sa.select(_table).where(*owned_by(owner))
        query = query.order_by(_c.seq.asc() if order == "asc" else _c.seq.desc()).limit(limit + 1)
        with self.engine.connect() as connection:
            if after is not None:
                last = connection.execute(sa.select(_c.seq).where(_c.id == after, *owned_by(owner))).scalar()
                if last is None:
                    raise KeyError(after)
                query = query.where(_c.seq > last if order == "asc" else _c.seq < last)
            rows = connection.execute(query).all()
        return [job_from_row(row) for row in rows[:limit]], len(rows) > limit

    @retried
    def cancel(self, id: str, owner: str | None = None) -> Job:
        """Cancel a waiting job at once, or ask the worker of a running one; an ended job stays as it is.

        Raises KeyError for a job that does not exist.
        """
        now = self._clock()
        this = [_c.id == id, *owned_by(owner)]
        held = sa.and_(_c.status == "in_progress", _c.lease_until >= now)
        with transaction(self.engine) as connection:
            connection.execute(_table.update().where(*this, held).values(cancel_requested=True))
            connection.execute(
                _table.update()
                .where(*this, _c.status.not_in(ENDED), sa.not_(held))
                .values(**end_values("cancelled", now))
            )
            job = self._find(connection, id, owner)
        if job is None:
            raise KeyError(id)
        self._note_change()
        return job

    @retried
    def delete(self, id: str, owner: str | None = None) -> Job:
        """Delete the row and return its last state; the worker of a running job loses its lease.

        Raises KeyError for a job that does not exist.
        """
        with transaction(self.engine) as connection:
            deletion = _table.delete().where(_c.id == id, *owned_by(owner)).returning(_table)
            row = connection.execute(deletion).one_or_none()
        if row is None:
            raise KeyError(id)
        self._note_change()
        return job_from_row(row)

    @retried
    def position(self, id: str) -> int:
        """Count the waiting jobs ahead of this one; 0 for the next, and for a job that does not wait."""
        this = _table.alias("this")
        before = sa.or_(_c.priority > this.c.priority, sa.and_(_c.priority == this.c.priority, _c.seq < this.c.seq))
        ahead = (
            sa.select(sa.func.count())
            .select_from(this.join(_table, before))
            .where(this.c.id == id, this.c.status == "queued", _c.status == "queued")
        )
        with self.engine.connect() as connection:
            return connection.execute(ahead).scalar_one()

    @retried
    def counts(self) -> dict[Status, int]:
        """Count the jobs of each status."""
        counts: dict[Status, int] = dict.fromkeys(get_args(Status), 0)
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(_c.status, sa.func.count()).group_by(_c.status))
            return counts | {row[0]: row[1] for row in rows}

    @retried
    def seconds_per_job(self) -> float | None:
        """Return the median time from first claim to end of recently completed jobs; None before the first."""
        with self.engine.connect() as connection:
            return admission.median_seconds(connection)

    # ---- Workers -----------------------------------------------------------------------------------------------------

    @not_retried
    def claim(
        self,
        worker: str,
        *,
        lease_seconds: float,
        models: Collection[str] | None = None,
        max_failures: int = MAX_FAILURES,
    ) -> Job | None:
        """Claim the next job for this worker until the lease ends; None if no job waits.

        First returns jobs whose leases have ended to the queue, or ends them: see `recover_overdue`. A claim whose
        answer is lost is not retried; its job returns to the queue when the lease ends.

        Args:
            models: claim only jobs of these models.
        """
        now = self._clock()
        waiting = [_c.status == "queued"] + ([] if models is None else [_c.model.in_(list(models))])
        lookup = sa.select(sa.exists().where(*waiting), sa.exists().where(*overdue(now)))
        with self.engine.connect() as connection:  # most polls find nothing and must not block writers
            anything_waits, anything_is_overdue = connection.execute(lookup).one()
        if anything_is_overdue:
            self.recover_overdue(max_failures=max_failures)
        elif not anything_waits:
            return None
        first = sa.select(_c.seq).where(*waiting).order_by(_c.priority.desc(), _c.seq).limit(1)
        with transaction(self.engine) as connection:
            row = connection.execute(
                _table.update()
                .where(_c.seq == first.with_for_update(skip_locked=True).scalar_subquery())
                .values(
                    status="in_progress",
                    lease_owner=worker,
                    lease_until=now + lease_seconds,
                    attempt=_c.attempt + 1,
                    progressed=False,
                    started_at=sa.func.coalesce(_c.started_at, now),
                )
                .returning(_table)
            ).one_or_none()
        self._note_change()
        return None if row is None else job_from_row(row)

    @retried
    def heartbeat(
        self,
        job: Job,
        *,
        lease_seconds: float,
        stage: str | None = None,
        step: int | None = None,
        steps: int | None = None,
        progress: float | None = None,
        seconds_left: float | None = None,
        checkpoint: str | None = None,
        checkpoint_step: int | None = None,
        resolved: Mapping[str, Any] | None = None,
        notes: Collection[str] | None = None,
    ) -> bool:
        """Extend the lease and record the attempt's progress in one statement; None leaves a value unchanged.

        A `checkpoint_step` beyond the last one is progress: it resets the count of failures.

        Returns:
            True if the worker must cancel the job.

        Raises:
            LeaseLost: the worker must stop and drop its result.
        """
        columns = {
            "stage": stage,
            "step": step,
            "steps": steps,
            "progress": progress,
            "seconds_left": seconds_left,
            "checkpoint": checkpoint,
            "checkpoint_step": checkpoint_step,
            "resolved": None if resolved is None else dict(resolved),
            "notes": None if notes is None else list(notes),
        }
        values: dict[str, Any] = {name: value for name, value in columns.items() if value is not None}
        if checkpoint_step is not None:
            values["failures"] = sa.case((_c.checkpoint_step < checkpoint_step, 0), else_=_c.failures)
            values["progressed"] = sa.case((_c.checkpoint_step < checkpoint_step, sa.true()), else_=_c.progressed)
        return bool(self._fenced(job, _c.cancel_requested, lease_until=self._clock() + lease_seconds, **values))

    @retried
    def finish(
        self, job: Job, *, results: Mapping[str, str], timings: Mapping[str, float], expires_at: float | None = None
    ) -> None:
        """Complete the job, whose files must be in the store by now. Raises LeaseLost."""
        values = end_values("completed", self._clock()) | {"results": dict(results), "timings": dict(timings)}
        self._fenced(job, **values, expires_at=expires_at, progress=100.0)

    @retried
    def fail(
        self,
        job: Job,
        code: str,
        message: str,
        *,
        retry: bool,
        max_failures: int = MAX_FAILURES,
        results: Mapping[str, str] | None = None,
    ) -> Status:
        """Fail the attempt, and the job unless another attempt may succeed. Raises LeaseLost.

        Args:
            code: error code for programs, such as ``out_of_memory``.
            message: error message for people; characters that cannot be stored are replaced.
            retry: another attempt may succeed.
            max_failures: attempts in a row without a new checkpoint after which the job fails.
            results: keys of files to keep if the job fails, such as its denoised latents.

        Returns:
            "queued" or "failed"; "cancelled" instead of "queued" if the job is to be cancelled.
        """
        error = {"error_code": code, "error_message": storable(message)}

        def outcome(row: Row[Any]) -> dict[str, Any]:
            failures = 0 if row.progressed else row.failures + 1
            if not retry or failures >= max_failures:
                files = {} if results is None else {"results": dict(results)}
                return end_values("failed", self._clock()) | error | files | {"failures": failures}
            if row.cancel_requested:
                return end_values("cancelled", self._clock())
            return requeue_values() | error | {"failures": failures}

        return self._end_attempt(job, outcome)

    @retried
    def confirm_cancel(self, job: Job) -> None:
        """Cancel a running job after its worker has stopped it. Raises LeaseLost."""
        self._fenced(job, **end_values("cancelled", self._clock()))

    @retried
    def release(self, job: Job) -> Status:
        """Return the job to the queue without counting a failure. Raises LeaseLost.

        Returns:
            "queued", or "cancelled" if the job is to be cancelled.
        """

        def outcome(row: Row[Any]) -> dict[str, Any]:
            return end_values("cancelled", self._clock()) if row.cancel_requested else requeue_values()

        return self._end_attempt(job, outcome)

    @retried
    def recover_overdue(self, *, max_failures: int = MAX_FAILURES) -> int:
        """Return jobs whose leases have ended to the queue; return how many.

        Those that are to be cancelled are; those whose attempts have ended without a new checkpoint `max_failures`
        times in a row fail with the code ``worker_lost``.
        """
        return self._requeue(overdue(self._clock()), max_failures)

    @retried
    def release_leases_of(self, worker_prefix: str, *, max_failures: int = MAX_FAILURES) -> int:
        """Recover, like `recover_overdue`, every job of dead workers whose names begin with a prefix."""
        leases = [_c.status == "in_progress", _c.lease_owner.startswith(worker_prefix, autoescape=True)]
        return self._requeue(leases, max_failures)

    @retried
    def record_worker(self, name: str, state: Mapping[str, Any]) -> None:
        """Record that a worker is alive, and its state (plain JSON)."""
        values = {"seen_at": self._clock(), "state": dict(state)}
        update = _worker_table.update().where(_worker_table.c.name == name).values(**values)
        with transaction(self.engine, exclusive=True) as connection:
            if not connection.execute(update).rowcount:
                connection.execute(_worker_table.insert().values(name=name, **values))
        self._note_change()

    @retried
    def forget_worker(self, name: str) -> None:
        """Remove the record of a worker that has stopped or has long been silent."""
        with transaction(self.engine) as connection:
            connection.execute(_worker_table.delete().where(_worker_table.c.name == name))
        self._note_change()

    @retried
    def workers(self, *, seen_within_seconds: float | None = None) -> list[WorkerRecord]:
        """List the workers by name, or only those recorded within the last seconds."""
        query = sa.select(_worker_table).order_by(_worker_table.c.name)
        if seen_within_seconds is not None:
            query = query.where(_worker_table.c.seen_at >= self._clock() - seen_within_seconds)
        with self.engine.connect() as connection:
            return [WorkerRecord(**row._mapping) for row in connection.execute(query)]

    # ---- Housekeeping ------------------------------------------------------------------------------------------------

    @retried
    def expired(self, now: float, *, unfinished_before: float | None = None, limit: int = 100) -> list[Job]:
        """List expired jobs, the oldest first: `expires_at` has passed, or they failed or were cancelled before
        `unfinished_before` (unix seconds; None: these are kept)."""
        expired = [sa.and_(_c.status == "completed", _c.expires_at <= now)]
        if unfinished_before is not None:
            expired.append(sa.and_(_c.status.in_(("failed", "cancelled")), _c.completed_at < unfinished_before))
        query = sa.select(_table).where(sa.or_(*expired)).order_by(_c.seq).limit(limit)
        with self.engine.connect() as connection:
            return [job_from_row(row) for row in connection.execute(query)]

    @retried
    def keys_in_use(self) -> set[str]:
        """Return every key of the FileStore that a row names, and the previews of unfinished jobs."""
        used: set[str] = set()
        columns = sa.select(_c.id, _c.status, _c.inputs, _c.results, _c.checkpoint)
        with self.engine.connect() as connection:
            for row in connection.execute(columns):
                used.update(row.inputs, row.results.values(), [row.checkpoint] if row.checkpoint else [])
                if row.status not in ENDED:
                    used.add(f"previews/{row.id}.webp")
        return used

    # ---- Helpers -----------------------------------------------------------------------------------------------------

    def _note_change(self) -> None:
        with self._lock:
            self._changes += 1

    def _find(self, connection: Connection, id: str, owner: str | None) -> Job | None:
        row = connection.execute(sa.select(_table).where(_c.id == id, *owned_by(owner))).one_or_none()
        return None if row is None else job_from_row(row)

    def _fenced(self, job: Job, returning: sa.ColumnElement[Any] = _c.status, **values: Any) -> Any:
        """Update the row if this attempt still holds its lease; return a column of the updated row."""
        update = _table.update().where(*held_by(job)).values(**values).returning(returning)
        with transaction(self.engine) as connection:
            updated = connection.execute(update).one_or_none()
            new = self._repeated_status(connection, job, (values.get("status"),)) if updated is None else updated[0]
        self._note_change()
        return new

    def _end_attempt(self, job: Job, outcome: Callable[[Row[Any]], dict[str, Any]]) -> Status:
        """End an attempt with values that `outcome` computes from its locked row; return the new status."""
        with transaction(self.engine) as connection:
            row = connection.execute(sa.select(_table).where(*held_by(job)).with_for_update()).one_or_none()
            if row is None:
                return self._repeated_status(connection, job, ("queued", "failed", "cancelled"))
            values = outcome(row)
            connection.execute(_table.update().where(_c.seq == row.seq).values(**values))
        self._note_change()
        return values["status"]

    def _repeated_status(self, connection: Connection, job: Job, expected: tuple[str | None, ...]) -> Status:
        """Return the status if this attempt has ended in an expected one (a retried call); else raise LeaseLost."""
        row = connection.execute(sa.select(_c.status, _c.attempt).where(_c.id == job.id)).one_or_none()
        if row is None or row.attempt != job.attempt or row.status not in expected:
            raise LeaseLost(job)
        return row.status

    def _requeue(self, leases: list[Condition], max_failures: int) -> int:
        now = self._clock()
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
        with transaction(self.engine, exclusive=True) as connection:
            count = sum(
                connection.execute(_table.update().where(*leases, *also).values(**values, failures=failures)).rowcount
                for also, values in steps
            )
        if count:
            self._note_change()
        return count
