"""Find the files of a request, verify their content, and copy what a video carries of them."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from pusa import media, zoo
from pusa.codes import CodedText, code_of, values_of
from pusa.conditions import fit_image
from pusa.fsutil import sha256_of
from pusa.lora.sources import parse_lora
from pusa.positions import frames_of
from pusa.provenance.xmp import Mark, write_packet
from pusa.request import ConditionSpec, ResolvedCondition, ResolvedRequest, final_size

MAX_EMBEDDED_BYTES = 2_000_000  # of all inputs together
_MOST_COMPRESSION = 16  # lossless; real footage reaches 4


@dataclass(frozen=True)
class Input:
    """Hold a condition of a request and its content: a file, or bytes that a video carried.

    `fitted` has the pixels of an image in the size of the video, where they have been read already.
    """

    condition: ResolvedCondition
    content: Path | bytes
    sha256: str
    fitted: Image.Image | None = None

    def read_image(self) -> Image.Image:
        """Read the image. Raises MediaError."""
        return media.read_image(self.source) if self.fitted is None else self.fitted

    @property
    def source(self) -> Path | BytesIO:
        """Return the content in a form that `pusa.media` reads, from its beginning."""
        return _source(self.content)


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


def check(inputs: Sequence[Input]) -> list[CodedText]:
    """Return a note for each thing that reading the inputs converts or leaves out.

    Raises MediaError for an input that cannot be read, before a model is loaded.
    """
    notes = []
    for entry in inputs:
        info = _probe(entry.condition, entry.content)
        name, has_sound = Path(entry.condition.file).name, getattr(info, "has_audio", False)
        for text in (*info.notes, *([CodedText("input_sound", "its sound is left out")] if has_sound else [])):
            notes.append(CodedText(code_of(text), f"{name}: {text}", **values_of(text), name=name))
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


@dataclass(frozen=True)
class CarriedInputs:
    """Hold what a video carries of its inputs.

    Attributes:
        request: the request without folders, whose conditions have the sha256 of what is carried.
        contents: base64 by sha256.
        inputs: the inputs, those that are carried as their copies, which have the same pixels and are read faster.
    """

    request: ResolvedRequest
    contents: dict[str, str]
    inputs: list[Input]


def carry(inputs: Sequence[Input], request: ResolvedRequest, marks: Mapping[str, Mark]) -> CarriedInputs:
    """Copy as many inputs as fit into a video's metadata: the pixels that the request uses, and nothing else.

    A copy is lossless, upright and fitted to the size of the video, so that a replay sees the same pixels. It has no
    metadata of its input (position, camera, preview, sound) and nothing that was cut away.

    Args:
        marks: what marked inputs said about themselves, by the sha256 of the input; their copies say it, too.

    Raises:
        MediaError: an input cannot be read.
    """
    contents: dict[str, str] = {}
    conditions, copies = [], []
    size = _copied_size(request)
    free_bytes = MAX_EMBEDDED_BYTES
    for entry in inputs:
        condition = entry.condition.model_copy(update={"file": Path(entry.condition.file).name})
        mark = marks.get(entry.sha256)
        xmp = b"" if mark is None else write_packet(mark)
        fitted, copy = None, None
        if condition.kind == "image":
            fitted = _fit(entry.read_image(), entry, size)
            copy = _copy_image(fitted, xmp)
        else:
            copy = _copy_video(entry, request, size, xmp, free_bytes)
        sha256 = hashlib.sha256(copy or b"").hexdigest()
        if copy is not None and (sha256 in contents or len(copy) <= free_bytes):
            free_bytes -= 0 if sha256 in contents else len(copy)
            contents[sha256] = base64.b64encode(copy).decode()
            condition = condition.model_copy(update={"sha256": sha256})
            entry = Input(entry.condition, copy, entry.sha256, fitted)
        conditions.append(condition)
        copies.append(entry)
    return CarriedInputs(without_folders(request).model_copy(update={"conditions": conditions}), contents, copies)


def without_folders(request: ResolvedRequest) -> ResolvedRequest:
    """Reduce paths to file names, so that a video's metadata tells nothing about the machine."""
    conditions = [spec.model_copy(update={"file": Path(spec.file).name}) for spec in request.conditions]
    loras = [str(parse_lora(source).with_files(zoo.public_name)) for source in request.lora]
    names = {"conditions": conditions, "model": zoo.public_name(request.model), "lora": loras}
    return request.model_copy(update=names)


def _fit(frame: Image.Image | np.ndarray, entry: Input, size: tuple[int, int]) -> Image.Image:
    """Fit a frame to a size, without colour profile and all else that Pillow keeps beside the pixels."""
    return Image.fromarray(np.asarray(fit_image(frame, *size, entry.condition.fit)))


def _copied_size(request: ResolvedRequest) -> tuple[int, int]:
    """Return the size of copies: that of the video, or for a draft that of the final, which is made from them."""
    own = request.width, request.height
    try:
        return final_size(zoo.defaults_of(request.model), *own) if request.draft else own
    except ValueError:  # a draft too large for a final of twice its size
        return own


def _copy_image(fitted: Image.Image, xmp: bytes) -> bytes:
    buffer = BytesIO()
    fitted.save(buffer, "WEBP", lossless=True, quality=0, method=0, xmp=xmp)  # half of PNG's time, and smaller
    return buffer.getvalue()


def _copy_video(
    entry: Input, request: ResolvedRequest, size: tuple[int, int], xmp: bytes, most_bytes: int
) -> bytes | None:
    """Copy the frames that the request uses; None as soon as they take more than `most_bytes`, or cannot take less."""
    fps, is_draft = request.fps, entry.condition.kind == "draft"
    reads_all = request.task in ("extend", "transition")  # the file shows the videos; their draft shows them, too
    most_frames = None if reads_all else frames_used(entry.condition, request)
    video = media.probe_video(entry.source)
    size = (video.width, video.height) if is_draft else size  # a draft is enlarged when it is read
    frames = round(video.seconds * fps) if most_frames is None else min(most_frames, round(video.seconds * fps))
    if 3 * size[0] * size[1] * frames > _MOST_COMPRESSION * most_bytes:
        return None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "copy.mp4"
        with media.VideoWriter(path, width=size[0], height=size[1], fps=fps, lossless=True, xmp=xmp) as writer:
            for frame in media.iter_video(entry.source, fps=fps, fit=size, max_frames=most_frames):
                writer.write((frame if is_draft else np.asarray(_fit(frame, entry, size)))[None])
        return path.read_bytes() if path.stat().st_size <= most_bytes else None


def frames_used(condition: ResolvedCondition, request: ResolvedRequest) -> int:
    """Count the frames from the start of a video that a condition can use."""
    factor = request.frames_per_latent
    indices = [position.latent_index(request.frames, request.fps, factor) for position in condition.positions]
    return frames_of(max(indices) + 1, factor) if indices else request.frames
