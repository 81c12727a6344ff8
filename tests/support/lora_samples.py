"""Make small LoRAs: the same matrices in every layout, and a forward pass that shows their effect."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pusa.lora.layouts import to_original

Pairs = dict[str, tuple[Tensor, Tensor]]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = (*(f"attn1.{o}" for o in ATTENTION), *(f"attn2.{o}" for o in ATTENTION), "ffn.net.0.proj", "ffn.net.2")


def make_pairs(model: nn.Module, rank: int = 4, seed: int = 0) -> Pairs:
    """A rank-4 A and B for the modules Pusa adapts, large enough to change the output by a few per cent."""
    generator = torch.Generator().manual_seed(seed)
    found: Pairs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and name.split(".", 2)[2] in TARGETS:
            a = torch.randn(rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, rank, generator=generator)
            found[name] = 0.05 * a, 0.05 * b
    return found


def comfyui(pairs: Pairs) -> dict[str, Tensor]:
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        keys[f"diffusion_model.{to_original(name)}.lora_A.weight"] = a
        keys[f"diffusion_model.{to_original(name)}.lora_B.weight"] = b
    return keys


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def pipe(transformer: nn.Module, transformer_2: nn.Module | None = None) -> SimpleNamespace:
    return SimpleNamespace(transformer=transformer, transformer_2=transformer_2)


@torch.no_grad()
def run(model: Any) -> Tensor:
    """One forward with a timestep per latent frame."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 16, 3, 4, 6, generator=generator)  # [B, C, F, H, W]
    text = torch.randn(1, 8, 48, generator=generator)
    timestep = torch.tensor([[0.0, 300.0, 900.0]])  # [B, F]
    return model(
        hidden_states=latents.to(model.dtype),
        timestep=timestep,
        encoder_hidden_states=text.to(model.dtype),
        return_dict=False,
    )[0]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- one LoRA, layout by layout ------------------------------------------------------------------------------------


def peft_folder(folder: Path, pairs: Pairs) -> Path:
    """Write a LoRA as `PeftModel.save_pretrained` does, with lora_alpha twice the rank and B halved to compensate."""
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        keys |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b / 2}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    write(folder / "adapter_model.safetensors", keys)
    return folder


def official_pickle(folder: Path, pairs: Pairs) -> Path:
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        keys[f"{to_original(name)}.lora_A.default.weight"] = a
        keys[f"{to_original(name)}.lora_B.default.weight"] = b
    torch.save(keys, folder / "pusa_v1.pt")
    return folder / "pusa_v1.pt"


def wrapped_old_pickle(folder: Path, pairs: Pairs) -> Path:
    inner = {key.removeprefix("diffusion_model."): tensor for key, tensor in comfyui(pairs).items()}
    torch.save({"module": {"state_dict": inner}}, folder / "lora.ckpt", _use_new_zipfile_serialization=False)
    return folder / "lora.ckpt"


def lightning(folder: Path, pairs: Pairs) -> Path:
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        key = f"diffusion_model.{to_original(name)}"
        keys |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": 4 * b, f"{key}.alpha": torch.tensor(1.0)}
    return write(folder / "lightning.safetensors", keys)


def kohya(folder: Path, pairs: Pairs) -> Path:
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        key = f"lora_unet_{to_original(name).replace('.', '_')}"
        keys |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(4.0)}
    return write(folder / "musubi.safetensors", keys)


def diffusers_file(folder: Path, pairs: Pairs) -> Path:
    """Write a LoRA as diffusers does: PEFT's configuration in the header, lora_alpha four times the rank."""
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        keys |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b / 4}
    config = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})
    return write(folder / "pytorch_lora_weights.safetensors", keys, {"lora_adapter_metadata": config})


# ---- LoRAs with more than matrices, and of other models ------------------------------------------------------------


def with_differences(model: nn.Module, pairs: Pairs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """LightX2V's keys, biases on some layers only; and the differences by parameter."""
    generator = torch.Generator().manual_seed(3)
    parameters = dict(model.named_parameters())
    keys = {
        "blocks.0.attn1.to_q.bias": "blocks.0.self_attn.q.diff_b",
        "blocks.1.norm2.weight": "blocks.1.norm3.diff",
        "blocks.1.norm2.bias": "blocks.1.norm3.diff_b",
        "blocks.1.attn2.norm_k.weight": "blocks.1.cross_attn.norm_k.diff",
        "blocks.0.scale_shift_table": "blocks.0.modulation.diff",
        "patch_embedding.weight": "patch_embedding.diff",
        "patch_embedding.bias": "patch_embedding.diff_b",
        "proj_out.weight": "head.head.diff",
        "condition_embedder.time_proj.bias": "time_projection.1.diff_b",
    }
    deltas = {name: 0.05 * torch.randn(parameters[name].shape, generator=generator) for name in keys}
    tensors = comfyui(pairs) | {f"diffusion_model.{key}": deltas[name] for name, key in keys.items()}
    return tensors, deltas


def flux(_: Pairs) -> dict[str, Tensor]:
    keys = ("double_blocks.0.img_attn.qkv", "single_blocks.3.linear1")
    return {f"diffusion_model.{key}.lora_{half}.weight": torch.zeros(2, 2) for key in keys for half in "AB"}
