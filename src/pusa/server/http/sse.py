"""Stream the changes of a job as server-sent events.

``video`` carries the job as ``GET /v1/videos/{id}`` returns it, at once and at every change. ``preview`` carries
``{"image": "data:image/webp;base64,..."}``. ``end`` is the last one: ``{"reason": "completed" | "failed" | "deleted" |
"shutdown" | "unavailable"}``. A client that reconnects gets the current job first, so no event is ever repeated.
"""

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from pusa.server.errors import ServiceError
from pusa.server.feed import Snapshot
from pusa.server.jobs.queue import Job

KEEP_ALIVE_SECONDS = 15.0
RECONNECT_MS = 2000
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # no proxy keeps or holds back what is sent


def event(name: str, data: Any) -> str:
    """Format an event without its number; `data` is sent as JSON, which has no line breaks."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


async def events(
    first: Snapshot | None,
    snapshots: AsyncGenerator[Snapshot, None],
    to_json: Callable[[Job], Awaitable[dict[str, Any]]],
    preview: Callable[[Job], Awaitable[bytes | None]],
    is_stopping: Callable[[], bool],
    *,
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
) -> AsyncIterator[str]:
    """Yield the text of the stream. All streams of a job share the text of an event.

    Args:
        first, snapshots: the job now and after every change; ends with the job or its deletion.
        to_json: converts a job for the client.
        preview: reads the preview of a running job, a WebP image, or None.
        is_stopping: tells a stopping server from a deleted job.
        keep_alive_seconds: interval of comments that keep proxies from closing the connection.
    """

    async def video_event(job: Job) -> str:
        return event("video", await to_json(job))

    async def preview_event(job: Job) -> str | None:
        image = await preview(job)
        return None if image is None else event("preview", {"image": preview_url(image)})

    yield f"retry: {RECONNECT_MS}\n\n"
    number, last_preview, last = 0, None, None
    reason = ""
    pending: asyncio.Future[Snapshot | None] = asyncio.get_running_loop().create_future()
    pending.set_result(first)
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=keep_alive_seconds)
            if not done:
                yield ": still here\n\n"
                continue
            try:
                snapshot = pending.result()
                if snapshot is None:
                    break
                last = snapshot.job
                number += 1
                yield f"id: {number}\n{await snapshot.once('video', video_event)}"
                if last.status == "in_progress":
                    text = await snapshot.once("preview", preview_event)
                    if text is not None and text != last_preview:
                        last_preview = text
                        number += 1
                        yield f"id: {number}\n{text}"
            except ServiceError as error:  # the response has begun: an error can only end it
                reason = "deleted" if error.status == 404 else "unavailable"
                break
            pending = asyncio.ensure_future(anext(snapshots, None))
    finally:
        pending.cancel()
        with suppress(asyncio.CancelledError, ServiceError):
            await pending
        await snapshots.aclose()
    if last is not None and last.ended:
        reason = "completed" if last.status == "completed" else "failed"
    yield f"id: {number + 1}\n" + event("end", {"reason": reason or ("shutdown" if is_stopping() else "deleted")})


def preview_url(image: bytes) -> str:
    """Write a preview, a WebP image, as a data URL."""
    return f"data:image/webp;base64,{b64encode(image).decode()}"
