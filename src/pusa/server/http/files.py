"""Define the routes of clients' files, and those that draw frames of files and videos."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from pusa.server.errors import ServiceError
from pusa.server.files import MAX_FRAME_WIDTH, MAX_STRIP_FRAMES, MAX_STRIP_HEIGHT
from pusa.server.http import openapi
from pusa.server.http.api import Id, Owner, Service
from pusa.server.http.file_schemas import CreateFile, FileDeleted, FileList, FileObject, FileRequest, file_object
from pusa.server.http.parameters import After, Limit, Number, Order, Whole
from pusa.server.http.reference_schemas import MAX_FRAME, StoredReference
from pusa.server.http.references import RequestReader, read_request
from pusa.server.http.validation import invalid_value
from pusa.server.jobs.client_files import ClientFile
from pusa.server.service import VideoService
from pusa.server.stored_requests import StoredRequests
from pusa.server.transfers.downloads import download
from pusa.server.transfers.uploads import Upload

router = APIRouter(prefix="/v1")

_TYPES = ("image/png", "image/jpeg", "image/webp", "video/mp4", "video/webm", "application/octet-stream")

FileId = Annotated[str, Path(description="The file's id.")]
Index = Annotated[
    int | None,
    Whole,
    Query(description="A frame of a clip by its number; negative counts from the end.", ge=-MAX_FRAME, le=MAX_FRAME),
]
Time = Annotated[
    float | None,
    Number,
    Query(description="A frame of a clip by its time in seconds.", ge=0, le=86_400),
]
Width = Annotated[int, Whole, Query(description="At most so many pixels wide.", ge=16, le=MAX_FRAME_WIDTH)]
Count = Annotated[int, Whole, Query(description="Frames, evenly spread.", ge=1, le=MAX_STRIP_FRAMES)]
Height = Annotated[int, Whole, Query(description="At most so many pixels high.", ge=16, le=MAX_STRIP_HEIGHT)]
Input = Annotated[
    int | None,
    Whole,
    Query(description="Of the files that the video is made from, counted from 0; before it is made too.", ge=0, le=63),
]
_DRAWN: dict[int | str, dict[str, Any]] = {
    200: openapi.binary("The picture.", "image/webp"),
    304: {"description": "It has not changed."},
    **openapi.errors(400, 404, 409, 503),
}


def _object(service: VideoService, file: ClientFile) -> FileObject:
    return file_object(file, service.library.expires_at(file))


# ---- files -----------------------------------------------------------------------------------------------------------


@router.post(
    "/files",
    response_model=FileObject,
    responses=openapi.errors(400, 404, 409, 413, 415, 503, 507),
    openapi_extra=openapi.body(CreateFile, "file"),
    summary="Keep a file",
)
async def create_file(request: Request, service: Service, owner: Owner) -> FileObject:
    """Takes a picture or a video as the part `file` of a form, as a data URL, or from a video of the server. The same
    content is the same file."""
    async with read_request(request, service) as reader:
        body = await reader.validate(CreateFile, {"file": "file"})
        upload = await _read_file(reader, body)
        kept = await service.library.add(upload, owner, body.filename or upload.name)
    return _object(service, kept)


async def _read_file(reader: RequestReader, body: CreateFile) -> Upload:
    parts = reader.files.get("file", [])
    url = body.file if body.file is not None else body.file_url
    given = len(parts) + sum(value is not None for value in (body.file, body.file_url, body.video_id))
    if given != 1:
        raise ServiceError(
            400, "missing_parameter", f"{given} files are given: send one as file, file_url or video_id", "file"
        )
    if body.input is not None and body.video_id is None:
        raise invalid_value("input counts the inputs of a video: give its video_id", "input")
    if parts:
        return parts[0]
    if body.video_id is not None:
        return await reader.stored(StoredReference(video_id=body.video_id, input=body.input), "video_id")
    found = await reader.from_url(url or "", "file_url")
    return Upload(name="", path=found.path, content_type=found.content_type, size=found.size)


@router.get("/files", response_model=FileList, responses=openapi.errors(400, 503), summary="List files")
async def list_files(
    service: Service,
    owner: Owner,
    after: After = None,
    limit: Limit = 20,
    order: Order = "desc",
) -> FileList:
    files, has_more = await service.library.list(owner, after=after or None, limit=limit, order=order)
    data = [_object(service, file) for file in files]
    return FileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    )


@router.get("/files/{id}", response_model=FileObject, responses=openapi.errors(404, 503), summary="Look at a file")
async def get_file(id: FileId, service: Service, owner: Owner) -> FileObject:
    return _object(service, await service.library.get(id, owner))


@router.delete("/files/{id}", response_model=FileDeleted, responses=openapi.errors(404, 503), summary="Remove a file")
async def delete_file(id: FileId, service: Service, owner: Owner) -> FileDeleted:
    """Videos made from it keep their own copies."""
    await service.library.delete(id, owner)
    return FileDeleted(id=id)


@router.get(
    "/files/{id}/content",
    responses={
        200: openapi.binary("The file.", *_TYPES),
        206: openapi.binary("The range that was asked for.", *_TYPES),
        304: {"description": "It has not changed."},
        **openapi.errors(404, 409, 416, 503),
    },
    response_class=Response,
    summary="Download a file",
)
async def get_file_content(request: Request, id: FileId, service: Service, owner: Owner) -> Response:
    """Supports byte ranges."""
    return await download(request, await service.library.content(id, owner))


@router.get(
    "/files/{id}/request",
    response_model=FileRequest,
    responses=openapi.errors(400, 404, 409, 413, 503, 507),
    summary="Look at the request inside a file",
)
async def get_file_request(id: FileId, service: Service, owner: Owner) -> FileRequest:
    """Returns the request inside a video of pusa, its small inputs as files; `has_request` tells if it is there."""
    found = await StoredRequests(service.settings, service.library, service.spool).read(id, owner)
    return FileRequest(request=found.body, missing=found.missing)


# ---- drawing ---------------------------------------------------------------------------------------------------------


class _FrameDrawing:
    """Draw the frame that a request asks for, of a file or of a video."""

    def __init__(
        self,
        request: Request,
        service: Service,
        owner: Owner,
        index: Index = None,
        time: Time = None,
        width: Width = MAX_FRAME_WIDTH,
    ) -> None:
        self._request, self._library, self._owner = request, service.library, owner
        self._index, self._time, self._width = index, time, width

    async def of(self, reference: StoredReference) -> Response:
        drawn = await self._library.frame(reference, self._owner, index=self._index, time=self._time, width=self._width)
        return _drawn(self._request, *drawn)


class _StripDrawing:
    """Draw the frames side by side that a request asks for, of a file or of a video."""

    def __init__(
        self, request: Request, service: Service, owner: Owner, count: Count = 12, height: Height = 64
    ) -> None:
        self._request, self._library, self._owner = request, service.library, owner
        self._count, self._height = count, height

    async def of(self, reference: StoredReference) -> Response:
        drawn = await self._library.strip(reference, self._owner, count=self._count, height=self._height)
        return _drawn(self._request, *drawn)


FrameDrawing = Annotated[_FrameDrawing, Depends()]
StripDrawing = Annotated[_StripDrawing, Depends()]


def _drawn(request: Request, content: bytes, identity: str) -> Response:
    """Respond with a picture that never changes."""
    headers = {"etag": f'"{identity}"', "cache-control": "private, max-age=86400, immutable"}
    if headers["etag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type="image/webp")


@router.get("/files/{id}/frame", responses=_DRAWN, response_class=Response, summary="Draw a frame of a file")
async def get_file_frame(id: FileId, frame: FrameDrawing) -> Response:
    """A WebP that every browser shows, whatever the format of the file; of a picture: upright and in sRGB."""
    return await frame.of(StoredReference.model_construct(file_id=id))


@router.get(
    "/files/{id}/strip", responses=_DRAWN, response_class=Response, summary="Draw frames of a file side by side"
)
async def get_file_strip(id: FileId, strip: StripDrawing) -> Response:
    """A WebP of `count` frames, each from the middle of its share of the clip."""
    return await strip.of(StoredReference.model_construct(file_id=id))


@router.get("/videos/{id:video}/frame", responses=_DRAWN, response_class=Response, summary="Draw a frame of a video")
async def get_video_frame(id: Id, frame: FrameDrawing, input: Input = None) -> Response:
    """Draws a frame of a finished video, or of one of the files that a video is made from."""
    return await frame.of(StoredReference.model_construct(video_id=id, input=input))


@router.get(
    "/videos/{id:video}/strip",
    responses=_DRAWN,
    response_class=Response,
    summary="Draw frames of a video side by side",
)
async def get_video_strip(id: Id, strip: StripDrawing, input: Input = None) -> Response:
    """Draws frames of a finished video, or of one of the files that a video is made from."""
    return await strip.of(StoredReference.model_construct(video_id=id, input=input))
