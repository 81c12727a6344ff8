"""Answer every error in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``.

This includes the errors that FastAPI and Starlette raise themselves (404, 405, 422, 500).
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from pusa.codes import plain
from pusa.fsutil import is_full
from pusa.server.jobs.store import StorageUnavailableError

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    422: "invalid_value",
    429: "queue_full",
    501: "not_supported",
    503: "unavailable",
    507: "disk_full",
}
# The SDKs retry 408, 409, 429 and 5xx twice. A header prevents it where that cannot help.
_NO_RETRY = {409, 500, 501, 507}


class ServiceError(Exception):
    """An error that the API returns to the client.

    Args:
        status: the HTTP status.
        code: a stable identifier for programs.
        message: for people: the value, the limit and the way out; never a path of this machine.
        param: the field at fault.
        headers: further response headers, such as ``Retry-After``.
        values: those of the code's text, see `pusa.codes`; plain JSON.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers, self.values = dict(headers or {}), dict(values or {})


class _ErrorResponse(JSONResponse):
    """Send an error that may quote what a client sent: halves of surrogate pairs, which UTF-8 has none of, become ?."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def envelope(
    message: str,
    *,
    status: int,
    code: str | None = None,
    param: str | None = None,
    values: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the JSON body of an error response."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = code or _CODES.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code, "values": plain(values or {})}}


def error_response(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    values: Mapping[str, Any] | None = None,
) -> JSONResponse:
    """Build an error response, with ``x-should-retry: false`` if a retry cannot help."""
    extra = {"x-should-retry": "false"} if status in _NO_RETRY else {}
    body = envelope(message, status=status, code=code, param=param, values=values)
    return _ErrorResponse(body, status, headers={**extra, **(headers or {})})


def is_disk_full(error: BaseException | None) -> bool:
    """Check whether an error, or one of its causes, is a full disk."""
    while error is not None:
        if is_full(error) or "database or disk is full" in str(error):  # SQLite has no error class for it
            return True
        error = error.__cause__ or error.__context__
    return False


def respond(error: Exception) -> JSONResponse:
    """Convert an exception to an error response; an unexpected one is logged."""
    if isinstance(error, ServiceError):
        return error_response(
            error.status,
            error.message,
            code=error.code,
            param=error.param,
            headers=error.headers,
            values=error.values,
        )
    if is_disk_full(error):
        logger.error("the disk is full: a request was service_error")
        return error_response(
            507, "the server's disk is full: delete videos that are not needed, or tell its operator", code="disk_full"
        )
    if isinstance(error, StorageUnavailableError):
        logger.error("%s", error)
        return error_response(503, str(error.strerror), code="storage_unavailable", headers={"retry-after": "30"})
    logger.error("a request ended in an unexpected error", exc_info=error)
    return error_response(500, "something went wrong in the server: its log says what", code="internal_error")


def install(app: FastAPI) -> None:
    """Register error handlers for all exceptions of `app`."""

    def methods(request: Request) -> str:
        """List the methods of all routes at this path; Starlette lists those of the first route only."""
        found = (route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE)
        names = {method for route in found for method in getattr(route, "methods", None) or ()}
        return ", ".join(sorted(names | ({"HEAD"} if "GET" in names else set())))

    async def service_error(_: Request, error: Exception) -> JSONResponse:
        return respond(error)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = {
            404: f"there is nothing at {request.url.path}: see /openapi.json for what there is",
            405: f"{request.method} is not possible here: see /openapi.json for what is",
        }.get(error.status_code, str(error.detail))
        headers = {"allow": methods(request)} if error.status_code == 405 else error.headers
        return error_response(error.status_code, message, headers=headers)

    async def validation_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][1]) if len(first["loc"]) > 1 else None  # what follows tells kinds of a value apart
        return error_response(400, f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=name)

    app.add_exception_handler(ServiceError, service_error)
    app.add_exception_handler(OSError, service_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
