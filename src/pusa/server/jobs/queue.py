"""Queue jobs durably in a database table. A method's change is on disk when it returns.

A worker claims a job for the length of a lease, which its heartbeats extend. Every claim gives the job a new attempt
number, and every call of a worker names its attempt: a worker that has lost its lease and comes back changes nothing
(`LeaseLost`). Attempts that advance the job's checkpoint are free; the queue counts those in a row that do not, and a
job that reaches the limit fails.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from pusa.codes import detail_of, plain
from pusa.server.jobs import admission, database, fencing, reading, records, workers
from pusa.server.jobs.client_changes import ClientChanges
from pusa.server.jobs.database import QueueDamaged, QueueUnavailable, SchemaError, not_retried, retried, transaction
from pusa.server.jobs.job import (
    ENDED,
    UNFINISHED,
    Condition,
    FileDigest,
    Job,
    LeaseLost,
    NewJob,
    QueueFull,
    Status,
    WorkerRecord,
    end_values,
    job_from_row,
    new_id,
    overdue,
    requeue_values,
    step_values,
    storable,
    waiting,
)
from pusa.server.jobs.reading import EVERY_JOB, JobFilter, Look

__all__ = [
    "ENDED",
    "EVERY_JOB",
    "MAX_FAILURES",
    "FileDigest",
    "Job",
    "JobFilter",
    "JobQueue",
    "LeaseLost",
    "Look",
    "NewJob",
    "QueueDamaged",
    "QueueFull",
    "QueueUnavailable",
    "SchemaError",
    "Status",
    "WorkerRecord",
    "new_id",
]

MAX_FAILURES = 3  # attempts in a row without progress

P = ParamSpec("P")
T = TypeVar("T")

_c = database.jobs.c


class JobQueue(ClientChanges):
    """Queue jobs in a database, `engine`; safe from any thread and any process.

    Every method raises `QueueUnavailable` if the database cannot be reached or stays busy.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time, check: bool = True) -> None:
        """Open the database and create its tables if it has none.

        Args:
            url: ``sqlite:///FILE`` on a local disk, or ``postgresql://USER:PASSWORD@HOST/DATABASE``.
            clock: returns unix seconds. Machines compare leases, so their clocks must agree to a few seconds.
            check: read a whole SQLite file first to find damaged pages.

        Raises:
            ValueError: the URL is of another kind, or names a file on a network share.
            SchemaError: the tables are newer than this program.
            QueueDamaged: the file of the database is damaged.
        """
        self.damage: str | None = None
        self.engine = database.connect(url, check=check)
        self._clock = clock
        self._changes = 0
        self._lock = threading.Lock()
        with self.engine.connect() as connection:
            self.identity: str = connection.execute(sa.select(database.schema_version.c.identity)).scalar_one()
            """Random id of the database, written when its tables were made."""

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        self.engine.dispose()

    def fault(self) -> str | None:
        """Return what an operator must repair: a damaged file, until this program restarts, or a vanished one."""
        return self.damage or database.missing_file(self.engine)

    def change_count(self) -> int:
        """Return a number that grows with every change this object makes, for readers that poll."""
        return self._changes

    # ---- Clients -----------------------------------------------------------------------------------------------------

    @retried
    def submit(
        self,
        new: NewJob,
        *,
        digests: Mapping[str, FileDigest] | None = None,
        total_limit: int | None = None,
        key_limit: int | None = None,
        same_fingerprint_seconds: float | None = None,
    ) -> tuple[Job, bool]:
        """Accept a job; it is on disk when this returns.

        Args:
            digests: of the inputs, by key.
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
        since = None if same_fingerprint_seconds is None else now - same_fingerprint_seconds
        with transaction(self.engine, exclusive=True) as connection:
            earlier = admission.find_earlier(connection, new, fingerprint_since=since)
            if earlier is not None:
                return earlier, earlier.id == new.id  # the same id: the first try of this very call
            admission.check_limits(connection, new.owner, total=total_limit, per_owner=key_limit)
            job = admission.insert(connection, new, digests, now)
        self._note_change()
        return job, True

    @retried
    def get(self, id: str, owner: str | None = None) -> Job | None:
        """Return the job if it exists, is not removed and belongs to this owner (None: to anyone)."""
        return self._read(reading.find, id, owner)

    @retried
    def page(
        self,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
        statuses: Collection[Status] | None = None,
        filter: JobFilter = EVERY_JOB,
    ) -> tuple[list[Job], bool]:
        """List jobs in order of arrival ("desc": the newest first), all or in some statuses; tell whether more follow.

        Raises KeyError for an `after` that neither exists nor was deleted in the last day.
        """
        return self._read(reading.page, owner, after, limit, order == "desc", statuses, filter)

    @retried
    def read_changes(self, known: Mapping[str, Job]) -> tuple[list[Job], list[str]]:
        """Read those of some jobs, given by id, that have changed, and the ids of those that were deleted."""
        return self._read(reading.changes, known)

    @retried
    def look(self, before: Look | None, owners: Collection[str]) -> Look:
        """Read the jobs of some owners that have changed since a look before, by this process or another.

        None for `before` begins: it finds no change. The cost grows with the number of unfinished jobs.
        """
        return self._read(reading.look, before, owners)

    @retried
    def jobs_of(self, owner: str, newest: int) -> list[Job]:
        """List an owner's unfinished jobs and so many of the newest, the newest first."""
        return self._read(reading.of_owner, owner, newest)

    @retried
    def position(self, id: str) -> int:
        """Count the waiting jobs ahead of this one; 0 for the next, and for a job that does not wait."""
        return self._read(reading.position, id)

    @retried
    def counts(self) -> dict[Status, int]:
        """Count the jobs of each status; the time grows with the number of jobs, see `count_unfinished`."""
        return self._read(reading.count, get_args(Status))

    @retried
    def count_unfinished(self) -> dict[Status, int]:
        """Count the jobs that wait and run."""
        return self._read(reading.count, UNFINISHED)

    @retried
    def seconds_per_job(self) -> float | None:
        """Return the median time from first claim to end of recently completed jobs; None before the first."""
        return self._read(admission.median_seconds)

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
        claimable = waiting(now) + ([] if models is None else [_c.model.in_(list(models))])
        with self.engine.connect() as connection:  # most polls find nothing and must not block writers
            anything_waits, anything_is_overdue = reading.any_of(connection, claimable, overdue(now))
        if anything_is_overdue:
            self.recover_overdue(max_failures=max_failures)
        elif not anything_waits:
            return None
        with transaction(self.engine) as connection:
            row = admission.claim(connection, claimable, worker, now, lease_seconds)
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
        checkpoint_digest: FileDigest | None = None,
        resolved: Mapping[str, Any] | None = None,
        notes: Collection[str] | None = None,
        note_details: Collection[Mapping[str, Any]] | None = None,
        plan: str | None = None,
    ) -> bool:
        """Extend the lease and record the attempt's progress in one statement; None leaves a value unchanged.

        A `checkpoint_step` beyond the last one is progress: it resets the count of failures. Returns True if the worker
        must cancel the job.

        Raises:
            LeaseLost: the worker must stop and drop its result.
        """
        values = {
            "stage": stage,
            "step": step,
            "steps": steps,
            "progress": progress,
            "seconds_left": seconds_left,
            "checkpoint": checkpoint,
            "resolved": None if resolved is None else dict(resolved),
            "notes": None if notes is None else list(notes),
            "note_details": None if note_details is None else plain(list(note_details)),
            "plan": plan and storable(plan),
            **({} if checkpoint_step is None else step_values(checkpoint_step)),
        }
        values = {name: value for name, value in values.items() if value is not None}
        digests = {checkpoint: checkpoint_digest} if checkpoint and checkpoint_digest else {}
        record = None
        if checkpoint is not None:
            record = partial(records.record_files, kind="checkpoint", keys=[checkpoint], digests=digests)
        values["lease_until"] = self._clock() + lease_seconds
        return bool(self._fenced(job, _c.cancel_requested, record, **values))

    @retried
    def drop_checkpoint(self, job: Job, note: str) -> None:
        """Let the job start from the beginning, as its checkpoint cannot be used; `note` says why. Raises LeaseLost."""
        details = [*job.note_details, detail_of(note)]
        self._fenced(job, checkpoint=None, checkpoint_step=0, notes=[*job.notes, note], note_details=details)

    @retried
    def finish(
        self,
        job: Job,
        *,
        results: Mapping[str, str],
        timings: Mapping[str, float],
        expires_at: float | None = None,
        digests: Mapping[str, FileDigest] | None = None,
    ) -> None:
        """Complete the job, whose files must be in the store by now; `digests` are theirs by key. Raises LeaseLost."""
        values = end_values("completed", self._clock()) | {"results": dict(results), "timings": dict(timings)}
        record = partial(records.record_files, kind="result", keys=results.values(), digests=digests)
        self._fenced(job, _c.status, record, **values, expires_at=expires_at, progress=100.0)

    @retried
    def fail(
        self,
        job: Job,
        code: str,
        message: str,
        *,
        values: Mapping[str, Any] | None = None,
        retry: bool,
        max_failures: int = MAX_FAILURES,
        retry_seconds: float = 0.0,
        results: Mapping[str, str] | None = None,
        digests: Mapping[str, FileDigest] | None = None,
    ) -> Status:
        """Fail the attempt, and the job unless another attempt may succeed. Raises LeaseLost.

        Args:
            code: error code for programs, such as ``out_of_memory``.
            message: error message for people; characters that cannot be stored are replaced.
            values: those of the code's text, see `pusa.codes`.
            retry: another attempt may succeed.
            max_failures: attempts in a row without a new checkpoint after which the job fails.
            retry_seconds: pause before the next attempt; doubles with each failure in a row, up to 32 times as long.
            results: keys of files to keep if the job fails, such as its denoised latents; `digests` are theirs by key.

        Returns:
            "queued" or "failed"; "cancelled" instead of "queued" if the job is to be cancelled.
        """
        error = {"error_code": code, "error_message": storable(message), "error_values": plain(values or {})}
        files = {} if results is None else {"results": dict(results)}
        outcome = partial(
            fencing.after_failure,
            now=self._clock(),
            error=error,
            files=files,
            max_failures=max_failures if retry else 0,
            retry_seconds=retry_seconds,
        )
        return self._end_attempt(job, outcome, digests)

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
        with transaction(self.engine, exclusive=True) as connection:
            workers.record(connection, name, state, self._clock())
        self._note_change()

    @retried
    def forget_worker(self, name: str) -> None:
        """Remove the record of a worker that has stopped or has long been silent."""
        with transaction(self.engine) as connection:
            workers.forget(connection, name)
        self._note_change()

    @retried
    def workers(self, *, seen_within_seconds: float | None = None) -> list[WorkerRecord]:
        """List the workers by name, or only those recorded within the last seconds."""
        since = None if seen_within_seconds is None else self._clock() - seen_within_seconds
        return self._read(workers.read, since)

    # ---- Housekeeping ------------------------------------------------------------------------------------------------

    @retried
    def expired(self, now: float, *, unfinished_before: float | None = None, limit: int = 100) -> list[Job]:
        """List expired jobs, the oldest first: `expires_at` has passed, or the time to undo their removal, or they
        failed or were cancelled before `unfinished_before` (unix seconds; None: these are kept)."""
        return self._read(reading.expired, now, unfinished_before, limit)

    @retried
    def forget_deleted(self, before: float, *, limit: int = 1000) -> int:
        """Forget jobs deleted before a time (unix seconds), after which no page begins any more, and the changes
        before it; return how many were deleted."""
        with transaction(self.engine) as connection:
            records.forget_changes(connection, before, limit)
            return records.forget_deleted(connection, before, limit)

    @retried
    def keys_in_use(self, keys: Collection[str]) -> set[str]:
        """Return those keys of the FileStore that a row names, and those of the previews of unfinished jobs."""
        return self._read(records.find_used, keys)

    @retried
    def digest(self, id: str, key: str) -> FileDigest | None:
        """Return what a file of a job must be; None if that was not recorded."""
        return self._read(records.find_digest, id, key)

    # ---- Helpers -----------------------------------------------------------------------------------------------------

    def _read(self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self.engine.connect() as connection:
            return query(connection, *args, **kwargs)

    def _note_change(self, count: int = 1) -> None:
        with self._lock:
            self._changes += count

    def _fenced(
        self,
        job: Job,
        returning: sa.ColumnElement[Any] = _c.status,
        also: Callable[[Connection, int], None] | None = None,
        **values: Any,
    ) -> Any:
        """Update the row if this attempt still holds its lease, and then do `also`; return a column of the row."""
        with transaction(self.engine) as connection:
            new = fencing.update(connection, job, values, returning, also)
        self._note_change()
        return new

    def _end_attempt(
        self,
        job: Job,
        outcome: Callable[[Row[Any]], dict[str, Any]],
        digests: Mapping[str, FileDigest] | None = None,
    ) -> Status:
        """End an attempt with values that `outcome` computes from its locked row; return the new status."""
        with transaction(self.engine) as connection:
            status = fencing.end(connection, job, outcome, digests)
        self._note_change()
        return status

    def _requeue(self, leases: list[Condition], max_failures: int) -> int:
        with transaction(self.engine, exclusive=True) as connection:
            count = admission.requeue(connection, leases, max_failures, self._clock())
        self._note_change(count)
        return count
