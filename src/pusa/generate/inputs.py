"""The files that a request names: found, known again by their content, carried inside the video if they are small."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pusa import media
from pusa.fsutil import sha256_of
from pusa.request import ConditionSpec, ResolvedRequest

MAX_BYTES_INSIDE = 2_000_000  # of all inputs together


@dataclass(frozen=True)
class Input:
    """A condition of a request, and where its content is: a file, or bytes that a video carried."""

    spec: ConditionSpec
    content: Path | bytes
    sha256: str

    @property
    def source(self) -> Path | BytesIO:
        """For `pusa.media`, from the beginning each time."""
        return BytesIO(self.content) if isinstance(self.content, bytes) else self.content

    def size(self) -> tuple[int, int]:
        """Width and height of its picture. Raises MediaError."""
        if self.spec.kind == "image":
            return media.read_image(self.source).size
        video = media.probe_video(self.source)
        return video.width, video.height

    @property
    def size_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def find(spec: ConditionSpec, carried: Mapping[str, bytes]) -> Input:
    """The content of a condition; `carried` holds contents by sha256.

    Raises:
        FileNotFoundError: the file is gone and not carried.
        ValueError: it is not the file that the video was made from.
    """
    if spec.sha256 in carried:
        assert spec.sha256 is not None
        return Input(spec, carried[spec.sha256], spec.sha256)
    path = Path(spec.file)
    if not path.is_file():
        raise FileNotFoundError(f"{spec.file} is not here: this {spec.kind} is needed to make the video")
    sha256 = sha256_of(path)
    if spec.sha256 not in (None, sha256):
        raise ValueError(f"{spec.file} has changed: the video was made from a file with sha256 {spec.sha256[:12]}...")
    return Input(spec, path, sha256)


def check(inputs: Sequence[Input]) -> None:
    """Raise MediaError for an input that cannot be read, before anything large is loaded."""
    for given in inputs:
        if given.spec.kind == "image":
            media.read_image(given.source)
        else:
            media.probe_video(given.source)


def carried_inside(inputs: Sequence[Input]) -> dict[str, str]:
    """Base64 by sha256 of as many inputs as fit into a video, the smallest first."""
    inside: dict[str, str] = {}
    room = MAX_BYTES_INSIDE
    for given in sorted(inputs, key=lambda i: i.size_bytes):
        if given.sha256 in inside:
            continue
        if given.size_bytes > room:
            break
        content = given.content if isinstance(given.content, bytes) else given.content.read_bytes()
        inside[given.sha256] = base64.b64encode(content).decode()
        room -= len(content)
    return inside


def without_folders(request: ResolvedRequest) -> ResolvedRequest:
    """As it is stored in a video: absolute paths would tell strangers about the machine, and are of no use to them."""
    specs = [
        spec.model_copy(update={"file": path.name}) if (path := Path(spec.file)).is_absolute() else spec
        for spec in request.conditions
    ]
    return request.model_copy(update={"conditions": specs})
