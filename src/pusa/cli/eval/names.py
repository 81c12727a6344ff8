"""Read names that are written with commas."""

from collections.abc import Sequence
from typing import Any

import click


class Names(click.ParamType):
    """Read some of the known names, ``i2v,start-end``, as a tuple with each of them once."""

    name = "names"

    def __init__(self, known: Sequence[str]) -> None:
        self._known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split a text; a default that is a tuple stays."""
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        if unknown := [name for name in names if name not in self._known]:
            self.fail(f"{unknown[0]!r} is none of {', '.join(self._known)}", param, ctx)
        return names
