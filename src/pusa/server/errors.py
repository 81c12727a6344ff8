"""One shape for all that goes wrong, as OpenAI's clients read it: ``{"error": {"message", "type", "param", "code"}}``.

What FastAPI and Starlette would answer themselves (404, 405, 422, 500) is turned into it here.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from pusa.fsutil import is_full

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
# The SDKs repeat 408, 409, 429 and 5xx twice. Where that cannot help they are told so.
_NOT_TO_BE_RETRIED = {409, 500, 501, 507}


class ServiceError(Exception):
    """A refusal, as the API shows it.

    Args:
        status: of HTTP.
        code: a stable word for programs.
        message: for people: the value, the limit and the way out. It never holds paths of this machine.
        param: the field it is about.
        headers: to be sent along (``Retry-After``).
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})


def envelope(message: str, *, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def error_response(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as it is sent, with ``x-should-retry: false`` where repeating it cannot help."""
    extra = {"x-should-retry": "false"} if status in _NOT_TO_BE_RETRIED else {}
    body = envelope(message, status=status, code=code, param=param)
    return JSONResponse(body, status, headers={**extra, **(headers or {})})


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that there is no room left."""
    while error is not None:
        if is_full(error) or "database or disk is full" in str(error):  # SQLite's words, whatever wraps them
            return True
        error = error.__cause__ or error.__context__
    return False


def respond(error: Exception) -> JSONResponse:
    """The answer to an error that nothing below has turned into a refusal; what is unexpected is logged."""
    if isinstance(error, ServiceError):
        return error_response(error.status, error.message, code=error.code, param=error.param, headers=error.headers)
    if is_disk_full(error):
        logger.error("the disk is full: a request was refused")
        return error_response(
            507, "the server's disk is full: delete videos that are not needed, or tell its operator", code="disk_full"
        )
    logger.error("a request ended in an unexpected error", exc_info=error)
    return error_response(500, "something went wrong in the server: its log says what", code="internal_error")


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Let `app` answer every error in the envelope; `routes` are those of its routers."""

    def methods(request: Request) -> str:
        """Of all routes at this path: Starlette names those of the first one only."""
        here = (route for route in (*routes, *app.routes) if route.matches(request.scope)[0] is not Match.NONE)
        return ", ".join(sorted({method for route in here for method in getattr(route, "methods", None) or ()}))

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return respond(error)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = {
            404: f"there is nothing at {request.url.path}: see /openapi.json for what there is",
            405: f"{request.method} is not possible here: see /openapi.json for what is",
        }.get(error.status_code, str(error.detail))
        headers = {"allow": methods(request)} if error.status_code == 405 else error.headers
        return error_response(error.status_code, message, headers=headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1]) if first["loc"] else None
        return error_response(400, f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=name)

    app.add_exception_handler(ServiceError, refused)
    app.add_exception_handler(OSError, refused)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid)
