"""Load, scale, merge, export and reduce LoRAs on a pipeline. The package imports its names on first use."""

from typing import TYPE_CHECKING

from pusa.lazy import lazy_names

if TYPE_CHECKING:
    from pusa.lora.operations import (
        describe_lora,
        export_lora,
        load_pusa,
        merge_lora,
        reduce_file,
        set_alpha,
        unload_lora,
        unmerge_lora,
    )

__all__ = [
    "describe_lora",
    "export_lora",
    "load_pusa",
    "merge_lora",
    "reduce_file",
    "set_alpha",
    "unload_lora",
    "unmerge_lora",
]

__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "pusa.lora.operations"))
