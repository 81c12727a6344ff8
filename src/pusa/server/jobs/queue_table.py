"""Share the database of `JobQueue` with a table beside the queue's own."""

from sqlalchemy.engine import Engine

from pusa.server.jobs.queue import JobQueue


class QueueTable:
    """Hold a table of a queue's database, for methods that `database.retried` runs.

    Args:
        queue: whose database holds the table; damage that is found in it is the queue's.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue

    @property
    def engine(self) -> Engine:
        return self._queue.engine

    @property
    def damage(self) -> str | None:
        """Say what an operator must repair, which is the queue's own."""
        return self._queue.damage

    @damage.setter
    def damage(self, reason: str) -> None:
        self._queue.damage = reason
