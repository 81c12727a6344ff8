"""Jobs as the page shows them: plain values, no keys of the store, no paths."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pusa.numerals import is_whole, parse_whole
from pusa.positions import nearest_of
from pusa.server.jobs.queue import Job

_SHOWN = ("steps", "guidance", "shift", "alpha", "seed", "preset")
_VARIANTS = ("video", "thumbnail", "contact_sheet")


def card(job: Job) -> dict[str, Any]:
    """What the gallery needs."""
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


def whole(job: Job, position: int | None) -> dict[str, Any]:
    """What the stage needs. `position`: jobs ahead of this one while it waits, None where that is not known."""
    return card(job) | {
        "task": job.request.get("task", "generate"),
        "parent": job.parent,
        "position": position if job.status == "queued" else None,
        "cancelling": job.cancel_requested and job.status in ("queued", "in_progress"),
        "stage": job.stage,
        "step": job.step,
        "steps": job.steps,
        "progress": job.progress,
        "seconds_left": job.seconds_left,
        "notes": list(job.notes),
        "error": job.error_message,
        "took_seconds": None if None in (job.started_at, job.completed_at) else job.completed_at - job.started_at,  # type: ignore[operator]
        "settings": settings(job.resolved or job.request),
        "request": _without_keys(job.resolved or job.request),
        "aspect": _aspect(job.size),
    }


def settings(request: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a request that are shown, in their order; what is still open is left out."""
    shown: dict[str, Any] = {"task": request.get("task", "generate"), "model": request.get("model", "")}
    for name in ("prompt", "negative_prompt"):
        if request.get(name):
            shown[name] = request[name]
    if conditions := request.get("conditions"):
        taken = {"extend": ["end"], "transition": ["end", "start"]}.get(shown["task"], [])
        shown["conditions"] = [
            {
                "kind": c.get("kind", "image"),
                "positions": c.get("positions") or [],
                "noise": c.get("noise") or [],
                "part": taken[number] if number < len(taken) else None,
            }
            for number, c in enumerate(conditions)
        ]
    if request.get("width") and request.get("height"):
        shown["size"] = f"{request['width']}x{request['height']}"
    if request.get("frames") and request.get("fps"):
        frames = nearest_of(request["frames"], 4, 1)
        shown["frames"] = {"frames": frames, "seconds": round(frames / request["fps"], 2), "fps": request["fps"]}
    for name in _SHOWN:
        if request.get(name) is not None:
            shown[name] = request[name]
    if request.get("task", "generate") != "generate" and request.get("overlap"):
        shown["overlap"] = request["overlap"]
    return shown


def _without_keys(request: Mapping[str, Any]) -> dict[str, Any]:
    conditions = [
        {**condition, "file": PurePosixPath(str(condition.get("file", ""))).name}
        for condition in request.get("conditions") or []
    ]
    return {name: value for name, value in {**request, "conditions": conditions}.items() if value not in (None, [])}


def _aspect(size: str) -> float:
    width, _, height = size.partition("x")
    known = is_whole(width) and is_whole(height) and parse_whole(height) > 0
    return parse_whole(width) / parse_whole(height) if known else 1.0
