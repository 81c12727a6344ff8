"""Sessions that were ended, in both databases: every server knows them until they would have ended by themselves."""

import sqlalchemy as sa
from queue_samples import Clock

from pusa.server.jobs import database
from pusa.server.jobs.ended_sessions import EndedSessions
from pusa.server.jobs.queue import JobQueue


class Seconds:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_one_server_has_ended_the_others_read(queue: JobQueue, clock: Clock) -> None:
    seconds = Seconds()
    here, there = (EndedSessions(queue, clock=clock, monotonic=seconds, read_seconds=1.0) for _ in range(2))
    here.end("a", clock.now + 100)
    here.end("a", clock.now + 100)  # once more, as after an answer that was lost
    assert here.has("a")
    assert not here.has("b")
    assert not there.has("a")  # read a moment ago
    assert not there.is_due()
    seconds.now += 1
    assert there.is_due()
    assert not there.is_due()  # somebody reads already
    there.refresh()
    assert there.has("a")
    assert EndedSessions(queue, clock=clock).has("a")  # after a restart, before any request


def test_a_session_is_forgotten_once_it_would_have_ended(queue: JobQueue, clock: Clock) -> None:
    sessions = EndedSessions(queue, clock=clock)
    sessions.end("a", clock.now + 10)
    clock.now += 11
    sessions.end("b", clock.now + 10)
    assert not sessions.has("a")
    with queue.engine.connect() as connection:
        assert connection.execute(sa.select(database.ended_sessions.c.id)).scalars().all() == ["b"]


def test_a_read_that_began_before_an_end_does_not_undo_it(queue: JobQueue, clock: Clock) -> None:
    sessions = EndedSessions(queue, clock=clock)
    before = sessions._read()
    sessions.end("a", clock.now + 10)
    sessions._learn(before)
    assert sessions.has("a")
