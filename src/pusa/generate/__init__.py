"""Make the video of a request. Names are imported on first use, as they need torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pusa.generate.run import decode, generate, load_latents, load_pipeline, read_request, save_latents

__all__ = ["decode", "generate", "load_latents", "load_pipeline", "read_request", "save_latents"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pusa.generate.run"), name)
