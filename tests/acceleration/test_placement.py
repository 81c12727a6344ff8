"""A plan changes where weights are and how they are stored, and nothing else; it can be undone, in the middle too.

The accelerator of these tests is the CPU: what moves weights runs, and results must be equal to the bit.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from components import make_transformer
from lora_samples import comfyui, make_pairs, run, same, weights, write
from plan_samples import make_plan
from torch import nn

from pusa.acceleration import apply
from pusa.acceleration.blocks import blocks_of
from pusa.acceleration.decisions import PartPlan
from pusa.acceleration.placement import can_apply, device_for, is_alpha_frozen, remove
from pusa.acceleration.quantization import cast, quantize, storage_of
from pusa.models.mochi.transformer import PusaMochiTransformer3DModel
from pusa.resources import ResourcesError

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 2.0}
OFFLOADS = ("none", "model", "blocks", "leaves", "disk")


def frames(pipe: Any) -> torch.Tensor:
    return pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **SMALL).frames


@pytest.fixture
def lora(tmp_path: Path, tiny_transformer: Any) -> Path:
    return write(tmp_path / "lora.safetensors", comfyui(make_pairs(tiny_transformer())))


def parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


# ---- offloading ----------------------------------------------------------------------------------------------------


def test_every_offload_makes_the_same_video_and_can_follow_any_other(tiny_pipeline: Any, tmp_path: Path) -> None:
    pipe = tiny_pipeline(experts=2)
    before = frames(pipe)
    for offload in (*OFFLOADS, *reversed(OFFLOADS)):
        apply(pipe, make_plan(offload), device="cpu", disk_folder=tmp_path)
        assert torch.equal(frames(pipe), before), offload
        assert torch.equal(frames(pipe), before), f"{offload}, again"
    remove(pipe)
    assert torch.equal(frames(pipe), before)
    modules = [pipe.text_encoder, pipe.transformer, pipe.transformer_2, pipe.vae]
    assert not any(hasattr(module, "_hf_hook") for module in modules)
    assert list(tmp_path.iterdir()) == []


def test_parts_may_be_placed_in_different_ways(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline(experts=2)
    before = frames(pipe)
    streamed = PartPlan("float32", "float32", "cuda", "blocks")
    for changes in (
        {"transformer": streamed},
        {"transformer_2": streamed, "vae": PartPlan("float32", "float32", "cuda", "leaves")},
        {"text_encoder": PartPlan("float32", "float32", "cpu"), "transformer": streamed},
        {"text_encoder": PartPlan("float32", "float32", "cuda", when="prompt")},
        {"text_encoder": PartPlan("float32", "float32", "cpu"), "vae": PartPlan("float32", "float32", "cpu")},
    ):
        apply(pipe, make_plan("model", **changes), device="cpu")
        assert torch.equal(frames(pipe), before), changes


def test_parts_that_take_turns_are_never_on_the_accelerator_together(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline(experts=2)
    apply(pipe, make_plan("model"), device="meta")
    hook = pipe.transformer._hf_hook
    pipe.transformer_2.to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        hook.pre_forward(pipe.transformer)  # takes the other one away first; there is no way back from "meta"
    assert next(pipe.transformer.parameters()).device.type == "cpu"


def test_a_text_encoder_for_prompts_leaves_the_accelerator_after_them(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline()
    apply(pipe, make_plan(text_encoder=PartPlan("float32", "float32", "cuda", when="prompt")), device="meta")
    assert next(pipe.text_encoder.parameters()).device.type == "cpu"
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):  # there is no way back from "meta"
        pipe.text_encoder(torch.ones(1, 4, dtype=torch.long))


def test_weights_on_disk_are_those_of_each_expert_and_leave_with_the_plan(tiny_pipeline: Any, tmp_path: Path) -> None:
    pipe = tiny_pipeline(experts=2)
    before = weights(pipe.transformer), weights(pipe.transformer_2)
    apply(pipe, make_plan("disk"), device="cpu", disk_folder=tmp_path)
    assert len({path.name.rpartition("-")[0] for path in tmp_path.iterdir()}) == 4
    assert len(list(tmp_path.glob("transformer-*/*.safetensors"))) == 3  # 2 blocks, and what is around them
    remove(pipe)
    assert same(weights(pipe.transformer), before[0])
    assert same(weights(pipe.transformer_2), before[1])
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_fails_in_the_middle_leaves_a_pipeline_that_takes_another(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline()
    before = frames(pipe)
    plan = make_plan("blocks", vae=PartPlan("float32", "float32", "cuda", "none"))
    calls = 0

    class Short(type(pipe.vae)):  # type: ignore[misc]
        def to(self, *args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise torch.OutOfMemoryError("out of memory")
            return super().to(*args, **options)

    pipe.vae.__class__ = Short
    with pytest.raises(torch.OutOfMemoryError):
        apply(pipe, plan, device="cpu")
    apply(pipe, make_plan("leaves"), device="cpu")
    assert torch.equal(frames(pipe), before)


def test_a_model_whose_parts_are_on_the_accelerator_runs_there(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline()
    apply(pipe, make_plan(), device="meta")
    assert {next(getattr(pipe, part).parameters()).device.type for part in ("text_encoder", "transformer", "vae")} == {
        "meta"
    }
    x = pipe._execution_device
    assert x.type == "meta"


def test_a_card_of_a_plan_is_one_of_the_accelerators_only_where_there_are_several() -> None:
    second = PartPlan("bfloat16", "bfloat16", "cuda", card=1)
    assert device_for(second, torch.device("cuda")) == torch.device("cuda", 1)
    assert device_for(second, torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert device_for(second, torch.device("cpu")) == torch.device("cpu")
    assert device_for(replace(second, device="cpu"), torch.device("cuda")) == torch.device("cpu")


def test_plans_that_cannot_be_are_refused(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline()
    with pytest.raises(ResourcesError, match="no card is large enough"):
        apply(pipe, replace(make_plan(), problem="no card is large enough"), device="cpu")
    with pytest.raises(ValueError, match="transformer cannot be kept on disk as int8: store it as fp8, or keep it"):
        apply(pipe, make_plan("disk", "int8"), device="cpu")


# ---- dtypes --------------------------------------------------------------------------------------------------------


def test_the_vae_gets_its_dtype_and_tiles_in_advance(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline()
    apply(pipe, make_plan(vae=PartPlan("bfloat16", "bfloat16", "cuda", tiles=True)), device="cpu")
    assert pipe.vae.dtype == torch.bfloat16
    assert pipe.vae.use_tiling
    kernel = pipe.vae.decoder.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last_3d)
    assert pipe.transformer.dtype == torch.float32
    with pytest.raises(ValueError, match="the vae is stored as bfloat16, not as float32: load the model again"):
        apply(pipe, make_plan(), device="cpu")


def test_a_cast_keeps_what_the_class_keeps_in_fp32(transformer: Any) -> None:
    cast(transformer, torch.bfloat16)
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32
    assert transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


# ---- fewer bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "bound"), [("int8", 0.02), ("fp8", 0.08)])
@pytest.mark.parametrize("offload", ["none", "model", "blocks", "leaves"])
def test_fewer_bits_round_the_weights_of_blocks_alone(
    tiny_pipeline: Any, storage: Any, bound: float, offload: Any
) -> None:
    pipe = tiny_pipeline()
    before, kept = frames(pipe), weights(pipe.transformer)
    apply(pipe, make_plan(offload, storage), device="cpu")
    assert storage_of(pipe.transformer) == storage
    difference = float((frames(pipe) - before).abs().max())
    assert 0 < difference < bound
    outside = {name: value for name, value in kept.items() if not name.startswith("blocks.") or "norm" in name}
    now = pipe.transformer.state_dict()
    assert all(torch.equal(now[name], value) for name, value in outside.items())
    assert len(outside) > 20


@pytest.mark.parametrize(("is_fast", "blocks"), [(False, range(6)), (True, range(1, 5))])
def test_where_layers_multiply_in_8_bits_the_first_and_last_block_stay_full(is_fast: bool, blocks: range) -> None:
    model = make_transformer(num_layers=6)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantize(model, "int8", dtype=torch.float32, is_fast=is_fast)
    changed = {name for name in linear if type(model.get_submodule(name).weight) is not torch.nn.Parameter}
    assert changed == {name for name in linear if name.startswith(tuple(f"blocks.{n}." for n in blocks))}
    assert storage_of(model) == "int8"


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_an_adapter_beside_fewer_bits_keeps_its_bits_and_a_live_alpha(
    tiny_pipeline: Any, lora: Path, storage: Any
) -> None:
    pipe = tiny_pipeline()
    pipe.load_pusa(lora, alpha=1.4)
    layer = pipe.transformer.blocks[0].attn1.to_q
    a = layer.lora_A["pusa"].weight.clone()
    apply(pipe, make_plan("model", storage), device="cpu")
    assert torch.equal(layer.lora_A["pusa"].weight, a)
    strong = run(pipe.transformer)
    pipe.set_alpha(0.7)
    weak = run(pipe.transformer)
    pipe.set_alpha(0.0)
    without = run(pipe.transformer)
    pipe.set_alpha(1.4)
    assert torch.equal(run(pipe.transformer), strong)
    plain = tiny_pipeline()
    apply(plain, make_plan("none", storage), device="cpu")
    assert torch.equal(without, run(plain.transformer))
    assert float((weak - without).abs().max()) > 1e-3
    assert not is_alpha_frozen(pipe)


def test_weights_in_fewer_bits_do_not_go_back(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline()
    apply(pipe, make_plan("none", "fp8"), device="cpu")
    rounded = frames(pipe)
    assert can_apply(pipe, make_plan("leaves", "fp8"))
    assert not can_apply(pipe, make_plan())
    with pytest.raises(ValueError, match="the transformer is stored as fp8, not as float32: load the model again"):
        apply(pipe, make_plan(), device="cpu")
    with pytest.raises(ValueError, match="stored as fp8, not as int8"):
        apply(pipe, make_plan("none", "int8"), device="cpu")
    remove(pipe)
    assert torch.equal(frames(pipe), rounded)


def test_a_text_encoder_can_be_stored_as_fp8_but_not_as_int8(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline()
    before = frames(pipe)
    encoder = PartPlan("float32", "fp8", "cuda")
    apply(pipe, make_plan(text_encoder=encoder), device="cpu")
    assert 0 < float((frames(pipe) - before).abs().max()) < 0.1
    with pytest.raises(ValueError, match="a UMT5EncoderModel cannot be stored as int8"):
        quantize(tiny_pipeline().text_encoder, "int8", dtype=torch.float32)


def test_without_torchao_int8_names_what_to_install(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name))
    with pytest.raises(RuntimeError, match=r'int8 need torchao: pip install "pusa\[quant\]", or quantize="fp8"'):
        quantize(transformer, "int8", dtype=torch.float32)


# ---- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", OFFLOADS)
def test_merged_adapters_stay_behind_and_keep_a_live_alpha(tiny_pipeline: Any, lora: Path, offload: Any) -> None:
    pipe = tiny_pipeline()
    untouched = weights(pipe.transformer)
    pipe.load_pusa(lora, alpha=1.4)
    reference = tiny_pipeline()
    reference.load_pusa(lora, alpha=1.4)
    reference.merge_lora()
    apply(pipe, make_plan(offload, merge=True), device="cpu")
    assert not any("lora_" in name for name in parameters(pipe.transformer))
    assert torch.equal(frames(pipe), frames(reference))
    remove(pipe)
    assert any("lora_" in name for name in parameters(pipe.transformer))
    pipe.unmerge_lora()
    assert same(weights(pipe.transformer), untouched)


def test_alpha_changes_while_merged_on_the_accelerator(tiny_pipeline: Any, lora: Path) -> None:
    pipe, reference = tiny_pipeline(), tiny_pipeline()
    for one in (pipe, reference):
        one.load_pusa(lora, alpha=1.4)
    apply(pipe, make_plan("model", merge=True), device="cpu")
    pipe.set_alpha(0.5)
    reference.set_alpha(0.5)
    reference.merge_lora()
    assert torch.equal(run(pipe.transformer), run(reference.transformer))
    apply(pipe, make_plan("none", merge=False), device="cpu")
    reference.unmerge_lora()
    assert torch.equal(run(pipe.transformer), run(reference.transformer))


def test_weights_on_disk_refuse_a_change_that_they_would_not_see(tiny_pipeline: Any, lora: Path) -> None:
    pipe = tiny_pipeline()
    pipe.load_pusa(lora, alpha=1.4)
    apply(pipe, make_plan("disk", merge=True), device="cpu")
    assert is_alpha_frozen(pipe)
    with pytest.raises(
        ValueError, match=r"kept on disk by group offloading.* call pusa\.acceleration\.placement\.remove"
    ):
        pipe.set_alpha(0.5)
    remove(pipe)
    pipe.set_alpha(0.5)
    strong = run(pipe.transformer)
    apply(pipe, make_plan("disk", merge=True), device="cpu")
    assert torch.equal(run(pipe.transformer), strong)
    apply(pipe, make_plan("disk", merge=False), device="cpu")
    assert not is_alpha_frozen(pipe)  # of an adapter, alpha is a number


def test_a_bias_of_an_adapter_follows_alpha_beside_fp8(tiny_pipeline: Any, tmp_path: Path, transformer: Any) -> None:
    keys = comfyui(make_pairs(transformer))
    keys["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.full((96,), 0.1)
    file = write(tmp_path / "bias.safetensors", keys)
    pipe, reference = tiny_pipeline(), tiny_pipeline()
    for one, alpha in ((pipe, 1.0), (reference, 0.5)):
        one.load_pusa(file, alpha=alpha)
        apply(one, make_plan("none", "fp8"), device="cpu")
    assert not is_alpha_frozen(pipe)
    pipe.set_alpha(0.5)
    assert torch.equal(run(pipe.transformer), run(reference.transformer))


def test_what_is_merged_into_fp8_follows_alpha(tiny_pipeline: Any, lora: Path) -> None:
    pipe, reference = tiny_pipeline(), tiny_pipeline()
    pipe.load_pusa(lora, alpha=1.4)
    reference.load_pusa(lora, alpha=0.5)
    reference.merge_lora()
    apply(pipe, make_plan("none", "fp8", merge=True), device="cpu")
    assert not is_alpha_frozen(pipe)
    pipe.set_alpha(0.5)
    merged = reference.transformer.blocks[0].attn1.to_q.base_layer.weight
    stored = pipe.transformer.blocks[0].attn1.to_q.base_layer.weight
    assert torch.equal(stored, merged.to(torch.float8_e4m3fn))  # merged first, rounded once more
    before = frames(pipe)
    apply(pipe, make_plan("blocks", "fp8", merge=True), device="cpu")
    assert torch.equal(frames(pipe), before)


def test_what_is_merged_into_int8_stays_and_says_so(tiny_pipeline: Any, lora: Path) -> None:
    pipe = tiny_pipeline()
    pipe.load_pusa(lora, alpha=1.4)
    apply(pipe, make_plan("none", "int8", merge=True), device="cpu")
    assert is_alpha_frozen(pipe)
    with pytest.raises(ValueError, match="load the model again with another alpha"):
        pipe.set_alpha(0.5)
    with pytest.raises(ValueError, match="the LoRAs of the transformer are merged into weights stored as int8"):
        apply(pipe, make_plan("none", "int8", merge=False), device="cpu")


def test_a_plan_is_needed(tiny_pipeline: Any) -> None:
    with pytest.raises(TypeError, match=r"plan is a NoneType: give one of pusa\.acceleration\.plan"):
        apply(tiny_pipeline, None, device="cpu")  # type: ignore[arg-type]


def test_blocks_of_another_base_are_quantised_without_their_modulation() -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "pooled_projection_dim": 16, "text_embed_dim": 16}
    model = PusaMochiTransformer3DModel(**sizes, num_layers=2, time_embed_dim=16)
    assert list(blocks_of(model)) == ["transformer_blocks.0", "transformer_blocks.1"]
    quantize(model, "int8", dtype=torch.float32)
    rounded = {name for name, value in model.named_parameters() if type(value.data).__name__ == "Int8Tensor"}
    assert {"transformer_blocks.0.attn1.add_q_proj.weight", "transformer_blocks.1.ff.net.2.weight"} <= rounded
    assert all(name.startswith("transformer_blocks.") and ".norm" not in name for name in rounded)
    assert storage_of(model) == "int8"
