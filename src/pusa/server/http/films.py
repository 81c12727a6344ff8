"""Define the route that joins videos to a film."""

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field

from pusa.fields import StrictModel, field
from pusa.server.exports import MAX_FILM_VIDEOS
from pusa.server.http import openapi
from pusa.server.http.api import Owner, Service
from pusa.server.http.file_schemas import FileObject, file_object
from pusa.server.http.reference_schemas import VideoId
from pusa.server.http.references import read_request

router = APIRouter(prefix="/v1")


class CreateFilm(StrictModel):
    """``POST /v1/films``."""

    videos: Annotated[list[VideoId], Field(max_length=MAX_FILM_VIDEOS)] = field(
        ..., "Ids of finished videos, in their order; a video may come more than once."
    )


@router.post(
    "/films",
    response_model=FileObject,
    responses=openapi.errors(400, 404, 409, 413, 415, 503, 507),
    openapi_extra=openapi.body(CreateFilm),
    summary="Join videos to a film",
)
async def create_film(request: Request, service: Service, owner: Owner) -> FileObject:
    """Joins at least two finished videos, one after another, to one MP4 in the size and at the frame rate of the first.
    The film is kept as a file."""
    async with read_request(request, service) as reader:
        body = await reader.validate(CreateFilm, {})
    film = await service.exports.film(body.videos, owner)
    return file_object(film, service.library.expires_at(film))
