"""Define the route that returns what a video was made from."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from pusa.server.http import openapi
from pusa.server.http.api import Id, Owner, Service
from pusa.server.http.from_request import body_of_job
from pusa.server.service import in_thread

router = APIRouter(prefix="/v1")


class VideoRequest(BaseModel):
    """Tell what a video was made from; its inputs are references to those that the video keeps."""

    request: dict[str, Any] = Field(description="A body of POST /v1/videos, without fields that have their defaults.")


@router.get(
    "/videos/{id:video}/request",
    response_model=VideoRequest,
    responses=openapi.errors(404, 503),
    summary="Look at the request of a video",
)
async def get_request(id: Id, service: Service, owner: Owner) -> VideoRequest:
    """The same body makes the same video."""
    job = await service.get(id, owner)
    return VideoRequest(request=await in_thread(body_of_job, job, service.settings))
