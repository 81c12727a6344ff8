"""A LoRA of Mochi's transformer, as diffusers writes it, is attached, scaled, merged and exported like one of Wan's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MochiPipeline
from lora_samples import comfyui, make_pairs, same, weights, write
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from pusa import PusaPipeline, load_single_file
from pusa.lora import describe_lora
from pusa.lora.adapters import state_of
from pusa.lora.ranks import reduce_file
from pusa.models.bases.mochi import MochiBase
from pusa.models.mochi import tiny
from pusa.models.mochi.checkpoint import save_transformer
from pusa.models.streaming import WeightSource

LAYERS = 2 * 12 + 9 + 1  # the last of 3 blocks has none after the attention of the text; to_q also pools the text


@pytest.fixture
def pipe() -> PusaPipeline:
    return PusaPipeline(**tiny.components())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a LoRA as diffusers does after training: lora_alpha is twice the rank."""
    stock = MochiPipeline(**tiny.components())
    torch.manual_seed(0)
    stock.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=list(MochiBase.lora_targets), init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(stock.transformer)
    config = stock.transformer.peft_config["default"].to_dict()
    MochiPipeline.save_lora_weights(
        tmp_path / "lora", transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
    )
    return tmp_path / "lora"


@torch.no_grad()
def run(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 12, 3, 4, 6, generator=generator)
    text = torch.randn(1, 8, tiny.TEXT_DIM, generator=generator)
    timestep = torch.tensor([700.0])
    mask = torch.ones(1, 8, dtype=torch.bool)
    return pipe.transformer(latents, text, timestep, mask, return_dict=False)[0]


def test_every_layer_is_adapted_as_by_diffusers(
    pipe: PusaPipeline, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = run(pipe)
    caplog.set_level("INFO", "pusa")
    assert pipe.load_pusa(folder, alpha=1.0) == LAYERS
    assert f"{LAYERS} of {LAYERS} layers" in caplog.text
    expected = MochiPipeline(**tiny.components())
    expected.load_lora_weights(folder)
    assert not torch.allclose(run(pipe), before, atol=1e-2)
    torch.testing.assert_close(run(pipe), run(expected), rtol=0, atol=1e-5)


def test_alpha_is_live_and_merging_is_exact(pipe: PusaPipeline, folder: Path) -> None:
    untouched, before = weights(pipe.transformer), run(pipe)
    pipe.load_pusa(folder, alpha=1.4)
    first = run(pipe)
    layer = pipe.transformer.transformer_blocks[0].attn1.add_q_proj
    a, b = (getattr(layer, half)["pusa"].weight for half in ("lora_A", "lora_B"))
    name = "transformer_blocks.0.attn1.add_q_proj.weight"
    pipe.merge_lora()
    torch.testing.assert_close(weights(pipe.transformer)[name], untouched[name] + 1.4 * (b @ a), rtol=0, atol=1e-6)
    torch.testing.assert_close(run(pipe), first, rtol=0, atol=1e-5)
    pipe.set_alpha(0.0)
    assert torch.equal(run(pipe), before)
    pipe.unmerge_lora()
    assert same(weights(pipe.transformer), untouched)
    pipe.set_alpha(1.4)
    assert torch.equal(run(pipe), first)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), before)


def test_untouched_weights_come_from_pieces_of_a_file(folder: Path, tmp_path: Path) -> None:
    """Read genmo's layout, which has queries, keys and values in one matrix, and halves in another order."""
    save_transformer(tiny.components()["transformer"], tmp_path / "dit.safetensors")
    transformer = load_single_file(tmp_path / "dit.safetensors")["transformer"]
    untouched = weights(transformer)
    pipe = PusaPipeline(**tiny.components() | {"transformer": transformer})
    pipe.load_pusa(folder, alpha=1.0)
    pipe.merge_lora()
    kept = state_of(transformer).untouched
    assert len(kept) == LAYERS
    assert all(isinstance(value.value, WeightSource) for value in kept.values())
    pipe.unmerge_lora()
    assert same(weights(transformer), untouched)


def test_an_exported_lora_is_read_here_and_by_diffusers(pipe: PusaPipeline, folder: Path, tmp_path: Path) -> None:
    pipe.load_pusa(folder, alpha=1.0)
    expected = run(pipe)
    with pytest.raises(ValueError, match=r"layout='comfyui' is not one of diffusers, which LoRAs of Mochi have"):
        pipe.export_lora(tmp_path / "out.safetensors", layout="comfyui")
    pipe.export_lora(tmp_path / "out.safetensors")
    stock = MochiPipeline(**tiny.components())
    stock.load_lora_weights(tmp_path / "out.safetensors")
    torch.testing.assert_close(run(stock), expected, rtol=0, atol=1e-5)
    reduce_file(tmp_path / "out.safetensors", tmp_path / "small.safetensors", 2)
    again = PusaPipeline(**tiny.components())
    assert again.load_pusa(tmp_path / "small.safetensors", alpha=1.0) == LAYERS
    assert describe_lora(tmp_path / "small.safetensors").ranks == (2,)
    assert str(describe_lora(tmp_path / "small.safetensors").model) == "Mochi"


def test_a_lora_of_another_model_is_refused(pipe: PusaPipeline, folder: Path, tmp_path: Path) -> None:
    wan = PusaPipeline.from_pretrained("tiny")
    path = write(tmp_path / "wan.safetensors", comfyui(make_pairs(wan.transformer)))
    with pytest.raises(ValueError, match=r"wan\.safetensors is a LoRA for Wan .*, not for Mochi"):
        pipe.load_pusa(path)
    with pytest.raises(ValueError, match="is a LoRA for Mochi, not for Wan"):
        wan.load_pusa(folder)
    other = {f"transformer.transformer_blocks.0.attn2.to_q.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}
    with pytest.raises(ValueError, match=r"ltx\.safetensors is a LoRA for .*, not for Mochi \(.*attn2\.to_q"):
        pipe.load_pusa(write(tmp_path / "ltx.safetensors", other))
