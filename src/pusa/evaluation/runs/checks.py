"""Check that a video is the one that its item asks for: it opens, and has the frames, the rate and the size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pusa import zoo
from pusa.defaults import GenerationDefaults
from pusa.evaluation.runs.cut import Cut
from pusa.evaluation.runs.files import hash_of
from pusa.media import MediaError, iter_video, probe_image, probe_video
from pusa.request import ConditionSpec, GenerationRequest, ResolvedRequest, match_orientation

_FPS_TOLERANCE = 0.01  # an mp4 stores the rate as a fraction


@dataclass(frozen=True)
class Expected:
    """Hold what a video must have.

    Attributes:
        width, height, fps, frames: None where nothing here tells: the defaults of a model that only a server knows,
            and frames where the length of an input video counts.
        request_sha256: hash of the resolved request.
    """

    width: int | None
    height: int | None
    fps: float | None
    frames: int | None
    request_sha256: str


def resolve(request: GenerationRequest) -> ResolvedRequest:
    """Fill the fields of a request as `pusa.generate` does. Raises as `GenerationRequest.resolved` does."""
    defaults = _defaults_of(request.model)
    first = request.conditions[0] if request.conditions else None
    return match_orientation(request, _size_of(first) if first else None, defaults).resolved(defaults)


def expect(request: GenerationRequest, cut: Cut | None = None) -> Expected:
    """Find out what the video of a request, or a cut of it, must have. Raises as `GenerationRequest.resolved` does."""
    resolved = resolve(request)
    told = resolved if _is_known(request.model) else request
    frames = resolved.frames if resolved.task == "generate" and told.frames else None
    frames = frames if cut is None else cut.frames
    width, height = (resolved.width, resolved.height) if told.width and told.height else (None, None)
    return Expected(width, height, told.fps, frames, request_hash(resolved))


def request_hash(resolved: ResolvedRequest) -> str:
    """Hash a resolved request; of its input files the names count, and not their folders."""
    values = resolved.model_dump(mode="json")
    for condition in values["conditions"]:
        condition["file"] = Path(condition["file"]).name
    return hash_of(values)


@cache
def _is_known(model: str) -> bool:
    return zoo.find(zoo.with_fallback(model)) is not None or Path(model).expanduser().is_dir()


@cache
def _defaults_of(model: str) -> GenerationDefaults:
    return zoo.defaults_of(model)


def _size_of(condition: ConditionSpec) -> Callable[[], tuple[int, int]]:
    def size() -> tuple[int, int]:
        info = (probe_image if condition.kind == "image" else probe_video)(Path(condition.file))
        return info.width, info.height

    return size


def problem_of(video: Path, expected: Expected, *, decode: bool = False) -> str | None:
    """Return what is wrong with a video, for people; None if nothing is.

    Args:
        decode: read every frame, not only the header and the first one.
    """
    try:
        info = probe_video(video)
        frames = sum(1 for _ in iter_video(video)) if decode else info.frames
    except FileNotFoundError:
        return "it is missing"
    except MediaError as error:
        return f"it does not open: {error}"
    if expected.width is not None and (info.width, info.height) != (expected.width, expected.height):
        return f"it is {info.width}x{info.height} and not {expected.width}x{expected.height}"
    if expected.frames is not None and frames != expected.frames:
        return f"it has {frames} frames and not {expected.frames}"
    if expected.fps is not None and abs(info.fps - expected.fps) > _FPS_TOLERANCE * expected.fps:
        return f"it has {info.fps:g} fps and not {expected.fps:g}"
    return None
