"""LoRA: every layout gives the same numbers, alpha is live and exact, and a file that does not fit says why."""

import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import huggingface_hub
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pusa.lora import (
    describe_lora,
    export_lora,
    load_pusa,
    merge_lora,
    set_alpha,
    unload_lora,
    unmerge_lora,
)
from pusa.lora_adapters import check_fits
from pusa.lora_layouts import Layout, read_lora, to_diffusers, to_original
from pusa.models.wan import PusaWanTransformer3DModel

Pairs = dict[str, tuple[Tensor, Tensor]]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = (*(f"attn1.{o}" for o in ATTENTION), *(f"attn2.{o}" for o in ATTENTION), "ffn.net.0.proj", "ffn.net.2")


@pytest.fixture
def transformer(tiny_transformer: Callable[..., WanTransformer3DModel]) -> WanTransformer3DModel:
    return PusaWanTransformer3DModel.from_wan(tiny_transformer())


@pytest.fixture
def pairs(transformer: WanTransformer3DModel) -> Pairs:
    return make_pairs(transformer)


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


# ---- the numbers of the original -----------------------------------------------------------------------------------


@pytest.fixture
def golden_transformer(golden: Path) -> WanTransformer3DModel:
    config = json.loads((golden / "transformer/config.json").read_text())["diffusers_config"]
    model = WanTransformer3DModel(**config).eval()
    model.load_state_dict(load_file(golden / "transformer/weights_diffusers.safetensors"))
    return PusaWanTransformer3DModel.from_wan(model)


@torch.no_grad()
def probe(model: Any, golden: Path) -> Tensor:
    given = load_file(golden / "lora/probe_input.safetensors")
    return model(
        hidden_states=given["latents"],
        timestep=given["timestep"],
        encoder_hidden_states=given["context"],
        return_dict=False,
    )[0]


@pytest.mark.parametrize(
    ("file", "alpha", "reference", "recorded"),
    [
        ("pusa_official_keys.pt", 1.4, "pusa_alpha1.4", "diffusion_model.* lora_A/lora_B, weight 1.4"),
        ("pusa_official_keys.safetensors", 1.0, "pusa_alpha1.0", "diffusion_model.* lora_A/lora_B, weight 1.0"),
        ("pusa_diffusion_model_AB.safetensors", 1.4, "pusa_alpha1.4", "diffusion_model.* lora_A/lora_B, weight 1.4"),
        ("pusa_diffusion_model_AB.safetensors", 1.0, "pusa_alpha1.0", "diffusion_model.* lora_A/lora_B, weight 1.0"),
        (
            "pusa_diffusion_model_up_down.safetensors",
            1.4,
            "pusa_alpha1.4",
            "diffusion_model.* lora_up/lora_down, weight 1.4",
        ),
        (
            "lightx2v_with_alpha.safetensors",
            1.0,
            "lightx2v_with_alpha_via_load_lora_lightx2v",
            "lightx2v with alpha, weight 1.0",
        ),
        (
            "lightx2v_without_alpha.safetensors",
            1 / 6,  # the original takes 1 / rank where there is no .alpha, everybody else 1
            "lightx2v_without_alpha_via_load_lora_lightx2v",
            "lightx2v without alpha, weight 1/rank",
        ),
    ],
)
def test_every_recorded_file_gives_the_originals_output(
    golden: Path, golden_transformer: Any, file: str, alpha: float, reference: str, recorded: str
) -> None:
    figures = json.loads((golden / "lora/report.json").read_text())["diffusers"][recorded]
    expected = load_file(golden / "lora/probe_outputs.safetensors")[reference]
    assert load_pusa(pipe(golden_transformer), golden / "lora" / file, alpha=alpha) == 30
    assert (probe(golden_transformer, golden) - expected).abs().max() <= 2 * figures["output_maxabs_vs_reference"]
    merge_lora(pipe(golden_transformer))
    assert (probe(golden_transformer, golden) - expected).abs().max() <= 2 * figures["output_after_fuse_maxabs"]


@pytest.mark.parametrize("alpha", ["1.0", "1.4"])
def test_merged_weights_are_the_originals(golden: Path, golden_transformer: Any, alpha: str) -> None:
    load_pusa(pipe(golden_transformer), golden / "lora/pusa_official_keys.pt", alpha=float(alpha))
    merge_lora(pipe(golden_transformer))
    own = weights(golden_transformer)
    expected = load_file(golden / f"lora/merged_pusa_alpha{alpha}.safetensors")
    assert len(expected) == 30
    for name, tensor in expected.items():
        module, _, kind = name.rpartition(".")
        torch.testing.assert_close(own[f"{to_diffusers(module)}.{kind}"], tensor, rtol=0, atol=1e-6)


def test_a_4_step_lora_and_pusa_together_give_the_originals_output(golden: Path, golden_transformer: Any) -> None:
    pipeline = pipe(golden_transformer)
    load_pusa(pipeline, golden / "lora/lightx2v_with_alpha.safetensors", alpha=1.0, adapter_name="lightning")
    load_pusa(pipeline, golden / "lora/pusa_official_keys.pt")
    report = json.loads((golden / "lora/report.json").read_text())["diffusers"]
    limit = 2 * report["lightx2v(alpha) weight 1.0 + pusa weight 1.4"]["output_maxabs_vs_reference"]
    expected = load_file(golden / "lora/probe_outputs.safetensors")["lightx2v_then_pusa1.4"]
    assert (probe(golden_transformer, golden) - expected).abs().max() <= limit


# ---- layouts -------------------------------------------------------------------------------------------------------


def _peft_folder(folder: Path, pairs: Pairs) -> Path:
    """As `PeftModel.save_pretrained` writes it, with lora_alpha twice the rank and B halved to make up for it."""
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        keys |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b / 2}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    write(folder / "adapter_model.safetensors", keys)
    return folder


def _official_pickle(folder: Path, pairs: Pairs) -> Path:
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        keys[f"{to_original(name)}.lora_A.default.weight"] = a
        keys[f"{to_original(name)}.lora_B.default.weight"] = b
    torch.save(keys, folder / "pusa_v1.pt")
    return folder / "pusa_v1.pt"


def _wrapped_old_pickle(folder: Path, pairs: Pairs) -> Path:
    inner = {key.removeprefix("diffusion_model."): tensor for key, tensor in comfyui(pairs).items()}
    torch.save({"module": {"state_dict": inner}}, folder / "lora.ckpt", _use_new_zipfile_serialization=False)
    return folder / "lora.ckpt"


def _lightning(folder: Path, pairs: Pairs) -> Path:
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        key = f"diffusion_model.{to_original(name)}"
        keys |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": 4 * b, f"{key}.alpha": torch.tensor(1.0)}
    return write(folder / "lightning.safetensors", keys)


def _kohya(folder: Path, pairs: Pairs) -> Path:
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        key = f"lora_unet_{to_original(name).replace('.', '_')}"
        keys |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(4.0)}
    return write(folder / "musubi.safetensors", keys)


def _diffusers(folder: Path, pairs: Pairs) -> Path:
    """As diffusers saves: PEFT's configuration in the header (here lora_alpha is four times the rank)."""
    keys: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        keys |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b / 4}
    config = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})
    return write(folder / "pytorch_lora_weights.safetensors", keys, {"lora_adapter_metadata": config})


@pytest.mark.parametrize(
    "make",
    [_official_pickle, _wrapped_old_pickle, _lightning, _kohya, _diffusers, _peft_folder],
    ids=lambda f: f.__name__,
)
def test_every_layout_gives_the_same_output(
    tmp_path: Path, transformer: Any, pairs: Pairs, make: Callable[[Path, Pairs], Path]
) -> None:
    base = run(transformer)
    (tmp_path / "plain").mkdir()
    load_pusa(pipe(transformer), write(tmp_path / "plain/a.safetensors", comfyui(pairs)))
    expected = run(transformer)
    assert (expected - base).abs().max() > 0.05
    assert load_pusa(pipe(transformer), make(tmp_path, pairs)) == 20
    torch.testing.assert_close(run(transformer), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes the biases for incomplete shards
def test_the_bias_of_a_peft_lora_is_inside_its_scale(tmp_path: Path, transformer: Any, tiny_transformer: Any) -> None:
    """PEFT computes `(B A x + bias) * lora_alpha / r`; `diff_b` of other tools is added as it is."""
    reference = tiny_transformer()
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q"], lora_bias=True, init_lora_weights=False)
    reference.add_adapter(config)
    for name, parameter in reference.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    reference.save_lora_adapter(tmp_path, adapter_name="default")
    assert load_pusa(pipe(transformer), tmp_path, alpha=1.0) == 4
    expected = run(PusaWanTransformer3DModel.from_wan(reference))
    torch.testing.assert_close(run(transformer), expected, rtol=0, atol=1e-5)


def test_loading_says_how_many_layers_of_how_many(
    tmp_path: Path, transformer: Any, pairs: Pairs, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "lora.safetensors", comfyui(pairs))
    with caplog.at_level(logging.INFO, logger="pusa"):
        load_pusa(pipe(transformer), file, alpha=1.2)
    assert caplog.messages == ["transformer: 20 of 20 layers of lora.safetensors adapted as 'pusa' (rank 4, alpha 1.2)"]


def test_a_file_with_alpha_reaches_both_experts_alike(tmp_path: Path, tiny_transformer: Any, pairs: Pairs) -> None:
    """diffusers' converter scales the tensors it is given in place, so that a second expert gets them scaled twice."""
    experts = [PusaWanTransformer3DModel.from_wan(tiny_transformer()) for _ in range(2)]
    assert load_pusa(pipe(*experts), _lightning(tmp_path, pairs)) == 40
    assert torch.equal(run(experts[0]), run(experts[1]))


# ---- alpha ---------------------------------------------------------------------------------------------------------


def test_alpha_there_and_back_is_the_same_output_bit_for_bit(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    pipeline = pipe(transformer)
    load_pusa(pipeline, write(tmp_path / "lora.safetensors", comfyui(pairs)), alpha=1.4)
    first = run(transformer)
    set_alpha(pipeline, 1.0)
    between = run(transformer)
    set_alpha(pipeline, 1.4)
    assert torch.equal(run(transformer), first)
    assert (between - first).abs().max() > 1e-2


def test_loading_twice_under_one_name_replaces(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    """The original's demo adds alpha * B A again at each call."""
    file = write(tmp_path / "lora.safetensors", comfyui(pairs))
    load_pusa(pipe(transformer), file)
    once = run(transformer)
    load_pusa(pipe(transformer), file, alpha=0.3)
    load_pusa(pipe(transformer), file)
    assert torch.equal(run(transformer), once)
    assert list(transformer.peft_config) == ["pusa"]


def test_each_adapter_has_its_own_alpha(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    pipeline, other = pipe(transformer), make_pairs(transformer, rank=3, seed=1)
    load_pusa(pipeline, write(tmp_path / "a.safetensors", comfyui(pairs)))
    alone = run(transformer)
    load_pusa(pipeline, write(tmp_path / "b.safetensors", comfyui(other)), alpha=1.0, adapter_name="lightning")
    both = run(transformer)
    set_alpha(pipeline, 0.0, adapter_name="lightning")
    torch.testing.assert_close(run(transformer), alone, rtol=0, atol=1e-6)
    set_alpha(pipeline, 1.0, adapter_name="lightning")
    assert torch.equal(run(transformer), both)
    unload_lora(pipeline, adapter_name="lightning")
    assert torch.equal(run(transformer), alone)


def test_unloading_leaves_the_model_as_it_was(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    before, trainable = weights(transformer), [p.requires_grad for p in transformer.parameters()]
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))
    assert not any(p.requires_grad for name, p in transformer.named_parameters() if "lora_" in name)
    merge_lora(pipe(transformer))
    unload_lora(pipe(transformer))
    assert same(transformer.state_dict(), before)
    assert [p.requires_grad for p in transformer.parameters()] == trainable


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), True, "1.4", None])
def test_alpha_must_be_a_finite_number(tmp_path: Path, transformer: Any, pairs: Pairs, alpha: Any) -> None:
    file = write(tmp_path / "lora.safetensors", comfyui(pairs))
    with pytest.raises(ValueError, match="not a finite number"):
        load_pusa(pipe(transformer), file, alpha=alpha)
    load_pusa(pipe(transformer), file)
    with pytest.raises(ValueError, match="not a finite number"):
        set_alpha(pipe(transformer), alpha)


def test_an_unknown_adapter_is_answered_with_those_attached(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))
    for call in (set_alpha, unload_lora, export_lora):
        argument: tuple[Any, ...] = {set_alpha: (1.0,), export_lora: (tmp_path / "x.safetensors",)}.get(call, ())
        with pytest.raises(ValueError, match="no LoRA is attached as 'other'; attached: pusa"):
            call(pipe(transformer), *argument, adapter_name="other")


# ---- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_rounds_once_and_unmerging_is_exact(
    tmp_path: Path, transformer: Any, pairs: Pairs, dtype: torch.dtype
) -> None:
    other = make_pairs(transformer, rank=3, seed=1)
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    before = weights(transformer)
    load_pusa(pipe(transformer), write(tmp_path / "a.safetensors", comfyui(pairs)), alpha=1.4)
    load_pusa(pipe(transformer), write(tmp_path / "b.safetensors", comfyui(other)), alpha=0.7, adapter_name="other")
    merge_lora(pipe(transformer))
    merged = weights(transformer)
    for name, (a, b) in pairs.items():
        c, d = other[name]
        exact = before[f"{name}.weight"].float() + 1.4 * (b @ a) + 0.7 * (d @ c)
        assert torch.equal(merged[f"{name}.weight"], exact.to(dtype))
    unmerge_lora(pipe(transformer))
    assert same(weights(transformer), before)


def test_the_scale_of_a_file_is_not_rounded_to_its_dtype(tmp_path: Path, transformer: Any) -> None:
    a, b = (tensor.bfloat16() for tensor in make_pairs(transformer, rank=3)["blocks.0.attn1.to_q"])
    key = "diffusion_model.blocks.0.self_attn.q"
    keys = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0)}
    before = transformer.blocks[0].attn1.to_q.weight.detach().clone()
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", keys), alpha=1.0)
    merge_lora(pipe(transformer))
    merged = weights(transformer)["blocks.0.attn1.to_q.weight"]
    assert torch.equal(merged, before + (b.float() * (1 / 3)) @ a.float())


def test_merged_the_adapters_act_no_more_and_unmerged_again(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))
    calls: list[str] = []
    for name, module in transformer.named_modules():
        if name.endswith(("lora_A.pusa", "lora_B.pusa")):
            module.register_forward_hook(lambda *_: calls.append("lora"))
    attached = run(transformer)
    assert len(calls) == 40
    merge_lora(pipe(transformer))
    torch.testing.assert_close(run(transformer), attached, rtol=0, atol=1e-5)
    assert len(calls) == 40
    unmerge_lora(pipe(transformer))
    assert torch.equal(run(transformer), attached)
    assert len(calls) == 80


def test_after_merging_alpha_and_further_loras_are_as_if_merged_anew(
    tmp_path: Path, tiny_transformer: Any, pairs: Pairs
) -> None:
    first = write(tmp_path / "a.safetensors", comfyui(pairs))
    head = {"proj_out": (torch.randn(3, 96), 0.01 * torch.randn(64, 3))}  # where the first has nothing
    second = write(tmp_path / "b.safetensors", comfyui(make_pairs(tiny_transformer(), rank=3, seed=1) | head))
    patient, direct = (PusaWanTransformer3DModel.from_wan(tiny_transformer()) for _ in range(2))

    load_pusa(pipe(patient), first, alpha=0.2)
    merge_lora(pipe(patient))
    set_alpha(pipe(patient), 3.0)
    load_pusa(pipe(patient), second, alpha=0.5, adapter_name="other")
    set_alpha(pipe(patient), 1.4)

    load_pusa(pipe(direct), first, alpha=1.4)
    load_pusa(pipe(direct), second, alpha=0.5, adapter_name="other")
    merge_lora(pipe(direct))
    assert same(weights(patient), weights(direct))
    assert torch.equal(run(patient), run(direct))

    unload_lora(pipe(patient), adapter_name="other")
    unload_lora(pipe(direct), adapter_name="other")
    assert same(weights(patient), weights(direct))
    unload_lora(pipe(patient))
    assert same(weights(patient), weights(tiny_transformer()))


def test_merging_takes_adapters_loaded_by_diffusers_too(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    file = write(tmp_path / "lora.safetensors", comfyui(pairs))
    WanPipeline.load_lora_into_transformer(WanPipeline.lora_state_dict(str(file)), transformer, adapter_name="stock")
    set_alpha(pipe(transformer), 0.8, adapter_name="stock")
    before = weights(transformer)
    merge_lora(pipe(transformer))
    name, (a, b) = next(iter(pairs.items()))
    assert torch.equal(weights(transformer)[f"{name}.weight"], before[f"{name}.weight"] + 0.8 * (b @ a))


def test_merging_nothing_is_an_error(transformer: Any) -> None:
    with pytest.raises(ValueError, match="no LoRA is attached"):
        merge_lora(pipe(transformer))


def test_fp8_storage_comes_after_the_lora_and_cannot_be_merged(
    tmp_path: Path, tiny_transformer: Any, pairs: Pairs
) -> None:
    file = write(tmp_path / "lora.safetensors", comfyui(pairs))
    early, late = (PusaWanTransformer3DModel.from_wan(tiny_transformer()) for _ in range(2))
    early.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="load the LoRA first, then cast"):
        load_pusa(pipe(early), file)
    load_pusa(pipe(late), file)
    late.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert run(late).isfinite().all()
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        merge_lora(pipe(late))
    assert export_lora(pipe(late), tmp_path / "out.safetensors").relative_error == 0.0


class Packed(nn.Parameter):
    """Stands for a quantised weight, which is a parameter of its own class."""

    @classmethod
    def of(cls, parameter: Tensor) -> Any:
        return cls(parameter.data.to(torch.uint8), requires_grad=False)


def test_a_quantised_weight_is_not_merged_into(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))
    layer = transformer.blocks[1].ffn.net[2].base_layer
    layer.weight = Packed.of(layer.weight)
    before = weights(transformer)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.net\.2\.weight is a Packed of torch\.uint8: quantised"):
        merge_lora(pipe(transformer))
    assert same(weights(transformer), before)


def test_a_quantised_weight_takes_no_difference_and_nothing_is_half_done(
    tmp_path: Path, transformer: Any, pairs: Pairs
) -> None:
    tensors, _ = _with_differences(transformer, pairs)
    file = write(tmp_path / "lora.safetensors", tensors)
    plain = transformer.proj_out.weight
    transformer.proj_out.weight = Packed.of(plain)
    with pytest.raises(ValueError, match=r"proj_out\.weight is a Packed"):
        load_pusa(pipe(transformer), file)
    assert not getattr(transformer, "peft_config", {})
    transformer.proj_out.weight = plain
    load_pusa(pipe(transformer), file, alpha=1.4)
    transformer.proj_out.weight = Packed.of(plain)
    before = weights(transformer)
    with pytest.raises(ValueError, match=r"proj_out\.weight is a Packed"):
        set_alpha(pipe(transformer), 1.0)
    assert same(weights(transformer), before)
    assert transformer.blocks[0].attn1.to_q.scaling["pusa"] == 1.4


# ---- whole differences ---------------------------------------------------------------------------------------------


def _with_differences(model: nn.Module, pairs: Pairs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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


def test_differences_of_biases_norms_and_heads_follow_alpha(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    before, base = weights(transformer), run(transformer)
    tensors, deltas = _with_differences(transformer, pairs)
    # beyond the 20 with matrices: norm3, norm_k and the modulation of a block, patch embedding, head, time projection
    assert load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", tensors), alpha=1.4) == 26
    first = run(transformer)
    for alpha in (0.5, 1.4):
        set_alpha(pipe(transformer), alpha)
        now = weights(transformer)
        for name, delta in deltas.items():
            assert torch.equal(now[name], before[name] + alpha * delta)
    assert torch.equal(run(transformer), first)

    merge_lora(pipe(transformer))
    torch.testing.assert_close(run(transformer), first, rtol=0, atol=1e-5)
    set_alpha(pipe(transformer), 0.0)
    assert torch.equal(run(transformer), base)
    set_alpha(pipe(transformer), 1.4)
    unmerge_lora(pipe(transformer))
    assert torch.equal(run(transformer), first)
    unload_lora(pipe(transformer))
    assert same(weights(transformer), before)


def test_differences_alone_are_a_lora_too(tmp_path: Path, transformer: Any) -> None:
    before = weights(transformer)
    _, deltas = _with_differences(transformer, {})
    file = write(tmp_path / "lora.safetensors", {"diffusion_model.head.head.diff": deltas["proj_out.weight"]})
    assert load_pusa(pipe(transformer), file, alpha=2.0) == 1
    assert torch.equal(transformer.proj_out.weight, before["proj_out.weight"] + 2.0 * deltas["proj_out.weight"])
    report = export_lora(pipe(transformer), tmp_path / "again.safetensors")
    assert (report.layers, report.rank, report.relative_error) == (1, 0, 0.0)
    unload_lora(pipe(transformer))
    assert same(weights(transformer), before)


def test_a_lora_on_the_patch_embedding_is_attached_and_merged(tmp_path: Path, transformer: Any) -> None:
    a, b = torch.randn(2, 16 * 4), torch.randn(96, 2)
    keys = {"diffusion_model.patch_embedding.lora_down.weight": a, "diffusion_model.patch_embedding.lora_up.weight": b}
    before = transformer.patch_embedding.weight.detach().clone()
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", keys), alpha=0.1)
    attached = run(transformer)
    merge_lora(pipe(transformer))
    torch.testing.assert_close(weights(transformer)["patch_embedding.weight"], before + 0.1 * (b @ a).view_as(before))
    torch.testing.assert_close(run(transformer), attached, rtol=0, atol=1e-4)


# ---- files that do not fit -----------------------------------------------------------------------------------------


def _flux(_: Pairs) -> dict[str, Tensor]:
    keys = ("double_blocks.0.img_attn.qkv", "single_blocks.3.linear1")
    return {f"diffusion_model.{key}.lora_{half}.weight": torch.zeros(2, 2) for key in keys for half in "AB"}


def _stable_diffusion(_: Pairs) -> dict[str, Tensor]:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    return {f"{key}.lora_{half}.weight": torch.zeros(2, 2) for half in ("up", "down")}


def _narrow(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui({name: (a[:, :48], b[:48]) for name, (a, b) in pairs.items()})


def _deep(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui(pairs | {name.replace("blocks.1.", "blocks.29."): pair for name, pair in pairs.items()})


def _image_to_video(pairs: Pairs) -> dict[str, Tensor]:
    key = "diffusion_model.blocks.0.cross_attn.k_img"
    return comfyui(pairs) | {f"{key}.lora_A.weight": torch.ones(4, 96), f"{key}.lora_B.weight": torch.ones(96, 4)}


def _image_channels(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui(pairs) | {"diffusion_model.patch_embedding.diff": torch.ones(96, 36, 1, 2, 2)}


def _in_part(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui(pairs | {"blocks.1.ffn.net.7": (torch.ones(4, 96), torch.ones(96, 4))})


def _wrong_shape(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui(pairs | {"blocks.1.ffn.net.2": (torch.ones(4, 64), torch.ones(96, 4))})


def _not_a_linear_layer(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui(pairs | {"blocks.1.norm2": (torch.ones(4, 96), torch.ones(96, 4))})


def _wrong_bias(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui(pairs) | {"diffusion_model.blocks.0.ffn.2.diff_b": torch.ones(5)}


def _strange_keys(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui(pairs) | {"diffusion_model.blocks.0.ffn.2.hoola": torch.ones(5)}


def _dora(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui(pairs) | {"diffusion_model.blocks.0.ffn.2.dora_scale": torch.ones(5)}


def _one_half(pairs: Pairs) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in comfyui(pairs).items() if "ffn.2.lora_B" not in key}


def _different_ranks(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui({name: (a[:2], b) for name, (a, b) in pairs.items()})


def _twice(pairs: Pairs) -> dict[str, Tensor]:
    return comfyui(pairs) | {"transformer.blocks.0.ffn.net.2.lora_A.weight": torch.ones(4, 128)}


def _checkpoint(_: Pairs) -> dict[str, Tensor]:
    return {"blocks.0.ffn.2.weight": torch.ones(96, 128)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_flux, "LoRA for Flux or HunyuanVideo, not for Wan"),
        (_stable_diffusion, "LoRA for Stable Diffusion, not for Wan"),
        (_narrow, "Wan model of width 48 with 2 blocks; this transformer has width 96 and 2 blocks"),
        (_deep, "Wan model of width 96 with 30 blocks; this transformer has width 96 and 2 blocks"),
        (_image_to_video, r"made for image-to-video Wan .* 1 of 21 layers .* blocks\.0\.attn2\.add_k_proj"),
        (_image_channels, r"made for image-to-video Wan .* \[96, 16, 1, 2, 2\], the difference \[96, 36, 1, 2, 2\]"),
        (_in_part, r"20 of 21 layers of lora\.safetensors match; first unmatched: blocks\.1\.ffn\.net\.7"),
        (_wrong_shape, r"19 of 20 layers .* blocks\.1\.ffn\.net\.2 \(B A is 96 x 64, the weight 96 x 128\)"),
        (_not_a_linear_layer, r"blocks\.1\.norm2 \(a FP32LayerNorm takes no LoRA\)"),
        (_wrong_bias, r"blocks\.0\.ffn\.net\.2 \(its bias is \[96\], the difference \[5\]\)"),
        (_strange_keys, r"1 keys .* no known LoRA layout; first: 'diffusion_model\.blocks\.0\.ffn\.2\.hoola'"),
        (_dora, "DoRA.* only LoRA is supported"),
        (_one_half, r"blocks\.\d\.ffn\.net\.2 has only one of its two matrices"),
        (_different_ranks, r"do not fit: A \[2, \d+\], B \[\d+, 4\]"),
        (_twice, r"repeats what another key says of blocks\.0\.ffn\.net\.2"),
        (_checkpoint, "holds no LoRA layer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_does_not_fit_says_why_and_leaves_nothing_behind(
    tmp_path: Path, transformer: Any, pairs: Pairs, make: Callable[[Pairs], dict[str, Tensor]], message: str
) -> None:
    before = weights(transformer)
    file = write(tmp_path / "lora.safetensors", make(pairs))
    with pytest.raises(ValueError, match=message):
        load_pusa(pipe(transformer), file)
    assert same(transformer.state_dict(), before)
    assert not getattr(transformer, "peft_config", {})


def _full_size(path: Path, width: int, ffn: int, blocks: int) -> Path:
    """The official key layout at full size but for the rank, which is 1."""
    keys: dict[str, Tensor] = {}
    for block in range(blocks):
        for name in [f"{kind}_attn.{o}" for kind in ("self", "cross") for o in "qkvo"] + ["ffn.0", "ffn.2"]:
            rows, columns = {"ffn.0": (ffn, width), "ffn.2": (width, ffn)}.get(name, (width, width))
            keys[f"blocks.{block}.{name}.lora_A.default.weight"] = torch.ones(1, columns, dtype=torch.bfloat16)
            keys[f"blocks.{block}.{name}.lora_B.default.weight"] = torch.ones(rows, 1, dtype=torch.bfloat16)
    return write(path, keys)


def test_at_full_size_all_400_layers_fit_and_those_of_another_size_do_not(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel()  # diffusers' default is the 14B one
    lora = read_lora(_full_size(tmp_path / "pusa_v1.safetensors", 5120, 13824, 40))
    check_fits(model, lora)
    assert len(lora.layers) == 400
    assert str(lora.model) == "Wan 14B (width 5120, 40 blocks)"
    message = (
        "this LoRA was made for a Wan model of width 1536 with 30 blocks; this transformer has width 5120 and 40 blocks"
    )
    with pytest.raises(ValueError, match=message):
        load_pusa(pipe(model), _full_size(tmp_path / "small.safetensors", 1536, 8960, 30))


def test_when_one_expert_does_not_fit_neither_is_touched(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    good = write(tmp_path / "high.safetensors", comfyui(pairs))
    bad = write(tmp_path / "low.safetensors", _in_part(pairs))
    pipeline = pipe(transformer, PusaWanTransformer3DModel.from_wan(WanTransformer3DModel(**transformer.config)))
    with pytest.raises(ValueError, match="20 of 21"):
        load_pusa(pipeline, {"transformer": good, "transformer_2": bad})
    assert not getattr(transformer, "peft_config", {})


def test_a_failed_load_keeps_the_adapter_it_would_replace(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    load_pusa(pipe(transformer), write(tmp_path / "good.safetensors", comfyui(pairs)))
    expected = run(transformer)
    with pytest.raises(ValueError, match="20 of 21"):
        load_pusa(pipe(transformer), write(tmp_path / "bad.safetensors", _in_part(pairs)))
    assert torch.equal(run(transformer), expected)


def test_fused_projections_would_ignore_a_lora(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))


def test_an_image_to_video_base_is_warned_about(
    tmp_path: Path, tiny_transformer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_transformer(in_channels=36)
    with caplog.at_level(logging.WARNING, logger="pusa"):
        load_pusa(pipe(model), write(tmp_path / "lora.safetensors", comfyui(make_pairs(model))))
    assert "Pusa is made for text-to-video Wan" in caplog.text


class _Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "bare pickle"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, transformer: Any, modern: bool) -> None:
    victim, file = tmp_path / "owned", tmp_path / "pusa_v1.pt"
    content = {"blocks.0.self_attn.q.lora_A.default.weight": torch.zeros(2, 96), "payload": _Malicious(victim)}
    if modern:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"pusa_v1\.pt is refused.*Nothing in it was run"):
        load_pusa(pipe(transformer), file)
    with pytest.raises(ValueError, match="refused"):
        describe_lora(file)
    assert not victim.exists()


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt", "lora.bin"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_named(tmp_path: Path, transformer: Any, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        load_pusa(pipe(transformer), tmp_path / name)


def test_a_pickle_of_something_else_is_named(tmp_path: Path, transformer: Any) -> None:
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds a list, not a dict of tensors"):
        load_pusa(pipe(transformer), tmp_path / "list.pt")


# ---- where files come from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nowhere.safetensors", "./no/such/folder", "loras/pusa_v1.pt"])
def test_a_missing_file_is_no_hub_id(transformer: Any, source: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(source)):
        load_pusa(pipe(transformer), source)


def test_a_folder_must_hold_one_lora_or_a_pair(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    with pytest.raises(ValueError, match="holds no LoRA file"):
        load_pusa(pipe(transformer), tmp_path)
    write(tmp_path / "a.safetensors", comfyui(pairs))
    _official_pickle(tmp_path, pairs)
    assert load_pusa(pipe(transformer), tmp_path) == 20  # safetensors before pickles
    write(tmp_path / "b.safetensors", comfyui(pairs))
    with pytest.raises(ValueError, match=r"holds 2 LoRA files; name one of them: a\.safetensors, b\.safetensors"):
        load_pusa(pipe(transformer), tmp_path)


@pytest.fixture
def experts(tiny_transformer: Any) -> SimpleNamespace:
    return pipe(*(PusaWanTransformer3DModel.from_wan(tiny_transformer(seed=seed)) for seed in range(2)))


@pytest.fixture
def noise_pair(tmp_path: Path, transformer: Any, pairs: Pairs) -> Path:
    """Wan2.2 files as they are named on the Hub."""
    folder = tmp_path / "pair"
    folder.mkdir()
    write(folder / "low_noise_pusa.safetensors", comfyui(make_pairs(transformer, rank=3, seed=5)))
    write(folder / "high_noise_pusa.safetensors", comfyui(pairs))
    return folder


def test_a_wan22_pair_goes_to_its_experts_with_an_alpha_each(noise_pair: Path, experts: SimpleNamespace) -> None:
    assert load_pusa(experts, noise_pair, alpha={"transformer": 1.5, "transformer_2": 1.4}) == 40
    ranks = [model.peft_config["pusa"].r for model in (experts.transformer, experts.transformer_2)]
    scales = [model.blocks[0].attn1.to_q.scaling["pusa"] for model in (experts.transformer, experts.transformer_2)]
    assert (ranks, scales) == ([4, 3], [1.5, pytest.approx(1.4)])
    first = run(experts.transformer)
    set_alpha(experts, {"transformer_2": 1.0})
    assert torch.equal(run(experts.transformer), first)
    assert experts.transformer_2.blocks[0].attn1.to_q.scaling["pusa"] == 1.0
    with pytest.raises(ValueError, match="alpha names vae"):
        set_alpha(experts, {"vae": 1.0})


def test_a_pair_may_be_named_file_by_file_or_for_one_expert(noise_pair: Path, experts: SimpleNamespace) -> None:
    high, low = noise_pair / "high_noise_pusa.safetensors", noise_pair / "low_noise_pusa.safetensors"
    assert load_pusa(experts, {"transformer": high, "transformer_2": low}) == 40
    together = run(experts.transformer_2)
    unload_lora(experts)
    assert load_pusa(experts, {"transformer_2": noise_pair}) == 20
    assert torch.equal(run(experts.transformer_2), together)
    assert not getattr(experts.transformer, "peft_config", {})
    with pytest.raises(ValueError, match="alpha names transformer; the LoRA goes to transformer, transformer_2"):
        load_pusa(experts, noise_pair, alpha={"transformer": 1.5})


def test_one_file_for_two_experts_is_said(
    noise_pair: Path, experts: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pusa"):
        assert load_pusa(experts, noise_pair / "high_noise_pusa.safetensors") == 40
    assert caplog.messages[0] == "one LoRA file for both experts: high_noise_pusa.safetensors"
    assert len([text for text in caplog.messages if "20 of 20 layers" in text]) == 2


def test_a_pair_for_one_transformer_is_an_error(noise_pair: Path, transformer: Any) -> None:
    with pytest.raises(ValueError, match="this pipeline has one transformer: name a file"):
        load_pusa(pipe(transformer), noise_pair)
    with pytest.raises(ValueError, match="source names transformer, transformer_2; this pipeline has transformer"):
        load_pusa(pipe(transformer), dict.fromkeys(("transformer", "transformer_2"), noise_pair))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, noise_pair: Path, pairs: Pairs) -> list[str]:
    """A Hub with one repository; the list records what was downloaded."""
    root, fetched = tmp_path / "hub", []
    shutil.copytree(noise_pair, root / "Wan2.2-V1")
    (root / "adapter").mkdir()
    _peft_folder(root / "adapter", pairs)
    write(root / "pusa_v1.safetensors", comfyui(pairs))

    def download(repo: str, name: str) -> str:
        assert repo == "someone/PusaV1"
        fetched.append(name)
        return str(root / name)

    def listing(repo: str) -> list[str]:
        if repo != "someone/PusaV1":
            raise ConnectionError("no such host")
        return [path.relative_to(root).as_posix() for path in root.rglob("*.*") if path.is_file()]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listing)
    return fetched


@pytest.mark.parametrize(
    ("source", "fetched"),
    [
        ("someone/PusaV1", ["pusa_v1.safetensors"]),
        ("someone/PusaV1/pusa_v1.safetensors", ["pusa_v1.safetensors"]),
        ("someone/PusaV1/Wan2.2-V1/high_noise_pusa.safetensors", ["Wan2.2-V1/high_noise_pusa.safetensors"]),
        ("someone/PusaV1/adapter", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]),
    ],
)
def test_a_hub_id_downloads_only_what_is_needed(
    hub: list[str], tmp_path: Path, transformer: Any, pairs: Pairs, source: str, fetched: list[str]
) -> None:
    assert load_pusa(pipe(transformer), source) == 20
    assert hub == fetched
    through_hub = run(transformer)
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))
    torch.testing.assert_close(run(transformer), through_hub, rtol=0, atol=1e-6)


def test_offline_a_hub_id_is_found_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, transformer: Any, pairs: Pairs
) -> None:
    repository = tmp_path / "models--someone--PusaV1"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    write(snapshot / "pusa_v1.safetensors", comfyui(pairs))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_pusa(pipe(transformer), "someone/PusaV1") == 20
    with pytest.raises(FileNotFoundError, match="'someone/PusaV2' is not on this machine"):
        load_pusa(pipe(transformer), "someone/PusaV2")


def test_a_hub_folder_may_hold_a_pair(hub: list[str], experts: SimpleNamespace) -> None:
    assert load_pusa(experts, "someone/PusaV1/Wan2.2-V1") == 40
    assert sorted(hub) == ["Wan2.2-V1/high_noise_pusa.safetensors", "Wan2.2-V1/low_noise_pusa.safetensors"]


def test_a_hub_that_does_not_answer_is_a_missing_file(hub: list[str], transformer: Any) -> None:
    with pytest.raises(
        FileNotFoundError, match="'someone/else' is not on this machine, and the Hub did not give it: no such"
    ):
        load_pusa(pipe(transformer), "someone/else")
    with pytest.raises(ValueError, match="'someone/PusaV1/missing' holds no LoRA file"):
        load_pusa(pipe(transformer), "someone/PusaV1/missing")


# ---- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "original"])
def test_an_exported_lora_loads_to_the_same_output(tmp_path: Path, transformer: Any, pairs: Pairs, layout: Any) -> None:
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)), alpha=1.3)
    expected = run(transformer)
    report = export_lora(pipe(transformer), tmp_path / "new/out.safetensors", layout=layout)
    assert (report.layers, report.rank, report.relative_error) == (20, 4, 0.0)
    with safe_open(report.paths[0], "pt") as file:
        header = file.metadata()
    base = "Wan, width 96, 2 blocks"
    assert header == {"format": "pt", "base": base, "rank": "4", "alpha": "1.3", "layout": layout}
    info = describe_lora(report.paths[0])
    assert (info.layout, info.layers, info.ranks) == (layout, 20, (4,))
    unload_lora(pipe(transformer))
    load_pusa(pipe(transformer), report.paths[0], alpha=1.3)
    torch.testing.assert_close(run(transformer), expected, rtol=0, atol=1e-6)
    assert list((tmp_path / "new").iterdir()) == [report.paths[0]]


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_stock_diffusers_reads_the_export(
    tmp_path: Path, transformer: Any, tiny_transformer: Any, pairs: Pairs, layout: Any
) -> None:
    bias = {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.full((96,), 0.1)}
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs) | bias), alpha=1.4)
    path = export_lora(pipe(transformer), tmp_path / "out.safetensors", layout=layout).paths[0]
    stock = tiny_transformer()
    WanPipeline.load_lora_into_transformer(
        WanPipeline.lora_state_dict(str(path)), stock, adapter_name="a", low_cpu_mem_usage=False
    )
    stock.set_adapters(["a"], [1.4])
    torch.testing.assert_close(run(PusaWanTransformer3DModel.from_wan(stock)), run(transformer), rtol=0, atol=1e-5)


def test_comfyui_holds_every_difference_and_other_layouts_say_what_they_cannot(
    tmp_path: Path, transformer: Any, pairs: Pairs
) -> None:
    tensors, _ = _with_differences(transformer, pairs)
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", tensors))
    expected = run(transformer)
    report = export_lora(pipe(transformer), tmp_path / "out.safetensors")
    assert set(tensors) - set(load_file(report.paths[0])) == {
        key for key in tensors if ".lora_" in key
    }  # now up and down
    for layout in get_args(Layout)[1:]:
        with pytest.raises(ValueError, match=f'the {layout} layout cannot hold .* use layout="comfyui"'):
            export_lora(pipe(transformer), tmp_path / "other.safetensors", layout=layout)
    assert not (tmp_path / "other.safetensors").exists()
    unload_lora(pipe(transformer))
    assert load_pusa(pipe(transformer), report.paths[0]) == 26
    torch.testing.assert_close(run(transformer), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lower_rank_is_the_best_one_and_its_error_is_measured(
    tmp_path: Path, transformer: Any, dtype: torch.dtype
) -> None:
    pairs = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in make_pairs(transformer, rank=8).items()}
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))
    report = export_lora(pipe(transformer), tmp_path / "small.safetensors", layout="diffusers", rank=5)
    assert report.rank == 5
    small = load_file(report.paths[0])

    lost, norm, best, worst = 0.0, 0.0, 0.0, {}
    for name, (a, b) in pairs.items():
        dense = b.double() @ a.double()
        kept = small[f"transformer.{name}.lora_B.weight"].double() @ small[f"transformer.{name}.lora_A.weight"].double()
        worst[f"transformer.{name}"] = float((dense - kept).norm() / dense.norm())
        lost += float((dense - kept).square().sum())
        norm += float(dense.square().sum())
        best += float(torch.linalg.svdvals(dense)[5:].square().sum())  # Eckart and Young
    assert report.relative_error == pytest.approx((lost / norm) ** 0.5, rel=1e-6)
    assert report.relative_error == pytest.approx((best / norm) ** 0.5, rel=1e-6 if dtype == torch.float32 else 1e-3)
    assert report.worst_error == pytest.approx(max(worst.values()), rel=1e-6)
    assert worst[report.worst_layer] == max(worst.values())
    assert load_pusa(pipe(transformer), report.paths[0]) == 20


def test_a_lora_of_less_than_its_stated_rank_loses_nothing(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    padded = {name: (torch.cat([a, a]), torch.cat([b, b], dim=1)) for name, (a, b) in pairs.items()}  # rank 4, stated 8
    name = next(iter(padded))
    padded[name] = padded[name][0], torch.zeros_like(padded[name][1])  # as at the start of training
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(padded)))
    expected = run(transformer)
    report = export_lora(pipe(transformer), tmp_path / "small.safetensors", rank=4)
    assert report.worst_error < 1e-6
    load_pusa(pipe(transformer), report.paths[0])
    torch.testing.assert_close(run(transformer), expected, rtol=0, atol=1e-5)


def test_two_experts_export_as_a_pair(tmp_path: Path, noise_pair: Path, experts: SimpleNamespace) -> None:
    load_pusa(experts, noise_pair)
    expected = run(experts.transformer), run(experts.transformer_2)
    report = export_lora(experts, tmp_path / "out/pusa.safetensors", layout="original")
    assert [path.name for path in report.paths] == ["pusa_high_noise.safetensors", "pusa_low_noise.safetensors"]
    assert (report.layers, report.rank) == (40, 4)
    load_pusa(experts, tmp_path / "out")
    for model, output in zip((experts.transformer, experts.transformer_2), expected, strict=True):
        torch.testing.assert_close(run(model), output, rtol=0, atol=1e-6)


def test_a_lora_in_training_exports_at_its_own_scale(tmp_path: Path, transformer: Any) -> None:
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False))
    expected = run(transformer)
    path = export_lora(pipe(transformer), tmp_path / "trained.safetensors", adapter_name="default").paths[0]
    unload_lora(pipe(transformer))
    assert load_pusa(pipe(transformer), path, alpha=1.0) == 4
    torch.testing.assert_close(run(transformer), expected, rtol=0, atol=1e-6)


def test_a_file_finer_than_the_model_is_exported_as_it_came(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))
    assert transformer.blocks[0].attn1.to_q.lora_A["pusa"].weight.dtype == torch.bfloat16
    out = load_file(export_lora(pipe(transformer), tmp_path / "out.safetensors", layout="diffusers").paths[0])
    for name, (a, b) in pairs.items():
        assert torch.equal(out[f"transformer.{name}.lora_A.weight"], a)
        assert torch.equal(out[f"transformer.{name}.lora_B.weight"], b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "out.pt"}, r"must end in \.safetensors"),
        ({"layout": "kohya"}, "layout='kohya' is not one of comfyui, diffusers, original"),
        ({"rank": 0}, "rank=0 is below 1"),
    ],
)
def test_export_checks_its_arguments(
    tmp_path: Path, transformer: Any, pairs: Pairs, arguments: dict[str, Any], message: str
) -> None:
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))
    with pytest.raises(ValueError, match=message):
        export_lora(pipe(transformer), **({"path": tmp_path / "out.safetensors"} | arguments))


# ---- what a file is ------------------------------------------------------------------------------------------------


def test_describe_names_layout_model_and_parts_without_a_model(tmp_path: Path) -> None:
    keys: dict[str, Tensor] = {}
    for block in range(40):
        key = f"diffusion_model.blocks.{block}.self_attn.q"
        keys |= {f"{key}.lora_down.weight": torch.zeros(8, 5120, dtype=torch.bfloat16)}
        keys |= {f"{key}.lora_up.weight": torch.zeros(5120, 8, dtype=torch.bfloat16)}
        keys |= {f"{key}.alpha": torch.tensor(8.0), f"{key}.diff_b": torch.zeros(5120)}
    info = describe_lora(write(tmp_path / "lora.safetensors", keys, {"note": "hello"}))
    assert (info.layout, str(info.model)) == ("comfyui", "Wan 14B (width 5120, 40 blocks)")
    assert (info.layers, info.ranks, info.dtype) == (40, (8,), "bfloat16")
    assert (info.has_alpha, info.has_diff, info.has_diff_b) == (True, False, True)
    assert info.metadata["note"] == "hello"
    image = keys | {"diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.zeros(5120)}
    image_info = describe_lora(write(tmp_path / "image.safetensors", image))
    assert str(image_info.model) == "Wan 14B image-to-video (width 5120, 40 blocks)"
    assert image_info.has_diff


def test_describe_names_other_models(tmp_path: Path) -> None:
    assert str(describe_lora(write(tmp_path / "f.safetensors", _flux({}))).model) == "Flux or HunyuanVideo"
    unknown = {f"towers.3.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    assert str(describe_lora(write(tmp_path / "u.safetensors", unknown)).model) == "an unknown model"
    with pytest.raises(FileNotFoundError, match="nothing"):
        describe_lora(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("model", ["wan2.1_t2v_14b", "wan2.1_t2v_1.3b"])
def test_every_parameter_of_wan_has_its_name_in_both_conventions(golden: Path, model: str) -> None:
    original = json.loads((golden / f"keys/{model}_original.json").read_text())
    theirs = json.loads((golden / f"keys/{model}_diffusers.json").read_text())
    for name, shape in original.items():
        if name.endswith("modulation"):
            renamed, back = to_diffusers(name), to_original(to_diffusers(name))
        else:
            module, _, kind = name.rpartition(".")
            renamed, back = f"{to_diffusers(module)}.{kind}", f"{to_original(to_diffusers(module))}.{kind}"
        assert theirs[renamed] == shape
        assert back == name


# ---- inside a pipeline ---------------------------------------------------------------------------------------------


def test_the_pipeline_has_it_all_and_a_video_comes_back_bit_for_bit(
    tmp_path: Path, tiny_pipeline: Any, pairs: Pairs
) -> None:
    pipeline = tiny_pipeline()
    arguments: dict[str, Any] = {"prompt": "a cat", "height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0}

    def video() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(**arguments, num_inference_steps=2, generator=generator, output_type="latent").frames

    plain = video()
    assert pipeline.load_pusa(write(tmp_path / "lora.safetensors", comfyui(pairs))) == 20
    first = video()
    assert (first - plain).abs().max() > 1e-3
    pipeline.set_alpha(1.0)
    assert not torch.equal(video(), first)
    pipeline.set_alpha(1.4)
    assert torch.equal(video(), first)
    pipeline.merge_lora()
    torch.testing.assert_close(video(), first, rtol=0, atol=1e-4)
    pipeline.unmerge_lora()
    assert torch.equal(video(), first)
    assert pipeline.export_lora(tmp_path / "out.safetensors", rank=2).rank == 2


def test_group_offloading_before_the_lora_changes_nothing(tmp_path: Path, tiny_pipeline: Any, pairs: Pairs) -> None:
    file = write(tmp_path / "lora.safetensors", comfyui(pairs))
    plain, offloaded = tiny_pipeline(), tiny_pipeline()
    cpu = torch.device("cpu")
    offloaded.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    for pipeline in (plain, offloaded):
        load_pusa(pipeline, file)
        set_alpha(pipeline, 0.9)
    assert torch.equal(run(offloaded.transformer), run(plain.transformer))
    merge_lora(plain)
    merge_lora(offloaded)
    assert torch.equal(run(offloaded.transformer), run(plain.transformer))


def test_a_pipeline_without_a_transformer_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="a SimpleNamespace has no transformer"):
        load_pusa(SimpleNamespace(), "lora.safetensors")
