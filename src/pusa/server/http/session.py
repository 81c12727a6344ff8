"""Define the routes that sign a page in and out; they need no key themselves."""

from fastapi import APIRouter, Request, Response

from pusa.server.http import openapi
from pusa.server.http.api import Service
from pusa.server.http.job_schemas import OpenSession, SessionState
from pusa.server.http.keys import ApiKeys, wrong_key
from pusa.server.http.middleware import address_of
from pusa.server.http.references import read_request
from pusa.server.http.session_cookies import SESSION_SECONDS, SessionCookies

router = APIRouter(prefix="/v1")

_NOT_KEPT = {"cache-control": "no-store"}


def _cookies(request: Request) -> SessionCookies:
    cookies: SessionCookies = request.app.state.sessions
    return cookies


def _path(request: Request) -> str:
    return request.scope.get("root_path") or "/"


@router.get(
    "/session", response_model=SessionState, responses=openapi.errors(429), summary="Tell whether a key is needed"
)
async def get_session(request: Request, response: Response, service: Service) -> SessionState:
    """Needs no key."""
    if "authorization" in request.headers and not request.state.is_signed_in:
        await service.wrong_keys.pause(address_of(request.scope))  # who guesses keys is slowed down here too
    response.headers.update(_NOT_KEPT)
    return SessionState(keys_required=bool(_cookies(request).keys), signed_in=request.state.is_signed_in)


@router.post(
    "/session",
    status_code=204,
    response_class=Response,
    responses=openapi.errors(400, 413, 415, 429, 503, 507),
    openapi_extra=openapi.body(OpenSession),
    summary="Sign in",
)
async def open_session(request: Request, service: Service) -> Response:
    """Takes a key and sets a cookie that stands for it in requests of the server's own pages, for 30 days or until
    the key is removed."""
    async with read_request(request, service) as reader:
        body = await reader.validate(OpenSession, {})
    cookies = _cookies(request)
    keys: ApiKeys = cookies.keys
    owner = keys.owner(body.key.strip())
    if owner is None:
        await service.wrong_keys.pause(address_of(request.scope))
        raise wrong_key()
    response = Response(status_code=204, headers=_NOT_KEPT)
    if owner:
        response.set_cookie(
            cookies.name,
            cookies.value(owner),
            max_age=SESSION_SECONDS,
            path=_path(request),
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
    return response


@router.delete("/session", status_code=204, response_class=Response, responses=openapi.errors(503), summary="Sign out")
async def close_session(request: Request) -> Response:
    """Ends the session, so that no copy of its cookie is valid any more, and removes the cookie."""
    await _cookies(request).end(request.headers)
    response = Response(status_code=204, headers=_NOT_KEPT)
    response.delete_cookie(
        _cookies(request).name,
        path=_path(request),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return response
