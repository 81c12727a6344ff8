"""Follow jobs: read them once for all who follow them, however many these are."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from pusa.server.errors import ServiceError
from pusa.server.jobs.queue import Job, JobQueue
from pusa.server.submit import in_thread

__all__ = ["ChangeLooks", "JobFeed", "Snapshot"]

T = TypeVar("T")

_LOOK_SECONDS = 0.1  # between two looks at this process' change counter, for up to 100 followers
_SECONDS_PER_FOLLOWER = 0.001  # beyond them, so that waking all of them costs a tenth of a core at most
_DATABASE_SECONDS = 1.0  # between two reads of the database, for changes by other processes


class ChangeLooks:
    """Tell a reader when to read the database: after a change by this process, and now and then for all others."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue, self._seen, self._read_at = queue, -1, time.monotonic()

    async def is_due(self, followers: int) -> bool:
        """Wait a moment, longer for many followers; return whether there may be something new."""
        await asyncio.sleep(max(_LOOK_SECONDS, followers * _SECONDS_PER_FOLLOWER))
        count, now = self._queue.change_count(), time.monotonic()
        if count == self._seen and now - self._read_at < _DATABASE_SECONDS:
            return False
        self._seen, self._read_at = count, now
        return True


class Snapshot:
    """Hold a job as it was at one moment, and what is made of it once for all followers."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._made: dict[str, asyncio.Future[Any]] = {}

    async def once(self, name: str, make: Callable[[Job], Awaitable[T]]) -> T:
        """Return what `make` returned to the first follower that asked for `name`."""
        if name not in self._made:
            self._made[name] = asyncio.ensure_future(make(self.job))
        made: T = await asyncio.shield(self._made[name])
        return made


class _Followed:
    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot: Snapshot | None = snapshot  # None: deleted, or the server stops
        self.error: ServiceError | None = None
        self.followers = 0
        self.changed = asyncio.Event()

    def change(self, snapshot: Snapshot | None, error: ServiceError | None = None) -> None:
        self.snapshot, self.error = snapshot, error
        self.changed.set()
        self.changed = asyncio.Event()


class JobFeed:
    """Wake the followers of jobs that have changed, by one reader task that runs while there are followers.

    Args:
        queue: its change counter tells changes by this process at once; others are found by looking.
        is_stopping: True ends every stream.
    """

    def __init__(self, queue: JobQueue, is_stopping: Callable[[], bool]) -> None:
        self._queue, self._is_stopping = queue, is_stopping
        self._followed: dict[str, _Followed] = {}
        self._reader: asyncio.Task[None] | None = None

    async def follow(self, job: Job) -> AsyncGenerator[Snapshot, None]:
        """Yield a job, just read, and its state after every change, until it has ended, is deleted or the server stops.

        Raises ServiceError (503) when the queue cannot be reached.
        """
        followed = self._followed.get(job.id)
        if followed is None:
            followed = self._followed[job.id] = _Followed(Snapshot(job))
        elif followed.snapshot is None or followed.snapshot.job != job:
            followed.change(Snapshot(job))
        followed.followers += 1
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read(), name="pusa-feed")
        last = None
        try:
            while not self._is_stopping():
                changed, snapshot = followed.changed, followed.snapshot
                if followed.error is not None:
                    raise followed.error
                if snapshot is None:
                    return
                if snapshot is not last:
                    last = snapshot
                    yield snapshot
                if snapshot.job.ended:
                    return
                await changed.wait()
        finally:
            followed.followers -= 1
            if not followed.followers and self._followed.get(job.id) is followed:
                del self._followed[job.id]

    async def _read(self) -> None:
        """Look for changes until there are no followers left."""
        looks = ChangeLooks(self._queue)
        while self._followed and not self._is_stopping():
            if not await looks.is_due(sum(followed.followers for followed in self._followed.values())):
                continue
            known = {id: f.snapshot for id, f in self._followed.items() if f.snapshot is not None}
            try:
                changed, deleted = await in_thread(
                    self._queue.read_changes, {id: snapshot.job for id, snapshot in known.items()}
                )
            except ServiceError as error:
                self._end_all(error)
                return
            for id, snapshot in ((job.id, Snapshot(job)) for job in changed):
                self._apply(id, known[id], snapshot)
            for id in deleted:
                self._apply(id, known[id], None)
        self._end_all(None)

    def _apply(self, id: str, before: Snapshot, after: Snapshot | None) -> None:
        followed = self._followed.get(id)
        if followed is not None and followed.snapshot is before:  # not read anew meanwhile
            followed.change(after)

    def _end_all(self, error: ServiceError | None) -> None:
        for followed in list(self._followed.values()):
            followed.change(None, error)
        self._followed.clear()
