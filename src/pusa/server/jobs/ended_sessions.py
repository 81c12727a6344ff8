"""Record the sessions that pages have ended before their time, in the database of `JobQueue`."""

import logging
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa

from pusa.server.jobs import database
from pusa.server.jobs.database import retried, transaction
from pusa.server.jobs.queue import JobQueue, QueueUnavailable
from pusa.server.jobs.queue_table import QueueTable

__all__ = ["EndedSessions"]

_table = database.ended_sessions
_c = _table.c

logger = logging.getLogger(__name__)


class EndedSessions(QueueTable):
    """Know the sessions that were ended on any server of a database, as it was read last. Thread-safe.

    Args:
        queue: whose database holds the table, which is read at once.
        read_seconds: age at which what was read is due to be read again.
        clock: returns unix seconds.
        monotonic: returns seconds, by which that age is measured.

    Raises:
        QueueUnavailable: the table cannot be read.
    """

    def __init__(
        self,
        queue: JobQueue,
        *,
        read_seconds: float = 1.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(queue)
        self._read_seconds, self._clock, self._monotonic = read_seconds, clock, monotonic
        self._known: dict[str, float] = {}  # when each would have ended by itself
        self._lock = threading.Lock()
        self._read_at = self._monotonic()
        self._learn(self._read())

    @retried
    def end(self, id: str, expires_at: float) -> None:
        """End a session for good; rows of sessions that have ended by themselves go.

        Args:
            id: of the session.
            expires_at: when it would have ended by itself (unix seconds).

        Raises:
            QueueUnavailable: the session goes on.
        """
        with transaction(self.engine, exclusive=True) as connection:
            connection.execute(_table.delete().where(sa.or_(_c.expires_at < self._clock(), _c.id == id)))
            connection.execute(_table.insert().values(id=id, expires_at=expires_at))
        self._learn({id: expires_at})

    def has(self, id: str) -> bool:
        """Tell whether a session was ended, by what was read last."""
        return id in self._known

    def is_due(self) -> bool:
        """Tell whether it is time for `refresh`, once each time."""
        with self._lock:
            now = self._monotonic()
            if now - self._read_at < self._read_seconds:
                return False
            self._read_at = now
            return True

    def refresh(self) -> None:
        """Read the database. While it does not answer, what is known stays: nobody can end a session meanwhile."""
        try:
            self._learn(self._read())
        except QueueUnavailable as error:
            logger.warning("the sessions that were ended cannot be read: %s", error)

    @retried
    def _read(self) -> dict[str, float]:
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(_c.id, _c.expires_at).where(_c.expires_at >= self._clock())).all()
        return {row.id: row.expires_at for row in rows}

    def _learn(self, ended: dict[str, float]) -> None:
        """Add to what is known, so that a read that began before an end does not undo it."""
        with self._lock:
            now = self._clock()
            self._known = {id: until for id, until in {**self._known, **ended}.items() if until >= now}
