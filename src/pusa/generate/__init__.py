"""Make the video of a request. Names are imported on first use, as they need torch."""

from typing import TYPE_CHECKING

from pusa.lazy import lazy_names

if TYPE_CHECKING:
    from pusa.generate.residents import load_pipeline
    from pusa.generate.run import decode, generate, load_latents, read_request, save_latents

__all__ = ["decode", "generate", "load_latents", "load_pipeline", "read_request", "save_latents"]

__getattr__ = lazy_names(
    __name__,
    {**dict.fromkeys(__all__, "pusa.generate.run"), "load_pipeline": "pusa.generate.residents"},
)
