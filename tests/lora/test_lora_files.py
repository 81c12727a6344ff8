"""Files as people have them load exactly, or say in one line why not; a failure leaves the model as it was."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import Pairs, comfyui, make_pairs, pipe, run, same, weights, with_differences, write
from torch import Tensor

from pusa.lora import adapters, describe_lora, load_pusa, merge_lora, set_alpha, unload_lora
from pusa.lora.layouts import read_lora, to_original

Tensors = dict[str, Tensor]


# ---- spellings -----------------------------------------------------------------------------------------------------


def _spelt(pairs: Pairs, layer: Callable[[str], str], down: str = "lora_A", up: str = "lora_B") -> Tensors:
    keys: Tensors = {}
    for name, (a, b) in pairs.items():
        keys |= {f"{layer(name)}.{down}.weight": a, f"{layer(name)}.{up}.weight": b}
    return keys


def _half_flat(name: str) -> str:
    return re.sub(r"^blocks\.(\d+)", r"lora_unet_blocks_\1", to_original(name))


def _processor(name: str) -> str:
    attention = re.fullmatch(r"(blocks\.\d+\.attn\d)\.(to_[qkv]|to_out)(?:\.0)?", name)
    return f"transformer.{attention[1]}.processor.{attention[2]}_lora" if attention else f"transformer.{name}.lora"


SPELLINGS: dict[str, Callable[[Pairs], Tensors]] = {
    "kohya with dots": lambda p: _spelt(p, _half_flat, "lora_down", "lora_up"),
    "kohya in diffusers' names": lambda p: _spelt(
        p, lambda n: "lora_transformer_" + n.replace(".", "_"), "lora_down", "lora_up"
    ),
    "old diffusers": lambda p: _spelt(p, lambda n: f"transformer.{n}.lora", "down", "up"),
    "attention processors": lambda p: _spelt(p, _processor, "down", "up"),
    "linear layers": lambda p: _spelt(p, lambda n: f"unet.{n}.lora_linear_layer", "down", "up"),
    "transformer_2": lambda p: _spelt(p, lambda n: f"transformer_2.{n}"),
    "unet": lambda p: _spelt(p, lambda n: f"unet.{n}"),
    "dit": lambda p: _spelt(p, lambda n: f"dit.{to_original(n)}"),
    "model": lambda p: _spelt(p, lambda n: f"model.{to_original(n)}"),
    "module of a compiled model": lambda p: _spelt(p, lambda n: f"module._orig_mod.{to_original(n)}"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_lora(tmp_path: Path, transformer: Any, pairs: Pairs, spelling: str) -> None:
    load_pusa(pipe(transformer), write(tmp_path / "plain.safetensors", comfyui(pairs)))
    expected = run(transformer)
    assert load_pusa(pipe(transformer), write(tmp_path / "other.safetensors", SPELLINGS[spelling](pairs))) == 20
    assert torch.equal(run(transformer), expected)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", ""])
@pytest.mark.parametrize("shape", [(1, 6, 96), (6, 96)])
def test_differences_of_the_modulation_are_added(tmp_path: Path, transformer: Any, prefix: str, shape: Any) -> None:
    before = weights(transformer)
    block = "blocks_1" if prefix == "lora_unet_" else "blocks.1"
    delta, head = torch.randn(shape), torch.randn(1, 2, 96)
    keys = {f"{prefix}{block}.diff_m": delta, f"{prefix}head.diff_m": head}
    assert load_pusa(pipe(transformer), write(tmp_path / "m.safetensors", keys), alpha=0.5) == 2
    now = weights(transformer)
    assert torch.equal(now["blocks.1.scale_shift_table"], before["blocks.1.scale_shift_table"] + 0.5 * delta)
    assert torch.equal(now["scale_shift_table"], before["scale_shift_table"] + 0.5 * head)
    unload_lora(pipe(transformer))
    assert same(weights(transformer), before)


def test_an_unknown_prefix_before_wans_names_is_called_that(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    keys = _spelt(pairs, lambda n: f"net.backbone.{to_original(n)}")
    with pytest.raises(ValueError, match=r"Wan's names behind the unknown prefix 'net\.backbone\.' in 20 of 20 layers"):
        load_pusa(pipe(transformer), write(tmp_path / "lora.safetensors", keys))


# ---- image-to-video and VACE ---------------------------------------------------------------------------------------


def _image_to_video(pairs: Pairs) -> Tensors:
    keys = comfyui(pairs)
    for layer in ("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.v_img", "img_emb.proj.1"):
        keys |= {f"diffusion_model.{layer}.lora_{h}.weight": torch.ones(4, 96) for h in ("down",)}
        keys |= {f"diffusion_model.{layer}.lora_up.weight": torch.ones(96, 4)}
    keys["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = torch.ones(96)
    keys["diffusion_model.blocks.0.cross_attn.k_img.diff_b"] = torch.ones(96)
    keys["diffusion_model.patch_embedding.diff"] = torch.ones(96, 36, 1, 2, 2)
    return keys


def test_the_fitting_part_of_an_image_to_video_lora_is_taken_on_request(
    tmp_path: Path, transformer: Any, pairs: Pairs
) -> None:
    file = write(tmp_path / "i2v.safetensors", _image_to_video(pairs))
    with pytest.raises(ValueError, match=r"5 of 25 layers do not match; first: .*layers=\"fitting\" .*leaves those"):
        load_pusa(pipe(transformer), file)
    assert load_pusa(pipe(transformer), file, layers="fitting") == 20
    fitted = run(transformer)
    load_pusa(pipe(transformer), write(tmp_path / "plain.safetensors", comfyui(pairs)))
    assert torch.equal(run(transformer), fitted)
    keys = comfyui(pairs | {"blocks.1.ffn.net.7": (torch.ones(4, 96), torch.ones(96, 4))})
    with pytest.raises(ValueError, match="20 of 21 layers"):  # not one of images
        load_pusa(pipe(transformer), write(tmp_path / "odd.safetensors", keys), layers="fitting")
    with pytest.raises(ValueError, match="layers='some' is neither"):
        load_pusa(pipe(transformer), file, layers="some")  # type: ignore[arg-type]


def test_a_vace_lora_is_called_that(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    key = "diffusion_model.vace_blocks.0.self_attn.q"
    keys = comfyui(pairs) | {f"{key}.lora_A.weight": torch.ones(4, 96), f"{key}.lora_B.weight": torch.ones(96, 4)}
    with pytest.raises(ValueError, match=r"made for VACE .* 1 of 21 layers do not match; first: vace_blocks\.0"):
        load_pusa(pipe(transformer), write(tmp_path / "vace.safetensors", keys))


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_the_same_lora_as_its_values_in_fp32(
    tmp_path: Path, transformer: Any, pairs: Pairs, dtype: torch.dtype, suffix: str, model_dtype: torch.dtype
) -> None:
    transformer.to(model_dtype)
    keys = {key: value.to(dtype) for key, value in with_differences(transformer, pairs)[0].items()}
    alphas = {f"{key.removesuffix('.lora_A.weight')}.alpha": torch.tensor(3.0) for key in keys if "lora_A" in key}
    narrow, wide = tmp_path / f"fp8.{suffix}", tmp_path / "fp32.safetensors"
    write(narrow, keys | alphas) if suffix == "safetensors" else torch.save(keys | alphas, narrow)
    write(wide, {key: value.float() for key, value in (keys | alphas).items()})
    load_pusa(pipe(transformer), wide)
    expected, tables = run(transformer), weights(transformer)
    load_pusa(pipe(transformer), narrow)
    assert torch.equal(run(transformer), expected)
    assert same(weights(transformer), tables)
    if suffix == "safetensors":
        assert describe_lora(narrow).dtype == str(dtype).removeprefix("torch.")


def test_all_256_codes_of_fp8_keep_their_values(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = codes.view(dtype)
        values = values[values.float().isfinite()].view(-1, 1)  # [out, rank]
        a = torch.ones(1, 4).to(dtype)
        keys = {"blocks.0.self_attn.q.lora_A.weight": a, "blocks.0.self_attn.q.lora_B.weight": values}
        lora = read_lora(write(tmp_path / "codes.safetensors", keys))
        assert torch.equal(lora.pairs["blocks.0.attn1.to_q"][1].float(), values.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integers_are_refused_in_one_line(tmp_path: Path, transformer: Any, pairs: Pairs, dtype: torch.dtype) -> None:
    keys = {key: (100 * value).to(dtype) for key, value in comfyui(pairs).items()}
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"^\S+ holds {kind} weights \(first: \S+\), not floats: .*$"):
        load_pusa(pipe(transformer), write(tmp_path / "int.safetensors", keys))


def test_scales_beside_the_weights_are_refused(tmp_path: Path, transformer: Any, pairs: Pairs) -> None:
    keys = {key: value.to(torch.float8_e4m3fn) for key, value in comfyui(pairs).items()}
    keys["diffusion_model.blocks.0.ffn.0.lora_A.scale_weight"] = torch.tensor(2.0)
    with pytest.raises(ValueError, match="is quantised, with scales beside its weights"):
        load_pusa(pipe(transformer), write(tmp_path / "scaled.safetensors", keys))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "diff_b", "alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_named_by_their_layer(
    tmp_path: Path, transformer: Any, pairs: Pairs, value: float, part: str, dtype: torch.dtype
) -> None:
    keys = {key: matrix.to(dtype) for key, matrix in comfyui(pairs).items()}
    bad = torch.full((96,) if part == "diff_b" else () if part == "alpha" else (4,), value, dtype=dtype)
    layer = "diffusion_model.blocks.1.cross_attn.k"
    if part in ("diff_b", "alpha"):
        keys[f"{layer}.{part}"] = bad
    else:
        keys[f"{layer}.{part}.weight"].view(-1)[2:6] = bad
    with pytest.raises(ValueError, match=r"bad\.safetensors holds NaN or infinity, first in blocks\.1\.attn2\.to_k"):
        load_pusa(pipe(transformer), write(tmp_path / "bad.safetensors", keys))


# ---- failures ------------------------------------------------------------------------------------------------------


def _state(model: Any) -> tuple[Any, ...]:
    modules = {name: type(module) for name, module in model.named_modules()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    return modules, trainable, list(getattr(model, "peft_config", {})), adapters.adapter_names(model)


@pytest.mark.parametrize("where", ["set_scale", "rewrite", "load"])
@pytest.mark.parametrize("before", ["nothing", "the same name", "another name", "merged"])
def test_a_failure_in_attaching_leaves_the_model_bit_for_bit(
    tmp_path: Path, experts: Any, pairs: Pairs, monkeypatch: pytest.MonkeyPatch, where: str, before: str
) -> None:
    first = write(tmp_path / "first.safetensors", with_differences(experts.transformer, pairs)[0])
    other = make_pairs(experts.transformer, rank=2, seed=8)
    second = write(tmp_path / "second.safetensors", with_differences(experts.transformer, other)[0])
    if before != "nothing":
        load_pusa(experts, first, alpha=0.7, adapter_name="other" if before == "another name" else "pusa")
    if before == "merged":
        merge_lora(experts)
    models = list(vars(experts).values())
    kept = [({k: v.clone() for k, v in model.state_dict().items()}, _state(model), run(model)) for model in models]

    owner, name = {
        "set_scale": (adapters.LoraLayer, "set_scale"),
        "rewrite": (adapters, "rewrite"),
        "load": (type(models[0]), "load_lora_adapter"),
    }[where]
    working, calls = getattr(owner, name), 0

    def fail_late(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = working(*args, **kwargs)
        calls += 1
        if calls == {"set_scale": 31, "rewrite": 3 if before in ("the same name", "merged") else 2, "load": 2}[where]:
            raise RuntimeError("out of luck")  # when the first expert is done
        return result

    for _ in range(2):  # and a second time
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail_late)
            with pytest.raises(RuntimeError, match="out of luck"):
                load_pusa(experts, second)
        for model, (state, structure, output) in zip(models, kept, strict=True):
            assert same(dict(model.state_dict()), state)
            assert _state(model) == structure
            assert torch.equal(run(model), output)
    load_pusa(experts, second, adapter_name="later")
    set_alpha(experts, 0.3, adapter_name="later")
    unload_lora(experts)
    assert all(not getattr(model, "peft_config", {}) for model in models)
