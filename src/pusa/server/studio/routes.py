"""Serve the page's own scripts: the state of a job, the gallery, media, and actions on finished jobs.

All routes are below ``/studio`` and answer in JSON. `pusa.server.http.middleware` names the owner of a request and
refuses pages of other servers. The scripts poll instead of holding a stream open: a browser opens six connections to a
server, of which Gradio has its own, and polling goes on after a restart by itself.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, JSONResponse

from pusa.generate.prompt_hints import unknown_words
from pusa.server.http.reference_schemas import ID_PATTERN
from pusa.server.service import ServiceError, VideoService, in_thread, is_video_id
from pusa.server.studio import examples, views
from pusa.server.transfers.downloads import download

ASSETS = Path(__file__).parent / "assets"
GALLERY_PAGE = 24
_FRESH = {"Cache-Control": "no-cache"}

JobId = Annotated[str, PathParameter(pattern=ID_PATTERN)]


def owner_of(request: Any) -> str:
    """Return the owner that the middleware found for a request; "" without one."""
    return getattr(request.state, "owner", "")


def router(service: VideoService) -> APIRouter:
    """Build the routes for a service."""
    routes = APIRouter(prefix="/studio", include_in_schema=False)
    assets = {path.name: path for path in ASSETS.iterdir()} | examples.public_files()

    @routes.get("/state")
    async def state(request: Request, job: str = "") -> JSONResponse:
        """Return the state of the model and of a job; ``job`` is null if there is none of that id."""
        answer: dict[str, Any] = {"model": await in_thread(_readiness, service), "job": None}
        if is_video_id(job):
            try:
                found = await service.get(job, owner_of(request))
                answer["job"] = views.details(found, await service.position(found), service.defaults)
            except ServiceError as error:
                if error.status != 404:
                    raise
        return JSONResponse(answer, headers=_FRESH)

    @routes.get("/jobs")
    async def jobs(request: Request, after: str | None = None) -> JSONResponse:
        listed, more = await service.list(owner_of(request), after=after, limit=GALLERY_PAGE)
        return JSONResponse({"jobs": [views.card(job) for job in listed], "more": more}, headers=_FRESH)

    @routes.get("/words")
    async def words(prompt: str = "") -> JSONResponse:
        found = await in_thread(unknown_words, prompt[:2000], service.settings.model)
        return JSONResponse([{"word": one.word, "nearest": one.nearest} for one in found], headers=_FRESH)

    @routes.get("/media/{job}/preview")
    async def preview(request: Request, job: JobId) -> Response:
        picture = await service.preview(job, owner_of(request))
        if picture is None:
            return Response(status_code=204)
        return Response(picture, media_type="image/webp", headers={"Cache-Control": "no-store"})

    @routes.get("/media/{job}/{variant}")
    async def media(request: Request, job: JobId, variant: Literal["video", "thumbnail", "contact_sheet"]) -> Response:
        return await download(request, await service.content(job, variant, owner_of(request)))

    @routes.post("/jobs/{job}/cancel")
    async def cancel(request: Request, job: JobId) -> JSONResponse:
        return JSONResponse(views.card(await service.cancel(job, owner_of(request))))

    @routes.post("/jobs/{job}/again")
    async def again(request: Request, job: JobId, vary_seed: bool = False) -> JSONResponse:
        new = await service.rerun(job, vary_seed=vary_seed, owner=owner_of(request), source="studio")
        return JSONResponse(views.card(new))

    @routes.post("/jobs/{job}/final")
    async def final(request: Request, job: JobId) -> JSONResponse:
        new = await service.final(job, owner_of(request), asked={}, source="studio")
        return JSONResponse(views.card(new))

    @routes.post("/jobs/{job}/delete")
    async def delete(request: Request, job: JobId) -> JSONResponse:
        return JSONResponse(views.card(await service.delete(job, owner_of(request))))

    @routes.get("/assets/{name}")
    async def asset(name: str) -> Response:
        return FileResponse(assets[name], headers=_FRESH) if name in assets else Response(status_code=404)

    return routes


def _readiness(service: VideoService) -> dict[str, Any]:
    found = service.readiness()
    return {
        "name": found.model,
        "ready": found.ready,
        "stage": found.stage,
        "percent": found.percent,
        "message": found.message,
    }
