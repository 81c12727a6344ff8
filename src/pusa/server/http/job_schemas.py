"""Define the bodies of the routes that change jobs, and the answers about a session."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from pusa.fields import StrictModel, field
from pusa.request import Text
from pusa.server.http.reference_schemas import VideoId


class UpdateVideo(StrictModel):
    """``POST /v1/videos/{id}``."""

    favourite: bool | None = field(None, "Whether it is a favourite.", unset="as it is")
    batch: Annotated[Text, Field(max_length=64)] | None = field(
        None, 'Your own name for videos that belong together; "" takes it out of its batch.', unset="as it is"
    )


class MoveVideo(StrictModel):
    """``POST /v1/videos/{id}/move``."""

    before: VideoId | None = field(None, "The waiting video of yours that it goes before.", unset="behind all of them")


class OpenSession(StrictModel):
    """``POST /v1/session``."""

    key: Annotated[Text, Field(min_length=1, max_length=1000)] = field(..., "An API key of this server.")


class SessionState(BaseModel):
    """Tell a page whether it must ask for a key."""

    object: Literal["session"] = "session"
    keys_required: bool
    signed_in: bool = Field(description="Whether calls like this one are let in.")
