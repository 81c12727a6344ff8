"""Encode frames to normalised latents with Wan's VAE, and decode latents to frames one latent frame at a time.

The VAE is causal in time: latent frame 0 is 1 frame, every later one is 4, and none depends on what follows. So frames
decoded one latent frame at a time are equal to the bit to those of one call. Only this module uses the caches inside
diffusers' VAE (`_cached_conv_counts`, `feat_cache`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from pusa.acceleration.decisions import PartPlan
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
    """Reorder a VAE's kernels, in place, for bf16 (on CPUs 1.4 times as fast; fp32 gains nothing).

    Values and saved files stay the same.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            order = torch.channels_last_3d if isinstance(module, nn.Conv3d) else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=order)
    return vae


def prepare_vae(vae: AutoencoderKLWan, plan: PartPlan) -> AutoencoderKLWan:
    """Set a VAE's dtype, the order of its kernels and its use of tiles as a plan says, in place.

    Where it is, and how it is offloaded, stay as they are.
    """
    dtype = getattr(torch, plan.dtype)
    if vae.dtype != dtype:
        vae.to(dtype)
    vae.use_tiling = plan.tiles
    return channels_last(vae) if dtype == torch.bfloat16 else vae


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


def move_to_ram(tensor: Tensor) -> Tensor:
    """Copy a tensor of a GPU to pinned RAM, from where it returns fastest; return one of the CPU as it is."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


@torch.no_grad()
def decode_chunks(
    vae: AutoencoderKLWan,
    latents: Tensor | Iterable[Tensor],
    *,
    park: Callable[[Tensor], Tensor] | None = move_to_ram,
) -> Iterator[Tensor]:
    """Decode normalised latents a latent frame at a time; memory does not grow with the length of the video.

    With `vae.use_tiling` each piece is decoded tile by tile, with one tile at a time on the device.

    Args:
        vae: any `AutoencoderKLWan`; several streams may be open at once.
        latents: ``[B, C, F, h, w]``, or consecutive pieces of it.
        park: moves what the convolutions keep of earlier frames (gigabytes) off the device while the next piece is
            awaited, and while another tile is decoded; None leaves it there.

    Yields:
        Frames ``[B, 3, n, H, W]`` in -1..1, in the VAE's dtype. Without tiles n is 1, then 4, 4, ..., and they are
        equal to the bit to ``vae.decode`` of the whole. With tiles there is one chunk for each piece, on the CPU, equal
        to the bit to that of ``vae.tiled_decode``.
    """
    pieces = [latents] if isinstance(latents, Tensor) else latents
    last = length_hint(pieces) - 1  # -1: unknown
    stream, tiles = _Stream(vae), _Tiles(vae)
    for number, piece in enumerate(pieces):
        if hasattr(vae, "_hf_hook"):  # model offloading hooks `vae.decode`, which is not called here
            vae._hf_hook.pre_forward(vae)
        z = _denormalised(vae, piece)
        if tiles.are_needed(z):
            yield _finished(vae, tiles.decode(z, park))
            continue
        for frames in stream.decode(vae.post_quant_conv(z)):
            yield _finished(vae, frames)
            del frames  # freed, if the caller has done so, before the next ones are decoded
        if park is not None and number != last:
            stream.park(park)


def _finished(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    if vae.config.patch_size is not None:
        frames = unpatchify(frames, patch_size=vae.config.patch_size)
    return frames.clamp(-1, 1)


class _Stream:
    """Decode consecutive latents; keep what each causal convolution needs of earlier frames."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._decoder = vae.decoder
        self._cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
        self._is_first = True

    def decode(self, z: Tensor) -> Iterator[Tensor]:
        """Yield the decoder's output ``[B, c, n, H, W]`` for each latent frame of ``[B, C, F, h, w]``."""
        self.park(lambda tensor: tensor.to(z.device, non_blocking=True))
        for frame in z.split(1, dim=2):
            yield self._decoder(frame, feat_cache=self._cache, feat_idx=[0], first_chunk=self._is_first)
            self._is_first = False

    def park(self, move: Callable[[Tensor], Tensor]) -> None:
        for index, kept in enumerate(self._cache):  # one by one, so that there are never two copies of all
            if isinstance(kept, Tensor):  # others are marks of diffusers
                self._cache[index] = move(kept)


class _Tiles:
    """Decode consecutive latents in diffusers' tiles, blended as in `AutoencoderKLWan.tiled_decode`.

    That function needs a whole video at once, and holds all its tiles on the device.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._streams: dict[tuple[int, int], _Stream] = {}
        patch, scale = vae.config.patch_size or 1, vae.spatial_compression_ratio
        sizes = vae.tile_sample_min_height, vae.tile_sample_min_width
        strides = vae.tile_sample_stride_height, vae.tile_sample_stride_width
        self._size = [size // scale for size in sizes]  # latents
        self._stride = [stride // scale for stride in strides]
        self._shown = [stride // patch for stride in strides]  # of the decoder's output
        self._blend = [size // patch - shown for size, shown in zip(sizes, self._shown, strict=True)]
        self._scale = scale // patch

    def are_needed(self, z: Tensor) -> bool:
        """Tell if latents ``[B, C, F, h, w]`` are decoded in tiles."""
        return self._vae.use_tiling and (z.shape[3] > self._size[0] or z.shape[4] > self._size[1])

    def decode(self, z: Tensor, park: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Decode the next latents to the decoder's output ``[B, c, n, H, W]``, on the CPU."""
        height, width = z.shape[3:]
        rows = [
            [self._tile(z, top, left, park) for left in range(0, width, self._stride[1])]
            for top in range(0, height, self._stride[0])
        ]
        shown_rows = []
        for above, row in zip([None, *rows], rows, strict=False):
            shown = []
            for column, tile in enumerate(row):
                if above is not None:
                    tile = self._vae.blend_v(above[column], tile, self._blend[0])
                if column:
                    tile = self._vae.blend_h(row[column - 1], tile, self._blend[1])
                shown.append(tile[..., : self._shown[0], : self._shown[1]])
            shown_rows.append(torch.cat(shown, dim=-1))
        return torch.cat(shown_rows, dim=-2)[..., : height * self._scale, : width * self._scale]

    def _tile(self, z: Tensor, top: int, left: int, park: Callable[[Tensor], Tensor] | None) -> Tensor:
        stream = self._streams.setdefault((top, left), _Stream(self._vae))
        tile = z[..., top : top + self._size[0], left : left + self._size[1]]
        parts = []
        for frame in tile.split(1, dim=2):
            parts += [frames.cpu() for frames in stream.decode(self._vae.post_quant_conv(frame))]
        if park is not None:
            stream.park(park)
        return torch.cat(parts, dim=2)


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
        return torch.cat(list(decode_chunks(vae, latents)), dim=2)
    finally:
        vae.use_tiling = was_tiling


def decode_tile_by_tile(vae: AutoencoderKLWan, latents: Tensor, tile: int = 16, stride: int = 12) -> Tensor:
    """Decode as `decode_video` with one tile at a time on the device; blend tiles where they overlap.

    Args:
        tile, stride: size and distance of the tiles in latent pixels.
    """
    height, width = latents.shape[3:]
    scale = vae.config.scale_factor_spatial
    video = weight = torch.zeros(())
    for top in range(0, max(height - tile, 0) + stride, stride):
        for left in range(0, max(width - tile, 0) + stride, stride):
            piece = latents[..., top : top + tile, left : left + tile]
            frames = torch.cat([chunk.cpu() for chunk in decode_chunks(vae, piece)], dim=2)
            if video.ndim == 0:
                video = frames.new_zeros(*frames.shape[:3], height * scale, width * scale)
                weight = frames.new_zeros(height * scale, width * scale)
            fade = _fade(frames.shape[3], scale * (tile - stride))[:, None] * _fade(
                frames.shape[4], scale * (tile - stride)
            )
            fade = fade.to(frames.dtype)
            area = (
                slice(top * scale, top * scale + frames.shape[3]),
                slice(left * scale, left * scale + frames.shape[4]),
            )
            video[..., area[0], area[1]] += frames * fade
            weight[area] += fade
    return video / weight


def _fade(size: int, overlap: int) -> Tensor:
    """Compute blending weights ``[size]``: 1 inside, falling over `overlap` pixels at both ends, never 0."""
    ramp = (torch.arange(size) + 1).clamp(max=overlap) / overlap
    return torch.minimum(ramp, ramp.flip(0))
