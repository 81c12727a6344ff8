"""LoRAs on bases stored in fp8, int8 and GGUF, and merging that reads the untouched weights from the model's files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import GGUFQuantizationConfig
from lora_samples import Pairs, comfyui, make_pairs, pipe, run, same, weights, with_differences, write
from model_folders import write_transformer
from single_file_samples import matrices, write_gguf
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from pusa.lora import export_lora, load_pusa, merge_lora, set_alpha, unload_lora, unmerge_lora
from pusa.lora.adapters import state_of
from pusa.models import original
from pusa.models.streaming import WeightsChangedError, weight_dtype
from pusa.models.wan import PusaWanTransformer3DModel

BF16 = torch.bfloat16
Make = Callable[[], PusaWanTransformer3DModel]


@pytest.fixture
def in_bf16(tiny_transformer: Any) -> Make:
    def make() -> PusaWanTransformer3DModel:
        model = PusaWanTransformer3DModel.from_wan(tiny_transformer())
        for name, parameter in model.named_parameters():
            parameter.data = parameter.to(weight_dtype(model, name, BF16))
        return model

    return make


@pytest.fixture
def lora(tmp_path: Path, pairs: Pairs) -> Path:
    return write(tmp_path / "lora.safetensors", comfyui(pairs))


def cast(model: PusaWanTransformer3DModel) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)


def int8(model: PusaWanTransformer3DModel) -> None:
    quantize_(model.blocks, Int8WeightOnlyConfig())


@pytest.fixture
def gguf_file(tmp_path: Path, in_bf16: Make) -> Path:
    tensors = original.transformer_to_original(in_bf16().state_dict())
    types = {f"{name}.weight": "Q8_0" for name in matrices(tensors)}
    return write_gguf(tmp_path / "base.gguf", tensors, types)[0]


def load_gguf(path: Path, tmp_path: Path, in_bf16: Make) -> PusaWanTransformer3DModel:
    in_bf16().save_config(tmp_path / "config")
    return PusaWanTransformer3DModel.from_single_file(
        str(path),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=BF16),
        torch_dtype=BF16,
    )


# ---- adapters beside quantised weights -----------------------------------------------------------------------------


def check_adapter(model: PusaWanTransformer3DModel, lora: Path, pairs: Pairs) -> None:
    """The base layer's output plus alpha B A x, live and exact; nothing of the adapter is rounded to the storage."""
    layer_name = "blocks.1.ffn.net.0.proj"
    x = torch.randn(1, 5, 96, generator=torch.Generator().manual_seed(2)).to(BF16)
    alone, base = run(model), model.get_submodule(layer_name)(x)
    assert load_pusa(pipe(model), lora, alpha=1.4) == 20
    wrapper = model.get_submodule(layer_name)
    a, b = (half.to(BF16) for half in pairs[layer_name])
    assert torch.equal(wrapper.lora_A["pusa"].weight, a)
    assert torch.equal(wrapper.lora_B["pusa"].weight, b)
    expected = base + (x @ a.T) @ b.T * 1.4
    torch.testing.assert_close(wrapper(x), expected, rtol=0, atol=float(expected.abs().max()) / 100)
    first = run(model)
    set_alpha(pipe(model), 1.0)
    assert not torch.equal(run(model), first)
    set_alpha(pipe(model), 0.0)
    assert torch.equal(run(model), alone)
    set_alpha(pipe(model), 1.4)
    assert torch.equal(run(model), first)
    assert torch.equal(wrapper.lora_A["pusa"].weight, a)


def check_no_merging(model: PusaWanTransformer3DModel) -> None:
    before = run(model)
    with pytest.raises(ValueError, match=r"quantised .*load the model again, merge, and then quantise"):
        merge_lora(pipe(model))
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("quantise", [cast, int8])
def test_an_adapter_is_live_and_exact_on_a_quantised_base(
    in_bf16: Make, lora: Path, pairs: Pairs, quantise: Callable[[PusaWanTransformer3DModel], None]
) -> None:
    model = in_bf16()
    quantise(model)
    check_adapter(model, lora, pairs)
    check_no_merging(model)
    unload_lora(pipe(model))
    assert load_pusa(pipe(model), lora) == 20


def test_an_adapter_is_live_and_exact_on_a_gguf_base(
    tmp_path: Path, in_bf16: Make, lora: Path, pairs: Pairs, gguf_file: Path
) -> None:
    model = load_gguf(gguf_file, tmp_path, in_bf16)
    check_adapter(model, lora, pairs)
    check_no_merging(model)


def test_casting_before_and_after_the_lora_is_the_same_model(tmp_path: Path, in_bf16: Make, lora: Path) -> None:
    early, late = in_bf16(), in_bf16()
    cast(early)
    load_pusa(pipe(early), lora)
    load_pusa(pipe(late), lora)
    cast(late)
    for model in (early, late):
        layer = model.blocks[0].attn1.to_q
        assert layer.base_layer.weight.dtype == torch.float8_e4m3fn
        assert layer.lora_B["pusa"].weight.dtype == BF16
    assert torch.equal(run(early), run(late))
    assert export_lora(pipe(early), tmp_path / "out.safetensors").relative_error == 0.0


def test_weights_in_fp8_without_a_dtype_to_compute_in_are_refused(in_bf16: Make, lora: Path) -> None:
    model = in_bf16()
    model.blocks[0].attn1.to_q.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="in which nothing computes: cast the weights with enable_layerwise_casting"):
        load_pusa(pipe(model), lora)


def test_merged_and_then_cast_alpha_changes_as_if_merged_anew_and_cast(
    tmp_path: Path, in_bf16: Make, lora: Path
) -> None:
    patient, direct, base = in_bf16(), in_bf16(), in_bf16()
    load_pusa(pipe(patient), lora, alpha=0.3)
    merge_lora(pipe(patient))
    cast(patient)
    set_alpha(pipe(patient), 1.4)
    load_pusa(pipe(direct), lora, alpha=1.4)
    merge_lora(pipe(direct))
    cast(direct)
    assert same(weights(patient), weights(direct))
    assert torch.equal(run(patient), run(direct))
    unmerge_lora(pipe(patient))
    cast(base)
    assert same(weights(patient), weights(base))


def test_the_alpha_of_one_lora_changes_beside_differences_in_cast_weights(
    tmp_path: Path, in_bf16: Make, pairs: Pairs, lora: Path
) -> None:
    """LightX2V's biases are in the weights when these are cast; Pusa's alpha needs none of them."""
    model = in_bf16()
    other = make_pairs(model, rank=3, seed=1)
    fast = write(tmp_path / "fast.safetensors", with_differences(model, other)[0])
    load_pusa(pipe(model), fast, alpha=1.0, adapter_name="fast")
    load_pusa(pipe(model), lora, alpha=1.4)
    cast(model)
    first = run(model)
    set_alpha(pipe(model), 1.0)
    set_alpha(pipe(model), 1.4)
    assert torch.equal(run(model), first)


# ---- merging without a second copy ---------------------------------------------------------------------------------


@pytest.fixture
def from_file(tmp_path: Path, in_bf16: Make) -> PusaWanTransformer3DModel:
    """A model read in bf16 from fp32 files of Wan's own layout, in two shards."""
    tensors = original.transformer_to_original(in_bf16().float().state_dict())
    write_transformer(tmp_path / "wan", tensors, shards=2)
    return PusaWanTransformer3DModel.from_wan(original.load_transformer(tmp_path / "wan", BF16))


def copies(model: PusaWanTransformer3DModel) -> list[str]:
    return [name for name, value in state_of(model).untouched.items() if isinstance(value.value, Tensor)]


def test_merging_keeps_no_second_copy_of_what_the_files_hold(from_file: Any, in_bf16: Make, lora: Path) -> None:
    before = weights(from_file)
    copy = in_bf16()
    for model in (from_file, copy):
        load_pusa(pipe(model), lora, alpha=1.4)
        merge_lora(pipe(model))
    assert copies(from_file) == []
    assert len(copies(copy)) == len(state_of(from_file).untouched) == 20
    assert same(weights(from_file), weights(copy))
    set_alpha(pipe(from_file), 0.4)
    set_alpha(pipe(from_file), 1.4)
    assert same(weights(from_file), weights(copy))
    unmerge_lora(pipe(from_file))
    assert same(weights(from_file), before)


def test_weights_that_were_changed_in_memory_are_copied_not_read(from_file: Any, lora: Path) -> None:
    changed = "blocks.1.attn2.to_v.weight"
    with torch.no_grad():
        from_file.get_parameter(changed)[3, 5] += 1
    before = weights(from_file)
    load_pusa(pipe(from_file), lora)
    merge_lora(pipe(from_file))
    assert copies(from_file) == [changed]
    unmerge_lora(pipe(from_file))
    assert same(weights(from_file), before)


@pytest.mark.parametrize("fault", ["has changed", "is gone"])
def test_a_file_that_is_not_the_same_any_more_is_an_error_that_changes_nothing(
    tmp_path: Path, from_file: Any, lora: Path, fault: str
) -> None:
    load_pusa(pipe(from_file), lora)
    merge_lora(pipe(from_file))
    merged = weights(from_file)
    path = sorted((tmp_path / "wan").glob("*.safetensors"))[1]
    stat = path.stat()
    path.rename(tmp_path / "away")
    if fault == "has changed":
        path.write_bytes((tmp_path / "away").read_bytes())
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    for change in (unmerge_lora, lambda pipeline: set_alpha(pipeline, 1.0), unload_lora):
        with pytest.raises(WeightsChangedError, match=rf"{path.name} {fault} .* or load the model again"):
            change(pipe(from_file))
        assert same(weights(from_file), merged)
    os.replace(tmp_path / "away", path)
    set_alpha(pipe(from_file), 1.0)
    unmerge_lora(pipe(from_file))


def test_a_file_replaced_before_merging_is_not_trusted(tmp_path: Path, from_file: Any, lora: Path) -> None:
    before = weights(from_file)
    for path in (tmp_path / "wan").glob("*.safetensors"):
        path.write_bytes(b"another")
    load_pusa(pipe(from_file), lora)
    merge_lora(pipe(from_file))
    assert len(copies(from_file)) == 20
    unmerge_lora(pipe(from_file))
    assert same(weights(from_file), before)
