"""Keep weights where there is room for them, and bring them to the accelerator when they compute.

Blocks and layers are streamed by diffusers' group offloading. Whole parts take turns by a hook of accelerate.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from diffusers import AutoencoderKLWan
from diffusers.hooks import HookRegistry, apply_group_offloading
from peft.tuners.lora import LoraLayer
from torch import nn

from pusa import resources
from pusa.acceleration.blocks import blocks_of
from pusa.acceleration.decisions import Offload

_CPU = torch.device("cpu")
_GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")  # diffusers' names


class TakeTurns(ModelHook):
    """Move a part to the accelerator before it computes, and the others with which it takes turns to the CPU.

    diffusers' `enable_model_cpu_offload` does this for whole pipelines only, and moves every part away after each call;
    here the part that computed last stays until another needs the room.

    Args:
        stays: False: the part leaves the accelerator after each computation.
    """

    def __init__(self, execution_device: torch.device, others: Iterable[nn.Module] = (), *, stays: bool = True) -> None:
        self.execution_device, self._stays = execution_device, stays
        self._others = list(others)

    @property
    def has_others(self) -> bool:
        """Tell if other parts leave the accelerator for this one."""
        return bool(self._others)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for other in self._others:
            if device_of(other) != _CPU:
                other.to(_CPU)
        if device_of(module) != self.execution_device:
            module.to(self.execution_device)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self._stays:
            module.to(_CPU)
        return output


def take_turns(parts: Iterable[tuple[nn.Module, torch.device]]) -> None:
    """Let parts take turns on their devices; those on different devices leave each other alone."""
    parts = list(parts)
    for module, device in parts:
        others = [other for other, place in parts if other is not module and place == device]
        add_hook_to_module(module, TakeTurns(device, others))


def takes_turns(module: nn.Module) -> bool:
    """Tell if a part has to wait for others to leave the accelerator before it computes, which takes seconds."""
    hook = getattr(module, "_hf_hook", None)
    return isinstance(hook, TakeTurns) and hook.has_others


def visit(module: nn.Module, device: torch.device) -> None:
    """Let a part be on its device only while it computes."""
    add_hook_to_module(module, TakeTurns(device, stays=False))


def end_turns(modules: Iterable[Any]) -> None:
    """Move parts that take turns to the CPU, where another needs the room that takes no turns with them."""
    for module in modules:
        if isinstance(getattr(module, "_hf_hook", None), TakeTurns) and device_of(module) != _CPU:
            module.to(_CPU)


def stay_on_cpu(module: nn.Module) -> None:
    """Let a part compute on the CPU whatever device its inputs are on, and return its outputs there."""
    add_hook_to_module(module, AlignDevicesHook(execution_device=_CPU, io_same_device=True))


def stream(module: nn.Module, offload: Offload, device: torch.device, folder: Path | None = None) -> None:
    """Copy a part's weights to `device` as it computes: block by block ("blocks", "disk") or layer by layer ("leaves").

    On CUDA the next block of a transformer is copied while one computes.

    Args:
        folder: for "disk": an empty folder of this part's own. Files in it are taken for this part's weights.
    """
    # A VAE's encoder and decoder are called without the VAE around them, which only hooks on their layers notice.
    by_block = offload in ("blocks", "disk") and not isinstance(module, AutoencoderKLWan)
    # Prefetching traces the order of the layers in a whole forward pass; of the other parts some never run.
    uses_stream = device.type == "cuda" and bool(blocks_of(module))
    if uses_stream:
        _pin_exact_sizes()
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=_CPU,
        offload_type="block_level" if by_block else "leaf_level",
        num_blocks_per_group=1 if by_block else None,
        use_stream=uses_stream,
        record_stream=uses_stream,
        # Pinned memory cannot be swapped: pin all weights only where they leave room for others.
        low_cpu_mem_usage=bytes_of(module) > resources.free_memory_bytes() / 2,
        offload_to_disk_path=str(folder) if offload == "disk" and folder is not None else None,
    )


def _pin_exact_sizes() -> None:
    """Let torch pin as much memory as is asked for: by default it rounds each weight up to a power of two bytes.

    Of a 14B model in bf16 that is 43 GB for 28. Torch has no public function for this setting, and setting it resets
    those of the environment, which are therefore repeated.
    """
    name = "pinned_max_round_threshold_mb"
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    set_settings = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if set_settings is None or name in settings:
        return
    with suppress(RuntimeError):  # a build that does not know it rounds up
        set_settings(",".join(filter(None, (settings, f"{name}:1"))))


def remove_offload(module: nn.Module) -> None:
    """Take a part's offloading away, also after a failure in the middle.

    Streamed weights come back to the CPU; others stay where they are.
    """
    if hasattr(module, "_hf_hook"):
        remove_hook_from_module(module, recurse=True)
    for group in _groups(module):
        if group.offload_to_disk_path is not None and Path(group.safetensors_file_path).exists():
            group.onload_device = _CPU
            group.onload_()
    if is_streamed(module):
        registry = HookRegistry.check_if_exists_or_initialize(module)
        for name in _GROUP_HOOKS:
            registry.remove_hook(name, recurse=True)
        module.to(_CPU)


def is_streamed(module: nn.Module) -> bool:
    """Tell if group offloading streams the weights of a part."""
    return next(_groups(module), None) is not None


def _groups(module: nn.Module) -> Iterator[Any]:
    """Iterate over the groups of diffusers' group offloading."""
    seen = set()
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry is not None else None
        if hook is not None and id(hook.group) not in seen:
            seen.add(id(hook.group))
            yield hook.group


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a model's first parameter."""
    return next(module.parameters()).device


def bytes_of(module: nn.Module) -> int:
    """Compute the size of a model's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


# ---- adapters that are merged --------------------------------------------------------------------------------------


class _Parked(nn.ModuleDict):
    """Matrices of a LoRA that stay where they are when their model is moved, and are not among its parameters.

    Once they are merged no forward pass reads them; on a card they would take 4.9 GB (rank 512 of a 14B model).
    """

    def _apply(self, fn: Any, recurse: bool = True) -> "_Parked":
        return self

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        yield prefix, self


def park_adapters(model: nn.Module) -> None:
    """Bring the matrices of merged LoRAs to the CPU and keep them there, whatever happens to their model."""
    for matrices in _matrices(model, nn.ModuleDict):
        matrices.to(_CPU)
        matrices.__class__ = _Parked


def unpark_adapters(model: nn.Module) -> None:
    """Undo `park_adapters`."""
    for matrices in _matrices(model, _Parked):
        matrices.__class__ = nn.ModuleDict


def _matrices(model: nn.Module, kind: type[nn.ModuleDict]) -> Iterator[nn.ModuleDict]:
    for layer in model.modules():
        for name in layer.adapter_layer_names if isinstance(layer, LoraLayer) else ():
            matrices = getattr(layer, name, None)
            if type(matrices) is kind:
                yield matrices
