"""Encode and decode with Wan's VAEs.

They are causal in time: latent frame 0 is 1 frame, every later one is 4, and none depends on what follows. So frames
decoded one latent frame at a time are equal to the bit to those of one call. Only this module uses the caches inside
diffusers' VAE (`_cached_conv_counts`, `feat_cache`).
"""

from collections.abc import Callable, Iterator
from typing import Any

from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from pusa.models.vaes.codec import Codec, TileLayout, statistics


class WanCodec(Codec):
    """Encode and decode with an `AutoencoderKLWan`, of Wan2.1 or of TI2V-5B."""

    def frames_per_latent(self, vae: AutoencoderKLWan) -> int:
        return vae.config.scale_factor_temporal

    def pixels_per_latent(self, vae: AutoencoderKLWan) -> int:
        return vae.config.scale_factor_spatial

    def channels(self, vae: AutoencoderKLWan) -> int:
        return vae.config.z_dim

    def normalisation(self, vae: AutoencoderKLWan) -> list[Any]:
        return [vae.config.latents_mean, vae.config.latents_std]

    def encode(self, vae: AutoencoderKLWan, video: Tensor) -> Tensor:
        return vae.encode(video.to(vae.dtype)).latent_dist.mode()

    def normalise(self, vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
        mean, std = statistics(vae, latents)
        return (latents - mean) / std

    def denormalise(self, vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
        mean, std = statistics(vae, latents)
        return latents * std + mean

    def stream(self, vae: AutoencoderKLWan) -> "WanStream":
        return WanStream(vae)

    def tile_layout(self, vae: AutoencoderKLWan) -> TileLayout:
        return TileLayout.of(vae, vae.spatial_compression_ratio, vae.config.patch_size or 1)

    def finish(self, vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
        if vae.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=vae.config.patch_size)
        return frames.clamp(-1, 1)


class WanStream:
    """Decode consecutive latents; keep what each causal convolution needs of earlier frames."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
        self._is_first = True

    def decode(self, z: Tensor) -> Iterator[Tensor]:
        self.park(lambda tensor: tensor.to(z.device, non_blocking=True))
        for frame in self._vae.post_quant_conv(z).split(1, dim=2):
            frame = frame.contiguous()  # in the same order for pieces of all lengths, which compiled code is made for
            yield self._vae.decoder(frame, feat_cache=self._cache, feat_idx=[0], first_chunk=self._is_first)
            self._is_first = False

    def park(self, move: Callable[[Tensor], Tensor]) -> None:
        for index, kept in enumerate(self._cache):  # one by one, so that there are never two copies of all
            if isinstance(kept, Tensor):  # others are marks of diffusers
                self._cache[index] = move(kept)
