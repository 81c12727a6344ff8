"""Send every change of an owner's jobs to all who follow them: one reader for all streams, however many these are.

The stream begins with ``videos``, the unfinished and the newest jobs, and ``ready``, what ``GET /ready`` says. Then
come ``video`` (a job as it is now), ``deleted`` (``{"id"}``), ``preview`` (``{"id", "image"}``) and ``ready``. ``end``
is the last one: ``{"reason": "shutdown" | "unavailable" | "signed_out"}``. Who reconnects begins again.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice

from pusa.server.errors import ServiceError
from pusa.server.feed import ChangeLooks
from pusa.server.http.schemas import video_from_job
from pusa.server.http.sse import KEEP_ALIVE_SECONDS, RECONNECT_MS, event, preview_url
from pusa.server.jobs.queue import Job, JobQueue, Look
from pusa.server.jobs.store import FileStore
from pusa.server.readiness import ServerState
from pusa.server.submit import in_thread

NEWEST = 50
"""Ended jobs that a stream begins with, beside all that are unfinished."""

_MOST_EVENTS = 500  # that a stream may be behind before it begins again
_MOST_BYTES = 8 * 2**20  # of them
_PIECE_BYTES = 64 * 1024  # of a text that is sent at once: what a client does not take is held for each of its streams


@dataclass(eq=False)
class _Channel:
    """Hold what the streams of one owner share: its latest events, numbered from 0; `first` is the oldest kept."""

    owner: str
    followers: int = 0
    events: deque[bytes] = field(default_factory=deque)
    first: int = 0
    held_bytes: int = 0
    beginning: tuple[int, bytes] | None = None  # as of the event of this number
    reason: str = ""  # why it has ended
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def end(self) -> int:
        return self.first + len(self.events)

    def send(self, events: list[bytes]) -> None:
        self.events.extend(events)
        self.held_bytes += sum(map(len, events))
        while len(self.events) > _MOST_EVENTS or self.held_bytes > _MOST_BYTES:
            self.held_bytes -= len(self.events.popleft())
            self.first += 1
        self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def next(self, number: int) -> tuple[bytes, int]:
        """Return the event of a number, with those that follow up to a piece, and the number behind them."""
        texts: list[bytes] = []
        size = 0
        for text in islice(self.events, number - self.first, None):
            size += len(text)
            if texts and size > _PIECE_BYTES:
                break
            texts.append(text)
        return b"".join(texts), number + len(texts)


class EventFeed:
    """Read the changes of all jobs once for all streams, by one task that runs while there are any.

    Args:
        queue: its change counter tells changes by this process at once; others are found within a second.
        files: holds the previews.
        readiness: reads the state of the workers.
        is_stopping: True ends every stream.
        keep_alive_seconds: interval of comments that keep proxies from closing a connection, and of looks at whether
            who follows is still allowed to.
    """

    def __init__(
        self,
        queue: JobQueue,
        files: FileStore,
        readiness: Callable[[], ServerState],
        is_stopping: Callable[[], bool],
        *,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        self._queue, self._files, self._readiness, self._is_stopping = queue, files, readiness, is_stopping
        self._keep_alive_seconds = keep_alive_seconds
        self._channels: dict[str, _Channel] = {}
        self._reading = asyncio.Lock()  # what a stream begins with is never older than what it then gets
        self._reader: asyncio.Task[None] | None = None
        self._look: Look | None = None
        self._ready = b""
        self._sent: dict[str, list[bytes]] = {}  # the latest events of unfinished jobs

    async def follow(self, owner: str, is_allowed: Callable[[], Awaitable[bool]]) -> AsyncGenerator[bytes, None]:
        """Yield the text of an owner's stream, until the server stops or `is_allowed` says no.

        Raises ServiceError (503) at the first step if the queue cannot be reached.
        """
        channel = self._channels.get(owner)
        if channel is None:
            channel = self._channels[owner] = _Channel(owner)
        channel.followers += 1
        try:
            begun, number = await self._begin(channel)
            yield b"retry: %d\n\n" % RECONNECT_MS
            for piece in _pieces(begun):
                yield piece
            begun = b""
            try:
                async for text in self._go_on(channel, number, is_allowed):
                    yield text
            except ServiceError:  # the response has begun: an error can only end it
                yield _end("unavailable")
        finally:
            channel.followers -= 1
            if not channel.followers and self._channels.get(owner) is channel:
                del self._channels[owner]

    async def _go_on(
        self, channel: _Channel, number: int, is_allowed: Callable[[], Awaitable[bool]]
    ) -> AsyncGenerator[bytes, None]:
        """Yield what follows the event of this number, up to the end."""
        asked_at = time.monotonic()
        while not channel.reason and not self._is_stopping():
            if time.monotonic() - asked_at >= self._keep_alive_seconds:
                asked_at = time.monotonic()
                if not await is_allowed():
                    yield _end("signed_out")
                    return
            changed = channel.changed
            if number < channel.first:  # too slow for every change
                begun, number = await self._begin(channel)
                for piece in _pieces(begun):
                    yield piece
                begun = b""
            elif number < channel.end:
                text, number = channel.next(number)
                for piece in _pieces(text):
                    yield piece
            else:
                try:
                    async with asyncio.timeout(self._keep_alive_seconds):
                        await changed.wait()
                except TimeoutError:
                    yield b": still here\n\n"
        yield _end(channel.reason or "shutdown")

    async def _begin(self, channel: _Channel) -> tuple[bytes, int]:
        """Return what a stream of this owner begins with, and the number of the event that follows it."""
        async with self._reading:
            if self._look is None:
                self._look = await in_thread(self._queue.look, None, ())
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read(), name="pusa-events")
            if channel.beginning is None or channel.beginning[0] != channel.end:
                channel.beginning = channel.end, await in_thread(self._read_beginning, channel.owner, self._look)
            number, text = channel.beginning
            return text, number

    async def _read(self) -> None:
        """Look for changes until there are no streams left."""
        looks, reason = ChangeLooks(self._queue), "shutdown"
        try:
            while self._channels and not self._is_stopping():
                if not await looks.is_due(sum(channel.followers for channel in self._channels.values())):
                    continue
                async with self._reading:
                    for owner, events in (await in_thread(self._read_changes, list(self._channels))).items():
                        if events and (channel := self._channels.get(owner)) is not None:
                            channel.send(events)
        except ServiceError:
            reason = "unavailable"
        finally:
            self._look, self._ready = None, b""
            self._sent.clear()
            for channel in self._channels.values():
                channel.reason = reason
                channel.wake()
            self._channels.clear()

    # ---- in a thread, one at a time ----------------------------------------------------------------------------------

    def _read_beginning(self, owner: str, look: Look) -> bytes:
        jobs = self._queue.jobs_of(owner, NEWEST)
        videos = [video_from_job(job, _place(job, look)).model_dump() for job in jobs]
        previews = [self._preview(job) for job in jobs if job.status == "in_progress"]
        ready = self._read_ready()
        self._ready = self._ready or ready
        return b"".join([_event("videos", {"data": videos}), *filter(None, previews), ready])

    def _read_changes(self, owners: list[str]) -> dict[str, list[bytes]]:
        """Return the new events by owner."""
        look = self._queue.look(self._look, owners)
        events: dict[str, list[bytes]] = {owner: [] for owner in owners}
        for job in look.changed:
            new = [_event("video", video_from_job(job, _place(job, look)).model_dump())]
            if job.status == "in_progress" and (preview := self._preview(job)) is not None:
                new.append(preview)
            before = self._sent.get(job.id, [])
            events[job.owner] += [text for text in new if text not in before]
            self._sent[job.id] = new
        for id, owner in look.deleted.items():
            events[owner].append(_event("deleted", {"id": id}))
        for id in set(self._sent) - set(look.unfinished):
            del self._sent[id]
        ready = self._read_ready()
        if ready != self._ready:
            self._ready = ready
            for of_owner in events.values():
                of_owner.append(ready)
        self._look = look
        return events

    def _read_ready(self) -> bytes:
        return _event("ready", asdict(self._readiness()))

    def _preview(self, job: Job) -> bytes | None:
        try:
            image = self._files.get_bytes(f"previews/{job.id}.webp")
        except FileNotFoundError:
            return None
        return _event("preview", {"id": job.id, "image": preview_url(image)})


def _place(job: Job, look: Look) -> int | None:
    """Count the waiting jobs ahead of a waiting one; None if that is not known yet."""
    seen = look.unfinished.get(job.id)
    return seen[2] if seen is not None and job.status == "queued" else None


def _event(name: str, data: object) -> bytes:
    return event(name, data).encode()


def _pieces(text: bytes) -> Iterator[bytes]:
    """Cut a text: what is sent is copied for each stream, and the next piece waits until this one is taken."""
    for start in range(0, len(text), _PIECE_BYTES):
        yield text[start : start + _PIECE_BYTES]


def _end(reason: str) -> bytes:
    return _event("end", {"reason": reason})
