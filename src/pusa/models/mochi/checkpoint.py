"""Convert Mochi's transformer between genmo's layout and diffusers', of any size, and save files in genmo's.

Genmo's layout is that of ``pusa_v0_dit.safetensors``, of genmo's ``dit.safetensors``, and, with or without a prefix, of
the files for ComfyUI; `pusa.models.single_file` loads them. Diffusers' converter does the same for the full 48 blocks
only. Three things are more than a name: queries, keys and values are one matrix in genmo's, and halves stand in another
order (the two of SwiGLU, and shift and scale of the last layer).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import MochiTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from pusa.models.files import WrongArchitectureError
from pusa.models.mochi.layout import count_blocks
from pusa.models.original import KeyTable

Value = TypeVar("Value")
Take = Callable[[Any, Sequence[int], int], Any]  # pieces of the rows of a value, in an order, of so many equal ones

_FUSED = re.compile(r"(blocks\.\d+\.attn\.)qkv(_[xy]\.\w+)")
_SPLIT = re.compile(r"(blocks\.\d+\.attn\.)([qkv])(_[xy]\.\w+)")
_SWAPPED = re.compile(r"blocks\.\d+\.mlp_[xy]\.w1\.\w+|final_layer\.mod\.\w+")
_LAST_MOD_Y = "last_mod_y"  # the last block modulates no text, and diffusers names that layer differently


def _pairs() -> Iterator[tuple[str, str]]:
    """Yield templates (genmo, diffusers) of what has been split and swapped already."""
    yield "pos_frequencies", "pos_frequencies"
    for name, other in {
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
        "t5_y_embedder.to_q": "time_embed.pooler.to_q",
        "t5_y_embedder.to_out": "time_embed.pooler.to_out",
        "t5_yproj": "time_embed.caption_proj",
        "final_layer.mod": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }.items():
        yield f"{name}.{{p}}", f"{other}.{{p}}"
    for name, other in {
        "mod_x": "norm1.linear",
        "mod_y": "norm1_context.linear",
        _LAST_MOD_Y: "norm1_context.linear_1",
        "attn.q_x": "attn1.to_q",
        "attn.k_x": "attn1.to_k",
        "attn.v_x": "attn1.to_v",
        "attn.q_y": "attn1.add_q_proj",
        "attn.k_y": "attn1.add_k_proj",
        "attn.v_y": "attn1.add_v_proj",
        "attn.q_norm_x": "attn1.norm_q",
        "attn.k_norm_x": "attn1.norm_k",
        "attn.q_norm_y": "attn1.norm_added_q",
        "attn.k_norm_y": "attn1.norm_added_k",
        "attn.proj_x": "attn1.to_out.0",
        "attn.proj_y": "attn1.to_add_out",
        "mlp_x.w1": "ff.net.0.proj",
        "mlp_x.w2": "ff.net.2",
        "mlp_y.w1": "ff_context.net.0.proj",
        "mlp_y.w2": "ff_context.net.2",
    }.items():
        yield f"blocks.{{n}}.{name}.{{p}}", f"transformer_blocks.{{n}}.{other}.{{p}}"


TRANSFORMER = KeyTable("a Mochi transformer", _pairs())


def take_rows(value: Tensor, order: Sequence[int], count: int) -> Tensor:
    """Take pieces of a tensor's rows; a single one is a view."""
    pieces = value.chunk(count)
    return pieces[order[0]] if len(order) == 1 else torch.cat([pieces[number] for number in order])


def _pieces(key: str, value: Value, blocks: int, take: Take) -> Iterator[tuple[str, Value]]:
    """Split and swap what diffusers has otherwise; `blocks` is the number of all."""
    if match := _FUSED.fullmatch(key):
        for number, letter in enumerate("qkv"):
            yield f"{match[1]}{letter}{match[2]}", take(value, [number], 3)
    elif _SWAPPED.fullmatch(key):
        yield key, take(value, [1, 0], 2)
    else:
        yield key.replace(f"blocks.{blocks - 1}.mod_y.", f"blocks.{blocks - 1}.{_LAST_MOD_Y}."), value


def transformer_to_diffusers(state_dict: Mapping[str, Value], take: Take = take_rows) -> dict[str, Value]:
    """Convert a whole state dict in genmo's layout, of any number of blocks, to diffusers'.

    Args:
        state_dict: without a prefix.
        take: how pieces of a value are taken; those of tensors that are no more than split are views.

    Raises:
        WrongArchitectureError: a key is no Mochi transformer's, or there is no block.
    """
    blocks = count_blocks(state_dict)
    return TRANSFORMER.to_diffusers(
        {name: piece for key, value in state_dict.items() for name, piece in _pieces(key, value, blocks, take)}
    )


def transformer_to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `transformer_to_diffusers`, to genmo's layout without a prefix; raise as that."""
    pieces = TRANSFORMER.to_original(state_dict)
    count_blocks(pieces)
    converted: dict[str, Tensor] = {}
    for key, value in pieces.items():
        if match := _SPLIT.fullmatch(key):
            names = [f"{match[1]}{letter}{match[3]}" for letter in "qkv"]
            if missing := [name for name in names if name not in pieces]:
                raise WrongArchitectureError(f"these tensors are no whole Mochi transformer: {missing[0]} is missing")
            if match[2] == "q":
                converted[f"{match[1]}qkv{match[3]}"] = torch.cat([pieces[name] for name in names])
        else:
            converted[key.replace(_LAST_MOD_Y, "mod_y")] = (
                take_rows(value, [1, 0], 2) if _SWAPPED.fullmatch(key) else value
            )
    return converted


def save_transformer(model: MochiTransformer3DModel, path: Path) -> None:
    """Write a transformer to a ``.safetensors`` file in genmo's layout, as its weights are stored."""
    converted = transformer_to_original(model.state_dict())
    save_file({key: value.contiguous() for key, value in converted.items()}, path)
