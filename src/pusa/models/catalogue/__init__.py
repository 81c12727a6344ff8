"""Describe the models that others have published, one module a base. Nothing here imports torch."""

from pusa.models.catalogue import mochi, wan
from pusa.models.catalogue.entry import LoraSource, ZooModel

PUBLISHED = (*wan.MODELS, *mochi.MODELS)

__all__ = ["PUBLISHED", "LoraSource", "ZooModel"]
