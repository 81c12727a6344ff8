"""Translate request bodies (OpenAI's and vLLM-Omni's names) to the fields of a `GenerationRequest`.

Values that `GenerationRequest` validates are passed on unchecked.
"""

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, get_args
from urllib.parse import unquote_to_bytes

from pydantic import ValidationError

from pusa.codes import code_of, values_of
from pusa.defaults import GenerationDefaults
from pusa.fields import StrictModel, explain, shown
from pusa.numerals import check_noise_multiplier, parse_number, parse_numbers, parse_size
from pusa.request import (
    ConditionSpec,
    GenerationRequest,
    default_overlap,
    parse_positions,
    prompt_lines,
)
from pusa.server.errors import ServiceError
from pusa.server.http.json_input import MAX_PLAIN_BYTES
from pusa.server.http.reference_schemas import StoredReference, UrlReference, VideoReference
from pusa.server.http.schemas import (
    CreateVideo,
    EditVideo,
    ExtendVideo,
    FinalVideo,
    GenerationOptions,
    KeyframeInput,
    LoraChoice,
    RemixVideo,
)
from pusa.server.transfers.uploads import UploadInfo

M = TypeVar("M", bound=StrictModel)

EDIT_NOISE = 0.7
"""Noise multiplier for editing a whole video: high enough to change what is seen, low enough to keep where it is."""

_RENAMED = {
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "guidance_scale_2": "guidance_2",
    "flow_shift": "shift",
    "lora_alpha": "alpha",
    "lora_alpha_2": "alpha_2",
}
_SAME_NAMES = tuple(name for name in GenerationRequest.model_fields if name != "lora")  # see `_parse_loras`
_FIELD_NAMES = {
    name
    for model in (
        CreateVideo,
        EditVideo,
        ExtendVideo,
        FinalVideo,
        RemixVideo,
        KeyframeInput,
        StoredReference,
        UrlReference,
        VideoReference,
        LoraChoice,
        GenerationRequest,
        ConditionSpec,
    )
    for name in model.model_fields
}


def _holds_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_holds_number, get_args(annotation)))


_NUMBER_FIELDS = {
    name
    for model in (GenerationOptions, CreateVideo, FinalVideo, KeyframeInput, StoredReference, LoraChoice)
    for name, field in model.model_fields.items()
    if _holds_number(field.annotation) and name not in ("extra_params", "keyframes", "lora")
}
_CLIENT_NAMES = {ours: theirs for theirs, ours in _RENAMED.items()}
_TO_STANDARD_BASE64 = bytes.maketrans(b"-_", b"+/")
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w-]+=[^;,]*)*)(;base64)?,", re.ASCII)


# ---- validation ------------------------------------------------------------------------------------------------------


def validate_fields(model: type[M], values: Mapping[str, Any], *, is_text: bool) -> M:
    """Validate the fields of a body.

    Args:
        is_text: the values are a form's: numbers are text, and an empty field counts as left out.

    Raises:
        ServiceError: 400, about the first invalid field.
    """
    if is_text:
        values = {name: value for name, value in values.items() if value != "" or name == "prompt"}
        _check_numbers(values)
    else:
        values = {name: value for name, value in values.items() if value is not None}
    try:
        return model.model_validate(values, strict=not is_text)
    except ValidationError as error:
        raise validation_error(error) from None


def _check_numbers(values: Any) -> None:
    """Raise ServiceError (400) for text in number fields that `parse_number` refuses; pydantic accepts more."""
    if isinstance(values, list):
        for value in values:
            _check_numbers(value)
    elif isinstance(values, dict):
        for name, value in values.items():
            texts = value if isinstance(value, list) else [] if name == "noise_multipliers" else [value]
            for text in texts:  # noise_multipliers as one text is a list: `_parse_multipliers` parses it
                if isinstance(text, str) and name in _NUMBER_FIELDS and text not in ("", "last"):
                    _check_number(text, name)
            _check_numbers(value)


def _check_number(text: str, name: str) -> None:
    try:
        parse_number(text, name)
    except ValueError as error:
        raise refused_value(error, name) from None


def validation_error(error: ValidationError) -> ServiceError:
    """Convert the first error of pydantic to a ServiceError with the client's field names."""
    first, *others = error.errors(include_url=False)
    param = str(first["loc"][0])[:100] if first["loc"] else None
    if _has_plain_location(first):
        message = explain(ValidationError.from_exception_data(error.title, [first]))  # type: ignore[list-item]
        fault = first
    else:
        fault = _deepest([first, *(other for other in others if other["loc"][:1] == first["loc"][:1])])
        message = _explain_union(fault)
    code, values = _code_and_values(fault)
    return ServiceError(400, code, message, param and client_name(param), values=values)


def _has_plain_location(error: Any) -> bool:
    """Check whether `explain` can follow an error's location: those of unions hold names of types too."""
    location = error["loc"]
    in_list = location[:1] in (("keyframes",), ("conditions",))
    return len(location) <= 1 or (in_list and all(isinstance(part, int) or part in _FIELD_NAMES for part in location))


def _code_and_values(error: Any) -> tuple[str, dict[str, Any]]:
    """Return the code of an error of pydantic and the values of its text, see `pusa.codes`."""
    context = error.get("ctx", {})
    names = [str(part) for part in error["loc"] if part in _FIELD_NAMES or error["type"] == "extra_forbidden"]
    field = client_name(names[-1])[:100] if names else ""
    value = error["input"] if isinstance(error["input"], int | float) else str(error["input"])[:60]
    match error["type"]:
        case "value_error":
            values = values_of(context["error"])
            return code_of(context["error"], "invalid_value"), values | ({"field": field} if "field" in values else {})
        case "extra_forbidden":
            return "unknown_parameter", {"field": field}
        case "missing":
            return "missing_parameter", {"field": field}
        case "greater_than_equal":
            return "below_minimum", {"field": field, "value": value, "minimum": context["ge"]}
        case "less_than_equal":
            return "above_maximum", {"field": field, "value": value, "maximum": context["le"]}
        case "literal_error":
            return "not_a_choice", {"field": field, "value": value, "choices": context["expected"]}
        case "int_type" | "int_parsing" | "int_parsing_size" | "int_from_float":
            return "not_a_whole_number", {"field": field, "value": value}
        case "float_type" | "float_parsing" | "finite_number":
            return "not_a_number", {"field": field, "value": value}
        case "too_long" | "string_too_long":
            return "too_long", {"field": field, "given": len(error["input"]), "limit": context["max_length"]}
        case "too_short" | "string_too_short":
            return "empty_value", {"field": field}
        case "string_pattern_mismatch" if field == "size":
            return "size_unknown", {"field": field, "value": value}
        case _:
            return "invalid_value", {"field": field, "value": value}


def _deepest(errors: Sequence[Any]) -> Any:
    """Return the error of a union's alternative that fits best."""
    return max(errors, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))


def _explain_union(deepest: Any) -> str:
    """Explain the error of an alternative of a union."""
    if deepest["type"] == "value_error":
        return str(deepest["ctx"]["error"])
    parts = [part for part in deepest["loc"] if isinstance(part, int) or part in _FIELD_NAMES]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    if deepest["type"] == "extra_forbidden":
        unknown = "" if deepest["loc"][-1] in parts else f".{deepest['loc'][-1]}"
        return f"{shown(name + unknown)} is unknown: leave it out"
    if deepest["type"] in ("too_long", "string_too_long"):
        limit = deepest["ctx"]["max_length"]
        return f"{name} has a length of {len(deepest['input'])}: the limit is {limit}"
    return f"{name}={shown(deepest['input'])}: {deepest['msg'][:1].lower()}{deepest['msg'][1:]}"


def client_name(name: str) -> str:
    """Return the API's name of a field of `GenerationRequest`."""
    return _CLIENT_NAMES.get(name, name)


def invalid_value(message: str, param: str | None = None, code: str = "invalid_value", **values: Any) -> ServiceError:
    """Make the error (400) of a value that is not possible; `code` and `values` are as in `pusa.codes`."""
    return ServiceError(400, code, message, param, values=values)


def refused_value(error: ValueError, param: str | None = None, *, message: str = "", **values: Any) -> ServiceError:
    """Make the error (400) of a value that was refused so, with its code and values; `message` replaces its own."""
    values = values_of(error) | values
    if "field" in values:
        values["field"] = client_name(values["field"] or param or "")
    return ServiceError(400, code_of(error, "invalid_value"), message or str(error), param, values=values)


# ---- translation -----------------------------------------------------------------------------------------------------


def build_request(
    body: CreateVideo | ExtendVideo | EditVideo,
    *,
    defaults: GenerationDefaults,
    with_length: bool = True,
) -> dict[str, Any]:
    """Build the fields of a `GenerationRequest` without its conditions.

    Args:
        body: the client's fields; its own win over those of `extra_params`.
        defaults: the model's, for the frame rate.
        with_length: convert `seconds` to frames. An extension leaves that to `extension_length`.
    """
    fields: dict[str, Any] = {}
    for part in (body.extra_params, body):
        if part is not None:
            fields |= {name: getattr(part, name) for name in part.model_fields_set if getattr(part, name) is not None}
    request = {name: fields[name] for name in _SAME_NAMES if name in fields}
    request |= {ours: fields[theirs] for theirs, ours in _RENAMED.items() if theirs in fields}
    if "size" in fields:
        width, height = parse_size(fields["size"])
        request = {"width": width, "height": height, **request}
    if with_length and "seconds" in fields and "frames" not in request:
        fps = float(fields.get("fps") or defaults.fps)
        request["frames"] = max(1, round(parse_seconds(fields["seconds"]) * fps))
    if isinstance(request.get("prompts"), str):
        request["prompts"] = prompt_lines(request["prompts"])
    names, scale = _parse_loras(fields.get("lora"))
    if names:
        request["lora"] = names
    if scale is not None:
        request.setdefault("alpha", scale)
    return request


def parse_seconds(value: str | float) -> float:
    """Parse a length in seconds, which clients send as text or as a number."""
    return parse_number(value, "seconds") if isinstance(value, str) else float(value)


def extension_length(seconds: float, request: Mapping[str, Any], defaults: GenerationDefaults) -> dict[str, int]:
    """Compute `frames` (with the overlap) and `overlap` of an extension that adds so many seconds.

    The overlap is the default of `GenerationRequest`.
    """
    factor = defaults.frames_per_latent
    new = max(factor, round(seconds * float(request.get("fps") or defaults.fps)))
    window = min(new + defaults.overlap, request.get("window") or defaults.num_frames)
    overlap = request.get("overlap") or default_overlap(window, factor, most=defaults.overlap)
    return {"frames": new + overlap, "overlap": overlap}


def _parse_loras(lora: Any) -> tuple[list[str], float | None]:
    if isinstance(lora, LoraChoice):
        return [lora.name], lora.scale
    if isinstance(lora, str):
        return [lora], None
    return list(lora or []), None


def build_conditions(
    body: GenerationOptions,
    keyframes: Sequence[tuple[KeyframeInput, str]],
    references: Mapping[str, UploadInfo],
    task: str | None,
) -> list[dict[str, Any]]:
    """Build the conditions of a `GenerationRequest`.

    Args:
        body: with `cond_positions`, `noise_multipliers` and so on.
        keyframes: each with the name of its upload.
        references: metadata of the uploads of input_reference by name, in order.
        task: the request's task, None for the default.

    Raises:
        ServiceError: 400 if the place of a file is ambiguous or missing.
    """
    options = merge_extra_params(body)
    noise = options.noise_multiplier
    shared: dict[str, Any] = {
        name: value for name, value in (("fit", options.fit), ("encode", options.encode)) if value is not None
    }
    positions, noises = read_positions(options), _parse_multipliers(options.noise_multipliers)
    placed = {name for _, name in keyframes}
    videos = [name for name, info in references.items() if info.kind == "video" and name not in placed]
    if keyframes:
        _check_keyframes(options, references, placed, videos)
        frames = [_keyframe_condition(frame, name, noise, shared) for frame, name in keyframes]
        return frames + [_video_condition(name, options, shared) for name in videos]
    if not references:
        for name in ("cond_positions", "noise_multipliers", "noise_multiplier"):
            if getattr(options, name) is not None:
                message = f"{name} is for pictures or a video: send input_reference or keyframes too"
                raise invalid_value(message, name, "needs_input", field=name)
        return []
    if len(videos) == len(references) and (len(videos) == 1 or task == "transition"):
        return [_video_condition(name, options, shared) for name in videos]
    if videos:
        raise invalid_value(
            f"input_reference has {len(videos)} video(s) among {len(references)} files: send one video, or pictures; "
            "two videos are joined by task=transition",
            "input_reference",
            "mixed_inputs",
            videos=len(videos),
            files=len(references),
        )
    image_positions = _image_positions(positions, len(references))
    noises = noises or [noise]
    if len(noises) not in (1, len(references)):
        raise invalid_value(
            f"noise_multipliers has {len(noises)} numbers for {len(references)} pictures: give 1 or {len(references)}",
            "noise_multipliers",
            "noise_count",
            given=len(noises),
            positions=len(references),
        )
    noises = noises * len(references) if len(noises) == 1 else noises
    return [
        {
            "kind": "image",
            "file": name,
            "positions": [place],
            **shared,
            **({} if multiplier is None else {"noise": [multiplier]}),
        }
        for name, place, multiplier in zip(references, image_positions, noises, strict=True)
    ]


def merge_extra_params(body: GenerationOptions) -> GenerationOptions:
    """Fill the options that the body leaves open from its `extra_params`."""
    extra = getattr(body, "extra_params", None)
    if extra is None:
        return body
    added = {name: getattr(extra, name) for name in extra.model_fields_set if getattr(body, name) is None}
    return body.model_copy(update=added)


def _check_keyframes(
    options: GenerationOptions, references: Mapping[str, UploadInfo], placed: Collection[str], videos: Sequence[str]
) -> None:
    if len(videos) > 1:
        message = f"{len(videos)} videos and keyframes are sent: send one video at most"
        raise invalid_value(message, "input_reference", "too_many_videos", given=len(videos), limit=1)
    for name in ("cond_positions", "noise_multipliers"):
        if getattr(options, name) is not None and not videos:
            message = f"{name} and keyframes say the same: send one of them"
            raise invalid_value(message, name, "said_twice", field=name)
    for number, name in enumerate(references):
        if name not in placed and name not in videos:
            message = f'file {number} of input_reference is in no keyframe: add {{"file": {number}, "latent": 0}}'
            raise invalid_value(message, "keyframes", "file_unused", name=str(number + 1))


def _video_condition(name: str, options: GenerationOptions, shared: Mapping[str, Any]) -> dict[str, Any]:
    condition = {"kind": "video", "file": name, **shared}
    if positions := read_positions(options):
        condition["positions"] = positions
    if (multipliers := parse_noise_multipliers(options)) is not None:
        condition["noise"] = multipliers
    return condition


def _keyframe_condition(
    frame: KeyframeInput, name: str, noise: float | None, shared: Mapping[str, Any]
) -> dict[str, Any]:
    multiplier = noise if frame.noise is None else frame.noise
    options = {key: value for key, value in (("fit", frame.fit), ("encode", frame.encode)) if value is not None}
    condition = {"kind": "image", "file": name, **shared, **options}
    if frame.position is not None:
        condition["positions"] = [frame.position]
    if multiplier is not None:
        condition["noise"] = [multiplier]
    return condition


def _image_positions(positions: list[Any], count: int) -> list[Any]:
    if positions:
        if len(positions) != count:
            raise invalid_value(
                f"cond_positions has {len(positions)} places for {count} pictures: give one for each",
                "cond_positions",
                "positions_count",
                given=len(positions),
                pictures=count,
            )
        return positions
    if count > 2:
        raise invalid_value(
            f"input_reference has {count} pictures: say where they go with cond_positions or keyframes",
            "input_reference",
            "positions_missing",
            pictures=count,
        )
    return [0, "last"][:count]


def read_positions(options: GenerationOptions) -> list[str]:
    """Split `cond_positions` into one text for each."""
    positions = options.cond_positions
    if isinstance(positions, str):
        try:
            positions = parse_positions(positions)
        except ValueError as error:
            raise refused_value(error, "cond_positions") from None
    return [str(position) for position in positions or []]


def parse_noise_multipliers(options: GenerationOptions) -> list[float] | None:
    """Parse `noise_multipliers`, or else the single `noise_multiplier`; None if the client gave neither."""
    single = options.noise_multiplier
    return _parse_multipliers(options.noise_multipliers) or (None if single is None else [single])


def _parse_multipliers(value: Any) -> list[Any]:
    if not isinstance(value, str):
        return list(value or [])
    try:
        numbers = parse_numbers(value)
        for number in numbers:
            check_noise_multiplier(number)
    except ValueError:
        message = f"noise_multipliers={value[:60]!r}: give numbers in 0..1 with commas: 0,0.2"
        raise invalid_value(message, "noise_multipliers", "noise_unknown", value=value[:60]) from None
    return numbers


# ---- data URLs -------------------------------------------------------------------------------------------------------


def decode_data_url(url: str, param: str) -> tuple[str, bytes]:
    """Decode a data URL to its content type and bytes.

    Raises:
        ServiceError: 400 for an invalid data URL, 413 for a long one without base64.
    """
    found = _DATA_URL.match(url[:300])
    if found is None:
        message = f"{param} is no data URL: send data:image/png;base64,... or the file itself"
        raise invalid_value(message, param, "not_a_data_url", field=param)
    text = url[found.end() :]
    if found[3]:
        return found[1] or "", decode_base64(text, param)
    if len(text) > MAX_PLAIN_BYTES:  # decoding escapes takes many times their memory
        message = f"{param} has more than {MAX_PLAIN_BYTES / 2**20:g} MiB that are not base64: send data:...;base64,..."
        raise ServiceError(413, "too_large", message, param, values={"limit": MAX_PLAIN_BYTES / 2**20})
    return found[1] or "", unquote_to_bytes(text)


def decode_base64(text: str, param: str) -> bytes:
    """Decode base64 in either alphabet, padded or not. Raises ServiceError (400)."""
    try:
        plain = text.encode("ascii").translate(_TO_STANDARD_BASE64, b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError:
        raise invalid_value(f"{param} is not base64", param, "not_a_data_url", field=param) from None


def format_seconds(value: str | float) -> str:
    """Format seconds with at most two decimals: 5, 2.06; text stays as the client wrote it."""
    return value if isinstance(value, str) else f"{float(value):.2f}".rstrip("0").rstrip(".")


def final_options(body: FinalVideo) -> dict[str, Any]:
    """Return `noise`, `size` and `steps` of `pusa.request.final_request`."""
    size = None if body.size is None else parse_size(body.size)
    return {"noise": body.noise_multiplier, "size": size, "steps": body.num_inference_steps}


def check_priority(priority: int | None, has_keys: bool) -> int:
    """Refuse a raised priority from clients with API keys: none may overtake the others."""
    if priority and priority > 0 and has_keys:
        message = f"priority={priority}: with API keys it is 0 or less, to let others go first"
        raise invalid_value(message, "priority", "priority_raised")
    return priority or 0
