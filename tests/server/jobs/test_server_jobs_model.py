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
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from queue_samples import Clock, new_job

from pusa.server.jobs.queue import ENDED, Job, JobQueue, LeaseLost, QueueFull

LEASE_SECONDS = 10
MAX_FAILURES = 3
LIMIT = 6

OWNERS = st.sampled_from(["a", "b"])
MODELS = st.sampled_from(["mini", "large"])
KEYS = st.sampled_from(["k1", "k2", None])
BACK = st.sampled_from([0, 0, 0, 1, 2])
WHICH = st.integers(0, 9)
WORKERS = st.sampled_from(["host/1", "host/2"])


LET_GO = ("queued", "failed", "cancelled")
ENDINGS: dict[str, tuple[Callable[[JobQueue, Job], Any], tuple[str, ...]]] = {
    "finish": (lambda queue, job: queue.finish(job, results={"video": "v"}, timings={}), ("completed",)),
    "cancelled": (lambda queue, job: queue.confirm_cancel(job), ("cancelled",)),
    "release": (lambda queue, job: queue.release(job), LET_GO),
    "fail": (lambda queue, job: queue.fail(job, "x", "x", retry=True, max_failures=MAX_FAILURES), LET_GO),
    "fail for good": (lambda queue, job: queue.fail(job, "x", "x", retry=False), LET_GO),
}
"""Map each end of an attempt to the statuses in which repeating it succeeds without another change."""


@dataclass
class Expected:
    """Model one job as the queue should report it."""

    id: str
    owner: str
    model: str
    priority: int
    key: str | None
    seq: int
    turn: int
    status: str = "queued"
    attempt: int = 0
    failures: int = 0
    step: int = 0
    moved: bool = False
    cancel: bool = False
    worker: str | None = None
    until: float = 0.0
    removed: bool = False
    favourite: bool = False

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

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[str, Expected] = {}
        self.attempts: list[Job] = []
        self.numbers = itertools.count()
        with self.queue.engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM jobs"))
        self.look = self.queue.look(None, ())
        self.seen: dict[str, tuple[str, bool]] = {}

    # ---- The model's own verbs -----------------------------------------------------------------------------------

    def running(self) -> list[Expected]:
        return [e for e in self.expected.values() if e.status == "in_progress"]

    def overdue(self) -> list[Expected]:
        return [e for e in self.running() if e.until < self.clock.now]

    def waiting(self, models: tuple[str, ...] | None = None) -> list[Expected]:
        found = [e for e in self.expected.values() if e.status == "queued" and (models is None or e.model in models)]
        return sorted(found, key=lambda e: (-e.priority, e.turn, e.seq))

    def next_turn(self, owner: str) -> int:
        """After the owner's other unfinished jobs, and after the job whose turn it is."""
        running, waiting = [e.turn for e in self.running()], [e.turn for e in self.waiting()]
        own = [e.turn for e in self.expected.values() if e.owner == owner and e.status not in ENDED]
        return 1 + max(0, *running, min(waiting, default=1) - 1, *own)

    def known_id(self, which: int) -> str:
        """A job's, or one that nobody has."""
        return [*self.expected, "video_unknown"][which % (len(self.expected) + 1)]

    def shown(self, id: str) -> Expected | None:
        """A job that clients see."""
        e = self.expected.get(id)
        return None if e is None or e.removed else e

    def attempt(self, back: int) -> Job:
        """One of the last attempts, 0 for the latest: most still hold their job, some have lost it."""
        return self.attempts[max(0, len(self.attempts) - 1 - back)]

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

    @initialize()
    def some_jobs(self) -> None:
        for priority in (0, 1, 0):
            self.submit("a", "mini", priority, None)

    # ---- What clients do -----------------------------------------------------------------------------------------

    @rule(owner=OWNERS, model=MODELS, priority=st.integers(0, 2), key=KEYS)
    def submit(self, owner: str, model: str, priority: int, key: str | None) -> None:
        new = new_job(owner=owner, model=model, priority=priority, idempotency_key=key)
        known = [e for e in self.expected.values() if key is not None and (e.owner, e.key) == (owner, key)]
        full = sum(e.status not in ENDED for e in self.expected.values()) >= LIMIT
        try:
            job, created = self.queue.submit(new, total_limit=LIMIT)
        except QueueFull:
            assert full
            assert not known
            return
        assert created == (not known)
        if known:
            assert job.id == known[0].id
        else:
            assert not full
            turn = self.next_turn(owner)
            self.expected[new.id] = Expected(new.id, owner, model, priority, key, next(self.numbers), turn)

    @precondition(lambda self: len(self.expected) > 3)
    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        id = self.known_id(which)
        e = self.shown(id)
        if e is None:
            with pytest.raises(KeyError):
                self.queue.cancel(id)
            return
        if e.status == "queued" or e in self.overdue():
            e.end("cancelled")
        elif e.status == "in_progress":
            e.cancel = True
        assert self.queue.cancel(id, e.owner).status == e.status

    @precondition(lambda self: len(self.expected) > 5)
    @rule(which=WHICH)
    def delete(self, which: int) -> None:
        id = self.known_id(which)
        e = self.expected.pop(id, None)
        if e is None:
            with pytest.raises(KeyError):
                self.queue.delete(id)
        else:
            assert self.queue.delete(id).status == e.status

    @precondition(lambda self: len(self.expected) > 3)
    @rule(which=WHICH)
    def remove(self, which: int) -> None:
        id = self.known_id(which)
        e = self.shown(id)
        if e is None:
            with pytest.raises(KeyError):
                self.queue.remove(id, undo_seconds=30)
            return
        if e.status not in ENDED:
            e.end("cancelled")
        e.removed, e.key = True, None
        assert self.queue.remove(id, e.owner, undo_seconds=30).status == e.status

    @precondition(lambda self: any(e.removed for e in self.expected.values()))
    @rule(which=WHICH)
    def restore(self, which: int) -> None:
        removed = [e for e in self.expected.values() if e.removed]
        e = removed[which % len(removed)]
        e.removed = False
        assert self.queue.restore(e.id, e.owner).status == e.status

    @rule(which=WHICH, favourite=st.booleans())
    def mark(self, which: int, favourite: bool) -> None:
        id = self.known_id(which)
        e = self.shown(id)
        if e is None:
            with pytest.raises(KeyError):
                self.queue.update(id, favourite=favourite)
            return
        e.favourite = favourite
        assert self.queue.update(id, e.owner, favourite=favourite).favourite == favourite

    @precondition(lambda self: len(self.waiting()) > 1)
    @rule(which=WHICH, before=WHICH, to_end=st.booleans())
    def move(self, which: int, before: int, to_end: bool) -> None:
        moved = self.waiting()[which % len(self.waiting())]
        own = [e for e in self.waiting() if e.owner == moved.owner]
        target = None if to_end else own[before % len(own)]
        self.queue.move(moved.id, moved.owner, before=target and target.id)
        if target is moved:
            return
        places = [(e.priority, e.turn) for e in own]
        own.remove(moved)
        own.insert(len(own) if target is None else own.index(target), moved)
        for e, (priority, turn) in zip(own, places, strict=True):
            e.priority, e.turn = priority, turn

    @precondition(lambda self: any(e.status not in ENDED for e in self.expected.values()))
    @rule(owner=OWNERS)
    def cancel_all(self, owner: str) -> None:
        own = [e for e in self.expected.values() if e.owner == owner and e.status not in ENDED]
        overdue = self.overdue()
        for e in own:
            if e.status == "queued" or e in overdue:
                e.end("cancelled")
            else:
                e.cancel = True
        assert {job.id: job.status for job in self.queue.cancel_all(owner)} == {e.id: e.status for e in own}

    # ---- What workers do -----------------------------------------------------------------------------------------

    @rule(worker=WORKERS, models=st.sampled_from([None, ("mini",), ("mini", "large")]))
    def claim(self, worker: str, models: tuple[str, ...] | None) -> None:
        for e in self.overdue():
            e.take_back()
        first = next(iter(self.waiting(models)), None)
        job = self.queue.claim(worker, lease_seconds=LEASE_SECONDS, models=models, max_failures=MAX_FAILURES)
        assert (job.id if job else None) == (first.id if first else None)
        if first is not None:
            first.status, first.attempt, first.moved = "in_progress", first.attempt + 1, False
            first.worker, first.until = worker, self.clock.now + LEASE_SECONDS
            self.attempts.append(job)

    @precondition(lambda self: self.waiting() or self.overdue())
    @rule(worker=WORKERS)
    def claim_any(self, worker: str) -> None:
        self.claim(worker, None)

    @precondition(lambda self: self.attempts)
    @rule(back=BACK, step=st.none() | st.integers(1, 6))
    def beat(self, back: int, step: int | None) -> None:
        job = self.attempt(back)

        def say() -> bool:
            return self.queue.heartbeat(job, lease_seconds=LEASE_SECONDS, checkpoint_step=step)

        if e := self.says(job, say):
            assert say() == e.cancel
            e.until = self.clock.now + LEASE_SECONDS
            if step is not None and step > e.step:
                e.moved, e.failures = True, 0
            e.step = e.step if step is None else step

    @precondition(lambda self: self.attempts)
    @rule(back=BACK, how=st.sampled_from([*ENDINGS, "fail", "fail"]))
    def end(self, back: int, how: str) -> None:
        job, (say, said_before) = self.attempt(back), ENDINGS[how]
        e = self.says(job, lambda: say(self.queue, job), said_before=said_before)
        if e is None:
            return
        match how:
            case "finish":
                e.end("completed")
            case "cancelled":
                e.end("cancelled")
            case "release":
                e.end("cancelled") if e.cancel else e.wait()
            case "fail" | "fail for good":
                e.give_up(retry=how == "fail")
        assert say(self.queue, job) in (None, e.status)

    @precondition(lambda self: self.running())
    @rule(host=st.sampled_from(["host/", "host/1", "none"]))
    def boot(self, host: str) -> None:
        theirs = [e for e in self.running() if e.worker is not None and e.worker.startswith(host)]
        assert self.queue.release_leases_of(host, max_failures=MAX_FAILURES) == len(theirs)
        for e in theirs:
            e.take_back()

    @precondition(lambda self: self.running())
    @rule(seconds=st.sampled_from([1, LEASE_SECONDS, LEASE_SECONDS + 1]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.overdue())
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
        shown = [e for e in self.expected.values() if not e.removed]
        assert [job.id for job in jobs] == [e.id for e in sorted(shown, key=lambda e: e.seq)]
        for job in jobs:
            e = self.expected[job.id]
            assert (job.status, job.attempt, job.checkpoint_step) == (e.status, e.attempt, e.step)
            assert (job.lease_owner, job.cancel_requested, job.favourite) == (e.worker, e.cancel, e.favourite)
            assert (job.priority, job.turn) == (e.priority, e.turn)
            assert job.status == "cancelled" or job.failures == e.failures
            assert (job.completed_at is not None) == (job.status in ENDED)
        counts = self.queue.counts()
        assert counts == {s: sum(e.status == s for e in self.expected.values()) for s in counts}
        for place, e in enumerate(self.waiting()):
            assert self.queue.position(e.id) == place
        look = self.queue.look(self.look, ("a", "b"))  # what a reader of changes knows is what there is
        self.seen |= {job.id: (job.status, job.favourite) for job in look.changed}
        assert not set(look.deleted) & {e.id for e in shown}
        for id in look.deleted:
            self.seen.pop(id, None)
        self.look = look
        assert self.seen == {e.id: (e.status, e.favourite) for e in shown}
        assert {id: seen[2] for id, seen in look.unfinished.items() if seen[2] is not None} == {
            e.id: place for place, e in enumerate(self.waiting())
        }


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
                stateful_step_count=50,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        Machine.queue.close()
