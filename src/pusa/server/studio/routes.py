"""What the page's own scripts ask for: the state of a job, the gallery, media, and what is done to a finished job.

Everything is below ``/studio`` and speaks JSON; who asks is known from `pusa.server.http.middleware`, which also
refuses pages of other servers. Polling rather than a stream: browsers open six connections to a server and Gradio has
its own, and a poll finds its way back after a restart by itself.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, JSONResponse

from pusa.generate.prompt_hints import unknown_words
from pusa.server.downloads import download
from pusa.server.http.schemas import ID_PATTERN
from pusa.server.service import ServiceError, VideoService, in_thread, is_video_id
from pusa.server.studio import examples, views

ASSETS = Path(__file__).parent / "assets"
GALLERY_PAGE = 24
_FRESH = {"Cache-Control": "no-cache"}

JobId = Annotated[str, PathParameter(pattern=ID_PATTERN)]


def owner_of(request: Any) -> str:
    """Who asks, as the gate found out; "" where it has not been passed."""
    return getattr(request.state, "owner", "")


def router(service: VideoService) -> APIRouter:
    """The routes over a service."""
    routes = APIRouter(prefix="/studio", include_in_schema=False)
    assets = {path.name: path for path in ASSETS.iterdir()} | examples.public_files()

    @routes.get("/state")
    async def state(request: Request, job: str = "") -> JSONResponse:
        """How the model is, and how a job is; ``job`` is null for one that is not there."""
        answer: dict[str, Any] = {"model": await in_thread(_readiness, service), "job": None}
        if is_video_id(job):
            try:
                found = await service.get(job, owner_of(request))
                answer["job"] = views.whole(found, await service.position(found))
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
