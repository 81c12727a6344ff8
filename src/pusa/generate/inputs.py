"""Find the files of a request, verify their content, and embed small ones in the video."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pusa import media
from pusa.fsutil import sha256_of
from pusa.request import ConditionSpec, ResolvedCondition, ResolvedRequest

MAX_EMBEDDED_BYTES = 2_000_000  # of all inputs together


@dataclass(frozen=True)
class Input:
    """Hold a condition of a request and its content: a file, or bytes that a video carried."""

    condition: ResolvedCondition
    content: Path | bytes
    sha256: str

    @property
    def source(self) -> Path | BytesIO:
        """Return the content in a form that `pusa.media` reads, from its beginning."""
        return _source(self.content)

    @property
    def size_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def find(condition: ResolvedCondition, carried: Mapping[str, bytes]) -> Input:
    """Find the content of a condition; `carried` holds contents by sha256.

    Raises:
        FileNotFoundError: the file does not exist and is not carried.
        ValueError: the file has another sha256 than the condition.
    """
    content = _content_of(condition, carried)
    sha256 = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)
    if condition.sha256 not in (None, sha256):
        raise ValueError(
            f"{condition.file} has changed: the video was made from a file with sha256 {condition.sha256[:12]}..."
        )
    return Input(condition.model_copy(update={"sha256": sha256}), content, sha256)


def frame_size(condition: ConditionSpec, carried: Mapping[str, bytes]) -> tuple[int, int]:
    """Return width and height of a condition's content in pixels. Raises FileNotFoundError, MediaError."""
    info = _probe(condition, _content_of(condition, carried))
    return info.width, info.height


def check(inputs: Sequence[Input]) -> list[str]:
    """Return a note for each thing that reading the inputs converts or leaves out.

    Raises MediaError for an input that cannot be read, before a model is loaded.
    """
    notes = []
    for entry in inputs:
        info = _probe(entry.condition, entry.content)
        texts = [*info.notes, *(["its sound is left out"] if getattr(info, "has_audio", False) else [])]
        notes += [f"{Path(entry.condition.file).name}: {text}" for text in texts]
    return notes


def _content_of(condition: ConditionSpec, carried: Mapping[str, bytes]) -> Path | bytes:
    if condition.sha256 is not None and condition.sha256 in carried:
        return carried[condition.sha256]
    path = Path(condition.file)
    if not path.is_file():
        raise FileNotFoundError(f"{condition.file} is not here: this {condition.kind} is needed to make the video")
    return path


def _probe(condition: ConditionSpec, content: Path | bytes) -> media.ImageInfo | media.VideoInfo:
    source = _source(content)
    return media.probe_image(source) if condition.kind == "image" else media.probe_video(source)


def _source(content: Path | bytes) -> Path | BytesIO:
    return BytesIO(content) if isinstance(content, bytes) else content


def embed(inputs: Sequence[Input]) -> dict[str, str]:
    """Encode as base64, by sha256, as many inputs as fit into a video's metadata, the smallest first."""
    embedded: dict[str, str] = {}
    free_bytes = MAX_EMBEDDED_BYTES
    for entry in sorted(inputs, key=lambda i: i.size_bytes):
        if entry.sha256 in embedded:
            continue
        if entry.size_bytes > free_bytes:
            break
        content = entry.content if isinstance(entry.content, bytes) else entry.content.read_bytes()
        embedded[entry.sha256] = base64.b64encode(content).decode()
        free_bytes -= len(content)
    return embedded


def strip_folders(request: ResolvedRequest) -> ResolvedRequest:
    """Reduce absolute paths to file names, so that a video's metadata tells nothing about the machine."""
    conditions = [
        condition.model_copy(update={"file": path.name}) if (path := Path(condition.file)).is_absolute() else condition
        for condition in request.conditions
    ]
    return request.model_copy(update={"conditions": conditions})
