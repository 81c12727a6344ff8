"""A request's body on its way to the service: files out of forms, out of the JSON itself and from allowed addresses."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeVar

import anyio
import anyio.to_thread
from starlette.requests import Request

from pusa.fields import StrictModel
from pusa.server.errors import ServiceError
from pusa.server.http import to_request as translate
from pusa.server.http import urls
from pusa.server.http.body import Received, in_reader, read_body
from pusa.server.http.schemas import CreateVideo, EditVideo, ExtendVideo, Keyframe, UrlReference, VideoReference
from pusa.server.service import VideoService, in_thread, is_id
from pusa.server.uploads import Upload

MAX_TEXT_BYTES = 48 * 2**20
"""The most bytes of a body outside of file parts: it is held in memory, and pictures in base64 are in it.

What is no base64 has a limit of its own (`pusa.server.http.json_input`)."""

_FETCHING = anyio.CapacityLimiter(4)  # what waits for others must not use up all threads

REFERENCE_FIELDS = ("input_reference", "input_references", "image_reference", "video_reference")

M = TypeVar("M", bound=StrictModel)


@dataclass
class Intake:
    """A body with its files: `files` by field, as they came."""

    service: VideoService
    received: Received
    files: dict[str, list[Upload]] = field(default_factory=dict)
    made: list[Upload] = field(default_factory=list)

    async def check(self, model: type[M], file_fields: Mapping[str, str]) -> M:
        """The fields, and the files in the fields where files belong (by the names they are sent under).

        Raises ServiceError (400).
        """
        values = dict(self.received.values)
        for name, upload in self.received.files:
            target = file_fields.get(name)
            is_empty = upload.size == 0 and (not upload.name or values.get(target or name) not in (None, ""))
            if is_empty:  # a form's file field that was left empty, or the SDK's beside an id
                continue
            if target is None:
                known = ", ".join(sorted(set(file_fields.values())))
                told = f"{name[:60]!r} holds a file: files go into {known}"
                raise ServiceError(400, "unknown_parameter", told, name[:60])
            self.files.setdefault(target, []).append(upload)
        return await in_reader(partial(translate.checked, model, values, is_text=self.received.is_text))

    async def from_url(self, url: str, param: str, wanted: Literal["image", "video"] | None = None) -> Upload:
        """The file that a data URL holds, or that an allowed address does."""
        service = self.service
        path = service.spool.new()
        upload = Upload(name=param, path=path, wanted=wanted)
        self.made.append(upload)
        if len(self.made) + len(self.received.files) > service.settings.max_uploads:
            most = service.settings.max_uploads
            raise ServiceError(400, "too_many_files", f"more than {most} files are sent, the limit: send fewer", param)
        if url[:8].lower().startswith(("https://", "http://")):
            fetch = partial(
                urls.fetch,
                url,
                path,
                allowed=service.settings.image_url_hosts,
                max_bytes=service.settings.max_body_bytes,
            )
            content_type, size = await anyio.to_thread.run_sync(fetch, limiter=_FETCHING)
        else:
            content_type, data = await in_thread(translate.data_of, url, param)
            size = len(data)
            await in_thread(path.write_bytes, data)
        return replace(upload, content_type=content_type, size=size)

    async def from_base64(self, text: str, param: str) -> Upload:
        if text[:5].lower() == "data:":
            return await self.from_url(text, param, "image")
        return await self.from_url(f"data:;base64,{text}", param, "image")

    async def references(self, body: CreateVideo) -> dict[str, Upload]:
        """What input_reference and its other names hold, in order: files first, then what is in the text."""
        found = [upload for name in REFERENCE_FIELDS for upload in self.files.get(name, [])]
        for name in ("input_reference", "image_reference", "video_reference"):
            given = getattr(body, name)
            for item in given if isinstance(given, list) else [] if given is None else [given]:
                url, wanted = _url_of(item)
                found.append(await self.from_url(url, name, wanted))
        return {f"reference_{number}": upload for number, upload in enumerate(found)}

    async def keyframes(
        self, body: CreateVideo, references: Mapping[str, Upload]
    ) -> tuple[list[tuple[Keyframe, str]], dict[str, Upload]]:
        """Each keyframe with the name of its file, and the files that came inside keyframes."""
        frames: list[tuple[Keyframe, str]] = []
        inside: dict[str, Upload] = {}
        for number, frame in enumerate(body.keyframes or []):
            if frame.file is not None:
                name = f"reference_{frame.file}"
                if name not in references:
                    told = (
                        f"keyframe {number + 1}: file={frame.file}, and {len(references)} files are in input_reference"
                    )
                    raise translate.invalid(f"{told}: they are counted from 0", "keyframes")
            else:
                name = f"keyframe_{number}"
                source = frame.image_b64 or frame.image_url or ""
                inside[name] = await (
                    self.from_base64(source, "image_b64")
                    if frame.image_b64 is not None
                    else self.from_url(source, "image_url", "image")
                )
            frames.append((frame, name))
        return frames, inside

    async def videos(self, body: ExtendVideo | EditVideo) -> list[str | Upload]:
        """Ids and files in `video`, in order: what the text says, then files."""
        given = body.video
        found: list[str | Upload] = []
        for item in given if isinstance(given, list) else [] if given is None else [given]:
            if isinstance(item, VideoReference):
                found.append(item.id)
            elif isinstance(item, str) and (is_id(item) or item.startswith("video_")):
                found.append(item)
            else:
                found.append(await self.from_url(_url_of(item)[0], "video", "video"))
        return found + [replace(upload, wanted="video") for upload in self.files.get("video", [])]


def _url_of(item: str | UrlReference) -> tuple[str, Literal["image", "video"] | None]:
    """The address, and what the sender says is there."""
    if isinstance(item, str):
        return item, None
    return (item.image_url, "image") if item.image_url is not None else (item.video_url or "", "video")


@asynccontextmanager
async def taken_in(request: Request, service: VideoService) -> AsyncIterator[Intake]:
    """The body of a request; its files are removed at the end."""
    received = await read_body(
        request, service.spool, max_files=service.settings.max_uploads, max_text_bytes=MAX_TEXT_BYTES
    )
    intake = Intake(service, received)
    try:
        yield intake
    finally:
        received.remove()
        for upload in intake.made:
            upload.path.unlink(missing_ok=True)
