"""Read a request's body and collect its files: form parts, data URLs, base64, URLs, and files on the server."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio
import anyio.to_thread
from starlette.requests import Request

from pusa.fields import StrictModel
from pusa.numerals import is_whole, parse_whole
from pusa.server.errors import ServiceError
from pusa.server.http import to_request, urls
from pusa.server.http.body import ParsedBody, in_parser_thread, read_body
from pusa.server.http.reference_schemas import StoredReference, UrlReference, VideoReference, stored_reference
from pusa.server.http.schemas import CreateVideo, EditVideo, ExtendVideo, KeyframeInput
from pusa.server.http.validation import invalid_value, validate_fields
from pusa.server.service import VideoService, in_thread
from pusa.server.transfers.reservations import Arrival
from pusa.server.transfers.uploads import Upload

MAX_TEXT_BYTES = 48 * 2**20
"""Limit for a body outside of file parts, which is held in memory with its images in base64.

Text that is not base64 has a lower limit, see `pusa.server.http.json_input`."""

_FETCHING = anyio.CapacityLimiter(4)  # slow hosts must not use up all threads

REFERENCE_FIELDS = ("input_reference", "input_references", "image_reference", "video_reference")

M = TypeVar("M", bound=StrictModel)


@dataclass
class RequestReader:
    """Validate the body of one request and collect its files.

    Attributes:
        owner: of the files on the server that the body may name.
        makes_parts: False where the facts about a part of a file are enough, see `FileLibrary.take`.
        files: form parts by field, in order; filled by `validate`.
        inline: files from URLs and base64 in fields, and copies of those on the server.
        reserved: space for the copies that the store will hold.
    """

    service: VideoService
    parsed_body: ParsedBody
    owner: str = ""
    makes_parts: bool = True
    files: dict[str, list[Upload]] = field(default_factory=dict)
    inline: list[Upload] = field(default_factory=list)
    reserved: list[Arrival] = field(default_factory=list)

    async def validate(self, model: type[M], file_fields: Mapping[str, str]) -> M:
        """Validate the fields, and assign the form's files to theirs.

        Args:
            file_fields: names of form parts that may hold files -> fields that the files belong to.

        Raises:
            ServiceError: 400.
        """
        values = dict(self.parsed_body.values)
        for name, upload in self.parsed_body.files:
            target = file_fields.get(name)
            is_empty = upload.size == 0 and (not upload.name or values.get(target or name) not in (None, ""))
            if is_empty:  # an empty file field of a form, or the part that the SDK sends beside an id
                continue
            if target is None:
                choices = ", ".join(sorted(set(file_fields.values())))
                message = f"{name[:60]!r} holds a file: files go into {choices}"
                raise ServiceError(400, "unknown_parameter", message, name[:60], values={"field": name[:60]})
            self.files.setdefault(target, []).append(upload)
        return await in_parser_thread(partial(validate_fields, model, values, is_text=self.parsed_body.is_text))

    async def from_url(self, url: str, param: str, expected_kind: Literal["image", "video"] | None = None) -> Upload:
        """Decode a data URL, or fetch one from an allowed host, into the spool."""
        service = self.service
        self._check_count(param)
        path = service.spool.new()
        upload = Upload(name=param, path=path, expected_kind=expected_kind)
        self.inline.append(upload)
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
            content_type, data = await in_thread(to_request.decode_data_url, url, param)
            size = len(data)
            await in_thread(path.write_bytes, data)
        return replace(upload, content_type=content_type, size=size)

    async def from_base64(self, text: str, param: str) -> Upload:
        """Decode an image from base64, or from a data URL, into the spool."""
        if text[:5].lower() == "data:":
            return await self.from_url(text, param, "image")
        return await self.from_url(f"data:;base64,{text}", param, "image")

    async def stored(self, reference: StoredReference, param: str) -> Upload:
        """Take a file on the server, or a part of it."""
        self._check_count(param)
        library = self.service.library
        upload = await library.take(reference, self.owner, param=param, makes_parts=self.makes_parts)
        self.inline.append(upload)
        self.reserved.append(await in_thread(library.reserve, upload.path.stat().st_size))
        return upload

    def _check_count(self, param: str) -> None:
        limit = self.service.settings.max_uploads
        if len(self.inline) + len(self.parsed_body.files) >= limit:
            message = f"more than {limit} files are sent, the limit: send fewer"
            raise ServiceError(400, "too_many_files", message, param, values={"limit": limit})

    async def _file_of(self, item: str | UrlReference | StoredReference, param: str) -> Upload:
        reference = stored_reference(item) if isinstance(item, str) else item
        if isinstance(reference, StoredReference):
            return await self.stored(reference, param)
        assert not isinstance(item, StoredReference)
        url, expected_kind = _url_and_kind(item)
        return await self.from_url(url, param, expected_kind)

    async def references(self, body: CreateVideo) -> dict[str, Upload]:
        """Collect the files of input_reference and its other names in order: form parts first, then the others."""
        found = [upload for name in REFERENCE_FIELDS for upload in self.files.get(name, [])]
        for name in ("input_reference", "image_reference", "video_reference"):
            for item in _as_list(getattr(body, name)):
                found.append(await self._file_of(item, name))
        return {f"reference_{number}": upload for number, upload in enumerate(found)}

    async def draft(self, body: CreateVideo) -> dict[str, Upload]:
        """Collect the file of draft_reference, if there is one."""
        found = [replace(upload, expected_kind="video") for upload in self.files.get("draft_reference", [])]
        if body.draft_reference is not None:
            found.append(replace(await self._file_of(body.draft_reference, "draft_reference"), expected_kind="video"))
        return {f"draft_{number}": upload for number, upload in enumerate(found)}

    async def keyframes(
        self, body: CreateVideo, references: Mapping[str, Upload]
    ) -> tuple[list[tuple[KeyframeInput, str]], dict[str, Upload]]:
        """Pair each keyframe with the name of its file; also collect the files inside keyframes by name."""
        frames: list[tuple[KeyframeInput, str]] = []
        inside: dict[str, Upload] = {}
        for number, frame in enumerate(body.keyframes or []):
            if frame.file is not None:
                name = f"reference_{frame.file}"
                if name not in references:
                    message = (
                        f"keyframe {number + 1}: file={frame.file}, and {len(references)} files are in input_reference"
                    )
                    raise invalid_value(f"{message}: they are counted from 0", "keyframes")
            else:
                name = f"keyframe_{number}"
                inside[name] = await self._picture_of(frame)
            frames.append((frame, name))
        return frames, inside

    async def _picture_of(self, frame: KeyframeInput) -> Upload:
        if frame.reference is not None:
            return await self.stored(frame.reference, "keyframes")
        if frame.image_b64 is not None:
            return await self.from_base64(frame.image_b64, "image_b64")
        return await self.from_url(frame.image_url or "", "image_url", "image")

    async def videos(self, body: ExtendVideo | EditVideo) -> list[str | Upload]:
        """Collect the ids and files of `video` in order: ids and URLs first, then form parts."""
        found: list[str | Upload] = []
        for item in _as_list(body.video):
            reference = stored_reference(item) if isinstance(item, str) else item
            if isinstance(reference, VideoReference):
                found.append(reference.id)
            elif isinstance(reference, StoredReference):
                if reference.video_id is not None and reference.input is None and not reference.is_part:
                    found.append(reference.video_id)
                else:
                    found.append(await self.stored(reference, "video"))
            else:
                assert not isinstance(item, VideoReference | StoredReference)
                found.append(await self.from_url(_url_and_kind(item)[0], "video", "video"))
        return found + [replace(upload, expected_kind="video") for upload in self.files.get("video", [])]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _url_and_kind(item: str | UrlReference) -> tuple[str, Literal["image", "video"] | None]:
    if isinstance(item, str):
        return item, None
    return (item.image_url, "image") if item.image_url is not None else (item.video_url or "", "video")


@asynccontextmanager
async def read_request(
    request: Request, service: VideoService, *, may_be_empty: bool = False, makes_parts: bool = True
) -> AsyncIterator[RequestReader]:
    """Parse the body of a request, or take one without fields where it `may_be_empty`; delete its files on leaving."""
    async with arriving(request, service) as arrival:
        if may_be_empty and _is_empty(request):
            parsed_body = ParsedBody(values={})
        else:
            parsed_body = await read_body(
                request,
                service.spool,
                max_files=service.settings.max_uploads,
                max_text_bytes=MAX_TEXT_BYTES,
                arrival=arrival,
            )
        reader = RequestReader(service, parsed_body, owner=request.state.owner, makes_parts=makes_parts)
        try:
            yield reader
        finally:
            parsed_body.remove()
            for upload in reader.inline:
                upload.path.unlink(missing_ok=True)
            for arrival in reader.reserved:
                arrival.release()


def _is_empty(request: Request) -> bool:
    """Return True for a request that has no body by its headers."""
    return "transfer-encoding" not in request.headers and request.headers.get("content-length", "0") == "0"


@asynccontextmanager
async def arriving(request: Request, service: VideoService, *folders: Path) -> AsyncIterator[Arrival]:
    """Reserve space for the body of a request until its files are stored or dropped.

    Args:
        folders: which the files go to from the spool; the store by default.

    Raises StorageFullError if there is too little.
    """
    length = request.headers.get("content-length", "")
    arrival = await in_thread(service.arrival, parse_whole(length) if is_whole(length) else None, *folders)
    try:
        yield arrival
    finally:
        arrival.release()
