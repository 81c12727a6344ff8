"""Send a file, whole or one range of it, from any store."""

import re
from collections.abc import AsyncIterator
from typing import BinaryIO
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pusa.numerals import parse_whole
from pusa.server.errors import ServiceError
from pusa.server.service import Content, in_thread

_CHUNK_BYTES = 256 * 1024
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


async def download(request: Request, content: Content) -> Response:
    """Respond with a file (200), one byte range of it (206) or, if the client has it already, nothing (304).

    A request for several ranges, or for another unit than bytes, gets the whole file, as RFC 9110 allows.

    Raises:
        ServiceError: 416 for a range outside the file, 404 for a file that was removed.
    """
    etag = f'"{content.etag}"'
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "cache-control": "private, max-age=86400, immutable",
        "content-disposition": _disposition(content.name),
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    start, end, status = 0, content.size, 200
    if request.headers.get("if-range", etag) == etag:
        byte_range = _parse_range(request.headers.get("range", ""), content)
        if byte_range is not None:
            (start, end), status = byte_range, 206
            headers["content-range"] = f"bytes {start}-{end - 1}/{content.size}"
    headers["content-length"] = str(end - start)
    try:
        file = await in_thread(content.open)
    except FileNotFoundError:
        raise ServiceError(404, "file_gone", f"{content.name} is not kept any more") from None
    return StreamingResponse(_read(file, start, end), status, headers, content.media_type)


def _disposition(name: str) -> str:
    """Propose a file's name: in ASCII for old programs, and as RFC 6266 has it where it holds other letters."""
    plain = name.encode("ascii", "replace").decode().replace("?", "_")
    return f'inline; filename="{plain}"' + ("" if plain == name else f"; filename*=UTF-8''{quote(name, safe='')}")


def _parse_range(header: str, content: Content) -> tuple[int, int] | None:
    """Parse a Range header to (first byte, last byte + 1); None stands for the whole file."""
    found = _RANGE.fullmatch(header.replace(" ", ""))
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":  # a suffix: the number of bytes at the end
        start, end = max(0, content.size - parse_whole(found[2])), content.size
    else:
        start, end = parse_whole(found[1]), min(content.size, parse_whole(found[2]) + 1 if found[2] else content.size)
    if found[2] and found[1] and parse_whole(found[2]) < parse_whole(found[1]):
        return None  # invalid, which RFC 9110 has ignored
    if start >= content.size or start >= end:
        message = f"{content.name} has {content.size} bytes: the range {header[:60]!r} is outside of it"
        raise ServiceError(416, "range_not_satisfiable", message, headers={"content-range": f"bytes */{content.size}"})
    return start, end


async def _read(file: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    try:
        await in_thread(file.seek, start)
        while start < end:
            chunk = await in_thread(file.read, min(_CHUNK_BYTES, end - start))
            if not chunk:
                break
            start += len(chunk)
            yield chunk
    finally:
        file.close()
