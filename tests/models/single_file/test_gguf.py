"""A GGUF file gives exactly what `gguf` computes in fp32, whatever its writer made of names and shapes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from components import make_transformer
from single_file_samples import HEADS, Tensors, matrices, transformer_tensors, write_gguf

from pusa import load_single_file
from pusa.models import original
from pusa.models.files import DamagedFileError, WrongArchitectureError
from pusa.models.single_file.recognition import recognise

pytest.importorskip("gguf")

BLOCKS_OF_32 = ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "F16", "BF16", "F32", "IQ4_NL"]
BLOCKS_OF_256 = ["Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS"]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return transformer_tensors(ffn_dim=256)


def load(path: Path) -> Tensors:
    return original.transformer_to_original(load_single_file(path, config=HEADS)["transformer"].state_dict())


def assert_equal(loaded: Tensors, meant: Tensors) -> None:
    assert loaded.keys() == meant.keys()
    for name, value in loaded.items():
        torch.testing.assert_close(value, meant[name].reshape(value.shape), rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("kind", BLOCKS_OF_32)
def test_blocks_of_32(tmp_path: Path, tensors: Tensors, kind: str) -> None:
    types = {f"{name}.weight": kind for name in matrices(tensors)}
    path, meant = write_gguf(tmp_path / "wan.gguf", tensors, types)
    assert recognise(path).parts[0].layout == "gguf"
    assert_equal(load(path), meant)


@pytest.mark.parametrize("kind", BLOCKS_OF_256)
def test_blocks_of_256(tmp_path: Path, tensors: Tensors, kind: str) -> None:
    path, meant = write_gguf(tmp_path / "wan.gguf", tensors, {"blocks.0.ffn.2.weight": kind})
    assert_equal(load(path), meant)


@pytest.mark.parametrize("architecture", ["wan", "pig", None])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_any_architecture_and_prefix(tmp_path: Path, tensors: Tensors, architecture: Any, prefix: str) -> None:
    named = {f"{prefix}{name}": value for name, value in tensors.items()}
    path, _ = write_gguf(tmp_path / "wan.gguf", named, {}, architecture=architecture)
    file = recognise(path)
    assert (file.architecture, file.parts[0].family, file.parts[0].prefix) == (architecture, "t2v", prefix)
    assert_equal(load(path), tensors)


def test_shapes_that_writers_changed(tmp_path: Path, tensors: Tensors) -> None:
    changed = dict(tensors)
    for name in ("blocks.0.modulation", "head.modulation"):
        changed[name] = tensors[name][0]
    changed["patch_embedding.weight"] = tensors["patch_embedding.weight"].reshape(96 * 16, 1, 2, 2)
    path, meant = write_gguf(tmp_path / "four.gguf", changed, {"patch_embedding.weight": "BF16"})
    assert recognise(path).parts[0].in_channels == 16
    assert_equal(load(path), meant)
    assert meant["patch_embedding.weight"].ne(changed["patch_embedding.weight"]).any()
    shape = "comfy.gguf.orig_shape.patch_embedding.weight"
    changed["patch_embedding.weight"] = tensors["patch_embedding.weight"].reshape(-1, 64)
    path, meant = write_gguf(
        tmp_path / "two.gguf", changed, {"patch_embedding.weight": "Q8_0"}, fields={shape: [96, 16, 1, 2, 2]}
    )
    assert_equal(load(path), meant)
    path, _ = write_gguf(tmp_path / "odd.gguf", changed, {}, fields={shape: [96, 16, 1, 2, 3]})
    with pytest.raises(DamagedFileError, match=r"not as many as its orig_shape \[96, 16, 1, 2, 3\]"):
        load(path)


def test_other_families_and_types_are_refused(tmp_path: Path, tensors: Tensors) -> None:
    wide = transformer_tensors(in_channels=36)
    with pytest.raises(WrongArchitectureError, match="an image-to-video model"):
        load(write_gguf(tmp_path / "i2v.gguf", wide, {})[0])
    path, _ = write_gguf(tmp_path / "type.gguf", tensors, {"blocks.0.ffn.2.weight": "TQ1_0"})
    with pytest.raises(WrongArchitectureError, match=r"blocks\.0\.ffn\.2\.weight is of GGUF's type TQ1_0"):
        load(path)


@pytest.mark.parametrize("part", [0.99, 0.5, 0.02, 0.0005])
def test_a_file_cut_short_is_damaged(tmp_path: Path, tensors: Tensors, part: float) -> None:
    path, _ = write_gguf(tmp_path / "cut.gguf", tensors, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(DamagedFileError, match=r"cut\.gguf is (?:no whole GGUF file|cut short)"):
        load_single_file(path)


def test_without_the_package_the_error_names_it(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write_gguf(tmp_path / "wan.gguf", tensors, {})
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r'wan\.gguf is a GGUF file: pip install "pusa\[quant\]"'):
        load_single_file(path)


def test_a_text_encoder_by_llama_cpp_names(tmp_path: Path, tiny_text_encoder: Any) -> None:
    encoder = tiny_text_encoder(seed=4)
    names = {
        "layer.0.layer_norm": "attn_norm",
        "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
        "layer.1.layer_norm": "ffn_norm",
        "layer.1.DenseReluDense.wi_0": "ffn_gate",
        "layer.1.DenseReluDense.wi_1": "ffn_up",
        "layer.1.DenseReluDense.wo": "ffn_down",
    } | {f"layer.0.SelfAttention.{letter}": f"attn_{letter}" for letter in "qkvo"}
    named = {}
    for name, value in encoder.state_dict().items():
        if name == "shared.weight":
            named["token_embd.weight"] = value
        elif name == "encoder.final_layer_norm.weight":
            named["enc.output_norm.weight"] = value
        elif name.startswith("encoder.block."):
            _, _, block, rest = name.split(".", 3)
            named[f"enc.blk.{block}.{names[rest.removesuffix('.weight')]}.weight"] = value
    types = {name: "Q8_0" for name, value in named.items() if value.ndim == 2 and value.shape[1] % 32 == 0}
    decoder = {"dec.blk.0.attn_q.weight": torch.zeros(2, 2), "output.weight": torch.zeros(2, 2)}
    path, meant = write_gguf(tmp_path / "t5.gguf", named | decoder, types, architecture="t5encoder")
    loaded = load_single_file(path)["text_encoder"]
    assert loaded.config.num_heads == 4
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    assert torch.equal(loaded.shared.weight, meant["token_embd.weight"])
    block = loaded.encoder.block[1].layer[1].DenseReluDense
    assert torch.equal(block.wi_0.weight, meant["enc.blk.1.ffn_gate.weight"])
    assert torch.equal(block.wo.weight, meant["enc.blk.1.ffn_down.weight"])
    hf = {name: value for name, value in encoder.state_dict().items() if "embed_tokens" not in name}
    pig = load_single_file(write_gguf(tmp_path / "pig.gguf", hf, {}, architecture="pig")[0])["text_encoder"]
    assert all(torch.equal(value, hf[name]) for name, value in pig.state_dict().items() if name in hf)


def test_the_model_computes_with_them(tmp_path: Path) -> None:
    stock = make_transformer(2, num_layers=1)
    path, _ = write_gguf(tmp_path / "wan.gguf", original.transformer_to_original(stock.state_dict()), {})
    model = load_single_file(path, config=HEADS)["transformer"]
    inputs = (torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 48))
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs).sample, stock(*inputs).sample, rtol=0, atol=0)
