"""The durable queue: a table of jobs and the verbs on it. What a verb has done is on disk when it returns.

A job is claimed by a worker for the length of a lease, which the worker's beats prolong. Every claim gives the job a
new attempt number, and all that a worker says names its attempt: a worker that was given up for dead and comes back
changes nothing (`LeaseLost`). Attempts that moved the job's checkpoint cost nothing; those in a row that did not are
counted, and a job that reached the limit fails rather than being tried for ever.
"""

import statistics
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from pusa.server.jobs import database
from pusa.server.jobs.database import QueueUnavailable, SchemaError, once, repeated, transaction
from pusa.server.jobs.job import (
    ENDED,
    UNFINISHED,
    Condition,
    Job,
    LeaseLost,
    NewJob,
    QueueFull,
    Status,
    WorkerRecord,
    back_in_queue,
    ended_as,
    held_as,
    job_of,
    new_id,
    overdue,
    owned_by,
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

MAX_FAILURES = 3
RECENT = 20  # the finished jobs that say how long the next one takes

_table, _worker_table = database.jobs, database.workers
_c = _table.c


class JobQueue:
    """The queue in a database; safe from any thread and from any process.

    Every method raises `QueueUnavailable` where the database cannot be reached or stays busy.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        """Open the database, with new tables where it has none.

        Args:
            url: ``sqlite:///FILE`` on a local disk, or ``postgresql://USER:PASSWORD@HOST/DATABASE``.
            clock: unix seconds. Leases are compared between machines, whose clocks must agree to a few seconds.

        Raises:
            ValueError: another kind of URL, or a file on a network share.
            SchemaError: the tables are newer than this program.
        """
        self._engine = database.connect(url)
        self._clock = clock
        self._changes = 0
        self._lock = threading.Lock()
        with self._engine.connect() as connection:
            self.identity: str = connection.execute(sa.select(database.schema_version.c.identity)).scalar_one()
            """Of the database, drawn when its tables were made."""

    def close(self) -> None:
        """Give the connections back; a later call opens new ones."""
        self._engine.dispose()

    def changed(self) -> int:
        """Grows with every change that this object makes: equal numbers mean nothing new from this process."""
        return self._changes

    # ---- What clients do ---------------------------------------------------------------------------------------------

    @repeated
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
            total_limit: of jobs that have not ended.
            key_limit: the same, of this owner's.
            same_fingerprint_seconds: for a request that was sent again after its answer was lost: a job of this owner
                with the same fingerprint, at most so many seconds old, is taken for the same.

        Returns:
            The job and whether it is new. It is an older one for an `idempotency_key` that the owner has used, or
            as `same_fingerprint_seconds` says; the caller compares `fingerprint` where that matters.

        Raises:
            QueueFull: one of the limits is reached.
        """
        now = self._clock()
        with transaction(self._engine, exclusive=True) as connection:
            known = self._known(connection, new, now, same_fingerprint_seconds)
            if known is not None:
                return known, known.id == new.id  # the same id: this call's own first try, whose answer was lost
            self._check_limits(connection, new.owner, total_limit, key_limit)
            values = {f.name: getattr(new, f.name) for f in fields(NewJob)} | {"inputs": list(new.inputs)}
            row = connection.execute(_table.insert().values(**values, created_at=now).returning(_table)).one()
        self._note_change()
        return job_of(row), True

    @repeated
    def get(self, id: str, owner: str | None = None) -> Job | None:
        """The job, if it is there and this owner's (None: anyone's)."""
        with self._engine.connect() as connection:
            return self._find(connection, id, owner)

    @repeated
    def page(
        self,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[list[Job], bool]:
        """Jobs in their order of arrival ("desc": the newest first), and whether there are more.

        Raises KeyError for an `after` that is not there.
        """
        chosen = sa.select(_table).where(*owned_by(owner))
        chosen = chosen.order_by(_c.seq.asc() if order == "asc" else _c.seq.desc()).limit(limit + 1)
        with self._engine.connect() as connection:
            if after is not None:
                last = connection.execute(sa.select(_c.seq).where(_c.id == after, *owned_by(owner))).scalar()
                if last is None:
                    raise KeyError(after)
                chosen = chosen.where(_c.seq > last if order == "asc" else _c.seq < last)
            rows = connection.execute(chosen).all()
        return [job_of(row) for row in rows[:limit]], len(rows) > limit

    @repeated
    def cancel(self, id: str, owner: str | None = None) -> Job:
        """End a job that waits; ask the worker of one that runs. One that has ended stays as it is.

        Raises KeyError for a job that is not there.
        """
        now = self._clock()
        this = [_c.id == id, *owned_by(owner)]
        held = sa.and_(_c.status == "in_progress", _c.lease_until >= now)
        with transaction(self._engine) as connection:
            connection.execute(_table.update().where(*this, held).values(cancel_requested=True))
            connection.execute(
                _table.update()
                .where(*this, _c.status.not_in(ENDED), sa.not_(held))
                .values(**ended_as("cancelled", now))
            )
            job = self._find(connection, id, owner)
        if job is None:
            raise KeyError(id)
        self._note_change()
        return job

    @repeated
    def delete(self, id: str, owner: str | None = None) -> Job:
        """Remove the row, whose last state is returned; the worker of a running job finds its lease lost.

        Raises KeyError for a job that is not there.
        """
        with transaction(self._engine) as connection:
            row = connection.execute(
                _table.delete().where(_c.id == id, *owned_by(owner)).returning(_table)
            ).one_or_none()
        if row is None:
            raise KeyError(id)
        self._note_change()
        return job_of(row)

    @repeated
    def position(self, id: str) -> int:
        """How many waiting jobs are before this one; 0 for the next, and for one that does not wait."""
        this = _table.alias("this")
        before = sa.or_(_c.priority > this.c.priority, sa.and_(_c.priority == this.c.priority, _c.seq < this.c.seq))
        ahead = (
            sa.select(sa.func.count())
            .select_from(this.join(_table, before))
            .where(this.c.id == id, this.c.status == "queued", _c.status == "queued")
        )
        with self._engine.connect() as connection:
            return connection.execute(ahead).scalar_one()

    @repeated
    def counts(self) -> dict[Status, int]:
        """How many jobs there are of each status."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(_c.status, sa.func.count()).group_by(_c.status)).all()
        counts: dict[Status, int] = dict.fromkeys(get_args(Status), 0)
        return counts | {row[0]: row[1] for row in rows}

    @repeated
    def seconds_per_job(self) -> float | None:
        """The median time, from the first claim to the end, of the last jobs that completed; None before the first."""
        with self._engine.connect() as connection:
            return self._seconds_per_job(connection)

    # ---- What workers do ---------------------------------------------------------------------------------------------

    @once
    def claim(
        self,
        worker: str,
        *,
        lease_seconds: float,
        models: Collection[str] | None = None,
        max_failures: int = MAX_FAILURES,
    ) -> Job | None:
        """The next job, now this worker's until the lease ends; None if nothing waits.

        Jobs whose leases have ended come back into the queue first, or end: see `recover_overdue`. Not repeated
        where the connection breaks: a claim whose answer was lost comes back when its lease ends.

        Args:
            models: only jobs of these.
        """
        now = self._clock()
        waiting = [_c.status == "queued"] + ([] if models is None else [_c.model.in_(list(models))])
        look = sa.select(sa.exists().where(*waiting), sa.exists().where(*overdue(now)))
        with self._engine.connect() as connection:  # most looks find nothing and must not hold up those who write
            anything_waits, anything_is_overdue = connection.execute(look).one()
        if anything_is_overdue:
            self.recover_overdue(max_failures=max_failures)
        elif not anything_waits:
            return None
        first = sa.select(_c.seq).where(*waiting).order_by(_c.priority.desc(), _c.seq).limit(1)
        with transaction(self._engine) as connection:
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
        return None if row is None else job_of(row)

    @repeated
    def beat(
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
        """Prolong the lease and say how far the attempt is, in one statement; what is None stays as it was.

        A `checkpoint_step` beyond the last one is progress: it takes back the failures counted so far.

        Returns:
            Whether the job is to be cancelled.

        Raises:
            LeaseLost: stop, and drop what was made.
        """
        said = {
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
        values: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        if checkpoint_step is not None:
            values["failures"] = sa.case((_c.checkpoint_step < checkpoint_step, 0), else_=_c.failures)
            values["progressed"] = sa.case((_c.checkpoint_step < checkpoint_step, sa.true()), else_=_c.progressed)
        return bool(self._fenced(job, _c.cancel_requested, lease_until=self._clock() + lease_seconds, **values))

    @repeated
    def finish(
        self, job: Job, *, results: Mapping[str, str], timings: Mapping[str, float], expires_at: float | None = None
    ) -> None:
        """The job is completed; its files must be in the store by now. Raises LeaseLost."""
        values = ended_as("completed", self._clock()) | {"results": dict(results), "timings": dict(timings)}
        self._fenced(job, **values, expires_at=expires_at, progress=100.0)

    @repeated
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
        """The attempt failed: the job waits for another one, or has failed. Raises LeaseLost.

        Args:
            code: for programs, such as ``out_of_memory``.
            message: for people; what cannot be stored as text is left out.
            retry: whether another attempt may succeed.
            max_failures: attempts in a row without a new checkpoint after which there is no other one.
            results: keys of what is kept of a job that has failed: its denoised latents.

        Returns:
            "queued" or "failed"; "cancelled" if that was asked for and there would have been another attempt.
        """
        error = {"error_code": code, "error_message": storable(message)}

        def fate(row: Row[Any]) -> dict[str, Any]:
            failures = 0 if row.progressed else row.failures + 1
            if not retry or failures >= max_failures:
                kept = {} if results is None else {"results": dict(results)}
                return ended_as("failed", self._clock()) | error | kept | {"failures": failures}
            if row.cancel_requested:
                return ended_as("cancelled", self._clock())
            return back_in_queue() | error | {"failures": failures}

        return self._let_go(job, fate)

    @repeated
    def cancelled(self, job: Job) -> None:
        """The attempt ended because the job was to be cancelled. Raises LeaseLost."""
        self._fenced(job, **ended_as("cancelled", self._clock()))

    @repeated
    def release(self, job: Job) -> Status:
        """Back into the queue with no failure counted, as the worker was asked to stop. Raises LeaseLost.

        Returns:
            "queued", or "cancelled" if that was asked for.
        """

        def fate(row: Row[Any]) -> dict[str, Any]:
            return ended_as("cancelled", self._clock()) if row.cancel_requested else back_in_queue()

        return self._let_go(job, fate)

    @repeated
    def recover_overdue(self, *, max_failures: int = MAX_FAILURES) -> int:
        """Take back the jobs whose leases have ended; how many there were.

        They wait again, save those that were to be cancelled and those that fail with the code ``worker_lost``: their
        `max_failures`-th attempt in a row has ended so, without a new checkpoint.
        """
        now = self._clock()
        return self._take_back(overdue(now), now, max_failures)

    @repeated
    def release_leases_of(self, worker_prefix: str, *, max_failures: int = MAX_FAILURES) -> int:
        """The same for all leases of workers whose names begin so: they are known to be dead."""
        theirs = [_c.status == "in_progress", _c.lease_owner.startswith(worker_prefix, autoescape=True)]
        return self._take_back(theirs, self._clock(), max_failures)

    @repeated
    def beat_worker(self, name: str, state: Mapping[str, Any]) -> None:
        """A worker says that it is there, and what it does (plain JSON)."""
        values = {"seen_at": self._clock(), "state": dict(state)}
        with transaction(self._engine, exclusive=True) as connection:
            if not connection.execute(
                _worker_table.update().where(_worker_table.c.name == name).values(**values)
            ).rowcount:
                connection.execute(_worker_table.insert().values(name=name, **values))
        self._note_change()

    @repeated
    def forget_worker(self, name: str) -> None:
        """The worker has stopped in good order, or has not been seen for long."""
        with transaction(self._engine) as connection:
            connection.execute(_worker_table.delete().where(_worker_table.c.name == name))
        self._note_change()

    @repeated
    def workers(self, *, seen_within_seconds: float | None = None) -> list[WorkerRecord]:
        """Those that have said something (in the last so many seconds), by name."""
        chosen = sa.select(_worker_table).order_by(_worker_table.c.name)
        if seen_within_seconds is not None:
            chosen = chosen.where(_worker_table.c.seen_at >= self._clock() - seen_within_seconds)
        with self._engine.connect() as connection:
            return [WorkerRecord(**row._mapping) for row in connection.execute(chosen)]

    # ---- What housekeeping does --------------------------------------------------------------------------------------

    @repeated
    def expired(self, now: float, *, unfinished_before: float | None = None, limit: int = 100) -> list[Job]:
        """Jobs that have ended and whose time is over, the oldest first: `expires_at` has come, or they ended without
        a result before `unfinished_before` (unix seconds)."""
        over = [sa.and_(_c.status == "completed", _c.expires_at <= now)]
        if unfinished_before is not None:
            over.append(sa.and_(_c.status.in_(("failed", "cancelled")), _c.completed_at < unfinished_before))
        with self._engine.connect() as connection:
            return [
                job_of(r)
                for r in connection.execute(sa.select(_table).where(sa.or_(*over)).order_by(_c.seq).limit(limit))
            ]

    @repeated
    def keys_in_use(self) -> set[str]:
        """All keys of the FileStore that a row names, and the previews of jobs that have not ended."""
        used: set[str] = set()
        columns = sa.select(_c.id, _c.status, _c.inputs, _c.results, _c.checkpoint)
        with self._engine.connect() as connection:
            for row in connection.execute(columns):
                used.update(row.inputs, row.results.values(), [row.checkpoint] if row.checkpoint else [])
                if row.status not in ENDED:
                    used.add(f"previews/{row.id}.webp")
        return used

    # ---- Parts of the above ------------------------------------------------------------------------------------------

    def _note_change(self) -> None:
        with self._lock:
            self._changes += 1

    def _find(self, connection: Connection, id: str, owner: str | None) -> Job | None:
        row = connection.execute(sa.select(_table).where(_c.id == id, *owned_by(owner))).one_or_none()
        return None if row is None else job_of(row)

    def _known(self, connection: Connection, new: NewJob, now: float, seconds: float | None) -> Job | None:
        mine = sa.select(_table).where(_c.owner == new.owner)
        same = [mine.where(_c.id == new.id)]
        if new.idempotency_key is not None:
            same.append(mine.where(_c.idempotency_key == new.idempotency_key))
        if new.fingerprint is not None and seconds is not None:
            recent = mine.where(_c.fingerprint == new.fingerprint, _c.created_at >= now - seconds)
            same.append(recent.order_by(_c.created_at.desc(), _c.seq.desc()).limit(1))
        for chosen in same:  # one after the other: each has an index of its own
            if (row := connection.execute(chosen).one_or_none()) is not None:
                return job_of(row)
        return None

    def _check_limits(self, connection: Connection, owner: str, total: int | None, key: int | None) -> None:
        limits: tuple[tuple[int | None, Literal["total", "key"], str | None], ...] = (
            (key, "key", owner),
            (total, "total", None),
        )
        for limit, scope, whose in limits:
            if limit is None:
                continue
            unfinished = sa.select(sa.func.count()).where(_c.status.in_(UNFINISHED), *owned_by(whose))
            if connection.execute(unfinished).scalar_one() >= limit:
                running = sa.select(sa.func.count()).where(_c.status == "in_progress")
                at_once = max(1, connection.execute(running).scalar_one())
                seconds = (self._seconds_per_job(connection) or 30.0) / at_once
                raise QueueFull(limit, min(max(seconds, 1.0), 3600.0), scope)

    def _seconds_per_job(self, connection: Connection) -> float | None:
        last = sa.select(_c.started_at, _c.completed_at).where(_c.status == "completed", _c.started_at.is_not(None))
        rows = connection.execute(last.order_by(_c.completed_at.desc()).limit(RECENT)).all()
        return statistics.median(row.completed_at - row.started_at for row in rows) if rows else None

    def _fenced(self, job: Job, returning: sa.ColumnElement[Any] = _c.status, **values: Any) -> Any:
        """One UPDATE of a row that must still be this attempt's; a value of the row as it is now."""
        with transaction(self._engine) as connection:
            updated = connection.execute(
                _table.update().where(*held_as(job)).values(**values).returning(returning)
            ).one_or_none()
            told = self._said_before(connection, job, (values.get("status"),)) if updated is None else updated[0]
        self._note_change()
        return told

    def _let_go(self, job: Job, fate: Callable[[Row[Any]], dict[str, Any]]) -> Status:
        """End an attempt as its row decides, which nobody else changes meanwhile."""
        with transaction(self._engine) as connection:
            row = connection.execute(sa.select(_table).where(*held_as(job)).with_for_update()).one_or_none()
            if row is None:
                return self._said_before(connection, job, ("queued", "failed", "cancelled"))
            values = fate(row)
            connection.execute(_table.update().where(_c.seq == row.seq).values(**values))
        self._note_change()
        return values["status"]

    def _said_before(self, connection: Connection, job: Job, wanted: tuple[str | None, ...]) -> Status:
        """The status, if this attempt has ended in one of `wanted`: by this very call, whose answer was lost."""
        row = connection.execute(sa.select(_c.status, _c.attempt).where(_c.id == job.id)).one_or_none()
        if row is None or row.attempt != job.attempt or row.status not in wanted:
            raise LeaseLost(job)
        return row.status

    def _take_back(self, which: list[Condition], now: float, max_failures: int) -> int:
        failures = sa.case((_c.progressed, 0), else_=_c.failures + 1)
        lost = {
            "error_code": "worker_lost",
            "error_message": f"its worker ended {max_failures} times in a row without getting further; the last time "
            "unexpectedly: see the worker's log, or try a smaller video",
        }
        steps: tuple[tuple[list[Condition], dict[str, Any]], ...] = (
            ([_c.cancel_requested], ended_as("cancelled", now)),
            ([failures >= max_failures], ended_as("failed", now) | lost),
            ([], back_in_queue()),
        )
        with transaction(self._engine, exclusive=True) as connection:
            count = sum(
                connection.execute(_table.update().where(*which, *also).values(**values, failures=failures)).rowcount
                for also, values in steps
            )
        if count:
            self._note_change()
        return count
