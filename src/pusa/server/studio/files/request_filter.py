"""Check the requests of the page before Gradio sees them.

Gradio has many more routes than this page uses, believes the paths that a page names, and reads bodies of any size on
the event loop. So only the routes listed here reach it, and this module reads, counts and checks a body first.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr
from gradio.components import Component
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pusa.server.errors import ServiceError
from pusa.server.http.body import in_parser_thread, read_bytes
from pusa.server.http.json_input import MAX_PLAIN_BYTES, BodyBudget, parse_json
from pusa.server.http.middleware import path_of
from pusa.server.studio.files.uploads import VisitorFiles
from pusa.server.studio.routes import owner_of
from pusa.server.studio.timeline import is_value

RUN = "/gradio_api/run/predict"
_READ = frozenset({"", "/", "/config", "/theme.css", "/manifest.json", "/robots.txt"})
_READ_BELOW = ("/assets/", "/static/")
_LONGEST_PATH = 250
_HEADERS_LEFT_OUT = frozenset(
    {b"x-forwarded-host", b"x-gradio-server"}
)  # Gradio would take the page's address from them
_KINDS: dict[str, type] = {
    "session_hash": str,
    "trigger_id": int,
    "event_id": str,
    "simple_format": bool,
    "batched": bool,
}
_FIELDS = frozenset({"data", "fn_index", "event_data", *_KINDS})


class RequestFilter:
    """Pass the requests of one page on to Gradio's app, and refuse all others.

    Args:
        app: Gradio's.
        page: its blocks.
        files: the files that visitors may name.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, files: VisitorFiles) -> None:
        self.app, self.page, self.files = app, page, files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = path_of(scope)
        scope = {**scope, "headers": [(n, v) for n, v in scope["headers"] if n.lower() not in _HEADERS_LEFT_OUT]}
        if scope["type"] == "http" and scope["method"] == "POST" and path == RUN:
            await self.app(scope, await self._checked(Request(scope, receive)), send)
        elif scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and _is_read(path, scope):
            await self.app(scope, receive, send)
        else:
            raise ServiceError(
                404, "not_found", f"there is nothing at {path[:100]}: the page uses no more than it shows"
            )

    async def _checked(self, request: Request) -> Receive:
        """Check a body and write it anew, so that Gradio reads exactly the checked values. Raises ServiceError.

        The new body names no session: Gradio would keep a copy of the page for each of thousands, and in it build the
        parts that it updates anew, without the methods that `confine` and the page have replaced. This page needs none.
        """
        body = await read_bytes(request, MAX_PLAIN_BYTES)
        call = await in_parser_thread(parse_json, body, BodyBudget(), "the body")
        await in_parser_thread(check_files, call, owner_of(request), self.files)
        check_call(call, self.page)
        call["session_hash"] = None
        try:
            written = json.dumps(call, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _wrong("a text holds half a character: type it anew") from None
        messages: list[Message] = [{"type": "http.request", "body": written, "more_body": False}]

        async def again() -> Message:
            return messages.pop() if messages else await request.receive()

        return again


def _is_read(path: str, scope: Scope) -> bool:
    if "deep_link" in QueryParams(scope.get("query_string", b"")):  # a page that somebody else has saved
        return False
    if len(path.encode("utf-8", "surrogateescape")) > _LONGEST_PATH or "\0" in path:
        return False  # a name that no file can have
    return path in _READ or path.startswith(_READ_BELOW)


# ---- files -----------------------------------------------------------------------------------------------------------


def check_files(call: Any, owner: str, files: VisitorFiles) -> None:
    """Raise ServiceError (400) for a file, anywhere in a call, that its visitor has not sent.

    So it does for any other object that Gradio might take for a file.
    """
    for one in _objects(call):
        if one.get("path") is not None:
            files.check(owner, one["path"])
        if "meta" in one and not _is_file(one):
            raise _wrong("a file of the page is not described as the page does it: choose the file again")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects in a value that is nested no deeper than `parse_json` allows."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner)


# ---- values ----------------------------------------------------------------------------------------------------------


def check_call(call: Any, page: gr.Blocks) -> None:
    """Check a call of one of the page's handlers: Gradio's own errors are a traceback and an empty answer.

    Raises:
        ServiceError: 400; the message names the part whose value is wrong.
    """
    if not isinstance(call, dict):
        raise _wrong("the body is no JSON object")
    if unknown := sorted(set(call) - _FIELDS):
        raise _wrong(f"{unknown[0][:60]!r} is unknown")
    number, data = call.get("fn_index"), call.get("data")
    handler = page.fns.get(number) if type(number) is int else None
    if handler is None or handler.fn is None:
        raise _wrong("fn_index names no handler of the page: load the page anew", "fn_index")
    for name, kind in _KINDS.items():
        value = call.get(name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, str) and len(value) > 100)):
            raise _wrong(f"{name}={str(value)[:60]!r} is of another kind: load the page anew", name)
    if not isinstance(data, list) or len(data) != len(handler.inputs):
        raise _wrong(f"data is no list of {len(handler.inputs)} values: load the page anew", "data")
    for part, value in zip(handler.inputs, data, strict=True):
        if isinstance(part, Component) and not _fits(part, value):
            name = str(getattr(part, "elem_id", None) or part.get_block_name())
            raise _wrong(f"{name} cannot have the value {str(value)[:60]!r}: put it right, or load the page anew", name)


def _wrong(message: str, param: str | None = None) -> ServiceError:
    return ServiceError(400, "invalid_value", message, param)


def _fits(part: Component, value: Any) -> bool:
    """Tell whether a part of the page may have a value; None is an empty one."""
    match part:
        case gr.Slider():
            if type(value) not in (int, float):
                return False
            return math.isfinite(value) and part.minimum <= value <= part.maximum
        case gr.Radio():
            return any(value == choice and type(value) is type(choice) for _, choice in part.choices)
        case gr.Checkbox():
            return type(value) is bool
        case gr.Textbox() | gr.Dropdown():
            return value is None or isinstance(value, str)
        case gr.Image() | gr.Video():
            return value is None or _is_file(value)
        case gr.Gallery():
            return value is None or (isinstance(value, list) and len(value) <= 64 and all(map(_is_picture, value)))
        case gr.HTML():
            return value is None or (isinstance(value, dict) and (part.elem_id != "timeline" or is_value(value)))
    return False


def _is_file(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str) or not value["path"]:
        return False
    texts = all(isinstance(value.get(name), str | None) for name in ("url", "orig_name", "mime_type"))
    size, is_stream = value.get("size"), value.get("is_stream", False)
    is_whole = (size is None or (type(size) is int and 0 <= size < 2**53)) and is_stream is False
    return texts and is_whole and value.get("meta") == {"_type": "gradio.FileData"}


def _is_picture(value: Any) -> bool:
    if not isinstance(value, Mapping) or not set(value) <= {"image", "caption"}:
        return False
    return _is_file(value.get("image")) and isinstance(value.get("caption"), str | None)
