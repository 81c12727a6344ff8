"""A safetensors file in any layout gives exactly float32(stored) * float32(scale), or is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from components import make_transformer
from single_file_samples import (
    HEADS,
    Tensors,
    declaration,
    matrices,
    scaled,
    transformer_tensors,
    write,
)

from pusa import PusaWanTransformer3DModel, load_single_file
from pusa.models import original
from pusa.models.files import DamagedFileError, WrongArchitectureError
from pusa.models.single_file.recognition import recognise

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return transformer_tensors()


def load(path: Path, **options: Any) -> Tensors:
    """The weights of a file's transformer by Wan's names."""
    model = load_single_file(path, config=HEADS, **options)["transformer"]
    assert isinstance(model, PusaWanTransformer3DModel)
    return original.transformer_to_original(model.state_dict())


def assert_equal(loaded: Tensors, meant: Tensors) -> None:
    assert loaded.keys() == meant.keys()
    for name, value in loaded.items():
        torch.testing.assert_close(value, meant[name].float(), rtol=0, atol=0, msg=name)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
@pytest.mark.parametrize("compiled", [False, True])
def test_prefixes_are_told_from_names(tmp_path: Path, tensors: Tensors, prefix: str, compiled: bool) -> None:
    named = {f"_orig_mod.{name}" if compiled else name: value for name, value in tensors.items()}
    path = write(tmp_path / "wan.safetensors", named, prefix=prefix)
    assert recognise(path).parts[0].prefix == prefix
    assert_equal(load(path), tensors)


def test_names_of_compiled_blocks_and_of_diffusers_are_known(tmp_path: Path, tensors: Tensors) -> None:
    compiled = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in tensors.items()}
    assert_equal(load(write(tmp_path / "blocks.safetensors", compiled)), tensors)
    path = write(tmp_path / "diffusers.safetensors", original.transformer_to_diffusers(tensors))
    assert recognise(path).parts[0].names == "diffusers"
    assert_equal(load(path), tensors)


def test_a_tensor_left_over_or_missing_is_named(tmp_path: Path, tensors: Tensors) -> None:
    extra = tensors | {"blocks.0.surprise.weight": torch.zeros(2)}
    with pytest.raises(WrongArchitectureError, match=r"text-to-video transformer in .*: .*blocks\.0\.surprise\.weight"):
        load(write(tmp_path / "extra.safetensors", extra))
    short = {name: value for name, value in tensors.items() if name != "blocks.0.ffn.2.bias"}
    with pytest.raises(WrongArchitectureError, match=r"1 weights are in no file: blocks\.0\.ffn\.net\.2\.bias"):
        load(write(tmp_path / "short.safetensors", short))
    twice = tensors | {f"_orig_mod.{name}": value for name, value in tensors.items() if "head" in name}
    with pytest.raises(DamagedFileError, match=r"head\S+ twice"):
        load(write(tmp_path / "twice.safetensors", twice))


def test_a_stranger_beside_the_transformer_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    named = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
    path = write(tmp_path / "stranger.safetensors", named | {"cond_stage_model.x.weight": torch.zeros(2)})
    with pytest.raises(
        WrongArchitectureError, match=r"no part of a Wan or Mochi model \(tensors such as cond_stage_model"
    ):
        load(path)


# ---- heads and sizes -----------------------------------------------------------------------------------------------


def test_heads_are_asked_for_only_where_tensors_do_not_tell(tmp_path: Path, tensors: Tensors) -> None:
    path = write(tmp_path / "tiny.safetensors", tensors)
    with pytest.raises(WrongArchitectureError, match=r"width of 96 .* give config=\{'num_attention_heads'"):
        load_single_file(path)
    with pytest.raises(WrongArchitectureError, match="5 heads of 19 channels do not make a width of 96"):
        load_single_file(path, config={"num_attention_heads": 5})
    with pytest.raises(ValueError, match=r"config has heads, which the transformer in tiny\.safetensors does not"):
        load_single_file(path, config={"heads": 3})
    by_size = load_single_file(path, config={"attention_head_dim": 32, "_class_name": "WanTransformer3DModel"})
    assert by_size["transformer"].config.num_attention_heads == 3
    wide = transformer_tensors(num_attention_heads=1, attention_head_dim=128)
    model = load_single_file(write(tmp_path / "wide.safetensors", wide))["transformer"]
    assert (model.config.num_attention_heads, model.config.attention_head_dim) == (1, 128)


def test_a_model_of_ti2v_5b_kind_needs_its_size_or_a_config_that_says_so(tmp_path: Path) -> None:
    tensors = transformer_tensors(in_channels=48, out_channels=48)
    path = write(tmp_path / "ti2v.safetensors", tensors)
    assert recognise(path).parts[0].family == "ti2v"
    with pytest.raises(WrongArchitectureError, match="TI2V-5B has a width of 3072, and this one 96"):
        load_single_file(path, config=HEADS)
    model = load_single_file(path, config=HEADS | {"in_channels": 48, "out_channels": 48})["transformer"]
    assert_equal(original.transformer_to_original(model.state_dict()), tensors)


# ---- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, E4M3, E5M2, "mixed"])
def test_plain_files_are_read_as_stored(tmp_path: Path, tensors: Tensors, dtype: Any) -> None:
    matrix = torch.bfloat16 if dtype == "mixed" else dtype
    rest = torch.float32 if dtype == "mixed" else dtype
    stored = {name: value.to(matrix if value.ndim > 1 else rest) for name, value in tensors.items()}
    assert_equal(load(write(tmp_path / "plain.safetensors", stored)), {k: v.float() for k, v in stored.items()})


def test_bf16_keeps_in_fp32_what_diffusers_does(tmp_path: Path, tensors: Tensors) -> None:
    model = load_single_file(
        write(tmp_path / "wan.safetensors", tensors), config=HEADS, torch_dtype={"default": torch.bfloat16}
    )["transformer"]
    assert model.blocks[0].attn1.to_q.weight.dtype == model.dtype == torch.bfloat16
    assert model.scale_shift_table.dtype == model.blocks[0].norm2.weight.dtype == torch.float32
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert not model.training


# ---- scaled fp8 and int8 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", [torch.empty(0, dtype=E4M3), torch.zeros(2, dtype=E4M3), torch.zeros(1), None])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(
    "shape", [lambda s: s, lambda s: s.reshape(1), lambda s: s.bfloat16()], ids=["[]", "[1]", "bf16"]
)
def test_scaled_files_of_2025(
    tmp_path: Path, tensors: Tensors, marker: Any, dtype: torch.dtype, shape: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    layers = [*matrices(tensors), "head.head", "text_embedding.0", "time_projection.1"]
    stored, meant = scaled(tensors, layers, dtype=dtype, shape=shape)
    if stored["head.head.scale_weight"].dtype == torch.bfloat16:
        meant |= {f"{n}.weight": stored[f"{n}.weight"].float() * stored[f"{n}.scale_weight"].float() for n in layers}
    stored |= {f"{name}.scale_input": torch.tensor(7.0) for name in layers}
    stored |= {} if marker is None else {"scaled_fp8": marker}
    path = write(tmp_path / "scaled.safetensors", stored, prefix="model.diffusion_model.")
    assert recognise(path).parts[0].layout == "fp8_scaled_old"
    assert_equal(load(path), meant)


@pytest.mark.parametrize("says", ["comfy_quant", "metadata", "metadata without prefix", "nothing"])
def test_scaled_files_of_today(tmp_path: Path, tensors: Tensors, says: str) -> None:
    layers, prefix, metadata = matrices(tensors), "diffusion_model.", None
    stored, meant = scaled(tensors, layers, spelling="weight_scale")
    stored |= {f"{name}.input_scale": torch.tensor(7.0) for name in layers}
    if says == "comfy_quant":
        stored |= {f"{name}.comfy_quant": declaration(full_precision_matrix_mult=True) for name in layers}
        stored["blocks.0.self_attn.comfy_attention.config"] = declaration("a hint")
    elif says != "nothing":
        before = prefix if says == "metadata" else ""
        metadata = {"layers": {f"{before}{name}": {"format": "float8_e4m3fn"} for name in layers}}
    path = write(tmp_path / "scaled.safetensors", stored, prefix=prefix, metadata=metadata)
    assert recognise(path).parts[0].layout == "fp8_scaled_new"
    assert_equal(load(path), meant)


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("flat", [False, True])
def test_scales_of_rows_go_along_rows_on_square_layers_too(
    tmp_path: Path, tensors: Tensors, dtype: torch.dtype, flat: bool
) -> None:
    layers = matrices(tensors)
    assert any(tensors[f"{name}.weight"].shape == (96, 96) for name in layers)
    stored, meant = scaled(
        tensors, layers, spelling="weight_scale", dtype=dtype, by_row=True, shape=lambda s: s.flatten() if flat else s
    )
    kind = "int8_tensorwise" if dtype == torch.int8 else "float8_e4m3fn"
    stored |= {f"{name}.comfy_quant": declaration(kind, per_row=True) for name in layers}
    path = write(tmp_path / "rows.safetensors", stored)
    assert recognise(path).parts[0].layout == ("int8_tensorwise" if dtype == torch.int8 else "fp8_scaled_per_row")
    assert_equal(load(path), meant)


def test_layers_are_told_one_by_one(tmp_path: Path, tensors: Tensors) -> None:
    layers = matrices(tensors)
    stored, meant = scaled(tensors, layers[:3], spelling="weight_scale")
    for name in layers[3:5]:
        stored[f"{name}.weight"] = tensors[f"{name}.weight"].to(E4M3)
        meant[f"{name}.weight"] = stored[f"{name}.weight"].float()
    path = write(tmp_path / "mixed.safetensors", stored)
    assert recognise(path).parts[0].layout == "fp8_mixed"
    assert_equal(load(path), meant)


def test_a_marker_before_all_components_is_of_all(tmp_path: Path, tensors: Tensors) -> None:
    layers = matrices(tensors)
    stored, meant = scaled(tensors, layers)
    named = {f"model.diffusion_model.{name}": value for name, value in stored.items()}
    assert_equal(load(write(tmp_path / "a.safetensors", named | {"scaled_fp8": torch.zeros(2).to(E4M3)})), meant)
    del named[f"model.diffusion_model.{layers[0]}.scale_weight"]
    with pytest.raises(WrongArchitectureError, match=rf"{layers[0]}\.weight is F8_E4M3 and its scale is missing"):
        load(write(tmp_path / "b.safetensors", named | {"scaled_fp8": torch.zeros(2).to(E4M3)}))


# ---- refused -------------------------------------------------------------------------------------------------------


Change = Callable[[Tensors, str], Any]
REFUSALS: dict[str, tuple[Change, str]] = {
    "scale missing beside its declaration": (
        lambda t, n: t.pop(f"{n}.weight_scale"),
        r"\.weight is F8_E4M3 and its scale is missing",
    ),
    "unknown format": (
        lambda t, n: t.update({f"{n}.comfy_quant": declaration("float7_of_tomorrow")}),
        "is quantised as float7_of_tomorrow",
    ),
    "convrot": (
        lambda t, n: t.update({f"{n}.comfy_quant": declaration("int8_tensorwise", convrot=True)}),
        "is convrot int8",
    ),
    "not JSON": (
        lambda t, n: t.update({f"{n}.comfy_quant": torch.zeros(4, dtype=torch.uint8)}),
        "is no JSON",
    ),
    "another type than declared": (
        lambda t, n: t.update({f"{n}.comfy_quant": declaration("int8_tensorwise")}),
        "is declared int8_tensorwise and stored as F8_E4M3",
    ),
    "scales of mxfp8": (
        lambda t, n: t.update({f"{n}.weight_scale": torch.ones(96, 3, dtype=torch.uint8)}),
        r"weight_scale is U8, as in mxfp8",
    ),
    "second scale of nvfp4": (
        lambda t, n: t.update({f"{n}.weight_scale_2": torch.ones(())}),
        "is quantised as nvfp4",
    ),
    "packed": (
        lambda t, n: t.update({f"{n}.weight": torch.zeros(96, 48, dtype=torch.uint8)}) or t.pop(f"{n}.comfy_quant"),
        r"weight is stored as U8",
    ),
    "scales of blocks": (
        lambda t, n: t.update({f"{n}.weight_scale": torch.ones(2, 2)}),
        r"has scales \[2, 2\]: one for the tensor or one for each row \[96\]",
    ),
    "scales of columns": (
        lambda t, n: t.update({f"{n}.weight_scale": torch.ones(1, 96)}),
        r"has scales \[1, 96\]",
    ),
    "scale without weight": (
        lambda t, n: t.update({"blocks.0.gone.weight_scale": torch.ones(())}),
        r"1 scales have no weight \(first: blocks\.0\.gone\.weight_scale\)",
    ),
    "two scales": (
        lambda t, n: t.update({f"{n}.scale_weight": torch.ones(())}),
        "has two scales",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_be_read_wrongly_is_refused_by_name(tmp_path: Path, tensors: Tensors, name: str) -> None:
    layers = matrices(tensors)
    stored, _ = scaled(tensors, layers, spelling="weight_scale")
    stored |= {f"{layer}.comfy_quant": declaration() for layer in layers}
    change, why = REFUSALS[name]
    change(stored, "blocks.0.self_attn.q")
    path = write(tmp_path / "odd.safetensors", stored)
    with pytest.raises(WrongArchitectureError, match=why):
        load(path)
    assert recognise(path).problem


def test_headers_that_name_other_layers_are_refused(tmp_path: Path, tensors: Tensors) -> None:
    stored, _ = scaled(tensors, matrices(tensors), spelling="weight_scale")
    layers = {"unet.blocks.0.self_attn.q": {"format": "int8_tensorwise", "convrot": True}}
    path = write(tmp_path / "names.safetensors", stored, metadata={"layers": layers})
    with pytest.raises(WrongArchitectureError, match=r"names 1 quantised layers that are not there \(first: unet"):
        load(path)
    path = write(tmp_path / "none.safetensors", stored, metadata={"layers": ["blocks.0.self_attn.q"]})
    with pytest.raises(WrongArchitectureError, match="_quantization_metadata has no layers"):
        load(path)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_lost_scale_in_an_unmarked_file_is_seen_by_its_values(
    tmp_path: Path, tensors: Tensors, dtype: torch.dtype
) -> None:
    stored, _ = scaled(tensors, matrices(tensors), dtype=dtype)
    del stored["blocks.0.ffn.0.scale_weight"]
    with pytest.raises(WrongArchitectureError, match=r"blocks\.0\.ffn\.0\.weight is F8_E\dM\d with values up to"):
        load(write(tmp_path / "lost.safetensors", stored))


def test_a_file_cut_short_is_damaged(tmp_path: Path, tensors: Tensors) -> None:
    path = write(tmp_path / "cut.safetensors", tensors)
    whole = path.read_bytes()
    for count, why in ((len(whole) - 1, "cut short"), (20, "no whole safetensors file"), (3, "no whole safetensors")):
        path.write_bytes(whole[:count])
        with pytest.raises(DamagedFileError, match=why):
            load_single_file(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
        load_single_file(tmp_path / "nothing.safetensors")
    with pytest.raises(DamagedFileError, match="is a folder: give a file in it"):
        load_single_file(tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", torch.int8, {"default": torch.bfloat16, "vae": "fp32"}])
def test_a_dtype_that_is_none_is_refused(tmp_path: Path, tensors: Tensors, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"torch_dtype=.* is no floating type: give torch\.bfloat16, for one"):
        load_single_file(write(tmp_path / "a.safetensors", tensors), torch_dtype=dtype)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": 5}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": 7, "shape": ["1"], "data_offsets": [0, "4"]}}',
    ],
)
def test_a_header_of_nonsense_is_damage(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "nonsense.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(DamagedFileError, match="no safetensors file: its header does not describe 'a'"):
        load_single_file(path)


def test_a_stock_transformer_and_the_loaded_one_agree(tmp_path: Path) -> None:
    stock = make_transformer(3, num_layers=1)
    path = write(tmp_path / "wan.safetensors", original.transformer_to_original(stock.state_dict()))
    model = load_single_file(path, config=HEADS)["transformer"]
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 48),
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, stock(**inputs).sample, rtol=0, atol=0)
