"""Validate request bodies, and explain what is wrong with them by the client's names of fields and stable codes."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from pusa.codes import code_of, values_of
from pusa.fields import StrictModel, explain, shown
from pusa.numerals import parse_number
from pusa.request import ConditionSpec, GenerationRequest
from pusa.server.errors import ServiceError
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

M = TypeVar("M", bound=StrictModel)

RENAMED = {
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "guidance_scale_2": "guidance_2",
    "flow_shift": "shift",
    "lora_alpha": "alpha",
    "lora_alpha_2": "alpha_2",
}
"""Names of the API -> names of `GenerationRequest`, where they differ."""

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
_CLIENT_NAMES = {ours: theirs for theirs, ours in RENAMED.items()}


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
