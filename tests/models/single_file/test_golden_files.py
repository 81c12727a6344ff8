"""Every recorded file in ComfyUI's layouts is loaded exactly or refused by name."""

import hashlib
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from paths import SHARED
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from pusa import PusaWanTransformer3DModel, load_single_file
from pusa.models import original
from pusa.models.files import DamagedFileError, WrongArchitectureError, read_json
from pusa.models.single_file.recognition import recognise

FOLDER = SHARED / "golden/singlefiles"
ENTRIES = read_json(FOLDER / "index.json").get("files", [])
ACCEPTED = [entry for entry in ENTRIES if entry["accept"]]
REFUSED = {
    "refuse_i2v_wan21": "image-to-video",
    "refuse_i2v_wan22_high_noise": "image-to-video",
    "refuse_vace": "VACE",
    "refuse_vace_module_only": "VACE module",
    "refuse_fun_control_wan21": "Fun control",
    "refuse_ti2v_5b": "TI2V-5B",
    "refuse_s2v": "S2V",
    "refuse_animate": "Animate",
    "refuse_nvfp4": "nvfp4",
    "refuse_mxfp8": "mxfp8",
    "refuse_int8_convrot": "convrot int8",
    "refuse_wan2.2_vae_stub": "Wan2.2 VAE",
    "refuse_t5xxl_not_umt5": r"T5 v1.1 encoder \(not UMT5\)",
    "refuse_truncated": "cut short: 12000 of 450208 bytes",
    "refuse_scale_missing": "blocks.0.ffn.0.weight is F8_E4M3 and its scale is missing",
}

pytestmark = pytest.mark.skipif(not ENTRIES, reason="shared/golden/singlefiles is not here; set PUSA_SHARED")


def name_of(entry: dict[str, Any]) -> str:
    return f"{entry['file']}-{entry['component']}"


def config_of(entry: dict[str, Any]) -> dict[str, Any]:
    return next(entry[name] for name in ("diffusers_config", "umt5_config", "vae_config") if name in entry)


def canonical(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors by the names of the index: Wan's own, and transformers' of the text encoder."""
    state = module.state_dict()
    if isinstance(module, UMT5EncoderModel):
        return {name: value for name, value in state.items() if name != "encoder.embed_tokens.weight"}
    if isinstance(module, AutoencoderKLWan):
        return original.vae_to_original(state)
    return original.transformer_to_original(state)


def sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def outputs(entry: dict[str, Any], module: nn.Module) -> dict[str, Tensor]:
    """Compute what the index recorded of this module."""
    group = entry["expected"]["forward"]["inputs"]
    inputs = {
        name.removeprefix(f"{group}."): value
        for name, value in load_file(FOLDER / "inputs.safetensors").items()
        if name.startswith(f"{group}.")
    }
    if isinstance(module, WanTransformer3DModel):
        _, _, _, height, width = inputs["latents"].shape
        timestep = inputs["timestep"].repeat_interleave(height // 2 * (width // 2), dim=1)
        velocity = module(
            hidden_states=inputs["latents"],
            timestep=timestep,
            encoder_hidden_states=inputs["context"],
            return_dict=False,
        )[0]
        return {"output": velocity}
    if isinstance(module, UMT5EncoderModel):
        hidden = module(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        return {"encoder_output": hidden}
    decoded = module.decode(inputs["latents"], return_dict=False)[0]
    return {"encoded_mean_raw": module.encode(inputs["video"]).latent_dist.mode(), "decoded_clamped": decoded}


@pytest.mark.parametrize("entry", ACCEPTED, ids=name_of)
def test_a_recorded_file_is_recognised_by_its_content(entry: dict[str, Any]) -> None:
    expected, file = entry["recognise"], recognise(FOLDER / entry["file"])
    part = file.part(entry["component"])
    assert part is not None
    assert part.layout == entry["layout"]
    assert part.prefix == expected.get("prefix", "")
    assert part.family == {"wan": expected.get("family")}.get(expected["model"], expected["model"])
    if entry["component"] == "transformer":
        assert (part.in_channels, part.out_channels) == (expected["in_channels"], expected["out_channels"])
        assert file.noise == expected.get("expert", "").removesuffix("_noise") or not file.noise
    assert part.names == expected.get("names", "wan")
    assert part.problem == ""
    assert list(file.components) == expected.get("components_in_file", [entry["component"]])


@pytest.mark.parametrize("entry", ACCEPTED, ids=name_of)
def test_a_recorded_file_is_loaded_exactly(entry: dict[str, Any]) -> None:
    module = load_single_file(FOLDER / entry["file"], config=config_of(entry))[entry["component"]]
    tensors = canonical(module)
    assert len(tensors) == entry["expected"]["keys"]
    assert sha256(tensors) == entry["expected"]["sha256_fp32"]
    if entry["component"] == "transformer":
        assert isinstance(module, PusaWanTransformer3DModel)
    forward = entry["expected"]["forward"]
    recorded = load_file(FOLDER / forward["file"])
    for name, value in outputs(entry, module).items():
        assert (value - recorded[name]).abs().max() <= forward["tolerance"], name


@pytest.mark.parametrize("entry", ACCEPTED, ids=name_of)
def test_a_recorded_file_in_bf16_is_rounded_once(entry: dict[str, Any]) -> None:
    module = load_single_file(FOLDER / entry["file"], config=config_of(entry), torch_dtype=torch.bfloat16)
    tensors = canonical(module[entry["component"]])
    assert {value.dtype for value in tensors.values()} <= {torch.bfloat16, torch.float32}
    assert sha256({name: value.bfloat16() for name, value in tensors.items()}) == entry["expected"]["sha256_bf16"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_recorded_file_that_would_be_wrong_is_refused_by_name(name: str) -> None:
    with pytest.raises((WrongArchitectureError, DamagedFileError), match=REFUSED[name]):
        load_single_file(FOLDER / f"{name}.safetensors")


def test_every_recorded_refusal_is_tried() -> None:
    assert {entry["file"] for entry in ENTRIES if not entry["accept"]} == {f"{name}.safetensors" for name in REFUSED}
