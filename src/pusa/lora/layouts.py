"""Read and write LoRA files: of any layout for Wan, under diffusers' names for other bases; recognise further ones."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pusa.lora.tensor_files import read_tensors
from pusa.models.bases.base import Base, LoraLayout
from pusa.models.files import DamagedFileError
from pusa.models.names import BLOCK_NAMES, MODEL_NAMES

Layout = LoraLayout
Pair = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

_NAMES = BLOCK_NAMES | MODEL_NAMES
_FLAT_NAMES = {name.replace(".", "_"): name for name in (*_NAMES.values(), *_NAMES)}  # kohya's, of either convention
_ORIGINAL_BLOCK_NAMES = {other: name for name, other in BLOCK_NAMES.items()}
_ORIGINAL_MODEL_NAMES = {other: name for name, other in MODEL_NAMES.items()}
_PATCH = (1, 2, 2)  # of all published models
_IMAGE_NAMES = ("attn2.add_k_proj", "attn2.add_v_proj", "attn2.norm_added_k", "condition_embedder.image_embedder")

_PREFIXES = {
    "base_model.model.": "peft",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lycoris_": "kohya",
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
    "transformer_2.": "diffusers",
    "unet.": "diffusers",
    "pipe.dit.": "original",
    "dit.": "original",
    "model.": "original",
    "module.": "original",
    "_orig_mod.": "original",  # of a compiled model
}
_SECOND_EXPERT = re.compile(r"(?:base_model\.model\.)?transformer_2\.")
_MATRIX = r"(?:lora[._](?:(?P<a>A|down)|(?P<b>B|up)))"
_KEY = re.compile(
    r"(?P<layer>.+?)(?:(?:\.|_lora\.)(?P<part>alpha|diff|diff_b|diff_m)"
    rf"|(?:\.{_MATRIX}|(?:_lora|\.lora_linear_layer)\.(?:(?P<old_a>down)|(?P<old_b>up)))(?:\.[^.]+)?\.weight"
    r"|\.(?P<bias>lora_B)(?:\.[^.]+)?\.bias)"
)
_OTHER_KINDS = re.compile(r"dora_scale|magnitude_vector|lokr_|hada_|oft_")
_SCALES = re.compile(r"(scale_weight|weight_scale|scaled_fp8|comfy_quant)$")

_OTHER_MODELS = (
    (r"individual_token_refiner|img_attn_qkv|txt_attn_qkv", "HunyuanVideo"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "Flux or HunyuanVideo"),
    (r"qkv_x|qkv_y|attn1[._](?:add_[qkv]_proj|to_add_out)", "Mochi"),
    (r"blocks_(?:spatial|temp)[._]", "FVDM"),
    (r"lora_te|text_model|down_blocks|up_blocks|mid_block|input_blocks|output_blocks", "Stable Diffusion"),
    (r"joint_blocks|attn.add_q_proj|attn_add_q_proj", "Stable Diffusion 3 or Qwen-Image"),
    (r"transformer_blocks", "Mochi, LTX-Video or CogVideoX"),
)
_WAN_BLOCK = re.compile(r"(?P<prefix>.*?)\bblocks[._]\d+[._](?P<name>.+)")
_WAN_SIZES = {(1536, 30): "1.3B", (5120, 40): "14B", (3072, 30): "5B"}


@dataclass(frozen=True)
class ModelGuess:
    """Model a LoRA was made for, guessed from names and shapes; `width` and `blocks` are 0 if unknown."""

    family: str
    width: int = 0
    blocks: int = 0
    image_to_video: bool = False
    vace: bool = False

    def __str__(self) -> str:
        if self.family != "Wan":
            return self.family
        size = _WAN_SIZES.get((self.width, self.blocks), "")
        task = "VACE" if self.vace else "image-to-video" if self.image_to_video else ""
        shape = f"(width {self.width or 'unknown'}, {self.blocks} blocks)"
        return " ".join(part for part in ("Wan", size, task, shape) if part)


@dataclass(frozen=True)
class LoraInfo:
    """Summary of a LoRA file: `ranks` ascending, `dtype` of its matrices, `metadata` of its header."""

    path: Path
    layout: str
    model: ModelGuess
    layers: int
    ranks: tuple[int, ...]
    dtype: str
    has_alpha: bool
    has_diff: bool
    has_diff_b: bool
    metadata: dict[str, str]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in diffusers' module names, to add as `weight + alpha * (B @ A)`.

    Attributes:
        pairs: module name -> A `[rank, in]` and B `[out, rank]`, with the file's alpha / rank folded into B.
        deltas: parameter name -> difference of the whole parameter (`diff`, `diff_b`, `diff_m`).
        unknown_keys: keys that are neither.
        has_alpha: the file has its own alphas.
        left_out: image-to-video layers that `without_image_layers` removed.
    """

    path: Path
    layout: str
    model: ModelGuess
    pairs: dict[str, Pair]
    deltas: dict[str, Tensor]
    unknown_keys: list[str]
    has_alpha: bool
    metadata: dict[str, str]
    left_out: tuple[str, ...] = ()

    @property
    def layers(self) -> set[str]:
        """Modules with a pair or a difference."""
        return set(self.pairs) | {name.rpartition(".")[0] for name in self.deltas}

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({a.shape[0] for a, _ in self.pairs.values()}))

    def without_image_layers(self) -> "LoraFile":
        """Return the file without the layers that only image-to-video models have."""
        names = {name for name in self.layers if _is_image_layer(name)}
        if any(delta.shape[1] == 36 for name, delta in self.deltas.items() if name == "patch_embedding.weight"):
            names.add("patch_embedding")
        pair = self.pairs.get("patch_embedding")
        if pair is not None and pair[0][0].numel() == 36 * math.prod(_PATCH):
            names.add("patch_embedding")
        return replace(
            self,
            pairs={name: pair for name, pair in self.pairs.items() if name not in names},
            deltas={name: delta for name, delta in self.deltas.items() if name.rpartition(".")[0] not in names},
            left_out=tuple(sorted(names)),
        )


def _is_image_layer(name: str) -> bool:
    return any(part in name for part in _IMAGE_NAMES)


def to_diffusers(name: str) -> str:
    """Convert a Wan module name to diffusers'; return diffusers' and unknown names unchanged."""
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    return block[1] + BLOCK_NAMES.get(block[2], block[2]) if block else MODEL_NAMES.get(name, name)


def to_original(name: str) -> str:
    """Convert a diffusers module name to Wan's own."""
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    if block:
        return block[1] + _ORIGINAL_BLOCK_NAMES.get(block[2], block[2])
    return _ORIGINAL_MODEL_NAMES.get(name, name)


def fold(b: Tensor, scale: float) -> Tensor:
    """Compute `b * scale` in the dtype of `b` if that is exact, else in float32."""
    if scale == 1.0 or b.is_meta:
        return b
    scaled = b.float() * scale
    narrow = scaled.to(b.dtype)
    return narrow if torch.equal(narrow.float(), scaled) else scaled


def read_lora(path: Path, expert: str | None = None, *, shapes_only: bool = False) -> LoraFile:
    """Read a LoRA file of any layout.

    Layouts: Wan's own names (the official `pusa_v1.pt`), ComfyUI (`diffusion_model.`), diffusers (`transformer.`), PEFT
    (`base_model.model.`) and kohya (`lora_unet_`); `lora_A/B`, `lora_down/up` or `lora.down/up`; with or without
    `.alpha`; `diff`, `diff_b` and `diff_m` (of the modulation). Without an alpha the scale is 1, as in PEFT and ComfyUI
    (Pusa's `load_lora_lightx2v` takes 1 / rank, which leaves a rank-256 file almost off). fp8 becomes bf16, which holds
    all its values. Pickles are read by `torch.load(weights_only=True)`, which runs no code.

    Args:
        expert: "transformer" or "transformer_2": of a file with keys of both (see `experts_of_keys`), read its own.
        shapes_only: read no matrices: they stay on the meta device, and are not searched for NaN.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no LoRA, is damaged or of an unsupported kind, holds NaN or infinity, or is a pickle
            that holds code.
    """
    tensors, metadata = read_tensors(path, shapes_only=shapes_only)
    if expert is not None and len(_experts_of(tensors)) > 1:
        second = expert == "transformer_2"
        tensors = {key: value for key, value in tensors.items() if bool(_SECOND_EXPERT.match(key)) == second}
    lora = _parse(path, tensors, metadata)
    if shapes_only:
        return lora
    for name, values in [*lora.deltas.items(), *((name, half) for name, pair in lora.pairs.items() for half in pair)]:
        if values.numel() and not all(bool(bound.isfinite()) for bound in values.aminmax()):
            raise DamagedFileError(f"{path.name} holds NaN or infinity, first in {name}: it is damaged, get it again")
    return lora


def experts_of_keys(path: Path) -> set[str]:
    """Return the experts of Wan2.2 that a file's keys name (`transformer_2.`); empty if all keys are of one kind."""
    keys = read_tensors(path, shapes_only=True)[0] if path.suffix == ".safetensors" else {}
    return _experts_of(keys)


def _experts_of(keys: Iterable[str]) -> set[str]:
    found = {"transformer_2" if _SECOND_EXPERT.match(key) else "transformer" for key in keys}
    return found if "transformer_2" in found else set()


def describe_lora(path: str | os.PathLike[str]) -> LoraInfo:
    """Summarise a LoRA file from names and shapes alone, without reading its matrices; raise as `read_lora`."""
    lora = read_lora(Path(path), "transformer", shapes_only=True)
    return LoraInfo(
        path=lora.path,
        layout=lora.layout,
        model=lora.model,
        layers=len(lora.layers),
        ranks=lora.ranks,
        dtype=", ".join(sorted({str(a.dtype).removeprefix("torch.") for a, _ in lora.pairs.values()})),
        has_alpha=lora.has_alpha,
        has_diff=any(not name.endswith(".bias") for name in lora.deltas),
        has_diff_b=any(name.endswith(".bias") for name in lora.deltas),
        metadata=lora.metadata,
    )


def _parse(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> LoraFile:
    parts, unknown_keys, layouts = _sort_keys(path, tensors)
    _check_kind(path, tensors, parts, unknown_keys)
    config = _peft_config(path, metadata)
    pairs: dict[str, Pair] = {}
    deltas: dict[str, Tensor] = {}
    for layer, part in parts.items():
        if "diff" in part:
            deltas[layer if layer.endswith("scale_shift_table") else f"{layer}.weight"] = part["diff"]
        if "diff_b" in part:
            deltas[f"{layer}.bias"] = part["diff_b"]
        if not part.keys() & {"a", "b", "bias"}:
            continue
        if "a" not in part or "b" not in part:
            raise ValueError(
                f"{path.name}: {layer} has only one of its two matrices (lora_A/lora_B or lora_down/lora_up)"
            )
        a, b = part["a"], part["b"]
        if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{path.name}: the matrices of {layer} do not fit: A {list(a.shape)}, B {list(b.shape)}")
        scale = _scale(part.get("alpha"), config, layer, a.shape[0])
        pairs[layer] = a, fold(b, scale)
        if "bias" in part:  # PEFT's lora_bias, inside the scale, unlike diff_b
            deltas[f"{layer}.bias"] = fold(part["bias"], scale)
    return LoraFile(
        path=path,
        layout="+".join(sorted(layouts - {"diffusers"} or layouts)),  # patch_embedding is the same in both conventions
        model=_guess_model(pairs, deltas, tensors),
        pairs=pairs,
        deltas=deltas,
        unknown_keys=unknown_keys,
        has_alpha=any("alpha" in part for part in parts.values()),
        metadata=metadata,
    )


def _sort_keys(path: Path, tensors: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str], set[str]]:
    """Sort tensors by layer (diffusers' name) and part; return unknown keys and the layouts of the others, too."""
    parts: dict[str, dict[str, Any]] = {}
    unknown_keys: list[str] = []
    layouts: set[str] = set()
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            unknown_keys.append(key)
            continue
        part = match["part"] or next(name for name in ("a", "b", "old_a", "old_b", "bias") if match[name])
        layer, layout = _plain_name(match["layer"] + (".modulation" if part == "diff_m" else ""))
        part = {"diff_m": "diff"}.get(part, part.removeprefix("old_"))
        layouts.add(layout)
        layer = to_diffusers(layer)
        if part in parts.setdefault(layer, {}):
            raise ValueError(f"{path.name}: {key!r} repeats what another key says of {layer}")
        parts[layer][part] = value
    return parts, unknown_keys, layouts


def _check_kind(path: Path, tensors: dict[str, Any], parts: dict[str, dict[str, Any]], unknown_keys: list[str]) -> None:
    """Refuse files that are no LoRA or are one of an unsupported kind; see `read_lora`."""
    unsupported = [key for key in unknown_keys if _OTHER_KINDS.search(key)]
    if unsupported:
        raise ValueError(f"{path.name} is a DoRA, LoKr, LoHa or OFT file ({unsupported[0]!r}); only LoRA is supported")
    scale = next((key for key in unknown_keys if _SCALES.search(key)), None)
    if scale:
        raise ValueError(
            f"{path.name} is quantised, with scales beside its weights ({scale!r}): get it in bf16 or fp32"
        )
    for layer, part in parts.items():
        values = next((v for name, v in part.items() if name != "alpha" and not v.is_floating_point()), None)
        if values is not None:
            kind = str(values.dtype).removeprefix("torch.")
            raise ValueError(f"{path.name} holds {kind} weights (first: {layer}), not floats: get it in bf16 or fp32")
    if not any(part.keys() - {"alpha"} for part in parts.values()):
        first = next(iter(tensors), None)
        raise ValueError(f"{path.name} holds no LoRA layer (first of {len(tensors)} keys: {first!r})")


def _plain_name(layer: str) -> tuple[str, str]:
    """Strip the prefixes that tools put before a layer's name; return the name and the layout they show."""
    layout = ""
    while prefix := next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), None):
        layer, layout = layer.removeprefix(prefix), layout or _PREFIXES[prefix]
    flat = layer.replace(".processor", "").replace(".", "_")  # kohya joins by underscores, all or some of the names
    block = re.fullmatch(r"blocks_(\d+)_(.+)", flat)
    if block and block[2] in _FLAT_NAMES:
        layer = f"blocks.{block[1]}.{_FLAT_NAMES[block[2]]}"
    elif block and block[2] in ("attn1_to_out", "attn2_to_out"):  # of attention processors
        layer = f"blocks.{block[1]}.{block[2][:5]}.to_out.0"
    else:
        layer = _FLAT_NAMES.get(flat, layer)
    return layer, layout or ("original" if to_diffusers(layer) != layer else "diffusers")


def unknown_prefix(name: str) -> str:
    """Return what stands before Wan's names in a layer that no known prefix explains; empty if it has none of them."""
    match = _WAN_BLOCK.fullmatch(name)
    if match is None or not match["prefix"]:
        return ""
    return match["prefix"] if match["name"].replace(".", "_") in _FLAT_NAMES else ""


def _scale(alpha: Tensor | float | None, config: dict[str, Any], layer: str, rank: int) -> float:
    if alpha is not None:
        return float(alpha) / rank
    if not config:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    value = next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", layer)), config["lora_alpha"])
    return float(value) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _peft_config(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Read PEFT's LoraConfig: diffusers keeps it in the header, PEFT beside `adapter_model.*`; {} without one."""
    beside = path.with_name("adapter_config.json")
    if "lora_adapter_metadata" in metadata:
        config = json.loads(metadata["lora_adapter_metadata"])
    elif path.stem == "adapter_model" and beside.is_file():
        config = json.loads(beside.read_text())
    else:
        return {}
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    return config if "lora_alpha" in config else {}


def _guess_model(pairs: dict[str, Pair], deltas: dict[str, Tensor], keys: Iterable[str]) -> ModelGuess:
    names = [*pairs, *deltas]
    module = re.compile(r"blocks\.(\d+)\.(" + "|".join(map(re.escape, BLOCK_NAMES.values())) + r")(\.weight|\.bias)?")
    blocks = [int(match[1]) for match in map(module.fullmatch, names) if match]
    vace = any("vace_blocks." in name for name in names)
    if not blocks and not vace and not any(name.removesuffix(".weight") in MODEL_NAMES.values() for name in names):
        if any(map(unknown_prefix, names)):
            return ModelGuess("Wan")
        found = next((model for pattern, model in _OTHER_MODELS if any(re.search(pattern, key) for key in keys)), None)
        return ModelGuess(found or "an unknown model")
    inner = re.compile(r"blocks\.\d+\.(attn1\.\w+|attn1\.to_out\.0|attn2\.to_q|attn2\.to_out\.0|ffn\.net\.0\.proj)")
    width = next((a.shape[1] for name, (a, _) in pairs.items() if inner.fullmatch(name)), 0)
    patch = deltas.get("patch_embedding.weight")
    image = any(map(_is_image_layer, names)) or (patch is not None and patch.shape[1] == 36)
    return ModelGuess("Wan", width, max(blocks, default=-1) + 1, image, vace)


def checked_layout(layout: Layout | None, base: Base) -> Layout:
    """Return a layout that files with LoRAs of a base have, its first one for None. Raises ValueError for another."""
    if layout is None:
        return base.lora_layouts[0]
    if layout not in base.lora_layouts:
        ways = ", ".join(base.lora_layouts)
        raise ValueError(f"layout={layout!r} is not one of {ways}, which LoRAs of {base.name} have")
    return layout


def write_lora(
    path: Path,
    pairs: Mapping[str, Pair],
    deltas: Mapping[str, Tensor],
    *,
    layout: Layout,
    metadata: Mapping[str, str],
) -> None:
    """Write pairs and differences (as in `LoraFile`) to a safetensors file that appears only when complete.

    "comfyui" gives each layer an `.alpha` equal to its rank, so that readers with other defaults agree on scale 1.

    Raises:
        ValueError: the layout cannot hold one of the differences.
    """
    tensors: dict[str, Tensor] = {}
    has_bias = any(name.endswith(".bias") for name in deltas)
    for name, (a, b) in pairs.items():
        if layout == "comfyui":
            key = f"diffusion_model.{to_original(name)}"
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
            tensors[f"{key}.alpha"] = torch.tensor(float(a.shape[0]))
        elif layout == "original":
            key = to_original(name)
            tensors |= {f"{key}.lora_A.default.weight": a, f"{key}.lora_B.default.weight": b}
        else:
            key = f"transformer.{name}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            if has_bias:  # PEFT has a bias on all layers or on none
                tensors[f"{key}.lora_B.bias"] = deltas.get(f"{name}.bias", torch.zeros(b.shape[0], dtype=b.dtype))
    for name, delta in deltas.items():
        module, _, parameter = name.rpartition(".")
        if layout == "comfyui":
            original = to_original(name if parameter == "scale_shift_table" else module)
            tensors[f"diffusion_model.{original}.{'diff_b' if parameter == 'bias' else 'diff'}"] = delta
        elif layout == "original" or parameter != "bias" or module not in pairs:
            raise ValueError(f'the {layout} layout cannot hold the difference of {name}: use layout="comfyui"')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    save_file(
        {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, partial, {"format": "pt", **metadata}
    )
    partial.replace(path)
