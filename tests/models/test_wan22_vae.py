"""The VAE of Wan2.2 TI2V-5B in Wan's own layout: names, configuration, and the folder that holds it."""

import json
from pathlib import Path

import pytest
import torch
from components import make_text_encoder, make_transformer
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from sparse_models import vae_shapes

from pusa import PusaPipeline
from pusa.models import files, original, tiny, wan22_vae


def make_vae() -> AutoencoderKLWan:
    """The published architecture with 8 channels at the top of the encoder and of the decoder."""
    narrow = {"encoder.conv1.weight": [8, 12, 3, 3, 3], "decoder.conv1.weight": [32, 48, 3, 3, 3]}
    torch.manual_seed(0)
    return AutoencoderKLWan(**wan22_vae.config_from_shapes(narrow)).eval()


def test_names_convert_in_both_directions_and_tell_the_configuration() -> None:
    vae = make_vae()
    weights = original.vae_to_original(vae.state_dict())
    back = original.vae_to_diffusers(weights)
    assert back.keys() == vae.state_dict().keys()
    assert all(back[key] is weights[name] for name, key in zip(weights, back, strict=True))
    assert wan22_vae.SIGN in weights
    shapes = {key: list(value.shape) for key, value in weights.items()}
    config = original.vae_config_from_keys(shapes)
    again = AutoencoderKLWan(**config)
    assert dict(again.config) == dict(vae.config)
    assert (again.config.z_dim, again.config.scale_factor_spatial) == (48, 16)


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    shapes = vae_shapes("wan2.2")
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 704_688_668
    assert original.vae_config_from_keys(shapes)["decoder_base_dim"] == 256


def test_names_agree_with_the_single_file_converter_of_diffusers() -> None:
    weights = original.vae_to_original(make_vae().state_dict())
    theirs = convert_wan_vae_to_diffusers(dict(weights))
    ours = original.vae_to_diffusers(weights)
    # It knows the Wan2.1 VAE, which has other stages: all else has to be the same.
    outside_stages = {key for key in ours if "_blocks." not in key}
    assert len(outside_stages) > 40
    assert all(theirs[key] is ours[key] for key in outside_stages)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("encoder.downsamples.1.downsamples.0.shortcut.bias", "encoder.down_blocks.1.resnets.0.conv_shortcut.bias"),
        ("encoder.downsamples.0.downsamples.1.residual.6.weight", "encoder.down_blocks.0.resnets.1.conv2.weight"),
        ("encoder.downsamples.1.downsamples.2.time_conv.bias", "encoder.down_blocks.1.downsampler.time_conv.bias"),
        ("decoder.upsamples.3.upsamples.2.residual.0.gamma", "decoder.up_blocks.3.resnets.2.norm1.gamma"),
        ("decoder.upsamples.0.upsamples.3.resample.1.weight", "decoder.up_blocks.0.upsampler.resample.1.weight"),
    ],
)
def test_names_of_stages_are_those_of_the_conversion_script_of_diffusers(name: str, other: str) -> None:
    weights = original.vae_to_original(make_vae().state_dict())  # scripts/convert_wan_to_diffusers.py
    assert original.vae_to_diffusers(weights)[other] is weights[name]


def test_another_number_of_channels_is_refused() -> None:
    shapes = {key: list(value.shape) for key, value in original.vae_to_original(make_vae().state_dict()).items()}
    shapes["conv2.weight"] = [32, 32, 1, 1, 1]
    with pytest.raises(files.WrongArchitectureError, match=r"32 latent channels; the Wan2\.2 VAE has 48"):
        original.vae_config_from_keys(shapes)


@pytest.fixture
def ti2v(tmp_path: Path) -> Path:
    """A narrow TI2V-5B in Wan's own layout."""
    folder = tmp_path / "Wan2.2-TI2V-5B"
    (folder / "google").mkdir(parents=True)
    config = {"_class_name": "WanModel", "model_type": "ti2v", "num_heads": 3}
    (folder / "config.json").write_text(json.dumps(config))
    transformer = make_transformer(in_channels=48, out_channels=48)
    weights = original.transformer_to_original(transformer.state_dict())
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    torch.save(original.vae_to_original(make_vae().state_dict()), folder / "Wan2.2_VAE.pth")
    text = original.text_encoder_to_original(make_text_encoder().state_dict())
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tiny.tokenizer().save_pretrained(folder / "google/umt5-xxl")
    return folder


def test_an_original_folder_of_ti2v_makes_the_same_video_as_its_diffusers_copy(ti2v: Path, tmp_path: Path) -> None:
    pipe = PusaPipeline.from_pretrained(ti2v)
    assert pipe.config.expand_timesteps
    pipe.save_pretrained(tmp_path / "copy")
    other = PusaPipeline.from_pretrained(tmp_path / "copy")
    embeds = torch.randn(1, 8, 48, generator=torch.Generator().manual_seed(1))
    call = {"prompt_embeds": embeds, "height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 2}
    call |= {"guidance_scale": 1.0, "output_type": "latent"}
    made = [p(**call, generator=torch.Generator().manual_seed(0)).frames for p in (pipe, other)]
    assert made[0].shape == (1, 48, 2, 4, 6)  # 16 pixels to a latent one
    assert torch.equal(*made)
    frames = [chunk.shape for chunk in pipe.decode_stream(made[0])]
    assert frames == [(1, 3, 1, 64, 96), (1, 3, 4, 64, 96)]


def test_the_vae_that_a_ti2v_folder_lacks_is_named(ti2v: Path) -> None:
    (ti2v / "Wan2.2_VAE.pth").rename(ti2v / "Wan2.1_VAE.pth")
    assert files.missing_files(ti2v) == ["Wan2.2_VAE.pth"]
