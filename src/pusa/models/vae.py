"""Encode frames to normalised latents with Wan's VAE, and decode latents to frames one latent frame at a time.

The VAE is causal in time: latent frame 0 is 1 frame, every later one is 4, and none depends on what follows. So frames
decoded one latent frame at a time are equal to the bit to those of one call. Only this module uses the caches inside
diffusers' VAE (`_cached_conv_counts`, `feat_cache`).
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from pusa.positions import frames_of

logger = logging.getLogger(__name__)

# Texts of other errors: of the CPU's allocator, of pinned memory, and of libraries on the GPU.
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


class DecodeError(RuntimeError):
    """Decoding failed; `latents` holds the denoised latents (CPU, normalised)."""

    def __init__(self, message: str, latents: Tensor) -> None:
        super().__init__(message)
        self.latents = latents


class DecodeMemoryError(DecodeError):
    """Decoding ran out of memory, even tile by tile."""


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Reorder a VAE's kernels, in place, for bf16 on CPUs (1.4 times as fast; fp32 gains nothing).

    Values and saved files stay the same.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            order = torch.channels_last_3d if isinstance(module, nn.Conv3d) else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=order)
    return vae


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Encode frames to normalised latents, without sampling (the mode of the posterior).

    Args:
        vae: any `AutoencoderKLWan`.
        video: ``[B, 3, 4n + 1, H, W]`` in -1..1; diffusers' VAE would silently drop further frames.

    Returns:
        fp32 ``[B, C, n + 1, h, w]``, mean 0 and variance about 1 per channel.

    Raises:
        ValueError: the number of frames is not 4n + 1.
    """
    factor = vae.config.scale_factor_temporal
    if video.shape[2] % factor != 1:
        raise ValueError(f"{video.shape[2]} frames: the VAE takes {factor}n + 1 of them (1, 5, 9, ...)")
    latents = vae.encode(video.to(get_module_execution_device(vae), vae.dtype)).latent_dist.mode().float()
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def _denormalised(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    latents = latents.to(get_module_execution_device(vae), vae.dtype)
    mean, std = _statistics(vae, latents)
    return latents * std + mean


@torch.no_grad()
def decode_chunks(vae: AutoencoderKLWan, latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Decode normalised latents a latent frame at a time; memory does not grow with the length of the video.

    Args:
        vae: any `AutoencoderKLWan`; several streams may be open at once.
        latents: ``[B, C, F, h, w]``, or consecutive pieces of it.

    Yields:
        Frames ``[B, 3, n, H, W]`` in -1..1, in the VAE's dtype: n is 1, then 4, 4, ... Equal to the bit to
        ``vae.decode`` of the whole.
    """
    stream = _Stream(vae)
    for piece in [latents] if isinstance(latents, Tensor) else latents:
        yield from stream.decode(piece)


class _Stream:
    """Decode pieces of one video; hold what the decoder keeps of earlier frames between two calls."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]  # what each causal convolution keeps
        self._is_first = True

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        vae = self._vae
        if hasattr(vae, "_hf_hook"):  # model offloading hooks `vae.decode`, which is not called here
            vae._hf_hook.pre_forward(vae)
        z = vae.post_quant_conv(_denormalised(vae, latents))
        for z_frame in z.split(1, dim=2):
            frames = vae.decoder(z_frame, feat_cache=self._cache, feat_idx=[0], first_chunk=self._is_first)
            if vae.config.patch_size is not None:
                frames = unpatchify(frames, patch_size=vae.config.patch_size)
            yield frames.clamp(-1, 1)
            self._is_first = False

    def move(self, device: torch.device) -> None:
        """Move what is kept, so that other streams have the room."""
        self._cache = [kept.to(device) if isinstance(kept, Tensor) else kept for kept in self._cache]


@torch.no_grad()
def decode_tiles(
    vae: AutoencoderKLWan, latents: Tensor | Iterable[Tensor], tile: int = 32, stride: int = 24
) -> Iterator[Tensor]:
    """Decode as `decode_chunks` with one tile at a time on the device, and blend tiles where they overlap.

    Between two tiles, what the decoder keeps of the first waits on the CPU: the device holds that of one tile only.

    Args:
        tile, stride: size and distance of the tiles in latent pixels.

    Yields:
        Frames ``[B, 3, n, H, W]`` on the CPU, for each piece all of its frames.
    """
    streams: dict[tuple[int, int], _Stream] = {}
    cpu = torch.device("cpu")
    for piece in [latents] if isinstance(latents, Tensor) else latents:
        height, width = piece.shape[3:]
        scale = vae.config.scale_factor_spatial
        video = weight = torch.zeros(())
        for top in range(0, max(height - tile, 0) + stride, stride):
            for left in range(0, max(width - tile, 0) + stride, stride):
                stream = streams.setdefault((top, left), _Stream(vae))
                stream.move(get_module_execution_device(vae))
                area = piece[..., top : top + tile, left : left + tile]
                frames = torch.cat([chunk.cpu() for chunk in stream.decode(area)], dim=2)
                stream.move(cpu)
                if video.ndim == 0:
                    video = frames.new_zeros(*frames.shape[:3], height * scale, width * scale)
                    weight = frames.new_zeros(height * scale, width * scale)
                overlap = scale * (tile - stride)
                fade = (_fade(frames.shape[3], overlap)[:, None] * _fade(frames.shape[4], overlap)).to(frames.dtype)
                rows = slice(top * scale, top * scale + frames.shape[3])
                columns = slice(left * scale, left * scale + frames.shape[4])
                video[..., rows, columns] += frames * fade
                weight[rows, columns] += fade
        yield video / weight


@torch.no_grad()
def decode_video(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode normalised latents ``[B, C, F, h, w]`` to a video ``[B, 3, 4F - 3, H, W]`` in -1..1, in the VAE's dtype.

    When memory runs out, decode again in tiles, then tile by tile and latent frame by latent frame with the result on
    the CPU (users lost hours of denoising to a failing decode: Wan2.2 issue 34, WanVideoWrapper issue 1476).

    Raises:
        DecodeMemoryError: none of these fits into memory; it carries the latents.
    """
    ways = [_decode_at_once, _decode_tiled, decode_tile_by_tile]
    for way in ways[1:] if vae.use_tiling else ways:
        try:
            return way(vae, latents)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("out of memory in %s; trying a way that needs less", way.__name__.strip("_"))
        # After the handler, as the exception holds the failed attempt's tensors until then.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise DecodeMemoryError(
        "out of memory while decoding, even tile by tile: free memory, or save these latents and decode them later",
        latents.detach().cpu(),
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell if an error means that a device, or the CPU's allocator, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in _OUT_OF_MEMORY)


def _decode_at_once(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    video, done = torch.empty(0), 0
    for frames in decode_chunks(vae, latents):
        if done == 0:  # allocated once, so that the video never exists twice
            count = frames_of(latents.shape[2], vae.config.scale_factor_temporal)
            video = frames.new_empty(*frames.shape[:2], count, *frames.shape[3:])
        video[:, :, done : done + frames.shape[2]] = frames
        done += frames.shape[2]
    return video


def _decode_tiled(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    was_tiling = vae.use_tiling
    vae.use_tiling = True
    try:
        return vae.decode(_denormalised(vae, latents), return_dict=False)[0]
    finally:
        vae.use_tiling = was_tiling


def decode_tile_by_tile(vae: AutoencoderKLWan, latents: Tensor, tile: int = 16, stride: int = 12) -> Tensor:
    """Decode as `decode_video` with one tile at a time on the device; blend tiles where they overlap.

    Args:
        tile, stride: size and distance of the tiles in latent pixels.
    """
    return torch.cat(list(decode_tiles(vae, latents, tile, stride)), dim=2)


def _fade(size: int, overlap: int) -> Tensor:
    """Compute blending weights ``[size]``: 1 inside, falling over `overlap` pixels at both ends, never 0."""
    ramp = (torch.arange(size) + 1).clamp(max=overlap) / overlap
    return torch.minimum(ramp, ramp.flip(0))
