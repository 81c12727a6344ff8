"""Store the weights of a model in fewer bits: as fp8 by diffusers' layerwise casting, as int8 or fp8 by torchao.

Only the linear layers of the transformer blocks change, which hold nearly all weights. Embeddings, norms, modulation
and the head stay as they are, and so do LoRA adapters, whose alpha stays live. Where layers multiply in 8 bits too, the
first and the last block keep full weights, as errors there reach all of the picture.
"""

import importlib.util
from itertools import chain
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from pusa.acceleration.blocks import blocks_of
from pusa.acceleration.decisions import Storage
from pusa.models.fp8 import store_as_fp8

FULL: tuple[Storage, ...] = ("float32", "bfloat16", "float16")
QUANTISED: tuple[Storage, ...] = ("fp8", "int8", "gguf")
_ADA = (8, 9)  # the first CUDA capability that multiplies in fp8

_DTYPES: dict[torch.dtype, Storage] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_TYPES: dict[str, Storage] = {"Int8Tensor": "int8", "Float8Tensor": "fp8", "GGUFParameter": "gguf"}


def storage_of(model: nn.Module) -> Storage:
    """Tell how most weights of a model are stored."""
    for parameter in model.parameters():
        if type(parameter).__name__ in _TYPES:
            return _TYPES[type(parameter).__name__]
        if parameter.is_floating_point() and parameter.dtype.itemsize == 1:
            return "fp8"
    return _DTYPES[model.dtype]  # type: ignore[index]  # models of diffusers and transformers have one


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model's weights to a dtype, except for those that its class keeps in fp32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def quantize(
    model: nn.Module,
    storage: Storage,
    *,
    dtype: torch.dtype,
    is_fast: bool = False,
    device: torch.device | None = None,
) -> None:
    """Store a model's weights as "fp8" or "int8", in place. LoRAs must be attached, or merged, before.

    Args:
        model: a transformer, or a text encoder for "fp8".
        dtype: of the computation.
        is_fast: multiply in 8 bits too, which is faster on cards that can and costs some accuracy. Otherwise weights
            become `dtype` again for each multiplication.
        device: convert the weights there, and leave them there. None: where they are.

    Raises:
        RuntimeError: torchao is needed and is not installed.
        ValueError: this kind of model cannot be stored so.
    """
    blocks = list(blocks_of(model))
    if storage == "fp8" and not (is_fast and blocks):
        store_as_fp8(model, dtype)
    elif storage in ("fp8", "int8") and blocks:
        _check_torchao()
        from torchao.quantization import quantize_

        kept = ends_of(len(blocks)) if is_fast else ()
        inside = tuple(f"{name}." for number, name in enumerate(blocks) if number not in kept)
        quantize_(
            model,
            _torchao_config(storage, is_fast),
            lambda module, name: name.startswith(inside) and _is_quantised(module, name),
            device=device,
        )
    else:
        raise ValueError(f"a {type(model).__name__} cannot be stored as {storage}: a transformer can, as fp8 or int8")


def ends_of(layers: int) -> tuple[int, ...]:
    """List the blocks that keep full weights where the others multiply in 8 bits: the first and last, of 5 or more."""
    return (0, layers - 1) if layers > 4 else ()


def multiplies_in_8_bits(storage: Storage, device: torch.device, *, has_adapters: bool) -> bool:
    """Tell if a device multiplies quantised weights without converting them first.

    Args:
        has_adapters: unmerged LoRAs run beside the weights; they gain nothing from fp8.
    """
    if device.type != "cuda" or has_adapters:
        return False
    return storage == "int8" or torch.cuda.get_device_capability(device) >= _ADA


def _check_torchao() -> None:
    if importlib.util.find_spec("torchao") is None:
        raise RuntimeError('weights in int8 need torchao: pip install "pusa[quant]", or quantize="fp8" without it')


def _torchao_config(storage: Storage, is_fast: bool) -> Any:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
    )

    if storage == "fp8":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    return Int8DynamicActivationInt8WeightConfig() if is_fast else Int8WeightOnlyConfig()


def _is_quantised(module: nn.Module, name: str) -> bool:
    """Select the linear layers of attention and feed-forward, without modulation and the matrices of LoRAs."""
    words = name.split(".")
    is_modulation = any(word.startswith(("norm", "adaLN")) for word in words)
    return isinstance(module, nn.Linear) and not is_modulation and set(LoraLayer.adapter_layer_names).isdisjoint(words)
