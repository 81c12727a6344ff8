"""Load, scale, merge and export LoRAs on a Wan pipeline. The package imports its names on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pusa.lora.operations import (
        describe_lora,
        export_lora,
        load_pusa,
        merge_lora,
        set_alpha,
        unload_lora,
        unmerge_lora,
    )

__all__ = ["describe_lora", "export_lora", "load_pusa", "merge_lora", "set_alpha", "unload_lora", "unmerge_lora"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pusa.lora.operations"), name)
