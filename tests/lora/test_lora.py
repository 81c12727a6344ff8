"""LoRA: alpha is live and exact, several act side by side, and a file that does not fit says why."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from lora_samples import Pairs, comfyui, flux, make_pairs, pipe, run, same, weights, with_differences, write
from torch import Tensor

from pusa.lora import export_lora, load_pusa, merge_lora, set_alpha, unload_lora, unmerge_lora
from pusa.lora.adapters import check_fits
from pusa.lora.layouts import read_lora
from pusa.models.wan import PusaWanTransformer3DModel


def test_loading_says_how_many_layers_of_how_many(
    tmp_path: Path, transformer: Any, pairs: Pairs, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "lora.safetensors", comfyui(pairs))
    with caplog.at_level(logging.INFO, logger="pusa"):
        load_pusa(pipe(transformer), file, alpha=1.2)
    assert caplog.messages == ["transformer: 20 of 20 layers of lora.safetensors adapted as 'pusa' (rank 4, alpha 1.2)"]


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


def test_adapters_have_separate_alphas(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
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


def test_an_unknown_adapter_is_an_error_that_lists_those_attached(
    tmp_path: Path, transformer: Any, pairs: Pairs
) -> None:
    load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", comfyui(pairs)))
    for call in (set_alpha, unload_lora, export_lora):
        argument: tuple[Any, ...] = {set_alpha: (1.0,), export_lora: (tmp_path / "x.safetensors",)}.get(call, ())
        with pytest.raises(ValueError, match="no LoRA is attached as 'other'; attached: pusa"):
            call(pipe(transformer), *argument, adapter_name="other")


# ---- whole differences ---------------------------------------------------------------------------------------------


def test_differences_of_biases_norms_and_heads_follow_alpha(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    before, base = weights(transformer), run(transformer)
    tensors, deltas = with_differences(transformer, pairs)
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
    _, deltas = with_differences(transformer, {})
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
        (flux, "LoRA for Flux or HunyuanVideo, not for Wan"),
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
