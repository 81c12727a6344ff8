"""Define the routes of ``/v1``: OpenAI's videos API with vLLM-Omni's extensions and ours."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.convertors import Convertor, register_url_convertor

from pusa.numerals import is_whole, parse_whole
from pusa.server.errors import ServiceError
from pusa.server.exports import Export
from pusa.server.http import openapi, to_request
from pusa.server.http.references import REFERENCE_FIELDS, RequestReader, read_request
from pusa.server.http.schemas import (
    CreateVideo,
    EditVideo,
    ExtendVideo,
    FinalVideo,
    RemixVideo,
    VideoEstimate,
    VideoObject,
    estimate_response,
    video_from_job,
)
from pusa.server.http.sse import STREAM_HEADERS, events
from pusa.server.http.validation import invalid_value
from pusa.server.jobs.queue import Job
from pusa.server.service import Upload, Variant, VideoService
from pusa.server.transfers.downloads import download

_RESERVED = ("cancel", "characters", "edits", "estimate", "extensions", "sync")


class _VideoConvertor(Convertor[str]):
    """Match an id in a path: any segment that is not a route of its own."""

    regex = rf"(?!(?:{'|'.join(_RESERVED)})(?:/|$))[^/]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("video", _VideoConvertor())

router = APIRouter(prefix="/v1")

_CONTENT_TYPES = ("video/mp4", "image/webp", "image/gif", "image/png")
_CREATE_FILE_FIELDS = {**dict.fromkeys(REFERENCE_FIELDS, "input_reference"), "draft_reference": "draft_reference"}
_VIDEO_FILE_FIELDS = {"video": "video"}
_DISCONNECT_SECONDS = 0.5  # between two checks whether a waiting client has disconnected


def get_service(request: Request) -> VideoService:
    return request.app.state.service


def get_owner(request: Request) -> str:
    return request.state.owner


Service = Annotated[VideoService, Depends(get_service)]
Owner = Annotated[str, Depends(get_owner)]
Id = Annotated[str, Path(description="The video's id.")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="A random key: requests with the same one return the same job.",
        min_length=1,
        max_length=255,
    ),
]


def submit_options(request: Request, idempotency_key: Key = None) -> dict[str, Any]:
    """Read the options of `JobSubmitter.create` that come in headers: retries, the trace, and the studio's mark."""
    retries = request.headers.get("x-stainless-retry-count", "0")
    traceparent = request.headers.get("traceparent", "")
    return {
        "idempotency_key": idempotency_key,
        "is_retry": is_whole(retries) and parse_whole(retries) > 0,
        "traceparent": traceparent if len(traceparent) == 55 and traceparent.isascii() else None,
        "source": "studio" if "x-pusa-page" in request.headers else "api",
    }


Options = Annotated[dict[str, Any], Depends(submit_options)]


async def video_response(service: VideoService, job: Job) -> JSONResponse:
    """Respond with a job and, in a header, how long to wait before reading it again."""
    position = await service.position(job)
    headers = {} if job.ended else {"openai-poll-after-ms": str(await service.poll_after_ms(job, position))}
    return JSONResponse(video_from_job(job, position).model_dump(), headers=headers)


# ---- making videos ---------------------------------------------------------------------------------------------------


@router.post(
    "/videos",
    response_model=VideoObject,
    responses=openapi.errors(400, 404, 409, 413, 415, 422, 429, 503, 507),
    openapi_extra=openapi.body(CreateVideo, "input_reference"),
    summary="Create a video",
)
async def create(request: Request, service: Service, owner: Owner, options: Options) -> Response:
    """Returns a queued job at once. Images and videos go into `input_reference`, as file parts of a form or as data
    URLs in JSON."""
    return await video_response(service, await _create(request, service, owner, options))


@router.post(
    "/videos/sync",
    responses={
        200: openapi.binary("The video.", "video/mp4"),
        **openapi.errors(400, 404, 409, 413, 415, 422, 429, 500, 503, 507),
    },
    response_class=Response,
    openapi_extra=openapi.body(CreateVideo, "input_reference"),
    summary="Create a video and wait for it",
)
async def create_and_wait(request: Request, service: Service, owner: Owner, options: Options) -> Response:
    """Responds with the MP4, for benchmarks. If the client disconnects, the job is cancelled."""
    job = await _create(request, service, owner, options)
    ending = asyncio.ensure_future(_wait_for_end(service.watch(job.id, owner)))
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
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
        error = video_from_job(job).error
        assert error is not None
        status = 500 if job.status == "failed" and error.code == "internal_error" else 409
        raise ServiceError(status, error.code, f"{job.id}: {error.message}")
    response = await download(request, await service.content(job.id, "video", owner))
    video = video_from_job(job)
    response.headers["x-video-id"] = job.id
    response.headers["x-inference-time-s"] = str(video.inference_time_s)
    response.headers["x-stage-durations"] = json.dumps(video.stage_durations)
    response.headers["x-peak-memory-mb"] = str(video.peak_memory_mb)
    return response


async def _wait_for_end(jobs: AsyncIterator[Job]) -> Job:
    """Return the last state of a job."""
    last = await anext(jobs)
    async for job in jobs:
        last = job
    return last


async def _wait_for_disconnect(request: Request) -> None:
    """Return once the client has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(_DISCONNECT_SECONDS)


@router.post(
    "/videos/estimate",
    response_model=VideoEstimate,
    responses=openapi.errors(400, 404, 409, 413, 415, 503, 507),
    openapi_extra=openapi.body(CreateVideo, "input_reference"),
    summary="Tell what a video would need",
)
async def estimate(request: Request, service: Service) -> VideoEstimate:
    """Checks a body of `POST /v1/videos` and returns what it would need on a worker's machine, without a job."""
    async with read_request(request, service, makes_parts=False) as reader:
        _, fields, uploads = await _read_create(reader, service)
        resolved, found = await service.estimate(fields, uploads)
    return estimate_response(service.model, resolved, found)


async def _read_create(
    reader: RequestReader, service: VideoService
) -> tuple[CreateVideo, dict[str, Any], dict[str, Upload]]:
    """Read the body of a new video; return it, the fields of a `GenerationRequest` and the uploads."""
    body = await reader.validate(CreateVideo, _CREATE_FILE_FIELDS)
    references = await reader.references(body)
    keyframes, inside = await reader.keyframes(body, references)
    drafts = await reader.draft(body)
    uploads = await service.submitter.probe({**references, **inside, **drafts})
    infos = {name: upload.info for name in references if (upload := uploads[name]).info is not None}
    fields = to_request.build_request(body, defaults=service.defaults)
    conditions = to_request.build_conditions(body, keyframes, infos, fields.get("task"))
    fields["conditions"] = conditions + to_request.draft_conditions(body, list(drafts))
    return body, fields, uploads


async def _create(request: Request, service: VideoService, owner: str, options: Mapping[str, Any]) -> Job:
    async with read_request(request, service) as reader:
        body, fields, uploads = await _read_create(reader, service)
        uses_seconds = body.seconds is not None and to_request.merge_extra_params(body).num_frames is None
        keeps_length = fields.get("task", "generate") in ("generate", "loop")
        return await service.create(
            fields,
            uploads,
            owner=owner,
            seconds=to_request.format_seconds(body.seconds or 0) if uses_seconds and keeps_length else None,
            priority=to_request.check_priority(body.priority, bool(service.settings.api_keys)),
            batch=body.batch,
            **options,
        )


@router.post(
    "/videos/extensions",
    response_model=VideoObject,
    responses=openapi.errors(400, 404, 409, 413, 415, 422, 429, 503, 507),
    openapi_extra=openapi.body(ExtendVideo, "video"),
    summary="Continue a video after its end",
)
async def extend(request: Request, service: Service, owner: Owner, options: Options) -> Response:
    """`video` is the id of a finished video, or a file."""
    async with read_request(request, service) as reader:
        body = await reader.validate(ExtendVideo, _VIDEO_FILE_FIELDS)
        videos = await _read_videos(reader, body, limit=1)
        generation = to_request.merge_extra_params(body)
        if generation.cond_positions is not None:
            raise invalid_value("an extension goes on after the end: leave cond_positions out", "cond_positions")
        job = await service.extend(
            videos[0],
            body.prompt,
            None if body.seconds is None else to_request.parse_seconds(body.seconds),
            owner=owner,
            request=_without_prompt(to_request.build_request(body, defaults=service.defaults, with_length=False)),
            noise=to_request.parse_noise_multipliers(generation),
            **options,
        )
    return await video_response(service, job)


@router.post(
    "/videos/edits",
    response_model=VideoObject,
    responses=openapi.errors(400, 404, 409, 413, 415, 422, 429, 503, 507),
    openapi_extra=openapi.body(EditVideo, "video"),
    summary="Make a video again after a prompt, or join two",
)
async def edit(request: Request, service: Service, owner: Owner, options: Options) -> Response:
    """Changes one `video` (an id or a file): all of it with much noise, or around the latent frames in
    `cond_positions`. Joins two videos by a transition."""
    async with read_request(request, service) as reader:
        body = await reader.validate(EditVideo, _VIDEO_FILE_FIELDS)
        videos = await _read_videos(reader, body, limit=2)
        generation = to_request.merge_extra_params(body)
        job = await service.edit(
            videos,
            body.prompt,
            owner=owner,
            request=_without_prompt(to_request.build_request(body, defaults=service.defaults)),
            positions=to_request.read_positions(generation),
            noise=to_request.parse_noise_multipliers(generation),
            **options,
        )
    return await video_response(service, job)


async def _read_videos(reader: RequestReader, body: ExtendVideo | EditVideo, *, limit: int) -> list[Any]:
    videos = await reader.videos(body)
    if not videos:
        raise ServiceError(400, "missing_parameter", "video is missing: send a finished video's id, or a file", "video")
    if len(videos) > limit:
        # The SDK cannot leave `video` out: beside an id it may send a file without meaning.
        ids = [video for video in videos if isinstance(video, str)]
        if len(ids) != limit:
            raise invalid_value(
                f"{len(videos)} videos are given: send {'one' if limit == 1 else 'at most two'}", "video"
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
    """There are no characters here: send images by `input_reference` instead."""
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
    response_model=VideoObject,
    responses=openapi.errors(400, 404, 413, 415, 422, 429, 503, 507),
    openapi_extra=openapi.body(RemixVideo),
    summary="Make a video once more with another prompt",
)
async def remix(request: Request, id: Id, service: Service, owner: Owner, options: Options) -> Response:
    """Keeps the inputs, settings and seed."""
    async with read_request(request, service) as reader:
        body = await reader.validate(RemixVideo, {})
    return await video_response(service, await service.remix(id, body.prompt, owner, **options))


@router.post(
    "/videos/{id:video}/final",
    response_model=VideoObject,
    responses=openapi.errors(400, 404, 409, 413, 415, 422, 429, 503, 507),
    openapi_extra=openapi.body(FinalVideo, required=False),
    summary="Make the final of a draft",
)
async def final(request: Request, id: Id, service: Service, owner: Owner, options: Options) -> Response:
    """Makes the clip of a finished draft in full quality: the same scene and motion. The body may be empty."""
    async with read_request(request, service, may_be_empty=True) as reader:
        body = await reader.validate(FinalVideo, {})
    asked = to_request.final_options(body)
    return await video_response(service, await service.final(id, owner, asked=asked, **options))


# ---- files and changes of a job --------------------------------------------------------------------------------------


@router.get(
    "/videos/{id:video}/content",
    responses={
        200: openapi.binary("The file.", *_CONTENT_TYPES),
        206: openapi.binary("The range that was asked for.", *_CONTENT_TYPES),
        304: {"description": "It has not changed."},
        **openapi.errors(400, 404, 409, 416, 503, 507),
    },
    response_class=Response,
    summary="Download a video, a picture of it, or an export",
)
async def get_content(
    request: Request,
    id: Id,
    service: Service,
    owner: Owner,
    variant: Annotated[Variant | Export, Query(description="Which of its files.")] = "video",
) -> Response:
    """Supports byte ranges. `gif`, `webp` and `last_frame` are made when they are asked for first."""
    match variant:
        case "gif" | "webp" | "last_frame":
            content = await service.exports.content(id, variant, owner)
        case _:
            content = await service.content(id, variant, owner)
    return await download(request, content)


@router.get(
    "/videos/{id:video}/events",
    responses={
        200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}},
        **openapi.errors(404, 429, 503),
    },
    response_class=StreamingResponse,
    summary="Follow a video",
)
async def follow(id: Id, service: Service, owner: Owner) -> Response:
    """Sends `video` at every change, `preview` with an image of the video so far, and `end`."""
    job = await service.get(id, owner)

    async def to_json(job: Job) -> dict[str, Any]:
        return video_from_job(job, await service.position(job)).model_dump()

    snapshots = service.follow(job)
    first = await anext(snapshots, None)  # a refusal must come before the stream begins
    stream = events(first, snapshots, to_json, service.preview_of, lambda: service.is_stopping)
    return StreamingResponse(stream, headers=STREAM_HEADERS, media_type="text/event-stream")
