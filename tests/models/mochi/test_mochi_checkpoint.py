"""Files in genmo's layout become diffusers' models and back, to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MochiTransformer3DModel
from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pusa import load_single_file
from pusa.models.files import WrongArchitectureError
from pusa.models.mochi import checkpoint
from pusa.models.mochi.layout import config_from_keys
from pusa.models.mochi.transformer import PusaMochiTransformer3DModel

Weights = dict[str, Tensor]


@pytest.fixture
def genmo(golden_tensors: Callable[[str], Weights]) -> Weights:
    return golden_tensors("mochi/transformer/weights_genmo")


def assert_equal(ours: Weights, expected: Weights) -> None:
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        assert torch.equal(value, expected[key]), key


def load(path: Path, **options: Any) -> PusaMochiTransformer3DModel:
    return load_single_file(path, components=["transformer"], **options)["transformer"]


def test_all_tensors_convert_both_ways(genmo: Weights, golden_tensors: Callable[[str], Weights]) -> None:
    diffusers = golden_tensors("mochi/transformer/weights_diffusers")
    assert_equal(checkpoint.transformer_to_diffusers(genmo), diffusers)
    assert_equal(checkpoint.transformer_to_original(diffusers), genmo)


def test_the_configuration_follows_from_the_shapes(genmo: Weights, golden_json: Callable[[str], Any]) -> None:
    config = config_from_keys({key: value.shape for key, value in genmo.items()})
    expected = golden_json("mochi/transformer/config")["diffusers"] | {"out_channels": 12}
    unseen = {"qk_norm", "activation_fn", "max_sequence_length"}  # no shape shows them
    assert config == {key: value for key, value in expected.items() if key not in unseen}


def test_the_full_size_converts_as_by_diffusers() -> None:
    with torch.device("meta"):
        model = MochiTransformer3DModel()
    genmo = checkpoint.transformer_to_original(model.state_dict())
    config = config_from_keys({key: value.shape for key, value in genmo.items()})
    assert {key: model.config[key] or 12 for key in config} == config
    ours, theirs = checkpoint.transformer_to_diffusers(genmo), convert_mochi_transformer_checkpoint_to_diffusers(genmo)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in ours.items()}
    assert shapes == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loads_a_file_and_saves_it(genmo: Weights, tmp_path: Path, prefix: str, dtype: torch.dtype | None) -> None:
    others = {"vae.decoder.weight": torch.zeros(2)} if prefix else {}  # beside it, in ComfyUI's
    save_file({prefix + key: value for key, value in genmo.items()} | others, tmp_path / "dit.safetensors")
    model = load(tmp_path / "dit.safetensors", torch_dtype=dtype)
    assert type(model) is PusaMochiTransformer3DModel
    assert model.dtype == (dtype or torch.float32)
    assert not model.training
    (tmp_path / "dit.safetensors").unlink()
    checkpoint.save_transformer(model, tmp_path / "saved.safetensors")
    assert_equal(
        load_file(tmp_path / "saved.safetensors"), {key: value.to(model.dtype) for key, value in genmo.items()}
    )


def test_the_last_block_is_the_last_of_any_number(golden_json: Callable[[str], Any]) -> None:
    config = golden_json("mochi/transformer/config")["diffusers"]
    for layers in (1, 2, 11):
        weights = PusaMochiTransformer3DModel(**config | {"num_layers": layers}).state_dict()
        assert_equal(checkpoint.transformer_to_diffusers(checkpoint.transformer_to_original(weights)), dict(weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.attn.proj_x.bias"), "1 weights are in no file: transformer_blocks.1.attn1.to_out"),
        (lambda w: w.update(strange=torch.zeros(1)), "1 of .* tensors are not those of a Mochi transformer: strange"),
        (lambda w: w.update({"blocks.0.mlp_x.w2.weight": torch.zeros(2, 2)}), "have another shape"),
        (lambda w: w.pop("t5_yproj.weight"), "and not whole: .* no Mochi transformer: 't5_yproj.weight'"),
    ],
    ids=["missing", "left over", "shape", "no text"],
)
def test_a_file_that_is_not_whole_is_refused(
    genmo: Weights, tmp_path: Path, change: Callable[[Weights], Any], message: str
) -> None:
    weights = dict(genmo)
    change(weights)
    save_file(weights, tmp_path / "dit.safetensors")
    with pytest.raises(WrongArchitectureError, match=message):
        load(tmp_path / "dit.safetensors")
    for other in ({}, {"q_norm": torch.zeros(1)}):
        with pytest.raises(WrongArchitectureError):
            checkpoint.transformer_to_diffusers(other)


def test_a_part_of_an_attention_is_refused(golden_tensors: Callable[[str], Weights]) -> None:
    weights = golden_tensors("mochi/transformer/weights_diffusers")
    weights.pop("transformer_blocks.0.attn1.to_k.weight")
    with pytest.raises(WrongArchitectureError, match=r"blocks\.0\.attn\.k_x\.weight is missing"):
        checkpoint.transformer_to_original(weights)
