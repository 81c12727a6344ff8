"""Read the configuration of Mochi's transformer from the names and shapes of its tensors. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pusa.models.files import WrongArchitectureError

STOCK_CLASS = "MochiTransformer3DModel"

# Layout -> names of the tensors whose shapes tell the configuration, and how blocks begin.
_GENMO = {
    "patch": "x_embedder.proj.weight",
    "text": "t5_yproj.weight",
    "head": "blocks.0.attn.q_norm_x.weight",
    "out": "final_layer.linear.weight",
    "time": "t_embedder.mlp.0.weight",
    "block": "blocks.",
}
_DIFFUSERS = {
    "patch": "patch_embed.proj.weight",
    "text": "time_embed.caption_proj.weight",
    "head": "transformer_blocks.0.attn1.norm_q.weight",
    "out": "proj_out.weight",
    "time": "time_embed.timestep_embedder.linear_1.weight",
    "block": "transformer_blocks.",
}
_NAMES = {"genmo": _GENMO, "diffusers": _DIFFUSERS}


def layout_of(names: Mapping[str, Any]) -> str | None:
    """Tell whose names a transformer's tensors have: "genmo" or "diffusers"; None: it is not Mochi's."""
    if "pos_frequencies" not in names:  # of its learned rotary embedding, which no other model has
        return None
    return "diffusers" if any(name.startswith(_DIFFUSERS["block"]) for name in names) else "genmo"


def count_blocks(names: Mapping[str, Any], layout: str = "genmo") -> int:
    """Count the blocks by the names of tensors.

    Raises:
        WrongArchitectureError: there is none.
    """
    pattern = re.compile(re.escape(_NAMES[layout]["block"]) + r"(\d+)\.")
    numbers = [int(match[1]) for name in names if (match := pattern.match(name))]
    if not numbers:
        raise WrongArchitectureError(f"these {len(names)} tensors are no Mochi transformer: there are no blocks")
    return 1 + max(numbers)


def config_from_keys(shapes: Mapping[str, Sequence[int]], layout: str = "genmo") -> dict[str, Any]:
    """Derive the diffusers configuration of a transformer (key -> shape, of the whole model).

    Raises:
        WrongArchitectureError: the tensors are not those of a Mochi transformer.
    """
    keys = _NAMES[layout]
    try:
        dim, in_channels, patch_size, _ = shapes[keys["patch"]]
        text_width, text_embed_dim = shapes[keys["text"]]
        head_dim, heads = shapes[keys["head"]][0], shapes["pos_frequencies"][1]
        rows, time_embed_dim = shapes[keys["out"]][0], shapes[keys["time"]][1]
    except (KeyError, ValueError, IndexError) as error:
        raise WrongArchitectureError(f"these {len(shapes)} tensors are no Mochi transformer: {error}") from error
    if heads * head_dim != dim:
        raise WrongArchitectureError(f"{heads} heads of {head_dim} channels do not make a width of {dim}")
    return {
        "patch_size": patch_size,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": count_blocks(shapes, layout),
        "pooled_projection_dim": text_width,
        "in_channels": in_channels,
        "out_channels": rows // patch_size**2,
        "text_embed_dim": text_embed_dim,
        "time_embed_dim": time_embed_dim,
    }
