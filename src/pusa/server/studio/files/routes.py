"""Receive and serve the page's files at the addresses that Gradio's components use."""

import asyncio
import hashlib
import json
import mimetypes
import re
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from pusa.server.errors import ServiceError
from pusa.server.http.body import ParsedBody, read_body
from pusa.server.http.json_input import MAX_PLAIN_BYTES
from pusa.server.http.references import arriving
from pusa.server.service import Content, VideoService, in_thread
from pusa.server.studio.files.uploads import Arriving, Progress, VisitorFiles
from pusa.server.studio.routes import owner_of
from pusa.server.transfers.downloads import download

_LOOK_SECONDS, _WAIT_SECONDS, _STILL_SECONDS = 0.1, 3.0, 15.0
_FILE_NAME = re.compile(rb'filename="([^"\r\n]{1,300})"')
_SHOWN = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "video/")  # no type that may run scripts

UploadId = Annotated[str, Query(max_length=64)]


class _Counting(Request):
    """Count the bytes of a request's body as they arrive."""

    arriving: Arriving | None = None

    async def stream(self) -> AsyncGenerator[bytes, None]:
        async for chunk in super().stream():
            if self.arriving is not None:
                names = _FILE_NAME.findall(chunk)
                self.arriving.name = names[-1].decode("utf-8", "replace") if names else self.arriving.name
                self.arriving.new_bytes += len(chunk)
            yield chunk


def file_router(files: VisitorFiles, service: VideoService) -> APIRouter:
    """Build the routes for the visitors' files."""
    routes = APIRouter(prefix="/gradio_api", include_in_schema=False)
    progress = Progress()

    @routes.post("/upload")
    async def upload(request: Request, upload_id: UploadId | None = None) -> JSONResponse:
        """Store the files of a form and return their paths in order."""
        owner, settings = owner_of(request), service.settings
        counting = _Counting(request.scope, request.receive)
        counting.arriving = None if upload_id is None else progress.of(owner, upload_id)
        received = ParsedBody()
        try:
            async with arriving(request, service, files.disk) as arrival:
                received = await read_body(
                    counting,
                    service.spool,
                    max_files=settings.max_uploads,
                    max_text_bytes=MAX_PLAIN_BYTES,
                    arrival=arrival,
                )
                return JSONResponse(await in_thread(_move_all, received, owner, files))
        finally:
            received.remove()
            if counting.arriving is not None:
                counting.arriving.is_done = True

    @routes.get("/upload_progress")
    async def upload_progress(request: Request, upload_id: UploadId) -> Response:
        owner = owner_of(request)
        events = _events(request, progress.of(owner, upload_id), partial(progress.forget, owner, upload_id))
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})

    @routes.api_route("/file={path:path}", methods=["GET", "HEAD"])
    async def file(request: Request, path: str) -> Response:
        owner = owner_of(request)
        if not await in_thread(files.is_own, owner, path):
            raise ServiceError(404, "not_found", "there is no such file: it was sent by somebody else, or is gone")
        return await download(request, await in_thread(_content, Path(path)))

    return routes


def _move_all(received: ParsedBody, owner: str, files: VisitorFiles) -> list[str]:
    if received.values or not received.files:
        raise ServiceError(400, "invalid_file", "the form holds no file: send files as parts of multipart/form-data")
    return [str(files.move(owner, upload.path, upload.name)) for _, upload in received.files]


def _content(path: Path) -> Content:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ServiceError(404, "file_gone", "the file is not kept any more: choose it again") from None
    kind = mimetypes.guess_type(path.name)[0] or ""
    return Content(
        path=path,
        open=lambda: path.open("rb"),
        size=size,
        media_type=kind if kind.startswith(_SHOWN) else "application/octet-stream",
        name=path.name.encode("ascii", "replace").decode().replace("?", "_"),
        etag=hashlib.sha256(str(path).encode()).hexdigest()[:32],  # a path is written once
    )


async def _events(request: Request, arriving: Arriving, forget: partial[None]) -> AsyncIterator[str]:
    """Send the bytes that came since the last event, as Gradio's page reads it, until all have come."""
    silent = 0.0
    began = False
    while not arriving.is_done and not await request.is_disconnected():
        if arriving.new_bytes:
            update = {"msg": "update", "orig_name": arriving.name, "chunk_size": arriving.new_bytes}
            arriving.new_bytes, silent, began = 0, 0.0, True
            yield f"data: {json.dumps(update)}\n\n"
        elif silent >= (_STILL_SECONDS if began else _WAIT_SECONDS):
            if not began:
                break
            silent = 0.0
            yield 'data: {"msg": "heartbeat"}\n\n'
        await asyncio.sleep(_LOOK_SECONDS)
        silent += _LOOK_SECONDS
    forget()
    yield 'data: {"msg": "done"}\n\n'
