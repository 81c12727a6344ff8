"""Write files of full-size models that hold headers only: their tensors are holes, which take no disk."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from pusa.models import original, wan22_vae
from pusa.zoo import ZOO

Shapes = Mapping[str, Sequence[int]]
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}


def transformer_shapes(model: str) -> dict[str, list[int]]:
    """Return the shapes of a zoo model's transformer under Wan's own names."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**ZOO[model].transformer)
    return original.transformer_to_original(_shapes(transformer))


def vae_shapes(model: str) -> dict[str, list[int]]:
    """Return the shapes of the VAE of Wan2.1 or Wan2.2 TI2V-5B ("wan2.1", "wan2.2") under Wan's own names."""
    config = {"base_dim": 96, "z_dim": 16}
    if model == "wan2.2":
        firsts = {"encoder.conv1.weight": [160, 12, 3, 3, 3], "decoder.conv1.weight": [1024, 48, 3, 3, 3]}
        config = wan22_vae.config_from_shapes(firsts)
    with torch.device("meta"):
        return original.vae_to_original(_shapes(AutoencoderKLWan(**config)))


def text_encoder_shapes() -> dict[str, list[int]]:
    """Return the shapes of UMT5-XXL's encoder under Wan's own names."""
    config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    with torch.device("meta"):
        return original.text_encoder_to_original(_shapes(UMT5EncoderModel(config)))


def _shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def write_sparse(path: Path, shapes: Shapes, dtype: str = "BF16", *, prefix: str = "", mark: bytes = b"") -> Path:
    """Write a safetensors file with these shapes, whose values are holes but for a `mark` at the end."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = math.prod(shape) * _BYTES[dtype]
        header[prefix + key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        file.seek(-len(mark), 2)
        file.write(mark)
    return path
