"""Find the files of a request, verify their content, and embed small ones in the video."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pusa import media
from pusa.fsutil import sha256_of
from pusa.request import ConditionSpec, ResolvedRequest

MAX_EMBEDDED_BYTES = 2_000_000  # of all inputs together


@dataclass(frozen=True)
class Input:
    """Hold a condition of a request and its content: a file, or bytes that a video carried."""

    spec: ConditionSpec
    content: Path | bytes
    sha256: str

    @property
    def source(self) -> Path | BytesIO:
        """Return the content in a form that `pusa.media` reads, from its beginning."""
        return BytesIO(self.content) if isinstance(self.content, bytes) else self.content

    def size(self) -> tuple[int, int]:
        """Return width and height in pixels. Raises MediaError."""
        info = self.probe()
        return info.width, info.height

    def probe(self) -> media.ImageInfo | media.VideoInfo:
        """Read size and notes. Raises MediaError for content that cannot be read."""
        return media.probe_image(self.source) if self.spec.kind == "image" else media.probe_video(self.source)

    @property
    def size_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def find(spec: ConditionSpec, carried: Mapping[str, bytes]) -> Input:
    """Find the content of a condition; `carried` holds contents by sha256.

    Raises:
        FileNotFoundError: the file does not exist and is not carried.
        ValueError: the file has another sha256 than the condition.
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


def check(inputs: Sequence[Input]) -> list[str]:
    """Return a note for each thing that reading the inputs converts or leaves out.

    Raises MediaError for an input that cannot be read, before a model is loaded.
    """
    notes = []
    for entry in inputs:
        info = entry.probe()
        texts = [*info.notes, *(["its sound is left out"] if getattr(info, "has_audio", False) else [])]
        notes += [f"{Path(entry.spec.file).name}: {text}" for text in texts]
    return notes


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
    specs = [
        spec.model_copy(update={"file": path.name}) if (path := Path(spec.file)).is_absolute() else spec
        for spec in request.conditions
    ]
    return request.model_copy(update={"conditions": specs})
