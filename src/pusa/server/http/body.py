"""Parse a request body (JSON, multipart form or URL-encoded form) to named values and files.

Files are written to the spool as they arrive, not held in memory. Names in forms may have brackets: ``name[]`` for
lists, ``name[key]`` for nested values.
"""

import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import anyio
import anyio.to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from pusa.fsutil import private_opener
from pusa.server.errors import ServiceError
from pusa.server.http.json_input import BASE64, BodyBudget, parse_json
from pusa.server.transfers.reservations import Arrival
from pusa.server.transfers.uploads import Spool, Upload

MAX_FIELDS = 200
MAX_NAME_BYTES = 200
MAX_HEADER_BYTES = 8192
"""Limit for the headers of one part of a form."""
_WRITE_BYTES = 2**20
_PARSING = anyio.CapacityLimiter(2)  # more threads would only take the interpreter away from the event loop
_IN_JSON = re.compile(r"\s*[\[{]")  # the start of a JSON list or object
_KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})((?:\[[A-Za-z0-9_]{0,64}\]){0,3})")
_BASE64_ESCAPED = BASE64 + b"%:;,."
_INDEX = re.compile(r"[0-9]{1,4}")

T = TypeVar("T")


@dataclass
class ParsedBody:
    """Values by name and, in order, files with the names of their fields.

    `is_text` marks the values of a form, in which numbers are still text.
    """

    values: dict[str, Any] = field(default_factory=dict)
    files: list[tuple[str, Upload]] = field(default_factory=list)
    is_text: bool = False

    def remove(self) -> None:
        """Delete the spooled files."""
        for _, upload in self.files:
            upload.path.unlink(missing_ok=True)


async def read_body(
    request: Request, spool: Spool, *, max_files: int, max_text_bytes: int, arrival: Arrival | None = None
) -> ParsedBody:
    """Parse the body by its content type.

    Args:
        arrival: counts what arrives and is written.

    Raises:
        ServiceError: 400 for a body that contradicts its content type or exceeds a count, 413 for more than
            `max_text_bytes` outside of file parts, 415 for another content type.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    match kind.decode("latin-1").lower():
        case "application/json":
            body = await read_bytes(request, max_text_bytes, arrival)
            return ParsedBody(values=await in_parser_thread(_parse_json_object, body))
        case "multipart/form-data":
            boundary = options.get(b"boundary", b"")
            if not 1 <= len(boundary) <= 256:
                raise ServiceError(400, "invalid_body", "the form has no boundary: send it as multipart/form-data does")
            return await _Multipart(boundary, spool, max_files, max_text_bytes, arrival).read(request.stream())
        case "application/x-www-form-urlencoded":
            body = await read_bytes(request, max_text_bytes, arrival)
            return ParsedBody(values=await in_parser_thread(parse_urlencoded, body), is_text=True)
        case other:
            shown = f"{other[:60]!r}" if other else "nothing"
            raise ServiceError(
                415,
                "unsupported_media_type",
                f"the content type is {shown}: send application/json or multipart/form-data",
            )


async def in_parser_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in one of the few threads for parsing: large bodies take long."""
    return await anyio.to_thread.run_sync(partial(function, *arguments), limiter=_PARSING)


async def read_bytes(request: Request, max_bytes: int, arrival: Arrival | None = None) -> bytearray:
    """Read the body into memory. Raises ServiceError (413) for more than `max_bytes`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_much_text(max_bytes)
        if arrival is not None:
            await arrival.received(len(chunk))
            arrival.hold_text(len(chunk))
    return body


def _too_much_text(max_bytes: int) -> ServiceError:
    message = (
        f"the body has more than {max_bytes / 2**20:g} MiB outside of file parts: send files as multipart/form-data"
    )
    return ServiceError(413, "too_large", message)


def _parse_json_object(body: bytearray) -> dict[str, Any]:
    value = parse_json(body, BodyBudget(), "the body")
    if not isinstance(value, dict):
        raise ServiceError(400, "invalid_body", f"the body is {_json_kind(value)}: send a JSON object")
    return value


def _json_kind(value: Any) -> str:
    return {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def parse_urlencoded(body: bytearray) -> dict[str, Any]:
    """Parse a URL-encoded form, in which only base64 may be long.

    The decoder splits a value at every escape, which takes much memory for values that consist of escapes; base64 has
    about two in sixty-four characters.
    """
    if _IN_JSON.match(body[:100].decode("latin-1")):
        raise ServiceError(
            415,
            "unsupported_media_type",
            "the body is JSON and its content type says a form: send the header Content-Type: application/json",
        )
    undecoded = BodyBudget()
    for part in bytes(body).split(b"&", MAX_FIELDS):
        value = part.partition(b"=")[2]
        escaped = value.count(b"%") + value.count(b"+")
        if value.translate(None, _BASE64_ESCAPED) or escaped * 16 > len(value):
            undecoded.take_plain(len(part))
    try:
        pairs = parse_qsl(
            body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="replace"
        )
    except ValueError:
        raise ServiceError(400, "invalid_body", f"the form has more than {MAX_FIELDS} fields") from None
    return parse_brackets(pairs)


# ---- names with brackets ---------------------------------------------------------------------------------------------


def parse_brackets(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Build nested values from the fields of a form.

    ``a[]`` or a repeated ``a`` is a list, ``a[b]`` and ``a[0][b]`` are nested, and text that starts like a JSON list
    or object is parsed as JSON. ``a[][b]`` is a list of objects, whose grouping such forms lose: it is restored from
    the order if every key occurs equally often.

    Raises:
        ServiceError: 400 for names or JSON that cannot be parsed, 413 for too much text outside of files.
    """
    budget = BodyBudget()
    result: dict[str, Any] = {}
    columns: dict[str, dict[str, list[Any]]] = {}  # a -> b -> values of a[][b]
    for name, text in pairs:
        found = _KEY.fullmatch(name)
        if found is None:
            shown = ascii(name)[:60]
            message = f"the field {shown} is unknown"
            raise ServiceError(400, "unknown_parameter", message, name[:60], values={"field": name[:60]})
        root, path = found[1], re.findall(r"\[([^\]]*)\]", found[2])
        value = _parse_value(root, text, budget)
        match path:
            case []:
                _append_or_set(result, root, value)
            case [""]:
                _get_list(result, root).append(value)
            case ["", key] if key:
                columns.setdefault(root, {}).setdefault(key, []).append(value)
            case [key] if key:
                _get_dict(result, root)[key] = value
            case [index, key] if index and key:
                _get_dict(_get_dict(result, root), index, root)[key] = value
            case _:
                raise ServiceError(400, "invalid_value", f"{name[:60]}: brackets are not understood; send JSON", root)
    for root, by_key in columns.items():
        if root in result or len({len(values) for values in by_key.values()}) > 1:
            raise ServiceError(
                400, "invalid_value", f"{root}: the form lost which values belong together; send one JSON string", root
            )
        rows = zip(*by_key.values(), strict=True)
        result[root] = [dict(zip(by_key, row, strict=True)) for row in rows]
    return {name: _to_list(value) for name, value in result.items()}


def _parse_value(name: str, text: str, budget: BodyBudget) -> Any:
    data = text.encode()
    is_json = _LISTED.match(text) if name == "prompts" else name not in _PLAIN_TEXT and _IN_JSON.match(text)
    if is_json:
        return parse_json(data, budget, name, name)
    budget.take_text(data)
    return text


_LISTED = re.compile(r'\s*\[\s*"')  # a line of a story may begin with a bracket: [close-up] a cat
_PLAIN_TEXT = {"prompt", "negative_prompt", "model", "image_url", "video_url"}  # never parsed as JSON


def _append_or_set(result: dict[str, Any], name: str, value: Any) -> None:
    if name not in result:
        result[name] = value
    elif isinstance(result[name], list):
        result[name].append(value)
    else:
        result[name] = [result[name], value]


def _get_list(result: dict[str, Any], name: str) -> list[Any]:
    value = result.setdefault(name, [])
    if not isinstance(value, list):
        raise ServiceError(400, "invalid_value", f"{name} is given once as a value and once as a list", name)
    return value


def _get_dict(result: dict[str, Any], name: str, root: str | None = None) -> dict[str, Any]:
    value = result.setdefault(name, {})
    if not isinstance(value, dict):
        raise ServiceError(
            400, "invalid_value", f"{root or name} is given once as a value and once in parts", root or name
        )
    return value


def _to_list(value: Any) -> Any:
    """Convert an object whose keys are 0, 1, 2... to a list."""
    if isinstance(value, dict) and value and all(_INDEX.fullmatch(key) for key in value):
        return [value[key] for key in sorted(value, key=int)]
    return value


# ---- multipart -------------------------------------------------------------------------------------------------------


class _Multipart:
    """Parse a multipart form: text stays in memory, files go to the spool a megabyte at a time."""

    def __init__(
        self, boundary: bytes, spool: Spool, max_files: int, max_text_bytes: int, arrival: Arrival | None = None
    ) -> None:
        self.spool, self.max_files, self.max_text_bytes = spool, max_files, max_text_bytes
        self.arrival = arrival
        self.pairs: list[tuple[str, str]] = []
        self.received = ParsedBody(is_text=True)
        self.ended = False
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._data = bytearray()
        self._size = self._text_size = self._header_size = 0
        self._name = ""
        self._file: _File | None = None
        self._to_write: list[tuple[Path, bytes]] = []
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_end": self._on_end,
            },
        )

    async def read(self, stream: AsyncIterator[bytes]) -> ParsedBody:
        try:
            async for chunk in stream:
                if self.arrival is not None:
                    await self.arrival.received(len(chunk))
                await in_parser_thread(self._parser.write, chunk)  # a chunk of many line breaks takes 0.1 s
                await self._write()
            self._parser.finalize()
            if not self.ended:
                raise ServiceError(400, "invalid_body", "the form is cut short: its last boundary is missing")
            self.received.values = await in_parser_thread(parse_brackets, self.pairs)
        except FormParserError:
            self._discard()
            raise ServiceError(400, "invalid_body", "the form is not valid multipart/form-data") from None
        except BaseException:
            self._discard()
            raise
        return self.received

    def _discard(self) -> None:
        self.received.remove()
        if self._file is not None:
            self._file.path.unlink(missing_ok=True)

    async def _write(self) -> None:
        for path, data in self._to_write:
            await anyio.to_thread.run_sync(partial(_append, path, data))
            if self.arrival is not None:
                self.arrival.spooled(len(data))
        self._to_write.clear()

    def _on_part_begin(self) -> None:
        self._headers, self._data, self._size, self._file, self._name = {}, bytearray(), 0, None, ""
        self._header_size = 0

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_size += size
        if self._header_size > MAX_HEADER_BYTES:
            message = (
                f"a part of the form has headers of more than {MAX_HEADER_BYTES} bytes, the limit: send shorter ones"
            )
            raise ServiceError(400, "invalid_body", message)

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name")
        if name is None or len(name) > MAX_NAME_BYTES:
            raise ServiceError(400, "invalid_body", "a part of the form has no name, or one that is too long")
        self._name = name.decode("utf-8", "replace")
        if len(self.pairs) + len(self.received.files) >= MAX_FIELDS:
            raise ServiceError(400, "invalid_body", f"the form has more than {MAX_FIELDS} fields")
        if b"filename" not in options:
            return
        if len(self.received.files) >= self.max_files:
            message = f"the form has more than {self.max_files} files"
            raise ServiceError(400, "too_many_files", message, self._name, values={"limit": self.max_files})
        self._file = _File(
            name=options[b"filename"].decode("utf-8", "replace"),
            path=self.spool.new(),
            content_type=self._headers.get(b"content-type", b"").decode("latin-1")[:100],
        )
        self._to_write.append((self._file.path, b""))  # creates an empty file too

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._file is None:
            self._text_size += end - start
            if self._text_size > self.max_text_bytes:
                raise _too_much_text(self.max_text_bytes)
            if self.arrival is not None:
                self.arrival.hold_text(end - start)
        self._data += data[start:end]
        if self._file is not None and len(self._data) >= _WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        assert self._file is not None
        self._to_write.append((self._file.path, bytes(self._data)))
        self._data.clear()

    def _on_part_end(self) -> None:
        if self._file is None:
            self.pairs.append((self._name, self._data.decode("utf-8", "replace")))
            return
        self._flush()
        upload = Upload(
            name=self._file.name, path=self._file.path, content_type=self._file.content_type, size=self._size
        )
        self.received.files.append((self._name.removesuffix("[]"), upload))
        self._file = None

    def _on_end(self) -> None:
        self.ended = True


@dataclass(frozen=True)
class _File:
    name: str
    path: Path
    content_type: str


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab", opener=private_opener) as file:
        file.write(data)
