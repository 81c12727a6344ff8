"""Encode and decode every frame on its own, with a VAE of pictures, as FVDM does with Stable Diffusion's."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pusa.models.vaes.codec import Codec


class FramewiseCodec(Codec):
    """Encode and decode with an `AutoencoderKL`: a latent frame is a frame."""

    def frames_per_latent(self, vae: AutoencoderKL) -> int:
        return 1

    def pixels_per_latent(self, vae: AutoencoderKL) -> int:
        return 2 ** (len(vae.config.block_out_channels) - 1)

    def channels(self, vae: AutoencoderKL) -> int:
        return vae.config.latent_channels

    def normalisation(self, vae: AutoencoderKL) -> list[Any]:
        return [vae.config.scaling_factor, vae.config.shift_factor]

    def encode(self, vae: AutoencoderKL, video: Tensor) -> Tensor:
        frames = video.to(vae.dtype).unbind(2)
        return torch.stack([vae.encode(frame).latent_dist.mode() for frame in frames], dim=2)

    def normalise(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def denormalise(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)

    def stream(self, vae: AutoencoderKL) -> "FramewiseStream":
        return FramewiseStream(vae)

    def tile_layout(self, vae: AutoencoderKL) -> None:
        return None


class FramewiseStream:
    """Decode frames, which keep nothing of each other; diffusers' own function sees to tiles."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = vae

    def decode(self, z: Tensor) -> Iterator[Tensor]:
        for frame in z.unbind(2):
            yield self._vae.decode(frame).sample.unsqueeze(2)

    def park(self, move: Callable[[Tensor], Tensor]) -> None:
        pass
