"""Declare fields once for options, controls, schemas and error messages."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_LONGEST_NAME = 100
_YES, _NO = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


class ProblemsError(ValueError):
    """Name every problem of an input, one a line; all of them are shown."""


class StrictModel(BaseModel):
    """Refuse unknown fields, infinities and values of another type (text for a number, true for 1); frozen."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def field(default: Any, help: str, *, unit: str | None = None, unset: str | None = None, **limits: Any) -> Any:
    """Declare a field with its help, unit and limits.

    Args:
        default: ``...`` for a required field.
        help: one sentence for users.
        unit: of the number.
        unset: the effect of leaving the field out, where the default alone does not tell it.
        limits: as pydantic's ``Field`` takes them (``ge``, ``le``, ``max_length``, ``pattern``).
    """
    extra: dict[str, Any] = {name: text for name, text in (("unit", unit), ("unset", unset)) if text is not None}
    return Field(default, description=help, json_schema_extra=extra, **limits)


@dataclass(frozen=True)
class FieldSpec:
    """Describe a field for an option or a control; `minimum` and `maximum` are inclusive, `unset` is as in `field`."""

    name: str
    type: Literal["integer", "number", "string", "list", "boolean"]
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    default: Any
    unit: str | None
    unset: str | None
    help: str

    @property
    def range(self) -> str:
        """Write the range as ``1..200``; empty without limits."""
        return "" if self.minimum is None else f"{bound(self.minimum)}..{bound(self.maximum)}"

    def parse(self, text: str) -> Any:
        """Parse text of the environment or the command line; lists are separated by commas.

        Invalid text is returned unchanged, so that the validation of the model reports it.
        """
        text = text.strip()
        match self.type:
            case "list":
                return [part.strip() for part in text.split(",") if part.strip()]
            case "boolean":
                return True if text.lower() in _YES else False if text.lower() in _NO else text
            case "integer" | "number":
                try:
                    number = json.loads(text)
                except ValueError:
                    return text
                return number if type(number) in (int, float) else text
            case _:
                return text


def field_specs(model: type[BaseModel]) -> Iterator[FieldSpec]:
    """Yield the fields of a model in their order, without nested models, for options, controls and documentation."""
    for name, schema in _schema(model)["properties"].items():
        inner = _without_null(schema)
        if "$ref" in inner.get("items", {}):
            continue
        yield FieldSpec(
            name=name,
            type="list" if inner["type"] == "array" else inner["type"],
            minimum=inner.get("minimum"),
            maximum=inner.get("maximum"),
            choices=tuple(inner.get("enum", ())),
            default=schema.get("default"),
            unit=schema.get("unit"),
            unset=schema.get("unset"),
            help=schema["description"],
        )


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    return next((option for option in schema.get("anyOf", []) if option.get("type") != "null"), schema)


def explain(error: ValidationError) -> str:
    """Write one line for each error of a `StrictModel`: the value, the limit and the way out."""
    model = next(m for m in _descendants(StrictModel) if m.__name__ == error.title)
    return "\n".join(_explain_one(e, _schema(model)) for e in error.errors(include_url=False))


def _descendants(model: type[StrictModel]) -> Iterator[type[StrictModel]]:
    for child in model.__subclasses__():
        yield child
        yield from _descendants(child)


def _explain_one(error: Any, model_schema: dict[str, Any]) -> str:
    schema, siblings, where, name = model_schema, model_schema, "", ""
    for part in error["loc"]:  # such as ("conditions", 2, "noise", 0)
        if isinstance(part, int):
            schema = _without_null(schema).get("items", {})
            if "$ref" in schema:
                schema = model_schema["$defs"][schema["$ref"].rsplit("/", 1)[1]]
                where, name = f"{where}{name.removesuffix('s')} {part + 1}: ", ""
        else:
            siblings, name = schema, f"{name}.{part}" if name else part  # dotted where one model holds another
            schema = schema.get("properties", {}).get(part, {})
            if "$ref" in schema:
                schema = model_schema["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    return where + _message(error, name, schema | _without_null(schema), list(siblings.get("properties", ())))


def _message(error: Any, name: str, schema: dict[str, Any], siblings: list[str]) -> str:
    value, context = error["input"], error.get("ctx", {})
    assignment = f"{name}={shown(value)}" if name else shown(value)
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "greater_than_equal" | "less_than_equal" | "greater_than" | "less_than":
            message = f"{assignment} is {_limits(schema)}"
            means_default = value == -1 and "unset" in schema  # as other programs take it
            return f"{message}: leave it out: {schema['unset']}" if means_default else message
        case "extra_forbidden":
            last = name.rsplit(".", 1)[-1]  # a long one is no typing error, and takes long to compare
            close = difflib.get_close_matches(last, siblings, n=1) if len(last) <= _LONGEST_NAME else []
            return f"{shown(name)} is unknown: " + (
                f"did you mean {close[0]}?" if close else f"there are {', '.join(siblings)}"
            )
        case "missing":
            return f"{name} is missing"
        case "literal_error":
            return f"{assignment} is none of {', '.join(schema.get('enum') or [context['expected']])}"
        case "int_type" | "int_parsing" | "int_parsing_size" | "int_from_float":
            return f"{assignment} is not a whole number"
        case "float_type" | "float_parsing" | "finite_number":
            return f"{assignment} is not a number"
        case "bool_type" | "bool_parsing":
            return f"{assignment} is neither true nor false"
        case "string_type":
            return f"{assignment} is not text"
        case "list_type":
            return f"{assignment} is not a list"
        case "model_type" | "model_attributes_type":
            return f"{assignment} is not a set of named values"
        case "too_long" | "string_too_long":
            return f"{name} has a length of {len(value)}: the limit is {context['max_length']}"
        case "too_short" | "string_too_short":
            return f"{name} is empty: give something, or leave it out"
        case "json_invalid":
            return f"this is not JSON: {context['error']}"
        case _:
            return f"{assignment}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _limits(schema: dict[str, Any]) -> str:
    """Write the limits of a number that broke one: ``outside 1..200``, or ``not above 0 and at most 1``."""
    if "minimum" in schema and "maximum" in schema:
        return f"outside {bound(schema['minimum'])}..{bound(schema['maximum'])}"
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    return "not " + " and ".join(f"{text} {bound(schema[key])}" for key, text in words.items() if key in schema)


def bound(limit: float | None) -> str:
    """Write a limit without a needless fraction: 200, not 200.0."""
    return str(int(limit)) if limit is not None and limit == int(limit) else str(limit)


def shown(value: Any) -> str:
    """Write a value in at most 60 characters of one line, text in quotes."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to print more than 4300 digits
        return f"(a number of {value.bit_length()} bits)"
    value = value[:100] if isinstance(value, str | list | tuple) else value  # it may have megabytes
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
