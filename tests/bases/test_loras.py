"""Load LoRAs on every base: its own acts as strongly as asked, another base's is refused before any work."""

from pathlib import Path

import numpy as np
import torch
from command_line import pusa
from safetensors.torch import save_file
from studied_bases import Studied

from pusa import media
from pusa.generate import generate
from pusa.request import GenerationRequest


def lora_of(studied: Studied, path: Path) -> Path:
    """Write a LoRA on all layers that are adapted as published, in diffusers' layout."""
    draw = torch.Generator().manual_seed(0)
    pairs = {}
    for name, layer in studied.pipe.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(studied.pipe.base.lora_targets) and "blocks" in name:
            pairs[f"transformer.{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=draw)
            pairs[f"transformer.{name}.lora_B.weight"] = 0.05 * torch.randn(layer.out_features, 2, generator=draw)
    assert pairs
    save_file(pairs, path)
    return path


def test_a_lora_acts_as_strongly_as_asked(studied: Studied, tmp_path: Path) -> None:
    file = lora_of(studied, tmp_path / "own.safetensors")
    videos = {}
    for name, lora in {"none": [], "weak": [f"{file}@0.001"], "full": [f"{file}@1"]}.items():
        request = GenerationRequest(**studied.request, lora=lora)
        assert list(generate(request, tmp_path / f"{name}.mp4"))[-1].kind == "done"
        videos[name] = media.read_video(tmp_path / f"{name}.mp4").astype(int)
    weak, full = (np.abs(videos[name] - videos["none"]).mean() for name in ("weak", "full"))
    assert weak < full / 2  # an mp4 adds its own


def test_the_lora_of_another_base_is_refused(studied: Studied, tmp_path: Path) -> None:
    names = {"Wan": "blocks.0.attn1.to_q", "Mochi": "transformer_blocks.0.attn1.to_q", "FVDM": "blocks_temp.0.attn.qkv"}
    for base, layer in names.items():
        if base == studied.pipe.base.name:
            continue
        pair = {
            f"transformer.{layer}.lora_{side}.weight": torch.ones(2, 7).reshape(shape)
            for side, shape in (("A", (2, 7)), ("B", (7, 2)))
        }
        save_file(pair, tmp_path / "other.safetensors")
        prompt = [studied.base.prompt] if studied.base.prompt else []
        run = pusa("generate", *prompt, "--model", studied.folder, "--lora", tmp_path / "other.safetensors")
        assert run.exit_code == 2
        assert "other.safetensors" in run.output
        assert not list(tmp_path.glob("*.mp4"))
