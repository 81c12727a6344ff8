"""What every request passes before anything reads it: host, origin, key, size. And what every answer passes on its way.

One ASGI middleware, outside of all else, so that nothing can be reached around it. An error that nothing has caught
ends here, as an answer in the envelope.
"""

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import time
from base64 import b64decode
from collections.abc import Collection, Iterable
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pusa.numerals import is_whole, parse_whole
from pusa.server.connections import REFUSED
from pusa.server.errors import ServiceError, respond
from pusa.server.logs import log_context

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Answered without a key and for any host: for those who watch over the server."""

_API_PATHS = ("/v1/", "/metrics", "/openapi.json", "/docs")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_HOST = re.compile(r"(?:\[([0-9a-f:.%]+)\]|([^\[\]:]*))(?::[0-9]*)?")
_DRAINED_BYTES, _DRAINED_SECONDS = 16 * 2**20, 2.0  # of a body that nobody reads any more
_LEAST_BYTES_PER_SECOND = 1024  # of a body, over all the time that was waited for it
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class ApiKeys:
    """The keys that are let in. None: everyone is, and owns what everyone does."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(dict.fromkeys(hashlib.sha256(key.encode()).digest() for key in keys))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, presented: str | None) -> str | None:
        """Who presents a key: its sha256, "" where no keys are set, None for a wrong one.

        Every key is compared, in a time that does not depend on what was presented.
        """
        if not self._digests:
            return ""
        digest = hashlib.sha256((presented or "").encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex() if any(matches) else None

    def owner_of(self, headers: Headers) -> str | None:
        """Who sends a request: by ``Authorization: Bearer KEY``, or, as browsers ask for it, Basic with the key as
        password."""
        scheme, _, rest = headers.get("authorization", "").partition(" ")
        match scheme.lower():
            case "bearer":
                return self.owner(rest.strip())
            case "basic":
                return self.owner(_password(rest))
            case _:
                return self.owner(None)


def _password(encoded: str) -> str | None:
    try:
        return b64decode(encoded, validate=True).decode().partition(":")[2]
    except ValueError:
        return None


class HostCheck:
    """Which names this server answers to.

    A page that somebody's browser shows may point its own name at this machine and then read what it likes (DNS
    rebinding): it keeps its own name, so that names which are not ours are refused. Addresses are no names.

    Args:
        hosts: further names, without port; ``*`` allows all.
        origins: pages of other servers that may send requests, as ``https://host[:port]``; ``*`` allows all.
    """

    def __init__(self, hosts: Collection[str] = (), origins: Collection[str] = ()) -> None:
        machine = socket.gethostname().lower()
        self.hosts = {"localhost", machine, *(host.lower() for host in hosts)}
        self.origins = {origin.lower().rstrip("/") for origin in origins}

    def check(self, headers: Headers, method: str) -> None:
        """Raise ServiceError (403) for a host or an origin that is not ours."""
        host = headers.get("host", "").lower()
        if not self._is_ours(_name_of(host)):
            raise ServiceError(
                403,
                "unknown_host",
                f"this server does not answer to the name {_name_of(host)[:100]!r}: allow it with --allowed-host",
            )
        origin = headers.get("origin")
        if origin is None or origin.lower() in self.origins or "*" in self.origins:
            return
        if _netloc(origin) != host and not (origin == "null" and method in _SAFE_METHODS):
            raise ServiceError(
                403,
                "unknown_origin",
                f"pages of {origin[:100]!r} may not send requests here: allow them with --allowed-origin",
            )

    def _is_ours(self, name: str) -> bool:
        if "*" in self.hosts or name in self.hosts or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def path_of(scope: Scope) -> str:
    """The path below the one that a reverse proxy shows the server under."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _name_of(host: str) -> str:
    """Without port and brackets: ``[::1]:7860`` -> ``::1``; nothing for what is no host."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]) if found else ""


def _netloc(origin: str) -> str:
    """Host and port of an origin, in lower case; nothing where it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


class Gate:
    """The middleware.

    Args:
        app: what lies behind.
        keys: who is let in; ``request.state.owner`` says who it was.
        hosts: None leaves host and origin unchecked.
        max_body_bytes: of one request, counted as it comes, whatever its headers say.
        silent_seconds: how long nothing of a body may come.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        hosts: HostCheck | None,
        max_body_bytes: int,
        silent_seconds: float = 30.0,
    ) -> None:
        self.app, self.keys, self.hosts, self.max_body_bytes = app, keys, hosts, max_body_bytes
        self.silent_seconds = silent_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked_id = headers.get("x-request-id", "")
        request_id = asked_id if _REQUEST_ID.fullmatch(asked_id) else f"req_{secrets.token_hex(12)}"
        started = False
        body = _Body(receive, self.max_body_bytes, self.silent_seconds)

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                answer.setdefault("x-content-type-options", "nosniff")
                if body.is_late:
                    answer["connection"] = "close"
            await send(message)

        with log_context(request=request_id):
            try:
                self._admit(scope, headers)
                await self.app(scope, body.receive, send_marked)
            except ClientDisconnect:
                logger.debug("a client has gone before its request was read")
            except Exception as error:
                if started:  # the answer is on its way: all that can be done is to end it
                    logger.error("an answer broke off", exc_info=error)
                    raise
                if "expect" not in headers:  # that client waits to be told whether to send
                    scope.get(REFUSED, _nothing)()
                    await body.drain()
                await _refusal(error, scope, headers)(scope, receive, send_marked)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        state: dict[str, Any] = scope.setdefault("state", {})
        state["owner"] = ""
        if path_of(scope) in OPEN_PATHS:
            return
        if self.hosts is not None:
            self.hosts.check(headers, scope["method"])
        owner = self.keys.owner_of(headers)
        if owner is None:
            raise ServiceError(
                401,
                "invalid_api_key",
                "the API key is missing or wrong: send Authorization: Bearer KEY with a key of this server",
            )
        state["owner"] = owner
        length = headers.get("content-length", "0")
        if is_whole(length) and parse_whole(length) > self.max_body_bytes:
            raise _too_large(self.max_body_bytes)


def _nothing() -> None:
    """Stand in for what other servers than ours do not have."""


def _refusal(error: Exception, scope: Scope, headers: Headers) -> ASGIApp:
    answer = respond(error)
    if isinstance(error, ServiceError) and error.status == 401:
        is_page = not path_of(scope).startswith(_API_PATHS) and "text/html" in headers.get("accept", "")
        answer.headers["www-authenticate"] = 'Basic realm="pusa", charset="UTF-8"' if is_page else "Bearer"
    if scope["method"] not in _SAFE_METHODS:
        answer.headers["connection"] = "close"  # the rest of the body is not read
    return answer


class _Body:
    """A request's body as it comes in, up to `most` bytes: more is refused with 413. One that does not come, or comes
    byte by byte, is refused with 408."""

    def __init__(self, receive: Receive, most: int, silent_seconds: float) -> None:
        self._receive, self._most, self._silent_seconds = receive, most, silent_seconds
        self._seen, self._waited_seconds, self._is_over = 0, 0.0, False
        self.is_late = False

    async def receive(self) -> Message:
        if self._is_over:  # what comes now is that the client has gone: that may take as long as it likes
            return await self._receive()
        message = None
        began = time.monotonic()
        with anyio.move_on_after(self._patience_seconds()):
            message = await self._next()
        self._waited_seconds += time.monotonic() - began
        if message is None:
            self._is_over = self.is_late = True
            raise ServiceError(
                408,
                "request_timeout",
                f"the request's body did not come: nothing in {self._silent_seconds:g} s, or less than "
                f"{_LEAST_BYTES_PER_SECOND} bytes a second; send it again",
            )
        if self._seen > self._most:
            raise _too_large(self._most)
        return message

    async def drain(self) -> None:
        """Read on for a while: who is answered while still sending may lose the answer with the connection."""
        most = self._seen + _DRAINED_BYTES
        with anyio.move_on_after(_DRAINED_SECONDS):
            while not self._is_over and self._seen < most:
                await self._next()

    def _patience_seconds(self) -> float:
        due_seconds = self._silent_seconds + self._seen / _LEAST_BYTES_PER_SECOND
        return min(self._silent_seconds, max(0.0, due_seconds - self._waited_seconds))

    async def _next(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        self._is_over = message["type"] != "http.request" or not message.get("more_body", False)
        return message


def _too_large(most: int) -> ServiceError:
    return ServiceError(413, "too_large", f"the request has more than {most / 2**20:g} MiB, the limit: send less")
