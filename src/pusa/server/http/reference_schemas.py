"""Define how a request names a file: inside itself, as a file of the client's, or as a part of another video."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from pusa.fields import StrictModel, field

ID_PATTERN = r"^video_[0-9a-f]{32}$"
FILE_ID_PATTERN = r"^file_[0-9a-f]{32}$"
MAX_FRAME = 1_000_000
_MAX_SECONDS = 86_400

FileUrl = Annotated[str, Field(min_length=1, max_length=700_000_000)]  # data URLs; the body's own limit is far lower
VideoId = Annotated[str, Field(pattern=ID_PATTERN)]
FileId = Annotated[str, Field(pattern=FILE_ID_PATTERN)]
_Fraction = Annotated[float, Field(ge=0, le=1)]


class UrlReference(StrictModel):
    """A file inside the request, as a data URL; an https address only of hosts that the operator has allowed."""

    image_url: FileUrl | None = field(None, "A picture: data:image/png;base64,...")
    video_url: FileUrl | None = field(None, "A video: data:video/mp4;base64,...")

    @model_validator(mode="after")
    def _one(self) -> "UrlReference":
        if (self.image_url is None) == (self.video_url is None):
            raise ValueError("a reference holds one of image_url and video_url")
        return self


class VideoReference(StrictModel):
    """A finished video of this server."""

    id: VideoId = field(..., "The video's id.")


class StoredReference(StrictModel):
    """A file on this server, or a part of it: one frame of a clip, a piece of it, or a region of the picture."""

    file_id: FileId | None = field(None, "A file of POST /v1/files.")
    video_id: VideoId | None = field(None, "A finished video; with input, one of the files that it was made from.")
    input: int | None = field(None, "Which of the video's inputs, counted from 0.", ge=0, le=63)
    frame: int | None = field(
        None, "One frame of a clip as a picture; negative counts from the end.", ge=-MAX_FRAME, le=MAX_FRAME
    )
    start: float | None = field(
        None, "Where the piece of a clip begins.", unit="seconds", unset="its beginning", ge=0, le=_MAX_SECONDS
    )
    end: float | None = field(
        None, "Where the piece of a clip ends.", unit="seconds", unset="its end", gt=0, le=_MAX_SECONDS
    )
    crop: Annotated[list[_Fraction], Field(min_length=4, max_length=4)] | None = field(
        None, "The region to use: left, top, width and height, as fractions 0..1 of the upright picture."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "StoredReference":
        if (self.file_id is None) == (self.video_id is None):
            raise ValueError("a reference holds one of file_id and video_id")
        if self.input is not None and self.video_id is None:
            raise ValueError("input counts the inputs of a video: give its video_id")
        if self.frame is not None and (self.start is not None or self.end is not None):
            raise ValueError("frame takes one picture of a clip, start and end take a piece: give one of these")
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError(f"end={self.end:g} is not after start={self.start:g}")
        if self.crop is not None:
            _check_crop(self.crop)
        return self

    @property
    def is_part(self) -> bool:
        """True if less than the whole file is used."""
        return any(value is not None for value in (self.frame, self.start, self.end, self.crop))


def _check_crop(crop: list[float]) -> None:
    left, top, width, height = crop
    if width <= 0 or height <= 0:
        raise ValueError(f"crop={crop}: width and height have to be above 0")
    if left + width > 1.001 or top + height > 1.001:
        raise ValueError(f"crop={crop} reaches beyond the picture: left + width and top + height are at most 1")


def stored_reference(text: str) -> StoredReference | None:
    """Read a reference that is an id alone, which need not exist; None for any other text."""
    for prefix, name in (("file_", "file_id"), ("video_", "video_id")):
        if text.startswith(prefix):
            values: dict[str, Any] = {name: text}
            return StoredReference.model_construct(**values)
    return None


def _way(value: Any) -> str:
    """Tell which way of naming files a value is to be, so that errors are about that one."""
    if isinstance(value, list):
        return "a list"
    if not isinstance(value, dict):
        return "a text"
    if "image_url" in value or "video_url" in value:
        return "an address"
    return "an id" if "id" in value else "a file"


_Text = Annotated[FileUrl, Tag("a text")]
_Address = Annotated[UrlReference, Tag("an address")]
_Stored = Annotated[StoredReference, Tag("a file")]
_Video = Annotated[VideoReference, Tag("an id")]

AnyReference = Annotated[
    _Text | _Address | _Stored, Discriminator(lambda value: _way(value).replace("an id", "a file"))
]
_References = Annotated[list[AnyReference], Field(max_length=64)]
Reference = Annotated[
    _Text | _Address | _Stored | Annotated[_References, Tag("a list")],
    Discriminator(lambda value: _way(value).replace("an id", "a file")),
]
AnyVideo = Annotated[_Text | _Address | _Stored | _Video, Discriminator(_way)]
