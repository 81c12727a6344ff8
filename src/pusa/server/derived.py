"""Build the requests of videos that are made from other videos of the server."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pusa.defaults import GenerationDefaults
from pusa.lora.sources import public_name
from pusa.positions import frames_of, latent_frames
from pusa.request import GenerationRequest, final_request
from pusa.server.http.validation import refused_value, validation_error
from pusa.server.jobs.job import Job
from pusa.server.settings import ServerSettings


def request_of(job: Job, settings: ServerSettings) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the request of a job to submit again, whose conditions name uploads, and the key of each name."""
    metadata = settings.limit_metadata(job.request.get("metadata"))  # the operator may have changed it since
    names = {key: f"input_{number}" for number, key in enumerate(job.inputs)}
    conditions = [{**spec, "file": names[spec["file"]], "sha256": None} for spec in job.request["conditions"]]
    loras = [public_name(source) for source in job.request.get("lora") or []]
    changed = {"model": job.model, "metadata": metadata, "lora": loras, "conditions": conditions}
    return {**job.request, **changed}, {name: key for key, name in names.items()}


def final_of(
    job: Job, request: Mapping[str, Any], draft: str, defaults: GenerationDefaults, **asked: Any
) -> dict[str, Any]:
    """Return the request for the final of a draft, from the draft's `request` (`request_of`) and the name of its video.

    Args:
        asked: `noise`, `size` and `steps` of `pusa.request.final_request`.

    Raises:
        ServiceError: 400 if the job is no draft, or a value is out of its range.
    """
    resolved = job.resolved or {}
    size = {name: resolved.get(name) or request.get(name) for name in ("width", "height")}
    try:
        final = final_request(GenerationRequest.model_validate({**request, **size}), draft, defaults, **asked)
    except ValidationError as error:
        raise validation_error(error) from None
    except ValueError as error:
        raise refused_value(error, "id", message=f"{job.id}: {error}") from None
    return final.model_dump(mode="json")


def video_condition(name: str, noise: Sequence[float] | None, positions: Sequence[Any] | None = None) -> dict[str, Any]:
    """Build the condition of an uploaded video."""
    condition: dict[str, Any] = {"kind": "video", "file": name, "positions": list(positions or [])}
    return condition | ({"noise": list(noise)} if noise else {})


def num_frames_of(seconds: float, fps: float | None, most: int, defaults: GenerationDefaults) -> int:
    """Count the frames of a video at a rate (None: the model's), `most` at most, in whole latent frames."""
    frames, factor = min(round(seconds * (fps or defaults.fps)), most), defaults.frames_per_latent
    return max(1, frames_of(latent_frames(frames, factor), factor))


def prompt_of(request: Mapping[str, Any], parent: Job | None) -> str:
    """Return the prompt of a request made from a finished video: that video's where it has neither one nor a story."""
    own = str(request.get("prompt") or "")
    return own if own or request.get("prompts") or parent is None else parent.prompt


def size_and_fps(parent: Job | None, request: Mapping[str, Any] | None) -> dict[str, Any]:
    """Read size and frame rate of a finished video, the defaults of a `request` made from it; a draft is smaller."""
    resolved = (parent.resolved or {}) if parent else {}
    names = ("fps",) if request and request.get("draft") else ("width", "height", "fps")
    return {name: resolved[name] for name in names if resolved.get(name) is not None}
