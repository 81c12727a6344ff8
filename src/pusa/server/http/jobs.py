"""Define the routes of ``/v1`` that list, follow, mark, move, cancel, remove and restore jobs."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from pusa.server.errors import ServiceError
from pusa.server.http import openapi
from pusa.server.http.api import Id, Owner, Service, video_response
from pusa.server.http.job_schemas import MoveVideo, UpdateVideo
from pusa.server.http.parameters import After, Limit, Order, Whole
from pusa.server.http.references import read_request
from pusa.server.http.schemas import BatchName, VideoDeleted, VideoList, VideoObject, video_from_job
from pusa.server.http.sse import STREAM_HEADERS
from pusa.server.jobs.queue import Job, JobFilter, Status

router = APIRouter(prefix="/v1")

_MOST_UNDO_SECONDS = 86_400
_MEANT = {"extend": "extensions", "extension": "extensions", "edit": "edits"}  # guessed routes, and the right ones


def _video_list(jobs: list[Job], has_more: bool = False) -> VideoList:
    videos = [video_from_job(job) for job in jobs]
    return VideoList(
        data=videos,
        first_id=videos[0].id if videos else None,
        last_id=videos[-1].id if videos else None,
        has_more=has_more,
    )


@router.get("/videos", response_model=VideoList, responses=openapi.errors(400, 503), summary="List videos")
async def list_videos(
    service: Service,
    owner: Owner,
    after: After = None,
    limit: Limit = 20,
    order: Order = "desc",
    status: Annotated[
        Literal["queued", "in_progress", "completed", "failed", "cancelled"] | None,
        Query(description="Only videos in this status; failed has the cancelled ones too."),
    ] = None,
    q: Annotated[str, Query(description="Words that are all in the prompt.", max_length=200)] = "",
    task: Annotated[
        Literal["generate", "extend", "transition", "loop"] | None, Query(description="Only videos of this task.")
    ] = None,
    favourite: Annotated[bool | None, Query(description="true: only favourites; false: only the others.")] = None,
    batch: Annotated[BatchName | None, Query(description="Only videos of this batch.")] = None,
) -> VideoList:
    statuses: tuple[Status, ...] | None = None if status is None else (status,)
    if status == "failed":
        statuses = ("failed", "cancelled")  # which clients see as failed
    jobs, has_more = await service.list(
        owner,
        after=after or None,
        limit=limit,
        order=order,
        statuses=statuses,
        filter=JobFilter(words=q, task=task, favourite=favourite, batch=batch),
    )
    return _video_list(jobs, has_more)


@router.get(
    "/events",
    responses={
        200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}},
        **openapi.errors(429, 503),
    },
    response_class=StreamingResponse,
    summary="Follow all videos",
)
async def follow_all(request: Request, service: Service, owner: Owner) -> Response:
    """Sends `videos`, the unfinished and the newest ones, and `ready`, as GET /ready answers. Then come `video` at
    every change, `deleted`, `preview` with an image of a video so far, `ready`, and `end`."""
    texts = service.follow_all(owner, request.state.is_allowed)
    first = await anext(texts)  # a refusal must come before the stream begins

    async def stream() -> AsyncIterator[bytes]:
        async with aclosing(texts):
            yield first
            async for text in texts:
                yield text

    return StreamingResponse(stream(), headers=STREAM_HEADERS, media_type="text/event-stream")


@router.post(
    "/videos/cancel", response_model=VideoList, responses=openapi.errors(503), summary="Cancel all unfinished videos"
)
async def cancel_all(service: Service, owner: Owner) -> VideoList:
    """Queued jobs end at once, running ones after their step. Returns those that were unfinished."""
    return _video_list(await service.cancel_all(owner))


@router.get(
    "/videos/{id:video}", response_model=VideoObject, responses=openapi.errors(404, 503), summary="Look at a video"
)
async def get_video(id: Id, service: Service, owner: Owner) -> Response:
    """The header `openai-poll-after-ms` advises when to read the job again."""
    return await video_response(service, await service.get(id, owner))


@router.delete(
    "/videos/{id:video}",
    response_model=VideoDeleted,
    responses=openapi.errors(400, 404, 503),
    summary="Cancel and remove a video",
)
async def delete_video(
    id: Id,
    service: Service,
    owner: Owner,
    undo_seconds: Annotated[
        int,
        Whole,
        Query(description="How long it can be restored; 0: not at all.", ge=0, le=_MOST_UNDO_SECONDS),
    ] = 0,
) -> VideoDeleted:
    """A running job stops at once. The files go with the video, or after the time to undo it."""
    job = await service.delete(id, owner, undo_seconds=undo_seconds)
    return VideoDeleted(id=id, undo_until=int(job.undo_until) if undo_seconds and job.undo_until else None)


@router.post(
    "/videos/{id:video}/restore",
    response_model=VideoObject,
    responses=openapi.errors(404, 503),
    summary="Restore a removed video",
)
async def restore_video(id: Id, service: Service, owner: Owner) -> Response:
    """Undoes a removal with `undo_seconds`. A job that was stopped by it comes back cancelled: retry it."""
    return await video_response(service, await service.restore(id, owner))


@router.post(
    "/videos/{id:video}",
    response_model=VideoObject,
    responses=openapi.errors(400, 404, 413, 415, 503, 507),
    openapi_extra=openapi.body(UpdateVideo, has_form=False),
    summary="Mark a video",
)
async def update_video(request: Request, id: Id, service: Service, owner: Owner) -> Response:
    """Makes it a favourite or puts it into a batch; what is left out stays."""
    if (meant := _MEANT.get(id)) is not None:
        raise ServiceError(404, "not_found", f"there is no POST /v1/videos/{id}: use POST /v1/videos/{meant}")
    await service.get(id, owner)  # whoever has meant another route is not told about this one's body
    async with read_request(request, service) as reader:
        body = await reader.validate(UpdateVideo, {})
    values: dict[str, Any] = {}
    if body.favourite is not None:
        values["favourite"] = body.favourite
    if body.batch is not None:
        values["batch"] = body.batch or None
    if not values:
        raise ServiceError(400, "missing_parameter", "nothing to change: send favourite, batch or both", "favourite")
    return await video_response(service, await service.update(id, owner, **values))


@router.post(
    "/videos/{id:video}/move",
    response_model=VideoObject,
    responses=openapi.errors(400, 404, 409, 413, 415, 503, 507),
    openapi_extra=openapi.body(MoveVideo, required=False),
    summary="Move a waiting video in the queue",
)
async def move_video(request: Request, id: Id, service: Service, owner: Owner) -> Response:
    """Changes the order of your own waiting videos among themselves; other keys' videos keep their places.
    The body may be empty."""
    async with read_request(request, service, may_be_empty=True) as reader:
        body = await reader.validate(MoveVideo, {})
    return await video_response(service, await service.move(id, owner, before=body.before))


@router.post(
    "/videos/{id:video}/cancel",
    response_model=VideoObject,
    responses=openapi.errors(404, 503),
    summary="Cancel a video",
)
async def cancel_video(id: Id, service: Service, owner: Owner) -> Response:
    """A queued job ends at once, a running one after its step; an ended job stays as it is."""
    return await video_response(service, await service.cancel(id, owner))


@router.post(
    "/videos/{id:video}/retry",
    response_model=VideoObject,
    responses=openapi.errors(404, 409, 429, 503),
    summary="Make a failed video once more",
)
async def retry_video(id: Id, service: Service, owner: Owner) -> Response:
    """Queues a failed or cancelled job again, from the beginning, with the same inputs, settings and seed."""
    return await video_response(service, await service.retry(id, owner))
