"""Make the video of a request. Names are imported on first use, as they need torch."""

from typing import TYPE_CHECKING

from pusa.lazy import lazy_names

if TYPE_CHECKING:
    from pusa.generate.output import load_latents, save_latents
    from pusa.generate.residents import load_pipeline
    from pusa.generate.run import decode, generate, read_request

__all__ = ["decode", "generate", "load_latents", "load_pipeline", "read_request", "save_latents"]

__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("load_latents", "save_latents"), "pusa.generate.output"),
        **dict.fromkeys(("decode", "generate", "read_request"), "pusa.generate.run"),
        "load_pipeline": "pusa.generate.residents",
    },
)
