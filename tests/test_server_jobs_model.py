"""The queue against a model of it: any sequence of what clients and workers may do, the late and the lost included."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from queue_samples import Clock, new_job

from pusa.server.jobs import ENDED, Job, JobQueue, LeaseLost, QueueFull

LEASE_SECONDS = 10
MAX_FAILURES = 2
LIMIT = 6

OWNERS = st.sampled_from(["a", "b"])
MODELS = st.sampled_from(["mini", "large"])
KEYS = st.sampled_from(["k1", "k2", None])
WORKERS = st.sampled_from(["host/1", "host/2"])


@dataclass
class Expected:
    """What the queue should say of a job."""

    id: str
    owner: str
    model: str
    priority: int
    key: str | None
    seq: int
    status: str = "queued"
    attempt: int = 0
    failures: int = 0
    step: int = 0
    moved: bool = False
    cancel: bool = False
    worker: str | None = None
    until: float = 0.0

    def end(self, status: str) -> None:
        self.status, self.worker, self.cancel = status, None, False

    def wait(self) -> None:
        self.status, self.worker = "queued", None

    def give_up(self, *, retry: bool) -> None:
        """An attempt ended without a result."""
        failures = 0 if self.moved else self.failures + 1
        if not retry or failures >= MAX_FAILURES:
            self.end("failed")
        elif self.cancel:
            self.end("cancelled")
            return
        else:
            self.wait()
        self.failures = failures

    def take_back(self) -> None:
        """Its worker is gone."""
        self.end("cancelled") if self.cancel else self.give_up(retry=True)


class QueueMachine(RuleBasedStateMachine):
    """`queue` and `clock` are set by a subclass."""

    queue: JobQueue
    clock: Clock

    ids = Bundle("ids")
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[str, Expected] = {}
        self.numbers = itertools.count()
        with self.queue._engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM jobs"))

    # ---- The model's own verbs -----------------------------------------------------------------------------------

    def overdue(self) -> list[Expected]:
        return [e for e in self.expected.values() if e.status == "in_progress" and e.until < self.clock.now]

    def waiting(self, models: tuple[str, ...] | None = None) -> list[Expected]:
        found = [e for e in self.expected.values() if e.status == "queued" and (models is None or e.model in models)]
        return sorted(found, key=lambda e: (-e.priority, e.seq))

    def says(self, job: Job, say: Callable[[], Any], *, said_before: tuple[str, ...] = ()) -> Expected | None:
        """The expected job if the attempt may speak; else the queue must refuse it, or know that it has spoken."""
        e = self.expected.get(job.id)
        if e is not None and e.attempt == job.attempt:
            if e.status == "in_progress":
                return e
            if e.status in said_before:
                say()
                return None
        with pytest.raises(LeaseLost):
            say()
        return None

    # ---- What clients do -----------------------------------------------------------------------------------------

    @rule(target=ids, owner=OWNERS, model=MODELS, priority=st.integers(0, 2), key=KEYS)
    def submit(self, owner: str, model: str, priority: int, key: str | None) -> str:
        new = new_job(owner=owner, model=model, priority=priority, idempotency_key=key)
        known = [e for e in self.expected.values() if key is not None and (e.owner, e.key) == (owner, key)]
        full = sum(e.status not in ENDED for e in self.expected.values()) >= LIMIT
        try:
            job, created = self.queue.submit(new, total_limit=LIMIT)
        except QueueFull:
            assert full
            assert not known
            return new.id  # an id that nobody has
        assert created == (not known)
        if known:
            assert job.id == known[0].id
        else:
            assert not full
            self.expected[new.id] = Expected(new.id, owner, model, priority, key, next(self.numbers))
        return job.id

    @rule(id=ids)
    def cancel(self, id: str) -> None:
        e = self.expected.get(id)
        if e is None:
            with pytest.raises(KeyError):
                self.queue.cancel(id)
            return
        if e.status == "queued" or e in self.overdue():
            e.end("cancelled")
        elif e.status == "in_progress":
            e.cancel = True
        assert self.queue.cancel(id, e.owner).status == e.status

    @rule(id=consumes(ids))
    def delete(self, id: str) -> None:
        e = self.expected.pop(id, None)
        if e is None:
            with pytest.raises(KeyError):
                self.queue.delete(id)
        else:
            assert self.queue.delete(id).status == e.status

    # ---- What workers do -----------------------------------------------------------------------------------------

    @rule(target=attempts, worker=WORKERS, models=st.sampled_from([None, ("mini",), ("mini", "large")]))
    def claim(self, worker: str, models: tuple[str, ...] | None) -> Job | None:
        for e in self.overdue():
            e.take_back()
        first = next(iter(self.waiting(models)), None)
        job = self.queue.claim(worker, lease_seconds=LEASE_SECONDS, models=models, max_failures=MAX_FAILURES)
        assert (job.id if job else None) == (first.id if first else None)
        if first is not None:
            first.status, first.attempt, first.moved = "in_progress", first.attempt + 1, False
            first.worker, first.until = worker, self.clock.now + LEASE_SECONDS
        return job

    @rule(job=attempts, step=st.none() | st.integers(0, 5))
    def beat(self, job: Job | None, step: int | None) -> None:
        if job is None:
            return

        def say() -> bool:
            return self.queue.beat(job, lease_seconds=LEASE_SECONDS, checkpoint_step=step)

        if e := self.says(job, say):
            assert say() == e.cancel
            e.until = self.clock.now + LEASE_SECONDS
            if step is not None and step > e.step:
                e.moved, e.failures = True, 0
            e.step = e.step if step is None else step

    @rule(job=attempts)
    def finish(self, job: Job | None) -> None:
        if job is None:
            return

        def say() -> None:
            self.queue.finish(job, results={"video": "v"}, timings={})

        if e := self.says(job, say, said_before=("completed",)):
            say()
            e.end("completed")

    @rule(job=attempts, retry=st.booleans())
    def fail(self, job: Job | None, retry: bool) -> None:
        if job is None:
            return

        def say() -> str:
            return self.queue.fail(job, "crash", "crash", retry=retry, max_failures=MAX_FAILURES)

        if e := self.says(job, say, said_before=("queued", "failed", "cancelled")):
            e.give_up(retry=retry)
            assert say() == e.status

    @rule(job=attempts)
    def cancelled(self, job: Job | None) -> None:
        if job is None:
            return

        def say() -> None:
            self.queue.cancelled(job)

        if e := self.says(job, say, said_before=("cancelled",)):
            say()
            e.end("cancelled")

    @rule(job=attempts)
    def release(self, job: Job | None) -> None:
        if job is None:
            return

        def say() -> str:
            return self.queue.release(job)

        if e := self.says(job, say, said_before=("queued", "failed", "cancelled")):
            e.end("cancelled") if e.cancel else e.wait()
            assert say() == e.status

    @rule(host=st.sampled_from(["host/", "host/1", "none"]))
    def boot(self, host: str) -> None:
        theirs = [e for e in self.expected.values() if e.worker is not None and e.worker.startswith(host)]
        assert self.queue.release_leases_of(host, max_failures=MAX_FAILURES) == len(theirs)
        for e in theirs:
            e.take_back()

    @rule(seconds=st.sampled_from([1, LEASE_SECONDS, LEASE_SECONDS + 1]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def housekeeping(self) -> None:
        lost = self.overdue()
        assert self.queue.recover_overdue(max_failures=MAX_FAILURES) == len(lost)
        for e in lost:
            e.take_back()

    # ---- What must hold after each -------------------------------------------------------------------------------

    @invariant()
    def they_agree(self) -> None:
        jobs, more = self.queue.page(limit=1000, order="asc")
        assert not more
        assert [job.id for job in jobs] == [e.id for e in sorted(self.expected.values(), key=lambda e: e.seq)]
        for job in jobs:
            e = self.expected[job.id]
            assert (job.status, job.attempt, job.checkpoint_step) == (e.status, e.attempt, e.step)
            assert (job.lease_owner, job.cancel_requested) == (e.worker, e.cancel)
            assert job.status == "cancelled" or job.failures == e.failures
            assert (job.completed_at is not None) == (job.status in ENDED)
        counts = self.queue.counts()
        assert counts == {s: sum(e.status == s for e in self.expected.values()) for s in counts}
        for place, e in enumerate(self.waiting()):
            assert self.queue.position(e.id) == place


@pytest.mark.parametrize(("database", "examples"), [("sqlite", 30), ("postgresql", 15)])
def test_the_queue_does_what_its_model_does(request: Any, tmp_path: Path, database: str, examples: int):
    if database == "postgresql":
        url = request.getfixturevalue("postgresql_url")
    else:
        url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"

    class Machine(QueueMachine):
        clock = Clock()
        queue = JobQueue(url, clock=clock)

    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        Machine.queue.close()
