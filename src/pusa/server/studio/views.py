"""Convert jobs to JSON for the page, without keys of the store and without paths."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pusa import zoo
from pusa.defaults import GenerationDefaults
from pusa.numerals import is_whole, parse_whole
from pusa.positions import nearest_of
from pusa.server.jobs.queue import Job
from pusa.server.plans import Estimate

_SETTINGS = ("steps", "guidance", "shift", "alpha", "seed", "preset")
_VARIANTS = ("video", "thumbnail", "contact_sheet")


def card(job: Job) -> dict[str, Any]:
    """Return the fields of a job that the gallery shows."""
    return {
        "id": job.id,
        "status": job.status,
        "prompt": job.prompt,
        "seconds": job.seconds,
        "size": job.size,
        "created_at": job.created_at,
        "has": {name: name in job.results for name in _VARIANTS},
        "attempt": job.attempt,
    }


def details(job: Job, position: int | None, defaults: GenerationDefaults) -> dict[str, Any]:
    """Return the fields of a job that the stage shows.

    Args:
        position: jobs ahead of this one while it waits; None: unknown.
        defaults: the model's, to whose whole latent frames the length of a job is rounded that no worker has begun.
    """
    factor = 1 if job.resolved else defaults.frames_per_latent
    return card(job) | {
        "task": job.request.get("task", "generate"),
        "draft": bool(job.request.get("draft")),
        "parent": job.parent,
        "position": position if job.status == "queued" else None,
        "cancelling": job.cancel_requested and job.status in ("queued", "in_progress"),
        "stage": job.stage,
        "step": job.step,
        "steps": job.steps,
        "progress": job.progress,
        "seconds_left": job.seconds_left,
        "notes": list(job.notes),
        "plan": job.plan,
        "error": job.error_message,
        "took_seconds": None if None in (job.started_at, job.completed_at) else job.completed_at - job.started_at,  # type: ignore[operator]
        "settings": settings(job.resolved or job.request, factor),
        "request": without_keys(job.resolved or job.request),
        "aspect": _aspect(job.size),
    }


def estimate(found: Estimate) -> dict[str, Any] | None:
    """Return what a request would need, for the line above the button; None if nothing is known."""
    plan = found.plan
    if plan is None and found.seconds is None:
        return None
    return {
        "plan": None if plan is None else plan.summary,
        "problem": bool(plan and plan.problem),
        "gpu_bytes": 0 if plan is None else plan.peak_bytes,
        "ram_bytes": 0 if plan is None else plan.ram_peak_bytes,
        "seconds": found.seconds,
    }


def settings(request: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """Return the settings of a request that the page shows, in their order, without those that are not set.

    Args:
        factor: frames of a latent frame, to round the length; 1 where that is done.
    """
    values: dict[str, Any] = {
        "task": request.get("task", "generate"),
        "model": zoo.public_name(request.get("model") or ""),
    }
    for name in ("prompt", "negative_prompt"):
        if request.get(name):
            values[name] = request[name]
    if conditions := request.get("conditions"):
        parts = {"extend": ["end"], "transition": ["end", "start"]}.get(values["task"], [])
        values["conditions"] = [
            {
                "kind": c.get("kind", "image"),
                "positions": c.get("positions") or [],
                "noise": c.get("noise") or [],
                "part": parts[number] if number < len(parts) else None,
            }
            for number, c in enumerate(conditions)
        ]
    if request.get("width") and request.get("height"):
        values["size"] = f"{request['width']}x{request['height']}"
    if request.get("frames") and request.get("fps"):
        frames = nearest_of(request["frames"], factor, 1)
        values["frames"] = {"frames": frames, "seconds": round(frames / request["fps"], 2), "fps": request["fps"]}
    for name in _SETTINGS:
        if request.get(name) is not None:
            values[name] = request[name]
    if request.get("schedule", "even") != "even":
        values["schedule"] = request["schedule"]
    if request.get("prompts"):
        values["prompts"] = " / ".join(request["prompts"])
    if request.get("task", "generate") != "generate" and request.get("overlap"):
        values["overlap"] = request["overlap"]
    return values


def without_keys(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the set fields of a request, with names of files in place of keys of the store."""
    conditions = [
        {**condition, "file": PurePosixPath(str(condition.get("file", ""))).name}
        for condition in request.get("conditions") or []
    ]
    names = {
        "model": zoo.public_name(request.get("model") or ""),
        "lora": [zoo.public_name(source) for source in request.get("lora") or []],
    }
    shown = {**request, **names, "conditions": conditions}
    return {name: value for name, value in shown.items() if value not in (None, [], "")}


def _aspect(size: str) -> float:
    width, _, height = size.partition("x")
    is_size = is_whole(width) and is_whole(height) and parse_whole(height) > 0
    return parse_whole(width) / parse_whole(height) if is_size else 1.0
