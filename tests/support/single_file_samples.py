"""Write tiny models to single files in the layouts that ComfyUI's users have, and say which weights must come out."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from components import make_transformer
from safetensors.torch import save_file
from torch import Tensor

from pusa.models import original

HEADS = {"num_attention_heads": 3}
LIMITS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}

Tensors = dict[str, Tensor]


def transformer_tensors(seed: int = 0, **changes: Any) -> Tensors:
    """Make the tensors of a transformer with one block, under Wan's own names."""
    model = make_transformer(seed, **{"num_layers": 1, **changes})
    generator = torch.Generator().manual_seed(seed)
    tensors = original.transformer_to_original(model.state_dict())  # biases and norms begin as zeros and ones
    return {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}


def matrices(tensors: Mapping[str, Tensor], part: str = "blocks.") -> list[str]:
    """List the layers whose weight is a matrix: their names without ``.weight``."""
    return [
        name.removesuffix(".weight")
        for name, value in tensors.items()
        if value.ndim == 2 and part in name and "." in name
    ]


def quantise(
    weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, by_row: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the stored matrix and its scale, [] or [N, 1]."""
    largest = weight.abs().amax(dim=1, keepdim=True) if by_row else weight.abs().max()
    scale = largest / LIMITS[dtype]
    stored = (weight / scale).clamp(-LIMITS[dtype], LIMITS[dtype])
    return (stored.round() if dtype == torch.int8 else stored).to(dtype), scale


def scaled(
    tensors: Mapping[str, Tensor],
    layers: list[str],
    *,
    spelling: str = "scale_weight",
    dtype: torch.dtype = torch.float8_e4m3fn,
    by_row: bool = False,
    shape: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> tuple[Tensors, Tensors]:
    """Quantise layers: what a file holds, and which weights it means, computed row by row without broadcasting."""
    stored, meant = dict(tensors), dict(tensors)
    for layer in layers:
        weight, scale = quantise(tensors[f"{layer}.weight"], dtype, by_row=by_row)
        stored[f"{layer}.weight"] = weight
        stored[f"{layer}.{spelling}"] = shape(scale)
        rows = scale.flatten().expand(weight.shape[0]) if scale.numel() == 1 else scale.flatten()
        meant[f"{layer}.weight"] = torch.stack([row.float() * factor for row, factor in zip(weight, rows, strict=True)])
    return stored, meant


def declaration(format: str = "float8_e4m3fn", **fields: Any) -> Tensor:
    """Make a ``comfy_quant`` tensor: JSON as bytes."""
    return torch.frombuffer(bytearray(json.dumps({"format": format, **fields}).encode()), dtype=torch.uint8).clone()


def write(path: Path, tensors: Mapping[str, Tensor], *, prefix: str = "", metadata: Any = None) -> Path:
    """Write a safetensors file with a prefix before all names."""
    named = {f"{prefix}{name}": value.contiguous().clone() for name, value in tensors.items()}
    text = {"format": "pt"} if metadata is None else {"_quantization_metadata": json.dumps(metadata)}
    save_file(named, path, text)
    return path


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    types: Mapping[str, str],
    *,
    architecture: str | None = "wan",
    fields: Mapping[str, Any] | None = None,
) -> tuple[Path, Tensors]:
    """Write a GGUF file.

    Args:
        types: name -> GGUF's type; others are F32. Blocks that gguf cannot make are random ones.
        fields: lists of integers and strings for the header.

    Returns:
        The path and the weights that the file means, by gguf.
    """
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, architecture or "")  # which leaves out an empty one
    for name, value in (fields or {}).items():
        writer.add_string(name, value) if isinstance(value, str) else writer.add_array(name, value)
    meant = {}
    random = numpy.random.default_rng(0)
    for name, value in tensors.items():
        kind = gguf.GGMLQuantizationType[types.get(name, "F32")]
        data = value.detach().float().numpy()
        try:
            blocks = gguf.quantize(data, kind)
        except NotImplementedError:
            block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
            blocks = random.integers(0, 60, (data.shape[0], data.shape[1] // block_size * type_size), numpy.uint8)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        meant[name] = torch.from_numpy(numpy.array(gguf.dequantize(blocks, kind))).reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, meant
