"""Let a model of the zoo make smaller videos where nothing else is asked for."""

from dataclasses import replace
from typing import Any

import pytest

from pusa import zoo


def make_smaller(patch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Change defaults (`GenerationDefaults`) of a model of the zoo until the patch is undone."""
    model = zoo.ZOO[name]
    patch.setitem(zoo.ZOO, name, replace(model, defaults=replace(model.defaults, **changes)))
