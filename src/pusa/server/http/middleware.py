"""Check host, origin, API key and body size of every request, and add ids and headers to every response.

One ASGI middleware outside of all others, so that no route can be reached without it. It also turns uncaught
exceptions into error responses.
"""

import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Collection
from functools import partial
from typing import Any

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pusa.numerals import is_whole, parse_whole
from pusa.server.connections import ON_REFUSED, client_network
from pusa.server.errors import ServiceError, respond
from pusa.server.http.keys import ApiKeys, WrongKeys, wrong_key
from pusa.server.http.session_cookies import Session, SessionCookies, netloc_of
from pusa.server.logs import log_context

logger = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/health", "/ready"})
"""Answered without a key and for any host, for health checks."""

_API_PATHS = ("/v1/", "/metrics", "/openapi.json", "/docs")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_HOST = re.compile(r"(?:\[([0-9a-f:.%]+)\]|([^\[\]:]*))(?::[0-9]*)?")
_DRAINED_BYTES = 16 * 2**20  # read of a refused request's body before its connection is closed
_MIN_BYTES_PER_SECOND = 1024  # of a body, over the time spent waiting for it
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_OPEN_BODY_BYTES = 64 * 1024  # of a request that needs no key

SESSION_PATH = "/v1/session"
NOBODY = "nobody"
"""The owner of a request without a valid key, on a path that needs none: no job is theirs."""


class HostCheck:
    """Refuse requests for foreign host names and from foreign web pages.

    In DNS rebinding a web page lets its own host name point to this machine to read from it; its requests carry that
    name. IP addresses are always allowed.

    Args:
        hosts: further host names, without port; ``*`` allows all.
        origins: web pages that may send requests, as ``https://host[:port]``; ``*`` allows all.
    """

    def __init__(self, hosts: Collection[str] = (), origins: Collection[str] = ()) -> None:
        machine = socket.gethostname().lower()
        self.hosts = {"localhost", machine, *(host.lower() for host in hosts)}
        self.origins = {origin.lower().rstrip("/") for origin in origins}

    def check(self, headers: Headers, method: str) -> None:
        """Raise ServiceError (403) for a host or an origin that is not allowed."""
        host = headers.get("host", "").lower()
        if not self._is_allowed(_host_name(host)):
            raise ServiceError(
                403,
                "unknown_host",
                f"this server does not answer to the name {_host_name(host)[:100]!r}: allow it with --allowed-host",
            )
        origin = headers.get("origin")
        if origin is None or origin.lower() in self.origins or "*" in self.origins:
            return
        if netloc_of(origin) != host and not (origin == "null" and method in _SAFE_METHODS):
            raise ServiceError(
                403,
                "unknown_origin",
                f"pages of {origin[:100]!r} may not send requests here: allow them with --allowed-origin",
            )

    def _is_allowed(self, name: str) -> bool:
        if "*" in self.hosts or name in self.hosts or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def path_of(scope: Scope) -> str:
    """Return the path of a request without the prefix of a reverse proxy."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _host_name(host: str) -> str:
    """Strip port and brackets: ``[::1]:7860`` -> ``::1``; an invalid host becomes ""."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]) if found else ""


class AccessMiddleware:
    """Authorise every request, limit its body, and answer with its id.

    Sets ``request.state.owner``, ``is_signed_in`` and ``is_allowed``, which is awaited: are the owner's key and session
    still valid?

    Args:
        app: the ASGI app to protect.
        keys: valid API keys.
        sessions: the cookies of pages, which stand for a key.
        open_paths: those that need no key; one that ends in / stands for all below it, but / for itself alone.
        hosts: None leaves host and origin unchecked.
        max_body_bytes: limit for a request's body, counted as it arrives, whatever its headers claim.
        silent_seconds: longest pause within a body.
        drain_seconds: how long the body of a refused request is read before its connection is closed.
        wrong_keys: counts them.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        hosts: HostCheck | None,
        max_body_bytes: int,
        silent_seconds: float = 30.0,
        drain_seconds: float = 2.0,
        wrong_keys: WrongKeys | None = None,
        sessions: SessionCookies | None = None,
        open_paths: Collection[str] = (),
    ) -> None:
        self.wrong_keys = WrongKeys() if wrong_keys is None else wrong_keys
        self.app, self.keys, self.hosts, self.max_body_bytes = app, keys, hosts, max_body_bytes
        self.sessions, self.open_paths = sessions, frozenset(open_paths)
        self.silent_seconds, self.drain_seconds = silent_seconds, drain_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # the answer to GET without its body, for every route
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        headers = Headers(scope=scope)
        client_id = headers.get("x-request-id", "")
        request_id = client_id if _REQUEST_ID.fullmatch(client_id) else f"req_{secrets.token_hex(12)}"
        started = False
        max_bytes = min(self.max_body_bytes, _OPEN_BODY_BYTES) if self._is_open(scope) else self.max_body_bytes
        body = _LimitedBody(receive, max_bytes, self.silent_seconds)

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                response = MutableHeaders(scope=message)
                response["x-request-id"] = request_id
                response.setdefault("x-content-type-options", "nosniff")
                if body.is_late:
                    response["connection"] = "close"
            await send(message)

        with log_context(request=request_id):
            try:
                await self._authorize(scope, headers, max_bytes)
                await self.app(scope, body.receive, send_with_headers)
            except ClientDisconnect:
                logger.debug("a client has gone before its request was read")
            except Exception as error:
                if started:  # the response has begun: it can only be broken off
                    logger.error("an answer broke off", exc_info=error)
                    raise
                if "expect" not in headers:  # a client that waits for 100 Continue sends no body
                    scope.get(ON_REFUSED, _do_nothing)()
                    await body.drain(self.drain_seconds)
                if isinstance(error, ServiceError) and error.status == 401 and "authorization" in headers:
                    error = await self._slow_down(error, scope)
                await _error_response(error, scope, headers)(scope, receive, send_with_headers)

    async def _slow_down(self, error: ServiceError, scope: Scope) -> ServiceError:
        """Wait before a wrong key is refused, the longer the more its address has presented; return the error."""
        try:
            await self.wrong_keys.pause(address_of(scope))
        except ServiceError as too_many:
            return too_many
        return error

    def _is_open(self, scope: Scope) -> bool:
        """Tell whether a path needs no key, but host and origin are looked at."""
        path = path_of(scope) or "/"
        return path in self.open_paths or any(
            path.startswith(folder) for folder in self.open_paths if folder != "/" and folder.endswith("/")
        )

    async def _authorize(self, scope: Scope, headers: Headers, max_bytes: int) -> None:
        state: dict[str, Any] = scope.setdefault("state", {})
        state["owner"] = NOBODY
        if path_of(scope) in PUBLIC_PATHS:
            return
        if self.hosts is not None:
            self.hosts.check(headers, scope["method"])
        owner, session = self.keys.owner_of(headers), None
        if owner is None and self.sessions is not None:
            session = await self.sessions.find(headers)
            owner = None if session is None else session.owner
        if owner is None and not self._is_open(scope):
            raise wrong_key()
        state["is_signed_in"] = owner is not None
        if owner is not None:
            state["owner"], state["is_allowed"] = owner, partial(self._is_allowed, owner, session)
        length = headers.get("content-length", "0")
        if is_whole(length) and parse_whole(length) > max_bytes:
            raise _too_large(max_bytes)

    async def _is_allowed(self, owner: str, session: Session | None) -> bool:
        """Tell whether whoever was let in still is."""
        if session is not None and self.sessions is not None and await self.sessions.has_ended(session):
            return False
        return self.keys.knows(owner)


def address_of(scope: Scope) -> str:
    """Return the network of the client, by which wrong keys are counted."""
    client = scope.get("client")
    return client_network(client[0]) if client else ""


def _without_body(send: Send) -> Send:
    """Send the head of a response and no body; a stream is broken off."""

    async def send_head(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        elif message.get("more_body", False):
            raise ClientDisconnect

    return send_head


def _do_nothing() -> None:
    """Stand in for the callback of `pusa.server.connections` under another ASGI server."""


def _error_response(error: Exception, scope: Scope, headers: Headers) -> ASGIApp:
    response = respond(error)
    if isinstance(error, ServiceError) and error.status == 401:
        is_page = not path_of(scope).startswith(_API_PATHS) and "text/html" in headers.get("accept", "")
        if "x-pusa-page" in headers or headers.get("sec-fetch-mode") in ("cors", "same-origin"):
            is_page = False  # a script's own request: the browser must not ask for a password
        response.headers["www-authenticate"] = 'Basic realm="pusa", charset="UTF-8"' if is_page else "Bearer"
    if scope["method"] not in _SAFE_METHODS:
        response.headers["connection"] = "close"  # the rest of the body stays unread
    return response


class _LimitedBody:
    """Receive a request's body; raises ServiceError 413 beyond `max_bytes` and 408 if it stalls or is too slow."""

    def __init__(self, receive: Receive, max_bytes: int, silent_seconds: float) -> None:
        self._receive, self._max_bytes, self._silent_seconds = receive, max_bytes, silent_seconds
        self._seen, self._waited_seconds, self._is_over = 0, 0.0, False
        self.is_late = False

    async def receive(self) -> Message:
        if self._is_over:  # only the client's disconnection is left to wait for, without limit
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
                f"{_MIN_BYTES_PER_SECOND} bytes a second; send it again",
            )
        if self._seen > self._max_bytes:
            raise _too_large(self._max_bytes)
        return message

    async def drain(self, seconds: float) -> None:
        """Read on for a while: a client that is still sending when the connection closes may lose the response."""
        limit = self._seen + _DRAINED_BYTES
        with anyio.move_on_after(seconds):
            while not self._is_over and self._seen < limit:
                await self._next()

    def _patience_seconds(self) -> float:
        due_seconds = self._silent_seconds + self._seen / _MIN_BYTES_PER_SECOND
        return min(self._silent_seconds, max(0.0, due_seconds - self._waited_seconds))

    async def _next(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        self._is_over = message["type"] != "http.request" or not message.get("more_body", False)
        return message


def _too_large(max_bytes: int) -> ServiceError:
    message = f"the request has more than {max_bytes / 2**20:g} MiB, the limit: send less"
    return ServiceError(413, "too_large", message, values={"limit": max_bytes / 2**20})
