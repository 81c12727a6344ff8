"""Define the schemas of the files API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from pusa.fields import StrictModel, field
from pusa.request import Text
from pusa.server.http.reference_schemas import FileUrl, VideoId
from pusa.server.jobs.client_files import ClientFile


class CreateFile(StrictModel):
    """``POST /v1/files``."""

    file: FileUrl | None = field(None, "A picture or a video: a part of a form, or as file_url.")
    file_url: FileUrl | None = field(None, "A picture or a video as a data URL.")
    video_id: VideoId | None = field(None, "A finished video, to keep its file; with input, one that it was made from.")
    input: int | None = field(None, "Which of the video's inputs, counted from 0.", ge=0, le=63)
    filename: Annotated[Text, Field(max_length=200)] | None = field(
        None, "A name for people.", unset="that of the file"
    )
    purpose: Annotated[Text, Field(max_length=100)] | None = field(
        None, "As OpenAI's clients send it; it changes nothing."
    )


class FileObject(BaseModel):
    """A file that is kept for its owner; `seconds`, `frames` and `fps` are those of a clip."""

    id: str
    object: Literal["file"] = "file"
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None
    kind: Literal["image", "video"]
    width: int
    height: int
    seconds: float
    frames: int
    fps: float | None
    has_request: bool = Field(description="True for a video of pusa that holds the request that made it.")


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileRequest(BaseModel):
    """The request inside a file; its inputs are references to files."""

    request: dict[str, Any] = Field(description="A body of POST /v1/videos, without fields that have their defaults.")
    missing: list[str] = Field(description="Names of inputs that were too large to be inside: send them anew.")


def file_object(file: ClientFile, expires_at: float | None) -> FileObject:
    """Convert a file for clients."""
    names = ("kind", "width", "height", "seconds", "frames", "fps")
    return FileObject(
        id=file.id,
        filename=file.name,
        bytes=file.digest.size_bytes,
        created_at=int(file.created_at),
        expires_at=None if expires_at is None else int(expires_at),
        has_request=bool(file.info.get("has_request")),
        **{name: file.info[name] for name in names},
    )
