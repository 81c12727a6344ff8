"""A VAE of pictures encodes and decodes every frame of a video on its own."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pusa.models.vae import codec_of, decode_chunks, decode_video, encode_video


@pytest.fixture(params=[None, 0.1], ids=["", "shifted"])
def vae(request: pytest.FixtureRequest) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.18215,
        shift_factor=request.param,
        sample_size=16,
    ).eval()


@pytest.fixture
def video() -> Tensor:
    return torch.rand(2, 3, 4, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_every_frame_is_a_picture(vae: AutoencoderKL, video: Tensor) -> None:
    shift, scale = vae.config.shift_factor or 0, vae.config.scaling_factor
    latents = encode_video(vae, video)
    assert latents.shape == (2, 4, 4, 8, 6)
    for k in range(4):
        expected = (vae.encode(video[:, :, k]).latent_dist.mode() - shift) * scale
        assert torch.equal(latents[:, :, k], expected)
    chunks = list(decode_chunks(vae, latents))
    assert [chunk.shape for chunk in chunks] == [(2, 3, 1, 16, 12)] * 4
    for k, chunk in enumerate(chunks):
        expected = vae.decode(latents[:, :, k] / scale + shift).sample.clamp(-1, 1)
        assert torch.equal(chunk[:, :, 0], expected)
    assert torch.equal(decode_video(vae, latents), torch.cat(chunks, dim=2))
    pieces = decode_chunks(vae, iter(latents.split([1, 3], dim=2)))
    assert torch.equal(torch.cat(list(pieces), dim=2), torch.cat(chunks, dim=2))


@torch.no_grad()
def test_short_of_memory_it_decodes_in_diffusers_tiles(
    vae: AutoencoderKL, video: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    latents = encode_video(vae, torch.cat([video, video], dim=4))  # 8 x 12 latents; tiles are of 8 x 8
    vae.enable_tiling()
    tiled = decode_video(vae, latents)
    vae.disable_tiling()

    def limited(_: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].shape[3] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    vae.decoder.conv_in.register_forward_pre_hook(limited)
    assert torch.equal(decode_video(vae, latents), tiled)
    assert "out of memory in decode_at_once" in caplog.text
    assert not vae.use_tiling


def test_no_frame_and_other_models_are_refused(vae: AutoencoderKL, video: Tensor) -> None:
    with pytest.raises(ValueError, match=r"0 frames: the VAE takes 1n \+ 1 of them \(1, 2, 3, ...\)"):
        encode_video(vae, video[:, :, :0])
    other: Any = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="a VAE of class Linear: give one of AutoencoderKL, AutoencoderKLMochi"):
        codec_of(other)
