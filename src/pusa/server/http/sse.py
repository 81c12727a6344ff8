"""Stream the changes of a job as server-sent events.

``video`` carries the job as ``GET /v1/videos/{id}`` returns it, at once and at every change. ``preview`` carries
``{"image": "data:image/webp;base64,..."}``. ``end`` is the last one: ``{"reason": "completed" | "failed" | "deleted" |
"shutdown" | "unavailable"}``. A client that reconnects gets the current job first, so no event is ever repeated.
"""

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from pusa.server.errors import ServiceError
from pusa.server.jobs.queue import Job

KEEP_ALIVE_SECONDS = 15.0
RECONNECT_MS = 2000


def event(name: str, data: Any, number: int) -> str:
    """Format one event; `data` is sent as JSON, which has no line breaks."""
    return f"id: {number}\nevent: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


async def events(
    jobs: AsyncIterator[Job],
    to_json: Callable[[Job], Awaitable[dict[str, Any]]],
    preview: Callable[[Job], Awaitable[bytes | None]],
    is_stopping: Callable[[], bool],
    *,
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
) -> AsyncIterator[str]:
    """Yield the text of the stream.

    Args:
        jobs: the job now and after every change; ends with the job or its deletion.
        to_json: converts a job for the client.
        preview: reads the preview of a running job, a WebP image, or None.
        is_stopping: tells a stopping server from a deleted job.
        keep_alive_seconds: interval of comments that keep proxies from closing the connection.
    """
    yield f"retry: {RECONNECT_MS}\n\n"
    number, last_image, last = 0, None, None
    reason = ""
    pending = asyncio.ensure_future(anext(jobs, None))
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=keep_alive_seconds)
            if not done:
                yield ": still here\n\n"
                continue
            try:
                job = pending.result()
            except ServiceError as error:  # the response has begun: an error can only end it
                reason = "deleted" if error.status == 404 else "unavailable"
                break
            if job is None:
                break
            last = job
            number += 1
            yield event("video", await to_json(job), number)
            if not job.ended:
                image = await preview(job) if job.status == "in_progress" else None
                if image is not None and image != last_image:
                    last_image = image
                    number += 1
                    picture = f"data:image/webp;base64,{b64encode(image).decode()}"
                    yield event("preview", {"image": picture}, number)
            pending = asyncio.ensure_future(anext(jobs, None))
    finally:
        pending.cancel()
        with suppress(asyncio.CancelledError, ServiceError):
            await pending
    if last is not None and last.ended:
        reason = "completed" if last.status == "completed" else "failed"
    yield event("end", {"reason": reason or ("shutdown" if is_stopping() else "deleted")}, number + 1)
