"""Describe the parts of each base for plans, one module a base, found by its name."""

from collections.abc import Callable, Mapping
from typing import Any

from pusa.acceleration.shapes import fvdm, mochi, wan
from pusa.acceleration.shapes.common import PartShapes
from pusa.models.bases import base_of_values

_DESCRIPTIONS: Mapping[str, Callable[..., PartShapes]] = {
    "Wan": wan.parts,
    "Mochi": mochi.parts,
    "FVDM": fvdm.parts,
}


def parts_of(config: Mapping[str, Any], parameters: Mapping[str, int], vae: Mapping[str, Any]) -> PartShapes:
    """Read the shapes of a model's parts from its configurations.

    Args:
        config: of the transformer; one that names no known class is a Wan's.
        parameters: component -> count; those of others are counted or published.
        vae: the VAE's configuration, or nothing of it for the published one.
    """
    return _DESCRIPTIONS[base_of_values(config).name](config, parameters, vae)
