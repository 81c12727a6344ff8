"""Define the route that streams a video while it is made."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from pusa.request import is_wave
from pusa.server.errors import ServiceError
from pusa.server.feed import Snapshot
from pusa.server.http import openapi
from pusa.server.http.api import Id, Owner, Service
from pusa.server.http.sse import STREAM_HEADERS
from pusa.server.jobs.queue import Job

router = APIRouter(prefix="/v1")


def check_grows(job: Job) -> None:
    """Raise ServiceError (409) unless a job's video can be watched while it is made."""
    if not is_wave(str(job.request.get("schedule") or "")):
        message = f"{job.id} is made as a whole: ask for schedule=wave to watch a video while it is made"
        raise ServiceError(409, "not_a_wave", message)
    if job.ended:
        way_out = "its content has all of it" if job.status == "completed" else "retry it to make it once more"
        raise ServiceError(409, "not_running", f"{job.id} is {job.status}: {way_out}")


async def fragments(
    first: Snapshot | None,
    snapshots: AsyncGenerator[Snapshot, None],
    read: Callable[[Job, int], Awaitable[bytes | None]],
) -> AsyncIterator[bytes]:
    """Yield the parts of a growing MP4 as they are there; end with the job, or where an attempt begins it anew.

    Args:
        first, snapshots: the job now and after every change; ends with the job or its deletion.
        read: returns a part by its number from 0 on; None: it is not there yet.
    """
    attempt, number, snapshot = 0, 0, first
    try:
        while snapshot is not None and (number == 0 or snapshot.job.attempt == attempt):
            attempt = snapshot.job.attempt
            while (data := await read(snapshot.job, number)) is not None:
                number += 1
                yield data
            snapshot = await anext(snapshots, None)
    except ServiceError:  # the response has begun: an error can only end it
        pass
    finally:
        await snapshots.aclose()


@router.get(
    "/videos/{id:video}/stream",
    responses={
        200: openapi.binary("The video as far as it is made, and its parts as they follow.", "video/mp4"),
        **openapi.errors(404, 409, 429, 503),
    },
    response_class=StreamingResponse,
    summary="Watch a video while it is made",
)
async def stream_video(id: Id, service: Service, owner: Owner) -> Response:
    """Only for schedule=wave. A fragmented MP4, which may lack the last frames; the finished video has all."""
    job = await service.get(id, owner)
    check_grows(job)
    snapshots = service.follow(job)
    first = await anext(snapshots, None)  # a refusal must come before the stream begins
    parts = fragments(first, snapshots, service.fragment_of)
    return StreamingResponse(parts, headers=STREAM_HEADERS, media_type="video/mp4")
