"""Find the modules and parameters of a stock model beneath its LoRAs, and tell how their weights are kept."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


def base_of(model: Any, layer: str) -> Any:
    """Find a module of the stock model, inside its LoRA wrapper if it has one."""
    module = model.get_submodule(layer)
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def parameter_of(model: Any, name: str) -> nn.Parameter:
    """Find a parameter of the stock model."""
    layer, _, parameter = name.rpartition(".")
    return getattr(base_of(model, layer), parameter)


def compute_dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the dtype that a layer of diffusers computes in if it stores its weights in another; else None."""
    registry = getattr(module, "_diffusers_hook", None)
    casting = registry.get_hook("layerwise_casting") if registry is not None else None
    return casting.compute_dtype if casting is not None else getattr(module, "compute_dtype", None)  # GGUFLinear's


def is_on_disk(model: Any, name: str) -> bool:
    """Tell if diffusers' group offloading keeps a parameter in a file."""
    parts = name.split(".")
    for end in range(len(parts)):
        module = model.get_submodule(".".join(parts[:end]))
        registry = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry is not None else None
        if hook is not None and hook.group.offload_to_disk_path is not None:
            return True
    return False
