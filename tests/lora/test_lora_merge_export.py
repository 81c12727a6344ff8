"""Merging a LoRA into the weights and back, and writing one out: rounded once, exact in return, errors measured."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from diffusers import WanPipeline
from lora_samples import Pairs, comfyui, make_pairs, pipe, run, same, weights, with_differences, write
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pusa.lora import describe_lora, export_lora, load_pusa, merge_lora, set_alpha, unload_lora, unmerge_lora
from pusa.lora.adapters import state_of
from pusa.lora.layouts import Layout
from pusa.models.wan import PusaWanTransformer3DModel

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


def test_the_same_alpha_writes_no_merged_weight_again(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    """A server sets it for each request, and the weights may have many gigabytes."""
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)), alpha=1.4)
    merge_lora(pipe(transformer))
    weight = transformer.get_submodule(next(iter(pairs))).base_layer.weight
    writes, merged = weight._version, weight.detach().clone()
    set_alpha(pipe(transformer), 1.4)
    assert weight._version == writes
    set_alpha(pipe(transformer), 1.3)
    assert weight._version > writes
    assert not torch.equal(weight, merged)
    set_alpha(pipe(transformer), 1.4)
    transformer.set_adapters(["pusa"], [0.7])  # past this module: it counts, too
    set_alpha(pipe(transformer), 1.4)
    assert torch.equal(weight, merged)
    assert transformer.get_submodule(next(iter(pairs))).scaling["pusa"] == 1.4


def test_a_merge_keeps_no_second_copy_of_the_matrices(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))
    merge_lora(pipe(transformer))
    written = state_of(transformer).written
    assert len(written) == len(pairs)
    assert [part for entries in written.values() for _, part in entries] == [None] * len(pairs)


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
    tensors, _ = with_differences(transformer, pairs)
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
    tensors, _ = with_differences(transformer, pairs)
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


def test_a_lora_in_training_exports_at_its_scale(tmp_path: Path, transformer: Any) -> None:
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
