"""Quantised matrices kept as stored compute what dequantised ones do, take less memory and carry LoRAs."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from single_file_samples import HEADS, declaration, matrices, scaled, transformer_tensors, write, write_gguf
from torch import nn

from pusa import load_single_file

pytest.importorskip("torchao")
pytest.importorskip("gguf")

KINDS = ["fp8", "fp8 e5m2", "fp8 by row", "fp8 plain", "int8", "int8 by row", "Q8_0", "Q4_1", "Q4_K"]


def written(folder: Path, kind: str) -> tuple[Path, set[str]]:
    """Write a transformer whose blocks are quantised; return the file and the quantised layers."""
    tensors = transformer_tensors(ffn_dim=256)
    layers = matrices(tensors)
    if kind[0] == "Q":
        layers = layers if kind != "Q4_K" else ["blocks.0.ffn.2"]
        return write_gguf(folder / "wan.gguf", tensors, {f"{n}.weight": kind for n in layers})[0], set(layers)
    if kind == "fp8 plain":
        stored = tensors | {f"{n}.weight": tensors[f"{n}.weight"].to(torch.float8_e4m3fn) for n in layers}
        return write(folder / "wan.safetensors", stored), set(layers)
    dtype = torch.int8 if "int8" in kind else torch.float8_e5m2 if "e5m2" in kind else torch.float8_e4m3fn
    stored, _ = scaled(tensors, layers, spelling="weight_scale", dtype=dtype, by_row="row" in kind)
    if dtype == torch.int8:
        stored |= {f"{n}.comfy_quant": declaration("int8_tensorwise") for n in layers}
    return write(folder / "wan.safetensors", stored), set(layers)


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, generator=generator).to(dtype),
        "timestep": torch.tensor([[0.0, 700.0]]),
        "encoder_hidden_states": torch.randn(1, 5, 48, generator=generator).to(dtype),
    }


def quantised(model: nn.Module) -> list[nn.Linear]:
    kinds = ("Float8Tensor", "Int8Tensor", "GGUFParameter")
    return [m for m in model.modules() if isinstance(m, nn.Linear) and type(m.weight).__name__ in kinds]


@pytest.mark.parametrize("kind", KINDS)
def test_kept_matrices_compute_the_same(tmp_path: Path, kind: str) -> None:
    path, layers = written(tmp_path, kind)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        dequantised = load_single_file(path, config=HEADS, torch_dtype=dtype)["transformer"]
        kept = load_single_file(path, config=HEADS, torch_dtype=dtype, keep_quantized=True)["transformer"]
        assert len(quantised(kept)) == len(layers)
        assert kept.dtype == dtype
        with torch.no_grad():
            wanted, got = (model(**inputs(dtype)).sample for model in (dequantised, kept))
        assert got.dtype == dtype
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("kind", ["fp8", "int8 by row", "Q8_0"])
def test_kept_matrices_carry_loras(tmp_path: Path, kind: str) -> None:
    path, _ = written(tmp_path, kind)
    outputs = []
    for keep in (False, True):
        model = load_single_file(path, config=HEADS, keep_quantized=keep)["transformer"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that such layers cannot be merged
            model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "ffn.net.2"], init_lora_weights=False))
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            outputs.append(model(**inputs(torch.float32)).sample)
            model.disable_adapters()
            assert (outputs[-1] - model(**inputs(torch.float32)).sample).abs().max() > 1e-3
    assert (outputs[0] - outputs[1]).abs().max() <= 2e-6 * outputs[0].abs().max()


def test_kept_matrices_take_the_memory_of_the_file(tmp_path: Path) -> None:
    path, layers = written(tmp_path, "fp8")
    kept = load_single_file(path, config=HEADS, torch_dtype=torch.bfloat16, keep_quantized=True)["transformer"]
    weights = [module.weight for module in quantised(kept)]
    assert len(weights) == len(layers)
    assert all(weight.qdata.dtype == torch.float8_e4m3fn and weight.scale.numel() == 1 for weight in weights)
    assert not any(weight.requires_grad for weight in weights)


@pytest.mark.parametrize("kind", ["fp8", "Q8_0"])
def test_a_text_encoder_is_kept_too(tmp_path: Path, kind: str, tiny_text_encoder: Any) -> None:
    names = {n: v.detach() for n, v in tiny_text_encoder(seed=1).state_dict().items() if "embed_tokens" not in n}
    layers = [n.removesuffix(".weight") for n, v in names.items() if "DenseReluDense.w" in n and v.shape[1] % 32 == 0]
    if kind == "fp8":
        path = write(tmp_path / "umt5.safetensors", scaled(names, layers)[0])
    else:
        path, _ = write_gguf(tmp_path / "umt5.gguf", names, {f"{n}.weight": kind for n in layers}, architecture="pig")
    tokens = torch.tensor([[5, 9, 1, 0]])
    dequantised = load_single_file(path)["text_encoder"]
    kept = load_single_file(path, keep_quantized=True)["text_encoder"]
    assert len(quantised(kept)) == len(layers) > 0
    with torch.no_grad():
        wanted, got = (model(tokens).last_hidden_state for model in (dequantised, kept))
    assert (got - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_one_component_of_an_all_in_one_file_is_loaded_and_kept_alone(golden: Path) -> None:
    path = golden / "singlefiles/all_in_one_checkpoint.safetensors"
    whole = load_single_file(path, config={"transformer": HEADS})
    assert {"transformer", "text_encoder", "vae"} <= set(whole)
    for keep in (False, ["text_encoder"], ["transformer"]):
        alone = load_single_file(path, config={"transformer": HEADS}, components=["transformer"], keep_quantized=keep)
        assert set(alone) == {"transformer"}
        assert bool(quantised(alone["transformer"])) == (keep == ["transformer"])
    assert set(load_single_file(path, components=["vae"])) == {"vae"}
    with pytest.raises(ValueError, match=r"components=\['unet'\]: all_in_one_checkpoint\.safetensors holds "):
        load_single_file(path, components=["unet"])
