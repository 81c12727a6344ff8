"""Read the transformer's configuration of a model folder in either layout, without torch and without its weights."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pusa.models import files

HEAD_DIM = 128  # of all published models; no shape shows it


def folder_config(folder: Path) -> tuple[dict[str, Any], int] | None:
    """Read the configuration of a folder's transformer and the number of its experts.

    Values that a ``config.json`` in Wan's own layout does not have come from the headers of the shards.

    Returns:
        Values under diffusers' names, and 1 or 2; None if the folder holds no Wan transformer, or a damaged one.
    """
    try:
        if (folder / "model_index.json").is_file():
            return _diffusers_config(folder)
        return _original_config(folder) if files.is_original(folder) else None
    except (OSError, ValueError, KeyError, TypeError):  # `pusa.loading` tells what is wrong with it
        return None


def config_from_shapes(shapes: Mapping[str, Sequence[int]], head_dim: int = HEAD_DIM) -> dict[str, Any]:
    """Derive the values that tell Wan's models apart (original key -> shape). Raises KeyError for other models."""
    dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
    return {
        "in_channels": in_channels,
        "out_channels": shapes["head.head.weight"][0] // math.prod(patch_size),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
    }


def fits(config: Mapping[str, Any], transformer: Mapping[str, Any]) -> bool:
    """Tell if a configuration has every value of another, which is a model's of the zoo."""
    takes_images = config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None
    return not takes_images and all(config.get(name) == value for name, value in transformer.items())


def _diffusers_config(folder: Path) -> tuple[dict[str, Any], int] | None:
    index = files.read_json(folder / "model_index.json")
    parts = files.diffusers_components(folder)
    experts = [name for name in ("transformer", "transformer_2") if name in parts]
    if not experts:
        return None
    config = files.read_json(folder / experts[0] / "config.json")
    if config.get("_class_name") not in files.TRANSFORMER_CLASSES:
        return None
    return config, 2 if len(experts) == 2 or index.get("boundary_ratio") is not None else 1


def _original_config(folder: Path) -> tuple[dict[str, Any], int] | None:
    experts = files.original_experts(folder)
    place = experts["transformer"]
    shards = files.transformer_shards(place)
    shapes = {key: shape for path in shards for key, shape in files.safetensors_shapes(path).items()}
    if not shapes or any(".k_img." in key or key.startswith("img_emb.") for key in shapes):
        return None
    heads = files.read_json(place / "config.json").get("num_heads")
    dim = shapes["patch_embedding.weight"][0]
    return config_from_shapes(shapes, dim // heads if heads else HEAD_DIM), len(experts)
