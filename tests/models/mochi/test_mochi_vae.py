"""Mochi's VAE encodes videos and hands out frames as it goes, equal to those of one call."""

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLMochi
from torch import Tensor

from pusa.acceleration.decisions import PartPlan
from pusa.models.mochi import tiny
from pusa.models.vae import (
    DecodeMemoryError,
    decode_chunks,
    decode_tile_by_tile,
    decode_video,
    encode_video,
    prepare_vae,
)


@pytest.fixture
def vae() -> AutoencoderKLMochi:
    vae = tiny.components()["vae"]
    vae.register_to_config(scaling_factor=1.25)  # 1 as published, which would hide it
    return vae


def noise(frames: int, height: int = 4, width: int = 5, batch: int = 1) -> Tensor:
    return torch.randn(batch, 12, frames, height, width, generator=torch.Generator().manual_seed(0))


def pixels(frames: int, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def of_channels(values: Any) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


@torch.no_grad()
def decoded_by_diffusers(vae: AutoencoderKLMochi, latents: Tensor) -> Tensor:
    """Decode as `MochiPipeline` does."""
    mean, std = of_channels(vae.config.latents_mean), of_channels(vae.config.latents_std)
    z = latents * std / vae.config.scaling_factor + mean
    return vae.decode(z.to(vae.dtype)).sample.clamp(-1, 1)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    """Find them equal but for the order of additions in a convolution."""
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-5


def psnr(a: Tensor, b: Tensor) -> float:
    return 10 * math.log10(4 / (a - b).square().mean().item())  # of values in -1..1


def limit_memory(vae: AutoencoderKLMochi, latent_pixels: int) -> None:
    """Let the decoder fail on more than so many latent pixels at a time, as a small device would."""

    def limited(_: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].shape[3] * inputs[0].shape[4] > latent_pixels:
            raise torch.OutOfMemoryError("CUDA out of memory")

    vae.decoder.conv_in.register_forward_pre_hook(limited)


@pytest.mark.parametrize("frames", [1, 7, 19])
def test_encodes_the_normalised_mode(vae: AutoencoderKLMochi, frames: int) -> None:
    video = pixels(frames)
    latents = encode_video(vae, video)
    with torch.no_grad():
        z = vae.encode(video).latent_dist.mode()
    mean, std = of_channels(vae.config.latents_mean), of_channels(vae.config.latents_std)
    assert latents.shape == (1, 12, (frames + 5) // 6, 2, 3)
    torch.testing.assert_close(latents, (z - mean) / std * vae.config.scaling_factor)
    assert torch.equal(encode_video(vae, video), latents)


def test_encodes_in_bf16_with_the_fine_waves_of_fp32_pixels(vae: AutoencoderKLMochi) -> None:
    expected = encode_video(vae, pixels(7))
    vae.to(torch.bfloat16)
    latents = encode_video(vae, pixels(7))
    assert latents.dtype == torch.float32
    with torch.no_grad():
        z = vae.encode(pixels(7).bfloat16()).latent_dist.mode().float()
    mean, std = of_channels(vae.config.latents_mean), of_channels(vae.config.latents_std)
    rounded = (z - mean) / std * vae.config.scaling_factor  # with pixels in bf16
    assert (latents - expected).norm() < 0.05 * expected.norm()
    assert (latents - expected).norm() < 0.5 * (rounded - expected).norm()


@pytest.mark.parametrize("frames", [2, 6, 12])
def test_other_numbers_of_frames_are_refused(vae: AutoencoderKLMochi, frames: int) -> None:
    with pytest.raises(ValueError, match=rf"{frames} frames: the VAE takes 6n \+ 1 of them \(1, 7, 13, ...\)"):
        encode_video(vae, pixels(frames))


def test_chunks_are_the_whole(vae: AutoencoderKLMochi) -> None:
    latents = noise(4, batch=2)
    whole = decoded_by_diffusers(vae, latents)
    chunks = list(decode_chunks(vae, latents))
    assert [chunk.shape for chunk in chunks] == [(2, 3, n, 32, 40) for n in (1, 6, 6, 6)]
    assert_same(torch.cat(chunks, dim=2), whole)
    assert torch.equal(decode_video(vae, latents), torch.cat(chunks, dim=2))
    pieces = list(decode_chunks(vae, iter(latents.split([1, 2, 1], dim=2))))
    assert torch.equal(torch.cat(pieces, dim=2), torch.cat(chunks, dim=2))
    assert_same(decode_video(vae, latents[:, :, :1]), whole[:, :, :1])


def test_blocks_of_all_sizes_are_streamed() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        **tiny.VAE | {"decoder_block_out_channels": (32, 64, 32, 96), "layers_per_block": (2, 1, 0, 3, 1)}
    ).eval()
    assert_same(decode_video(vae, noise(2, 2, 3)), decoded_by_diffusers(vae, noise(2, 2, 3)))


def test_streaming_rounds_no_more_than_diffusers(vae: AutoencoderKLMochi) -> None:
    latents = noise(3)
    ours, theirs = decode_video(vae, latents), decoded_by_diffusers(vae, latents)
    exact = decoded_by_diffusers(vae.double(), latents.double())
    assert (ours - exact).abs().max() <= max(2 * (theirs - exact).abs().max().item(), 1e-6)


def test_streams_do_not_disturb_each_other_and_park_what_they_keep(vae: AutoencoderKLMochi) -> None:
    latents, moved = noise(3), []

    def park(tensor: Tensor) -> Tensor:
        moved.append(weakref.ref(tensor))
        return tensor.clone()

    def pieces() -> Iterator[Tensor]:
        for number, piece in enumerate(latents.split(1, dim=2)):
            assert len(moved) == number * 10  # two convolutions in each of five residual blocks
            assert [tensor for tensor in moved if tensor() is not None] == []
            yield piece

    abandoned = decode_chunks(vae, latents)
    next(abandoned)
    assert_same(torch.cat(list(decode_chunks(vae, pieces(), park=park)), dim=2), decoded_by_diffusers(vae, latents))


@pytest.mark.parametrize("size", [(5, 7), (4, 8)])
def test_tiles_are_those_of_diffusers(vae: AutoencoderKLMochi, size: tuple[int, int]) -> None:
    latents = noise(3, *size)
    vae.enable_tiling(32, 32, 24, 24)  # tiles of 4 x 4 latents
    expected = decoded_by_diffusers(vae, latents)
    limit_memory(vae, 16)  # one tile fits
    assert_same(decode_video(vae, latents), expected)
    chunks = list(decode_chunks(vae, iter(latents.split([1, 2], dim=2))))
    assert [chunk.shape[2] for chunk in chunks] == [1, 12]
    assert_same(torch.cat(chunks, dim=2), expected)


def test_short_of_memory_it_decodes_in_tiles_and_keeps_latents_if_none_fits(vae: AutoencoderKLMochi) -> None:
    latents = noise(2, 5, 7)
    vae.enable_tiling(32, 32, 24, 24)
    expected = decoded_by_diffusers(vae, latents)
    vae.disable_tiling()
    limit_memory(vae, 16)
    assert_same(decode_video(vae, latents), expected)
    assert not vae.use_tiling
    limit_memory(vae, 0)
    with pytest.raises(DecodeMemoryError) as caught:
        decode_video(vae, latents)
    assert torch.equal(caught.value.latents, latents)


def test_one_tile_is_the_whole(vae: AutoencoderKLMochi) -> None:
    latents = noise(2, 6, 7)
    torch.testing.assert_close(decode_tile_by_tile(vae, latents), decode_video(vae, latents), rtol=0, atol=1e-6)


def test_a_plan_prepares_the_vae(vae: AutoencoderKLMochi) -> None:
    latents = noise(2, 2, 2)
    expected = decode_video(vae, latents)
    prepare_vae(vae, PartPlan("bfloat16", "bfloat16", "cpu", tiles=True))
    assert vae.use_tiling
    video = decode_video(vae, latents)
    assert video.dtype == torch.bfloat16
    assert psnr(video.float(), expected) > 30
    vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(decode_video(vae, latents), video)
