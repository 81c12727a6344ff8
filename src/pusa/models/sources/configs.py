"""Read the transformer's configuration of a model folder in either layout, without torch and without its weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pusa.models import files
from pusa.models.bases import base_named

HEAD_DIM = 128  # of all published models; no shape shows it


def folder_config(folder: Path) -> tuple[dict[str, Any], int] | None:
    """Read the configuration of a folder's transformer and the number of its experts.

    Values that a ``config.json`` in Wan's own layout does not have come from the headers of the shards.

    Returns:
        Values under diffusers' names, and 1 or 2; None if the folder holds no transformer of a base, or a damaged one.
    """
    try:
        if (folder / "model_index.json").is_file():
            return _diffusers_config(folder)
        return _original_config(folder) if files.is_original(folder) else None
    except (OSError, ValueError, KeyError, TypeError):  # `pusa.loading` tells what is wrong with it
        return None


def config_from_shapes(shapes: Mapping[str, Sequence[int]], num_heads: int | None = None) -> dict[str, Any]:
    """Derive the values that tell Wan's models apart (original key -> shape). Raises KeyError for other models."""
    dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
    return {
        "in_channels": in_channels,
        "out_channels": shapes["head.head.weight"][0] // math.prod(patch_size),
        "num_attention_heads": num_heads or dim // HEAD_DIM,
        "attention_head_dim": dim // num_heads if num_heads else HEAD_DIM,
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": count_blocks(shapes),
    }


def count_blocks(shapes: Iterable[str]) -> int:
    """Count the blocks of a transformer or a text encoder by its original keys."""
    return 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))


def takes_images(shapes: Iterable[str]) -> bool:
    """Tell by original keys if a transformer is of an image-to-video model with an encoder of images."""
    return any(".k_img." in key or key.startswith("img_emb.") for key in shapes)


def fits(config: Mapping[str, Any], transformer: Mapping[str, Any]) -> bool:
    """Tell if a configuration has every value of another, which is a model's of the zoo."""
    has_images = config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None
    return not has_images and all(config.get(name) == value for name, value in transformer.items())


def _diffusers_config(folder: Path) -> tuple[dict[str, Any], int] | None:
    index = files.read_json(folder / "model_index.json")
    parts = files.diffusers_components(folder)
    experts = [name for name in ("transformer", "transformer_2") if name in parts]
    if not experts:
        return None
    config = files.read_json(folder / experts[0] / "config.json")
    if base_named(config.get("_class_name", "")) is None:
        return None
    return config, 2 if len(experts) == 2 or index.get("boundary_ratio") is not None else 1


def _original_config(folder: Path) -> tuple[dict[str, Any], int] | None:
    experts = files.original_experts(folder)
    place = experts["transformer"]
    shards = files.transformer_shards(place)
    shapes = {key: shape for path in shards for key, shape in files.safetensors_shapes(path).items()}
    if not shapes or takes_images(shapes):
        return None
    return config_from_shapes(shapes, files.read_json(place / "config.json").get("num_heads")), len(experts)
