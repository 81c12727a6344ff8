"""Translate a stored `GenerationRequest` back to the body of ``POST /v1/videos`` that makes the same request.

`pusa.server.http.to_request` goes the other way.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pusa.request import ConditionSpec, GenerationRequest, Position, stored_request
from pusa.server.derived import request_of
from pusa.server.http.validation import client_name
from pusa.server.jobs.job import Job
from pusa.server.settings import ServerSettings

Reference = dict[str, Any]
"""Names a file on the server, as in ``input_reference``: ``{"video_id": "video_…", "input": 0}``."""

_PLACES = {"latent": "latent", "frame": "frame", "second": "time"}
_OWN_WAYS = ("conditions", "sha256", "model", "lora", "metadata", "lora_layers")  # see `body_of`


def body_of(request: GenerationRequest, reference_of: Callable[[str], Reference]) -> dict[str, Any]:
    """Return the body of ``POST /v1/videos`` that makes a request, without the fields that have their defaults.

    Args:
        request: its `model` and `lora` are the public names, and `metadata` is what the operator allows.
        reference_of: returns the reference to the file of a condition by its `file`.
    """
    fields = {
        client_name(name): value
        for name, value in request.model_dump(mode="json", exclude_defaults=True).items()
        if name not in _OWN_WAYS and value is not None
    }
    own = {"model": request.model, "lora": list(request.lora), "metadata": request.metadata}
    given = {name: value for name, value in own.items() if value}
    return {**fields, **given, **_inputs(request.conditions, reference_of)}


def _inputs(conditions: Sequence[ConditionSpec], reference_of: Callable[[str], Reference]) -> dict[str, Any]:
    """Return the fields of a body that make these conditions."""
    images = [spec for spec in conditions if spec.kind == "image"]
    videos = [spec for spec in conditions if spec.kind == "video"]
    drafts = [spec for spec in conditions if spec.kind == "draft"]
    uses = Counter(spec.file for spec in images)
    shared = [file for file, count in uses.items() if count > 1]  # sent once
    fields: dict[str, Any] = {}
    if files := [*shared, *(spec.file for spec in videos)]:
        fields["input_reference"] = [reference_of(file) for file in files]
    if images:
        fields["keyframes"] = [_keyframe(spec, shared, reference_of) for spec in images]
    for spec in videos[:1]:  # two videos of a transition have the same
        fields |= _video_options(spec)
    for spec in drafts:
        fields["draft_reference"] = reference_of(spec.file)
        if spec.noise:
            fields["draft_noise_multiplier"] = spec.noise[0]
    return fields


def _keyframe(spec: ConditionSpec, shared: Sequence[str], reference_of: Callable[[str], Reference]) -> dict[str, Any]:
    source = {"file": shared.index(spec.file)} if spec.file in shared else {"reference": reference_of(spec.file)}
    frame: dict[str, Any] = {**source, "fit": spec.fit}
    for position in spec.positions:
        frame |= _place(position)
    if spec.noise:
        frame["noise"] = spec.noise[0]
    if spec.encode is not None:
        frame["encode"] = spec.encode
    return frame


def _place(position: Position) -> Mapping[str, Any]:
    value: int | float | str = "last" if str(position) == "last" else position.value
    return {_PLACES[position.unit]: value}


def _video_options(spec: ConditionSpec) -> dict[str, Any]:
    options: dict[str, Any] = {"fit": spec.fit}
    if spec.positions:
        options["cond_positions"] = [str(position) for position in spec.positions]
    if spec.noise:
        options["noise_multipliers"] = list(spec.noise)
    if spec.encode is not None:
        options["encode"] = spec.encode
    return options


def body_of_job(job: Job, settings: ServerSettings) -> dict[str, Any]:
    """Return the body of ``POST /v1/videos`` that makes a job's video once more, from the inputs that the job keeps."""
    values, keys = request_of(job, settings)
    references: dict[str, Reference] = {
        name: {"video_id": job.id, "input": job.inputs.index(key)} for name, key in keys.items()
    }
    return body_of(stored_request(values), references.__getitem__)
