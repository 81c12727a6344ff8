"""A part that is not exactly its checkpoint is refused by name before anything is computed, and so are strangers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pusa import PusaPipeline, loading
from pusa.models import files, original, tiny
from pusa.models.files import WrongArchitectureError
from pusa.training.config import TrainConfig
from pusa.training.model import load_transformer

Tensors = dict[str, torch.Tensor]
STEMS = {"text_encoder": "model"}
ORIGINAL = {"text_encoder": "models_t5_umt5-xxl-enc-bf16", "vae": "Wan2.1_VAE"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two experts in diffusers layout."""
    second = tiny.components(seed=5)["transformer"]
    PusaPipeline(**tiny.components(), transformer_2=second, boundary_ratio=0.875).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def wan22(tmp_path: Path) -> Path:
    """The same in Wan's own layout."""
    root, parts = tmp_path / "wan", tiny.components()
    for name in ("high_noise_model", "low_noise_model"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps({"model_type": "t2v", "num_heads": 3}))
        tensors = original.transformer_to_original(parts["transformer"].state_dict())
        save_file({k: v.contiguous() for k, v in tensors.items()}, root / name / "diffusion_pytorch_model.safetensors")
    vae = original.vae_to_original(parts["vae"].state_dict())
    text = original.text_encoder_to_original(parts["text_encoder"].state_dict())
    for part, tensors in (("vae", vae), ("text_encoder", text)):
        save_file({k: v.clone() for k, v in tensors.items()}, root / f"{ORIGINAL[part]}.safetensors")
    parts["tokenizer"].save_pretrained(root / "google/umt5-xxl")
    return root


def weights_of(folder: Path, part: str) -> Path:
    if (folder / "model_index.json").exists():
        return folder / part / f"{STEMS.get(part, 'diffusion_pytorch_model')}.safetensors"
    if part in ORIGINAL:
        return folder / f"{ORIGINAL[part]}.safetensors"
    return folder / files.ORIGINAL_EXPERTS[part] / "diffusion_pytorch_model.safetensors"


def change(path: Path, edit: Callable[[Tensors], Any]) -> str:
    """Edit the tensors of a file; return the name of the last one."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    return list(tensors)[-1]


PARTS = ("transformer", "transformer_2", "text_encoder", "vae")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", ["folder", "wan22"])
def test_a_tensor_that_is_missing_or_left_over_is_named(layout: str, part: str, request: Any) -> None:
    root = request.getfixturevalue(layout)
    path = weights_of(root, part)
    whole = path.read_bytes()
    where = part if layout == "folder" or part in ORIGINAL else files.ORIGINAL_EXPERTS[part]
    for key in sorted(load_file(path))[::7]:
        change(path, lambda tensors, key=key: tensors.pop(key))
        with pytest.raises(
            WrongArchitectureError, match=rf"{where}.*(1 weights are in no file: |in no file: |missing)"
        ):
            PusaPipeline.from_pretrained(root)
        path.write_bytes(whole)
    change(path, lambda tensors: tensors.update({"blocks.0.odd.weight": torch.zeros(3)}))
    with pytest.raises(WrongArchitectureError, match=rf"{where}.*1 (tensors are left over|of \d+).*blocks\.0\.odd"):
        PusaPipeline.from_pretrained(root)


def scaled(tensors: Tensors, suffix: str, dtype: torch.dtype) -> None:
    """Quantise the matrices of attention, as converters for ComfyUI do."""
    for key in [key for key, value in tensors.items() if value.ndim == 2 and ("attn" in key or "Attention" in key)]:
        scale = tensors[key].abs().max() / 100
        tensors[key] = (tensors[key] / scale).to(dtype)
        tensors[key.replace(".weight", suffix)] = scale


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "text_encoder"])
@pytest.mark.parametrize("layout", ["folder", "wan22"])
@pytest.mark.parametrize(
    ("suffix", "dtype", "name"),
    [
        (".scale_weight", torch.float8_e4m3fn, "scaled fp8"),
        (".weight_scale", torch.float8_e5m2, "scaled fp8"),
        (".weight_scale", torch.int8, "scaled int8"),
    ],
)
def test_scaled_weights_are_refused_by_their_name(
    layout: str, part: str, suffix: str, dtype: torch.dtype, name: str, request: Any
) -> None:
    root = request.getfixturevalue(layout)
    change(weights_of(root, part), lambda tensors: scaled(tensors, suffix, dtype))
    with pytest.raises(
        WrongArchitectureError, match=rf"is {name}: \d+ of its \d+ tensors hold scales \(first: .*{suffix}"
    ):
        PusaPipeline.from_pretrained(root)


def test_integers_without_scales_are_refused_too(folder: Path) -> None:
    key = "blocks.0.attn1.to_q.weight"
    change(weights_of(folder, "transformer"), lambda t: t.update({key: t[key].to(torch.int8)}))
    with pytest.raises(
        WrongArchitectureError, match=r"transformer holds 1 quantised weights \(first: .*to_q\.weight, I8"
    ):
        PusaPipeline.from_pretrained(folder)


def test_another_shape_or_depth_than_the_configuration_is_refused(folder: Path) -> None:
    path = folder / "transformer/config.json"
    config = json.loads(path.read_text())
    for values, message in (
        ({"num_layers": 4}, r"27 weights are in no file: blocks\.3\."),
        ({"num_layers": 2}, r"27 tensors are left over: blocks\.2\."),
        (
            {"ffn_dim": 128},
            r"have another shape \(first: blocks\.0\.ffn\.net\.0\.proj\.weight is \[256, 96\], not \[128",
        ),
    ):
        path.write_text(json.dumps(config | values))
        with pytest.raises(WrongArchitectureError, match=message):
            PusaPipeline.from_pretrained(folder)


def test_training_refuses_such_a_transformer_too(folder: Path) -> None:
    change(weights_of(folder, "transformer_2"), lambda tensors: tensors.pop("proj_out.bias"))
    config = TrainConfig.model_validate({"model": {"source": str(folder)}})
    load_transformer(config, "transformer")
    with pytest.raises(WrongArchitectureError, match=r"transformer_2 .*1 weights are in no file: proj_out\.bias"):
        load_transformer(config, "transformer_2")


def test_what_is_legitimate_is_not_refused(folder: Path) -> None:
    """Tied embeddings under either name, the decoder of a whole UMT5, keys that diffusers ignores, a variant."""
    encoder = weights_of(folder, "text_encoder")
    change(encoder, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].clone()}))
    loading.load_text_encoder(folder)
    change(encoder, lambda t: t.pop("shared.weight"))
    loading.load_text_encoder(folder)
    change(encoder, lambda t: t.update({"lm_head.weight": torch.zeros(2), "decoder.block.0.x": torch.zeros(2)}))
    change(
        weights_of(folder, "transformer"), lambda t: t.update({"blocks.0.attn2.norm_added_q.weight": torch.ones(96)})
    )
    PusaPipeline.from_pretrained(folder)
    for part in ("transformer", "transformer_2", "vae"):
        path = weights_of(folder, part)
        path.rename(path.with_suffix(".fp16.safetensors"))
        save_file({"other": torch.zeros(1)}, path)
    encoder.with_suffix(".fp16.safetensors").write_bytes(encoder.read_bytes())
    PusaPipeline.from_pretrained(folder, variant="fp16")


def test_a_text_encoder_is_checked_when_it_is_read_alone(folder: Path, wan22: Path) -> None:
    for root in (folder, wan22):
        key = change(weights_of(root, "text_encoder"), lambda tensors: None)
        change(weights_of(root, "text_encoder"), lambda tensors, key=key: tensors.pop(key))
        PusaPipeline.from_pretrained(root, text_encoder=None)
        with pytest.raises(WrongArchitectureError, match="text_encoder"):
            loading.load_text_encoder(root)


# ---- parts that do not belong together -----------------------------------------------------------------------------


def set_index(folder: Path, **values: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_two_experts_need_a_boundary_and_a_boundary_two_experts(folder: Path) -> None:
    set_index(folder, boundary_ratio=None)
    with pytest.raises(ValueError, match=r"two transformers and no boundary_ratio.*give boundary_ratio \(0\.875"):
        PusaPipeline.from_pretrained(folder)
    assert PusaPipeline.from_pretrained(folder, boundary_ratio=0.9).config.boundary_ratio == 0.9
    assert PusaPipeline.from_pretrained(folder, transformer_2=None).transformer_2 is None
    set_index(folder, boundary_ratio=875)
    with pytest.raises(ValueError, match=r"boundary_ratio=875 is outside 0\.\.1: it is a sigma"):
        PusaPipeline.from_pretrained(folder)
    set_index(folder, boundary_ratio=0.875, transformer_2=[None, None])
    with pytest.raises(ValueError, match=r"boundary_ratio=0\.875 and no transformer_2.*boundary_ratio=None"):
        PusaPipeline.from_pretrained(folder)
    PusaPipeline.from_pretrained(folder, boundary_ratio=None)


def test_components_without_their_boundary_are_refused(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline(experts=2)
    with pytest.raises(ValueError, match="two transformers and no boundary_ratio"):
        PusaPipeline(**pipe.components)  # diffusers leaves the boundary out
    pipe.transformer_2 = None
    with pytest.raises(ValueError, match=r"boundary_ratio=0\.875 needs two transformers and transformer_2 is not here"):
        pipe("a cat", height=32, width=32, num_frames=5)
    pipe.register_to_config(boundary_ratio=None)
    pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1, guidance_scale=1, output_type="latent")


def test_a_vae_or_text_encoder_of_another_model_is_refused_before_denoising(folder: Path, tiny_vae: Any) -> None:
    pipe = PusaPipeline.from_pretrained(folder)
    other = tiny_vae(z_dim=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8)
    with pytest.raises(ValueError, match="transformer has 16 latent channels and vae has 8"):
        PusaPipeline.from_pretrained(folder, vae=other)
    pipe.vae = other
    with pytest.raises(ValueError, match="transformer has 16 latent channels and vae has 8"):
        pipe("a cat", height=32, width=32, num_frames=5)
    other.save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match="transformer has 16 latent channels and vae has 8"):
        PusaPipeline.from_pretrained(folder)
    narrow = PusaPipeline.from_pretrained("tiny").text_encoder
    narrow.config.d_model = 64
    with pytest.raises(ValueError, match="transformer has 48 channels of text and text_encoder has 64"):
        PusaPipeline.from_pretrained(folder, vae=None, text_encoder=narrow)


@pytest.mark.parametrize(
    ("part", "name"), [("transformer", "transformer"), ("vae", "VAE"), ("text_encoder", "text encoder")]
)
def test_a_file_given_as_a_model_is_called_what_it_is(folder: Path, part: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"is a single-file checkpoint of the {name}, not a folder: give the folder"):
        PusaPipeline.from_pretrained(weights_of(folder, part))


def test_other_files_given_as_a_model_are_called_what_they_are(tmp_path: Path) -> None:
    keys = {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1, 1)}
    save_file(keys, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"style\.safetensors is a LoRA: give it with --lora"):
        PusaPipeline.from_pretrained(tmp_path / "style.safetensors")
    for name, said in (
        ("q4.gguf", "a single GGUF file"),
        ("Wan2.1_VAE.pth", "checkpoint of the VAE"),
        ("a.mp4", "single"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=said):
            PusaPipeline.from_pretrained(tmp_path / name)


# ---- memory --------------------------------------------------------------------------------------------------------


def mapped_bytes(path: Path) -> int:
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mappings")
@pytest.mark.parametrize("layout", ["folder", "wan22"])
def test_weights_kept_in_fp32_do_not_hold_their_files(layout: str, request: Any) -> None:
    root = request.getfixturevalue(layout)
    pipe = PusaPipeline.from_pretrained(root, torch_dtype=torch.bfloat16, text_encoder=None)
    assert pipe.transformer.scale_shift_table.dtype == torch.float32
    for part in ("transformer", "transformer_2", "vae"):
        assert mapped_bytes(weights_of(root, part)) == 0
