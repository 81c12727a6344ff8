"""From the bytes of a request to named values and files: JSON, multipart forms and plain forms alike.

Files go to the spool as they come, not through memory. Names may be bracketed as forms do it: ``name[]`` for lists,
``name[key]`` for values inside.
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

from pusa.server.errors import ServiceError
from pusa.server.http.json_input import BASE64, Budget, parsed
from pusa.server.uploads import Spool, Upload

MAX_FIELDS = 200
MAX_NAME_BYTES = 200
MAX_HEADER_BYTES = 8192
"""The most bytes of the headers of a part of a form."""
_WRITE_BYTES = 2**20
_READING = anyio.CapacityLimiter(2)  # Python runs one of them at a time; the event loop has its turns between two
_IN_JSON = re.compile(r"\s*[\[{]")  # how text starts that is JSON
_KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})((?:\[[A-Za-z0-9_]{0,64}\]){0,3})")
_BASE64_ESCAPED = BASE64 + b"%:;,."
_INDEX = re.compile(r"[0-9]{1,4}")

T = TypeVar("T")


@dataclass
class Received:
    """A request's body: `values` by name, and `files` in their order with the names of their fields.

    `is_text`: the values are a form's, so that numbers are still text.
    """

    values: dict[str, Any] = field(default_factory=dict)
    files: list[tuple[str, Upload]] = field(default_factory=list)
    is_text: bool = False

    def remove(self) -> None:
        """Remove the files that no job has taken."""
        for _, upload in self.files:
            upload.path.unlink(missing_ok=True)


async def read_body(request: Request, spool: Spool, *, max_files: int, max_text_bytes: int) -> Received:
    """The body, whatever its content type.

    Raises:
        ServiceError: 400 for a body that is not what its content type says or has too much of something, 413 for
            more than `max_text_bytes` outside of file parts, 415 for another content type.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    match kind.decode("latin-1").lower():
        case "application/json":
            return Received(values=await in_reader(_json_object, await read_bytes(request, max_text_bytes)))
        case "multipart/form-data":
            boundary = options.get(b"boundary", b"")
            if not 1 <= len(boundary) <= 256:
                raise ServiceError(400, "invalid_body", "the form has no boundary: send it as multipart/form-data does")
            return await _Multipart(boundary, spool, max_files, max_text_bytes).read(request.stream())
        case "application/x-www-form-urlencoded":
            body = await read_bytes(request, max_text_bytes)
            return Received(values=await in_reader(_urlencoded, body), is_text=True)
        case other:
            shown = f"{other[:60]!r}" if other else "nothing"
            raise ServiceError(
                415,
                "unsupported_media_type",
                f"the content type is {shown}: send application/json or multipart/form-data",
            )


async def in_reader(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on a body in one of the few threads for that: it may be a large one."""
    return await anyio.to_thread.run_sync(partial(function, *arguments), limiter=_READING)


async def read_bytes(request: Request, most: int) -> bytearray:
    """The body. Raises ServiceError (413) for more than `most` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_much_text(most)
    return body


def _too_much_text(most: int) -> ServiceError:
    told = f"the body has more than {most / 2**20:g} MiB outside of file parts: send files as multipart/form-data"
    return ServiceError(413, "too_large", told)


def _json_object(body: bytearray) -> dict[str, Any]:
    value = parsed(body, Budget(), "the body")
    if not isinstance(value, dict):
        raise ServiceError(400, "invalid_body", f"the body is {_json_kind(value)}: send a JSON object")
    return value


def _json_kind(value: Any) -> str:
    return {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _urlencoded(body: bytearray) -> dict[str, Any]:
    """The values of a plain form. Every escape is a piece of its own while it is read: only base64 may be long, which
    has one plus sign, or slash, among sixty-four characters."""
    undecoded = Budget()
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
    return unbracketed(pairs)


# ---- names with brackets ---------------------------------------------------------------------------------------------


def unbracketed(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Values by name. ``a[]`` or a repeated ``a`` is a list, ``a[b]`` and ``a[0][b]`` are values inside, and text that
    is a JSON list or object is read as that.

    ``a[][b]`` is a list of objects. Clients lose which values belong together there: they are put together by their
    order where every key comes equally often, and refused elsewhere.

    Raises:
        ServiceError: 400, and 413 for too much text that is no file.
    """
    budget = Budget()
    result: dict[str, Any] = {}
    columns: dict[str, dict[str, list[Any]]] = {}  # a -> b -> values of a[][b]
    for name, text in pairs:
        found = _KEY.fullmatch(name)
        if found is None:
            shown = ascii(name)[:60]
            raise ServiceError(400, "unknown_parameter", f"the field {shown} is unknown", name[:60])
        root, path = found[1], re.findall(r"\[([^\]]*)\]", found[2])
        value = _value_of(root, text, budget)
        match path:
            case []:
                _append_or_set(result, root, value)
            case [""]:
                _list_of(result, root).append(value)
            case ["", key] if key:
                columns.setdefault(root, {}).setdefault(key, []).append(value)
            case [key] if key:
                _inside(result, root)[key] = value
            case [index, key] if index and key:
                _inside(_inside(result, root), index, root)[key] = value
            case _:
                raise ServiceError(400, "invalid_value", f"{name[:60]}: brackets are not understood; send JSON", root)
    for root, by_key in columns.items():
        if root in result or len({len(values) for values in by_key.values()}) > 1:
            raise ServiceError(
                400, "invalid_value", f"{root}: the form lost which values belong together; send one JSON string", root
            )
        rows = zip(*by_key.values(), strict=True)
        result[root] = [dict(zip(by_key, row, strict=True)) for row in rows]
    return {name: _listed(value) for name, value in result.items()}


def _value_of(name: str, text: str, budget: Budget) -> Any:
    data = text.encode()
    if _IN_JSON.match(text) and name not in _TEXTS:
        return parsed(data, budget, name, name)
    budget.take_text(data)
    return text


_TEXTS = {"prompt", "negative_prompt", "model", "image_url", "video_url"}  # never JSON, whatever they start with


def _append_or_set(result: dict[str, Any], name: str, value: Any) -> None:
    if name not in result:
        result[name] = value
    elif isinstance(result[name], list):
        result[name].append(value)
    else:
        result[name] = [result[name], value]


def _list_of(result: dict[str, Any], name: str) -> list[Any]:
    value = result.setdefault(name, [])
    if not isinstance(value, list):
        raise ServiceError(400, "invalid_value", f"{name} is given once as a value and once as a list", name)
    return value


def _inside(result: dict[str, Any], name: str, root: str | None = None) -> dict[str, Any]:
    value = result.setdefault(name, {})
    if not isinstance(value, dict):
        raise ServiceError(
            400, "invalid_value", f"{root or name} is given once as a value and once in parts", root or name
        )
    return value


def _listed(value: Any) -> Any:
    """Objects whose keys are 0, 1, 2... are the lists that the form could not write."""
    if isinstance(value, dict) and value and all(_INDEX.fullmatch(key) for key in value):
        return [value[key] for key in sorted(value, key=int)]
    return value


# ---- multipart -------------------------------------------------------------------------------------------------------


class _Multipart:
    """A form with files. Text is kept, files are written to the spool in pieces of a megabyte."""

    def __init__(self, boundary: bytes, spool: Spool, max_files: int, max_text_bytes: int) -> None:
        self.spool, self.max_files, self.max_text_bytes = spool, max_files, max_text_bytes
        self.pairs: list[tuple[str, str]] = []
        self.received = Received(is_text=True)
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
                "on_part_begin": self._part_begins,
                "on_part_data": self._part_data,
                "on_part_end": self._part_ends,
                "on_header_field": self._header_field,
                "on_header_value": self._header_text,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_end": self._ends,
            },
        )

    async def read(self, stream: AsyncIterator[bytes]) -> Received:
        try:
            async for chunk in stream:
                await in_reader(self._parser.write, chunk)  # a piece of many line breaks takes a tenth of a second
                await self._write()
            self._parser.finalize()
            if not self.ended:
                raise ServiceError(400, "invalid_body", "the form is cut short: its last boundary is missing")
            self.received.values = await in_reader(unbracketed, self.pairs)
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
        self._to_write.clear()

    def _part_begins(self) -> None:
        self._headers, self._data, self._size, self._file, self._name = {}, bytearray(), 0, None, ""
        self._header_size = 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def _header_text(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_size += size
        if self._header_size > MAX_HEADER_BYTES:
            told = f"a part of the form has headers of more than {MAX_HEADER_BYTES} bytes, the limit: send shorter ones"
            raise ServiceError(400, "invalid_body", told)

    def _header_ends(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _headers_end(self) -> None:
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
            raise ServiceError(400, "too_many_files", f"the form has more than {self.max_files} files", self._name)
        self._file = _File(
            name=options[b"filename"].decode("utf-8", "replace"),
            path=self.spool.new(),
            content_type=self._headers.get(b"content-type", b"").decode("latin-1")[:100],
        )
        self._to_write.append((self._file.path, b""))  # an empty file is a file

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._file is None:
            self._text_size += end - start
            if self._text_size > self.max_text_bytes:
                raise _too_much_text(self.max_text_bytes)
        self._data += data[start:end]
        if self._file is not None and len(self._data) >= _WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        assert self._file is not None
        self._to_write.append((self._file.path, bytes(self._data)))
        self._data.clear()

    def _part_ends(self) -> None:
        if self._file is None:
            self.pairs.append((self._name, self._data.decode("utf-8", "replace")))
            return
        self._flush()
        upload = Upload(
            name=self._file.name, path=self._file.path, content_type=self._file.content_type, size=self._size
        )
        self.received.files.append((self._name.removesuffix("[]"), upload))
        self._file = None

    def _ends(self) -> None:
        self.ended = True


@dataclass(frozen=True)
class _File:
    name: str
    path: Path
    content_type: str


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
