"""Name FVDM's classes, and those above them, for diffusers: it looks for both in the library of a saved folder."""

from diffusers import ModelMixin, SchedulerMixin

from pusa.ddim import PusaDDIMScheduler
from pusa.models.fvdm.transformer import FVDMTransformer3DModel

__all__ = ["FVDMTransformer3DModel", "ModelMixin", "PusaDDIMScheduler", "SchedulerMixin"]
