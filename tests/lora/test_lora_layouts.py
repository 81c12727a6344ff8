"""LoRA files: every layout gives the numbers of the original, from wherever it comes; none can run code."""

import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import WanTransformer3DModel
from lora_samples import (
    Pairs,
    comfyui,
    diffusers_file,
    flux,
    kohya,
    lightning,
    official_pickle,
    peft_folder,
    pipe,
    run,
    weights,
    wrapped_old_pickle,
    write,
)
from model_folders import cached_snapshot
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from pusa.lora import describe_lora, load_pusa, merge_lora, set_alpha, unload_lora
from pusa.lora.layouts import to_diffusers, to_original
from pusa.models.wan import PusaWanTransformer3DModel

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


@pytest.mark.parametrize(
    "make",
    [official_pickle, wrapped_old_pickle, lightning, kohya, diffusers_file, peft_folder],
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


def test_a_file_with_alpha_reaches_both_experts_alike(tmp_path: Path, tiny_transformer: Any, pairs: Pairs) -> None:
    """diffusers' converter scales the tensors it is given in place, so that a second expert gets them scaled twice."""
    experts = [PusaWanTransformer3DModel.from_wan(tiny_transformer()) for _ in range(2)]
    assert load_pusa(pipe(*experts), lightning(tmp_path, pairs)) == 40
    assert torch.equal(run(experts[0]), run(experts[1]))


# ---- pickles and damaged files -------------------------------------------------------------------------------------


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
    official_pickle(tmp_path, pairs)
    assert load_pusa(pipe(transformer), tmp_path) == 20  # safetensors before pickles
    write(tmp_path / "b.safetensors", comfyui(pairs))
    with pytest.raises(ValueError, match=r"holds 2 LoRA files; name one of them: a\.safetensors, b\.safetensors"):
        load_pusa(pipe(transformer), tmp_path)


# ---- two experts ---------------------------------------------------------------------------------------------------


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


def test_one_file_for_two_experts_is_logged(
    noise_pair: Path, experts: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    neutral = (noise_pair / "high_noise_pusa.safetensors").rename(noise_pair.parent / "glow.safetensors")
    with caplog.at_level(logging.INFO, logger="pusa"):
        assert load_pusa(experts, neutral) == 40
    assert len([text for text in caplog.messages if "20 of 20 layers" in text]) == 2
    assert all("its name tells neither high nor low noise" in text for text in caplog.messages)


def test_a_pair_for_one_transformer_is_an_error(noise_pair: Path, transformer: Any) -> None:
    with pytest.raises(ValueError, match="this pipeline has one transformer: name a file"):
        load_pusa(pipe(transformer), noise_pair)
    with pytest.raises(ValueError, match="source names transformer, transformer_2; this pipeline has transformer"):
        load_pusa(pipe(transformer), dict.fromkeys(("transformer", "transformer_2"), noise_pair))


# ---- the Hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, noise_pair: Path, pairs: Pairs) -> list[str]:
    """A Hub with one repository; the list records what was downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    root, fetched = tmp_path / "hub", []
    shutil.copytree(noise_pair, root / "Wan2.2-V1")
    (root / "adapter").mkdir()
    peft_folder(root / "adapter", pairs)
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
    snapshot = cached_snapshot(tmp_path, "someone/PusaV1", "0" * 40)
    snapshot.mkdir()
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
    assert str(describe_lora(write(tmp_path / "f.safetensors", flux({}))).model) == "Flux or HunyuanVideo"
    unknown = {f"towers.3.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    assert str(describe_lora(write(tmp_path / "u.safetensors", unknown)).model) == "an unknown model"
    with pytest.raises(FileNotFoundError, match="nothing"):
        describe_lora(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("model", ["wan2.1_t2v_14b", "wan2.1_t2v_1.3b"])
def test_every_parameter_of_wan_has_its_name_in_both_conventions(golden: Path, model: str) -> None:
    original = json.loads((golden / f"keys/{model}_original.json").read_text())
    theirs = json.loads((golden / f"keys/{model}_diffusers.json").read_text())
    assert len(original) == len(theirs)
    for name, shape in original.items():
        if name.endswith("modulation"):
            renamed, back = to_diffusers(name), to_original(to_diffusers(name))
        else:
            module, _, kind = name.rpartition(".")
            renamed, back = f"{to_diffusers(module)}.{kind}", f"{to_original(to_diffusers(module))}.{kind}"
        assert theirs[renamed] == shape
        assert back == name
