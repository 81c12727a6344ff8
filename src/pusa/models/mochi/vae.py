"""Encode and decode with Mochi's VAE: 6 frames and 8 x 8 pixels per latent, the first frame alone.

Its decoder is causal, and its norms see one frame at a time, so that latents can be decoded one frame after the other.
Diffusers' own cache for that (`use_framewise_decoding`) does not serve: it pads time with what came before only where
nothing pads height and width, and the published weights need both. So the decoder's blocks are walked through here,
with the two earlier frames that each convolution reads. The encoder has attention over time and sees a video at once.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKLMochi
from torch import Tensor, nn
from torch.nn import functional

from pusa.models.vaes.codec import Codec, statistics


class MochiCodec(Codec):
    """Encode and decode with an `AutoencoderKLMochi`."""

    def frames_per_latent(self, vae: AutoencoderKLMochi) -> int:
        return vae.temporal_compression_ratio

    def pixels_per_latent(self, vae: AutoencoderKLMochi) -> int:
        return vae.spatial_compression_ratio

    def channels(self, vae: AutoencoderKLMochi) -> int:
        return vae.config.latent_channels

    def normalisation(self, vae: AutoencoderKLMochi) -> list[Any]:
        return [vae.config.latents_mean, vae.config.latents_std, vae.config.scaling_factor]

    def encode(self, vae: AutoencoderKLMochi, video: Tensor) -> Tensor:
        # The pixels stay in fp32 up to the Fourier features: bf16 rounds a pixel by up to 2^-9, a quarter of a turn of
        # the finest of them, sin(2 pi 2^7 x).
        context: AbstractContextManager[Any] = nullcontext()
        if vae.dtype != torch.float32:
            context = torch.autocast(video.device.type, vae.dtype)
        with context:
            return vae.encode(video.float()).latent_dist.mode()

    def normalise(self, vae: AutoencoderKLMochi, latents: Tensor) -> Tensor:
        mean, std = statistics(vae, latents)
        return (latents - mean) * (vae.config.scaling_factor / std)

    def denormalise(self, vae: AutoencoderKLMochi, latents: Tensor) -> Tensor:
        mean, std = statistics(vae, latents)
        return latents * std / vae.config.scaling_factor + mean

    def stream(self, vae: AutoencoderKLMochi) -> "MochiStream":
        return MochiStream(vae)


class MochiStream:
    """Decode consecutive latents; keep the frames before that each causal convolution reads."""

    def __init__(self, vae: AutoencoderKLMochi) -> None:
        self._decoder = vae.decoder
        self._dropped = vae.temporal_compression_ratio - 1  # of the first latent frame, which stands for one frame
        self._kept: dict[nn.Module, Tensor] = {}

    def decode(self, z: Tensor) -> Iterator[Tensor]:
        self.park(lambda tensor: tensor.to(z.device, non_blocking=True))
        for latent in z.split(1, dim=2):
            is_first = not self._kept
            frames = self._frames(latent)
            yield frames[:, :, self._dropped :] if is_first else frames

    def park(self, move: Callable[[Tensor], Tensor]) -> None:
        for convolution, kept in self._kept.items():
            self._kept[convolution] = move(kept)

    def _frames(self, x: Tensor) -> Tensor:
        """Decode the next latent frame to 6 frames; see `MochiDecoder3D.forward`."""
        decoder = self._decoder
        x = self._residuals(decoder.block_in.resnets, decoder.conv_in(x))
        for block in decoder.up_blocks:
            x = _unfold(block, self._residuals(block.resnets, x))
        x = decoder.nonlinearity(self._residuals(decoder.block_out.resnets, x))
        return decoder.proj_out(x.movedim(1, -1)).movedim(-1, 1)

    def _residuals(self, blocks: Iterable[Any], x: Tensor) -> Tensor:
        for block in blocks:
            y = self._convolve(block.conv1, block.nonlinearity(block.norm1(x)))
            x = self._convolve(block.conv2, block.nonlinearity(block.norm2(y))) + x
        return x

    def _convolve(self, convolution: Any, x: Tensor) -> Tensor:
        """Convolve after what came before; the first frame stands for that at the beginning, as in diffusers."""
        count = convolution.time_pad
        before = self._kept.get(convolution)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, count, -1, -1)
        x = torch.cat([before, x], dim=2)
        self._kept[convolution] = x[:, :, -count:].clone()
        width, height = convolution.width_pad, convolution.height_pad
        return convolution.conv(functional.pad(x, (width, width, height, height, 0, 0), mode="replicate"))


def _unfold(block: Any, x: Tensor) -> Tensor:
    """Turn channels into frames, rows and columns; see `MochiUpBlock3D.forward`."""
    times, size = block.temporal_expansion, block.spatial_expansion
    x = block.proj(x.movedim(1, -1))  # [B, f, h, w, c * t * s * s]
    x = x.unflatten(-1, (-1, times, size, size)).permute(0, 4, 1, 5, 2, 6, 3, 7)  # [B, c, f, t, h, s, w, s]
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
