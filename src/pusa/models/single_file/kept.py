"""Keep the matrices of linear layers as a file stores them, and compute each at its use.

fp8 and int8 become torchao's `Float8Tensor` and `Int8Tensor` in an unchanged `nn.Linear`; both compute
float32(stored) * float32(scale), rounded once to the dtype of the model. A GGUF's blocks stay diffusers'
`GGUFParameter` in a `GGUFLinear` that computes them in fp32 and not in fp16. PEFT attaches LoRAs to all of them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pusa.models.single_file.quantisation import FP8_TYPES, GGUF_BLOCKS, StoredTensor
from pusa.models.single_file.tensors import TensorReader


class MissingPackageError(ModuleNotFoundError):
    """A package of the extra "quant" is not installed."""


def can_keep(model: nn.Module, name: str, tensor: StoredTensor) -> bool:
    """Tell whether a tensor is the quantised matrix of a linear layer."""
    is_linear = type(model.get_submodule(name.rpartition(".")[0])) is nn.Linear and name.endswith(".weight")
    kind = tensor.header.type
    if kind == "I8":
        return is_linear and tensor.header.shape[-1] % 2 == 0  # see `_torchao_tensor`
    return is_linear and kind in (*FP8_TYPES, *GGUF_BLOCKS)


def keep(model: nn.Module, name: str, tensor: StoredTensor, reader: TensorReader, dtype: torch.dtype) -> None:
    """Put a matrix into its linear layer as it is stored.

    Args:
        name: of the weight in the model's state dict.
        dtype: of the computation.

    Raises:
        MissingPackageError: torchao is not installed.
    """
    path = name.rpartition(".")[0]
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    if tensor.header.type not in (*FP8_TYPES, "I8"):
        model.set_submodule(path, _gguf_linear(linear, tensor, reader, dtype))
        return
    stored = reader.stored(tensor).clone()
    scale = reader.scale(tensor)
    weight = _torchao_tensor(stored, torch.ones(1, 1) if scale is None else scale, dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)


def _torchao_tensor(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Wrap a matrix ``[N, K]`` and its scale ``[1, 1]`` or ``[N, 1]``."""
    try:
        from torchao.quantization import Float8Tensor, Int8Tensor
    except ImportError as error:
        raise MissingPackageError('keep_quantized needs torchao: pip install "pusa[quant]"') from error
    rows, columns = stored.shape
    if stored.dtype == torch.int8:
        # Blocks of half a row: for whole rows torchao multiplies the product by scales that are rounded to bf16.
        scales = scale.expand(rows, 2).contiguous()
        return Int8Tensor(stored, scales, [1, columns // 2], dtype)
    block = [rows // scale.shape[0], columns]
    return Float8Tensor(stored, scale, block_size=block, dtype=dtype)


def _gguf_linear(linear: nn.Linear, tensor: StoredTensor, reader: TensorReader, dtype: torch.dtype) -> nn.Linear:
    from gguf import GGMLQuantizationType

    from pusa.models.single_file.gguf_linear import ExactGGUFLinear

    kind: Any = GGMLQuantizationType[tensor.header.type]
    return ExactGGUFLinear.of(linear, reader.blocks(tensor), kind, dtype)
