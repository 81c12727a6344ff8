"""The routes of ``/v1``: OpenAI's videos API with its extensions, as far as possible one call of the service each."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BeforeValidator
from starlette.convertors import Convertor, register_url_convertor

from pusa import zoo
from pusa.numerals import is_whole, parse_whole
from pusa.server.downloads import download
from pusa.server.errors import ServiceError
from pusa.server.http import openapi
from pusa.server.http import to_request as translate
from pusa.server.http.references import REFERENCE_FIELDS, Intake, taken_in
from pusa.server.http.schemas import (
    CreateVideo,
    EditVideo,
    ExtendVideo,
    Model,
    ModelList,
    RemixVideo,
    Video,
    VideoDeleted,
    VideoError,
    VideoList,
)
from pusa.server.http.sse import events
from pusa.server.jobs.queue import Job
from pusa.server.service import Variant, VideoService, in_thread

_RESERVED = ("characters", "edits", "extensions", "sync")


class _VideoConvertor(Convertor[str]):
    """An id in a path: anything but the words that are routes of their own."""

    regex = rf"(?!(?:{'|'.join(_RESERVED)})(?:/|$))[^/]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("video", _VideoConvertor())

router = APIRouter(prefix="/v1")

_FILES_OF_CREATE = dict.fromkeys(REFERENCE_FIELDS, "input_reference")
_FILES_OF_VIDEO = {"video": "video"}
_LOOK_SECONDS = 0.5  # between two looks whether a client that waits is still there


def service_of(request: Request) -> VideoService:
    return request.app.state.service


def owner_of(request: Request) -> str:
    return request.state.owner


Service = Annotated[VideoService, Depends(service_of)]
Owner = Annotated[str, Depends(owner_of)]
Id = Annotated[str, Path(description="The video's id.")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Drawn by the client: the same key is the same job, however often it is sent.",
        min_length=1,
        max_length=255,
    ),
]


def _whole(text: Any) -> Any:
    return parse_whole(text) if isinstance(text, str) else text


def sent_before(request: Request, idempotency_key: Key = None) -> dict[str, Any]:
    """What says that a request may have come before, and which trace it belongs to."""
    retries = request.headers.get("x-stainless-retry-count", "0")
    traceparent = request.headers.get("traceparent", "")
    return {
        "idempotency_key": idempotency_key,
        "is_retry": is_whole(retries) and parse_whole(retries) > 0,
        "traceparent": traceparent if len(traceparent) == 55 and traceparent.isascii() else None,
    }


Options = Annotated[dict[str, Any], Depends(sent_before)]


# ---- a job as clients see it -----------------------------------------------------------------------------------------


def shown(job: Job, position: int | None = None) -> Video:
    """Typed clients know four statuses: a cancelled job is one that failed with the code ``cancelled``."""
    error = None
    if job.status == "cancelled":
        error = VideoError(code="cancelled", message="it was cancelled")
    elif job.status == "failed":
        error = VideoError(code=job.error_code or "internal_error", message=job.error_message or "it failed")
    timings = dict(job.timings)
    return Video(
        id=job.id,
        model=job.model,
        status="failed" if job.status == "cancelled" else job.status,
        progress=100 if job.status == "completed" else max(0, min(99, int(job.progress))),
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        prompt=job.prompt,
        remixed_from_video_id=job.parent,
        seconds=job.seconds,
        size=job.size,
        error=error,
        stage=job.stage,
        step=job.step,
        steps=job.steps,
        seconds_left=None if job.seconds_left is None else round(job.seconds_left, 1),
        queue_position=position,
        notes=list(job.notes),
        seed=job.request.get("seed"),
        peak_memory_mb=timings.pop("peak_memory_mb", None),
        stage_durations=timings,
        inference_time_s=round(sum(s for stage, s in timings.items() if stage != "queue"), 4) if timings else None,
    )


async def _answer(service: VideoService, job: Job) -> JSONResponse:
    """A job with the advice when to look again."""
    position = await service.position(job)
    headers = {} if job.ended else {"openai-poll-after-ms": str(await service.poll_after_ms(job, position))}
    return JSONResponse(shown(job, position).model_dump(), headers=headers)


# ---- making videos ---------------------------------------------------------------------------------------------------


@router.post(
    "/videos",
    response_model=Video,
    responses=openapi.errors(400, 413, 415, 422, 429, 503, 507),
    openapi_extra=openapi.body(CreateVideo, "input_reference"),
    summary="Create a video",
)
async def create(request: Request, service: Service, owner: Owner, options: Options) -> Response:
    """Answers at once with a queued job. Pictures and videos go into `input_reference`, as file parts of a form or as
    data URLs in JSON."""
    return await _answer(service, await _created(request, service, owner, options))


@router.post(
    "/videos/sync",
    responses={
        200: openapi.binary("The video.", "video/mp4"),
        **openapi.errors(400, 409, 413, 415, 422, 429, 500, 503, 507),
    },
    response_class=Response,
    openapi_extra=openapi.body(CreateVideo, "input_reference"),
    summary="Create a video and wait for it",
)
async def create_and_wait(request: Request, service: Service, owner: Owner, options: Options) -> Response:
    """For benchmarks: the answer is the MP4. A client that goes away cancels the job."""
    job = await _created(request, service, owner, options)
    ending = asyncio.ensure_future(_last(service.watch(job.id, owner)))
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({ending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        job = ending.result() if ending.done() else job
    finally:
        for task in (ending, leaving):
            task.cancel()
        await asyncio.gather(ending, leaving, return_exceptions=True)
        if not job.ended:
            await asyncio.shield(service.cancel(job.id, owner))
    if not job.ended:
        raise ServiceError(503, "stopping", f"the server is stopping: {job.id} was cancelled")
    if job.status != "completed":
        error = shown(job).error
        assert error is not None
        status = 500 if job.status == "failed" and error.code == "internal_error" else 409
        raise ServiceError(status, error.code, f"{job.id}: {error.message}")
    answer = await download(request, await service.content(job.id, "video", owner))
    video = shown(job)
    answer.headers["x-video-id"] = job.id
    answer.headers["x-inference-time-s"] = str(video.inference_time_s)
    answer.headers["x-stage-durations"] = json.dumps(video.stage_durations)
    answer.headers["x-peak-memory-mb"] = str(video.peak_memory_mb)
    return answer


async def _last(jobs: AsyncIterator[Job]) -> Job:
    """A job as it is at the end."""
    last = await anext(jobs)
    async for job in jobs:
        last = job
    return last


async def _gone(request: Request) -> None:
    """Until the client has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(_LOOK_SECONDS)


async def _created(request: Request, service: VideoService, owner: str, options: Mapping[str, Any]) -> Job:
    async with taken_in(request, service) as intake:
        body = await intake.check(CreateVideo, _FILES_OF_CREATE)
        references = await intake.references(body)
        keyframes, inside = await intake.keyframes(body, references)
        uploads = await service.probe({**references, **inside})
        known = {name: upload.probed for name in references if (upload := uploads[name]).probed is not None}
        fields = translate.request_of(body, defaults=service.defaults)
        fields["conditions"] = translate.conditions_of(body, keyframes, known, fields.get("task"))
        said_seconds = body.seconds is not None and translate.merged(body).num_frames is None
        keeps_length = fields.get("task", "generate") in ("generate", "loop")
        return await service.create(
            fields,
            uploads,
            owner=owner,
            seconds=_text(body.seconds) if said_seconds and keeps_length else None,
            priority=_priority(body.priority, service),
            **options,
        )


def _text(seconds: str | float | None) -> str:
    return seconds if isinstance(seconds, str) else translate.shown_number(float(seconds or 0))


def _priority(asked: int | None, service: VideoService) -> int:
    """Where keys tell clients apart, nobody goes before the others by their own word."""
    if asked and asked > 0 and service.settings.api_keys:
        raise translate.invalid(f"priority={asked}: with API keys it is 0 or less, to let others go first", "priority")
    return asked or 0


@router.post(
    "/videos/extensions",
    response_model=Video,
    responses=openapi.errors(400, 404, 409, 413, 415, 422, 429, 503, 507),
    openapi_extra=openapi.body(ExtendVideo, "video"),
    summary="Continue a video after its end",
)
async def extend(request: Request, service: Service, owner: Owner, options: Options) -> Response:
    """`video` is the id of a finished video, or a file."""
    async with taken_in(request, service) as intake:
        body = await intake.check(ExtendVideo, _FILES_OF_VIDEO)
        videos = await _some_videos(intake, body, most=1)
        knobs = translate.merged(body)
        if knobs.cond_positions is not None:
            raise translate.invalid("an extension goes on after the end: leave cond_positions out", "cond_positions")
        job = await service.extend(
            videos[0],
            body.prompt,
            None if body.seconds is None else translate.seconds_of(body.seconds),
            owner=owner,
            request=_without_prompt(translate.request_of(body, defaults=service.defaults, with_length=False)),
            noise=translate.noises_of(knobs),
            **options,
        )
    return await _answer(service, job)


@router.post(
    "/videos/edits",
    response_model=Video,
    responses=openapi.errors(400, 404, 409, 413, 415, 422, 429, 503, 507),
    openapi_extra=openapi.body(EditVideo, "video"),
    summary="Make a video again after a prompt, or join two",
)
async def edit(request: Request, service: Service, owner: Owner, options: Options) -> Response:
    """One `video` (an id, or a file) is changed: all of it loosely, or around the latent frames in `cond_positions`,
    which are kept. Two are joined by a transition."""
    async with taken_in(request, service) as intake:
        body = await intake.check(EditVideo, _FILES_OF_VIDEO)
        videos = await _some_videos(intake, body, most=2)
        knobs = translate.merged(body)
        job = await service.edit(
            videos,
            body.prompt,
            owner=owner,
            request=_without_prompt(translate.request_of(body, defaults=service.defaults)),
            positions=translate.positions_of(knobs),
            noise=translate.noises_of(knobs),
            **options,
        )
    return await _answer(service, job)


async def _some_videos(intake: Intake, body: ExtendVideo | EditVideo, *, most: int) -> list[Any]:
    videos = await intake.videos(body)
    if not videos:
        raise ServiceError(400, "missing_parameter", "video is missing: send a finished video's id, or a file", "video")
    if len(videos) > most:
        # The SDK cannot leave `video` out: beside an id there may be a file that means nothing.
        ids = [video for video in videos if isinstance(video, str)]
        if len(ids) != most:
            raise translate.invalid(
                f"{len(videos)} videos are given: send {'one' if most == 1 else 'at most two'}", "video"
            )
        return ids
    return videos


def _without_prompt(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "prompt"}


@router.post(
    "/videos/characters",
    responses=openapi.errors(501),
    status_code=501,
    response_class=Response,
    summary="Not supported",
)
async def create_character() -> Response:
    """Characters have no meaning here: give the model pictures by `input_reference`."""
    raise _no_characters()


@router.get(
    "/videos/characters/{id}",
    responses=openapi.errors(501),
    status_code=501,
    response_class=Response,
    summary="Not supported",
)
async def get_character(id: Id) -> Response:
    raise _no_characters()


def _no_characters() -> ServiceError:
    return ServiceError(501, "not_supported", "there are no characters here: give pictures by input_reference instead")


@router.post(
    "/videos/{id:video}/remix",
    response_model=Video,
    responses=openapi.errors(400, 404, 413, 415, 422, 429, 503, 507),
    openapi_extra=openapi.body(RemixVideo),
    summary="Make a video once more with another prompt",
)
async def remix(request: Request, id: Id, service: Service, owner: Owner, options: Options) -> Response:
    """The same inputs, settings and seed."""
    async with taken_in(request, service) as intake:
        body = await intake.check(RemixVideo, {})
    return await _answer(service, await service.remix(id, body.prompt, owner, **options))


# ---- looking, following, ending --------------------------------------------------------------------------------------


@router.get("/videos", response_model=VideoList, responses=openapi.errors(400, 503), summary="List videos")
async def list_videos(
    service: Service,
    owner: Owner,
    after: Annotated[str | None, Query(description="The last_id of the page before.")] = None,
    limit: Annotated[int, BeforeValidator(_whole), Query(description="Videos on a page.", ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="asc: the oldest first.")] = "desc",
) -> VideoList:
    jobs, has_more = await service.list(owner, after=after or None, limit=limit, order=order)
    videos = [shown(job) for job in jobs]
    return VideoList(
        data=videos,
        first_id=videos[0].id if videos else None,
        last_id=videos[-1].id if videos else None,
        has_more=has_more,
    )


@router.get("/videos/{id:video}", response_model=Video, responses=openapi.errors(404, 503), summary="Look at a video")
async def get_video(id: Id, service: Service, owner: Owner) -> Response:
    """The header `openai-poll-after-ms` says when it is worth looking again."""
    return await _answer(service, await service.get(id, owner))


@router.delete(
    "/videos/{id:video}",
    response_model=VideoDeleted,
    responses=openapi.errors(404, 503),
    summary="Cancel and remove a video",
)
async def delete_video(id: Id, service: Service, owner: Owner) -> VideoDeleted:
    await service.delete(id, owner)
    return VideoDeleted(id=id)


@router.post(
    "/videos/{id:video}/cancel", response_model=Video, responses=openapi.errors(404, 503), summary="Cancel a video"
)
async def cancel_video(id: Id, service: Service, owner: Owner) -> Response:
    """One that waits ends at once, one that runs after its step; one that has ended stays as it is."""
    return await _answer(service, await service.cancel(id, owner))


@router.get(
    "/videos/{id:video}/content",
    responses={
        200: openapi.binary("The file.", "video/mp4", "image/webp"),
        206: openapi.binary("The range that was asked for.", "video/mp4", "image/webp"),
        304: {"description": "It has not changed."},
        **openapi.errors(400, 404, 409, 416, 503),
    },
    response_class=Response,
    summary="Download a video, its thumbnail or its sprite sheet",
)
async def get_content(
    request: Request,
    id: Id,
    service: Service,
    owner: Owner,
    variant: Annotated[Variant, Query(description="Which of its files.")] = "video",
) -> Response:
    """Ranges are possible."""
    return await download(request, await service.content(id, variant, owner))


@router.get(
    "/videos/{id:video}/events",
    responses={
        200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}},
        **openapi.errors(404, 503),
    },
    response_class=StreamingResponse,
    summary="Follow a video",
)
async def follow(id: Id, service: Service, owner: Owner) -> Response:
    """`video` at every change, `preview` with a picture of the video so far, `end` at the end."""
    await service.get(id, owner)

    async def shown_with_position(job: Job) -> dict[str, Any]:
        return shown(job, await service.position(job)).model_dump()

    async def preview(job: Job) -> bytes | None:
        try:
            return await service.preview(job.id, owner)
        except ServiceError:
            return None

    stream = events(service.watch(id, owner), shown_with_position, preview, lambda: service.is_stopping)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(stream, headers=headers, media_type="text/event-stream")


# ---- models ----------------------------------------------------------------------------------------------------------


@router.get("/models", response_model=ModelList, responses=openapi.errors(503), summary="List models")
async def list_models(service: Service) -> ModelList:
    return ModelList(data=[await in_thread(_model, service)])


@router.get("/models/{id:path}", response_model=Model, responses=openapi.errors(404), summary="Look at a model")
async def get_model(id: Id, service: Service) -> Model:
    if id != service.model:
        raise ServiceError(404, "model_not_found", f"there is no model {id[:60]!r}: there is {service.model}", "model")
    return await in_thread(_model, service)


def _model(service: VideoService) -> Model:
    known = zoo.find(service.settings.model)
    defaults = service.defaults
    return Model(
        id=service.model,
        created=service.started_at,
        owned_by="pusa",
        title=known.title if known else "",
        defaults={
            "width": defaults.width,
            "height": defaults.height,
            "num_frames": defaults.num_frames,
            "fps": defaults.fps,
            "num_inference_steps": defaults.steps,
            "guidance_scale": defaults.guidance,
            "flow_shift": defaults.shift,
        },
    )
