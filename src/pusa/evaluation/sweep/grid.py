"""Parse a grid of settings into points."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

from pusa.acceleration.decisions import LoadOptions
from pusa.evaluation.runs.files import hash_of
from pusa.fields import field_specs
from pusa.numerals import parse_numbers, parse_size
from pusa.request import GenerationRequest

NOISE, SIZE = "noise", "size"

_REQUEST = {
    spec.name: spec
    for spec in field_specs(GenerationRequest)
    if spec.name not in ("task", "prompt", "prompts", "draft", "seed", "metadata", "width", "height")
}
_LOAD = ("memory", "quantize", "attention", "compile")
NAMES = (*_REQUEST, NOISE, SIZE, *_LOAD)
"""Settings that an axis can have."""

_MOST_POINTS = 1000
_LONGEST_NAME = 100  # of a point's folder


@dataclass(frozen=True)
class Point:
    """Hold one point of a grid.

    Attributes:
        values: by the name of the axis, as JSON: numbers, texts, or a list of noise multipliers.
        published: figures that others have published for it, by name.
    """

    values: Mapping[str, Any]
    published: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The point's folder: ``steps=4,alpha=1.4``."""
        whole = ",".join(f"{name}={format_value(value)}" for name, value in self.values.items())
        plain = re.sub(r"[^\w.,=+-]+", "_", whole)
        if plain == whole and len(plain) <= _LONGEST_NAME:
            return plain
        return f"{plain[:_LONGEST_NAME]}-{hash_of(whole)[:8]}"  # paths of LoRAs may differ in what is cut or replaced

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of a request."""
        found = {name: value for name, value in self.values.items() if name in _REQUEST}
        if SIZE in self.values:
            found["width"], found["height"] = parse_size(self.values[SIZE], SIZE)
        return found

    @property
    def noise(self) -> tuple[float, ...] | None:
        """Noise multipliers of what is given; None: the point does not set them."""
        return tuple(self.values[NOISE]) if NOISE in self.values else None

    def load(self, base: LoadOptions) -> LoadOptions:
        """Return how the model is loaded at this point."""
        own = {name: value for name, value in self.values.items() if name in _LOAD}
        return LoadOptions(**{**{f.name: getattr(base, f.name) for f in fields(LoadOptions)}, **own})

    def weights(self) -> tuple[str, ...]:
        """Return what decides which weights are loaded, and how: alpha, steps and the like change at once."""
        names = ("model", "lora", "lora_layers", "fast", *_LOAD)
        return tuple(str(self.values.get(name)) for name in names)


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Parse an axis: ``steps=4,10,30``, or with values that have commas ``noise=0.2,0.5;0.3,0.7``.

    Raises:
        ValueError: the name is none of `NAMES`, or a value is out of range.
    """
    word, equals, values = text.partition("=")
    name = word.strip().replace("-", "_")
    name = "negative_prompt" if name == "negative" else name
    if not equals or name not in NAMES:
        raise ValueError(f"--vary {text[:80]!r}: write NAME=VALUE,VALUE with a NAME of {', '.join(NAMES)}")
    parts = [part.strip() for part in values.split(";" if ";" in values else ",")]
    if not all(parts):
        raise ValueError(f"--vary {text[:80]!r} has an empty value: write {name}=VALUE,VALUE")
    parsed = [_parse(name, part) for part in parts]
    if twice := [part for part, value in zip(parts, parsed, strict=True) if parsed.count(value) > 1]:
        raise ValueError(f"--vary {text[:80]!r} has {twice[0]} twice")
    return name, parsed


def _parse(name: str, text: str) -> Any:
    if name == NOISE:
        return parse_numbers(text)
    if name == SIZE:
        parse_size(text, f"--vary {SIZE}")
        return text
    if name in _LOAD:
        return text
    spec = _REQUEST[name]
    value = spec.parse(text)
    return float(value) if spec.type == "number" and type(value) is int else value


def make_points(axes: Sequence[tuple[str, Sequence[Any]]]) -> list[Point]:
    """Combine the values of all axes; those of one set of weights follow each other.

    Raises:
        ValueError: an axis is given twice, or there are more than a thousand points.
    """
    names = [name for name, _ in axes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--vary {twice[0]} is given twice: write all of its values in one")
    points = [Point(dict(zip(names, values, strict=True))) for values in product(*(values for _, values in axes))]
    if len(points) > _MOST_POINTS:
        raise ValueError(f"{len(points)} points are more than {_MOST_POINTS}: leave values out")
    return points


def in_order_of_weights(points: Sequence[Point]) -> list[Point]:
    """Sort points so that a model is loaded once for all that need the same weights; otherwise their order stays."""
    order = {weights: number for number, weights in enumerate(dict.fromkeys(point.weights() for point in points))}
    return sorted(points, key=lambda point: order[point.weights()])


def check_points(points: Sequence[Point], base: Mapping[str, Any]) -> None:
    """Check the fields of every point before any work. Raises pydantic's ValidationError, or ValueError."""
    for point in points:
        GenerationRequest(**{**base, **point.fields, "prompt": "a video"})
        point.load(LoadOptions())
        if point.noise is not None and not all(0 <= value <= 1 for value in point.noise):
            raise ValueError(f"noise={format_value(point.values[NOISE])} is outside 0..1")


def format_value(value: Any) -> str:
    """Format the value of an axis."""
    if isinstance(value, list | tuple):
        return "+".join(map(format_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_number(value: Any) -> float | None:
    """Return a value as a number for a diagram; None if it is none. A single noise multiplier is one."""
    if isinstance(value, list | tuple):
        return as_number(value[0]) if len(value) == 1 else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
