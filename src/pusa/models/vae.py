"""Encode frames to normalised latents, and decode latents to frames one latent frame at a time, with any base's VAE.

`pusa.models.vaes` says of each class of VAEs how it does that; the rest is alike: pieces, tiles, and what is done when
memory runs out.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderKLMochi, AutoencoderKLWan
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from pusa.acceleration.decisions import PartPlan
from pusa.models.mochi.vae import MochiCodec
from pusa.models.vaes.codec import VAE, Codec, Stream
from pusa.models.vaes.framewise import FramewiseCodec
from pusa.models.vaes.wan import WanCodec
from pusa.positions import frames_of

logger = logging.getLogger(__name__)

CODECS: dict[type[VAE], Codec] = {
    AutoencoderKL: FramewiseCodec(),
    AutoencoderKLMochi: MochiCodec(),
    AutoencoderKLWan: WanCodec(),
}
AnyVAE = TypeVar("AnyVAE", bound=nn.Module)

# Texts of other errors: of the CPU's allocator, of pinned memory, and of libraries on the GPU.
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


class DecodeError(RuntimeError):
    """Decoding failed; `latents` holds the denoised latents (CPU, normalised)."""

    def __init__(self, message: str, latents: Tensor) -> None:
        super().__init__(message)
        self.latents = latents


class DecodeMemoryError(DecodeError):
    """Decoding ran out of memory, even tile by tile."""


def codec_of(vae: VAE) -> Codec:
    """Return how a VAE encodes and decodes.

    Raises:
        TypeError: it is of no class of `CODECS`.
    """
    for vae_class, codec in CODECS.items():
        if isinstance(vae, vae_class):
            return codec
    raise TypeError(f"a VAE of class {type(vae).__name__}: give one of {', '.join(c.__name__ for c in CODECS)}")


def channels_last(vae: AnyVAE) -> AnyVAE:
    """Reorder a VAE's kernels, in place, for bf16 (on CPUs 1.4 times as fast; fp32 gains nothing).

    Values and saved files stay the same.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            order = torch.channels_last_3d if isinstance(module, nn.Conv3d) else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=order)
    return vae


def prepare_vae(vae: VAE, plan: PartPlan) -> VAE:
    """Set a VAE's dtype, the order of its kernels and its use of tiles as a plan says, in place.

    Where it is, and how it is offloaded, stay as they are.
    """
    dtype = getattr(torch, plan.dtype)
    if vae.dtype != dtype:
        vae.to(dtype)
    vae.use_tiling = plan.tiles
    return channels_last(vae) if dtype == torch.bfloat16 else vae


@torch.no_grad()
def encode_video(vae: VAE, video: Tensor, *, normalize: bool = True) -> Tensor:
    """Encode frames to normalised latents, without sampling (the mode of the posterior).

    Args:
        vae: of a class of `CODECS`.
        video: ``[B, 3, T n + 1, H, W]`` in -1..1, where T is the number of frames per latent frame (Wan's 4, Mochi's
            6, a VAE of pictures 1); diffusers' VAEs would silently drop, or misplace, further frames.

        normalize: False leaves the mean and the scale of the encoder, which no transformer is meant to see.

    Returns:
        fp32 ``[B, C, n + 1, h, w]``, mean 0 and variance about 1 per channel.

    Raises:
        ValueError: the number of frames is not T n + 1.
    """
    codec = codec_of(vae)
    count, factor = video.shape[2], codec.frames_per_latent(vae)
    if count < 1 or (count - 1) % factor:
        some = ", ".join(str(frames_of(n, factor)) for n in (1, 2, 3))
        raise ValueError(f"{count} frames: the VAE takes {factor}n + 1 of them ({some}, ...)")
    latents = codec.encode(vae, video.to(get_module_execution_device(vae))).float()
    return codec.normalise(vae, latents) if normalize else latents


def move_to_ram(tensor: Tensor) -> Tensor:
    """Copy a tensor of a GPU to pinned RAM, from where it returns fastest; return one of the CPU as it is."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


@torch.no_grad()
def decode_chunks(
    vae: VAE,
    latents: Tensor | Iterable[Tensor],
    *,
    park: Callable[[Tensor], Tensor] | None = move_to_ram,
) -> Iterator[Tensor]:
    """Decode normalised latents a latent frame at a time; memory does not grow with the length of the video.

    With `vae.use_tiling` each piece is decoded tile by tile, with one tile at a time on the device.

    Args:
        vae: of a class of `CODECS`; several streams may be open at once.
        latents: ``[B, C, F, h, w]``, or consecutive pieces of it.
        park: moves what the convolutions keep of earlier frames (gigabytes) off the device while the next piece is
            awaited, and while another tile is decoded; None leaves it there.

    Yields:
        Frames ``[B, 3, n, H, W]`` in -1..1, in the VAE's dtype. Without tiles n is 1, then 4, 4, ... (Mochi: 6), and
        they are equal to ``vae.decode`` of the whole (Wan: to the bit; Mochi: but for the rounding of fp32). With tiles
        there is one chunk for each piece, on the CPU, equal alike to that of ``vae.tiled_decode``. A VAE of pictures
        decodes one frame at a time, in tiles or not.
    """
    codec = codec_of(vae)
    pieces = [latents] if isinstance(latents, Tensor) else latents
    last = length_hint(pieces) - 1  # -1: unknown
    stream, tiles = codec.stream(vae), _Tiles(vae, codec)
    for number, piece in enumerate(pieces):
        if hasattr(vae, "_hf_hook"):  # model offloading hooks `vae.decode`, which is not called here
            vae._hf_hook.pre_forward(vae)
        z = codec.denormalise(vae, piece.to(get_module_execution_device(vae), vae.dtype))
        if tiles.are_needed(z):
            yield codec.finish(vae, tiles.decode(z, park))
            continue
        for frames in stream.decode(z):
            yield codec.finish(vae, frames)
            del frames  # freed, if the caller has done so, before the next ones are decoded
        if park is not None and number != last:
            stream.park(park)


class _Tiles:
    """Decode consecutive latents in diffusers' tiles, blended as in the VAE's own `tiled_decode`.

    That function needs a whole video at once, and holds all its tiles on the device.
    """

    def __init__(self, vae: VAE, codec: Codec) -> None:
        self._vae, self._codec, self._layout = vae, codec, codec.tile_layout(vae)
        self._streams: dict[tuple[int, int], Stream] = {}

    def are_needed(self, z: Tensor) -> bool:
        """Tell if latents ``[B, C, F, h, w]`` are decoded in tiles."""
        layout = self._layout
        return (
            layout is not None and self._vae.use_tiling and (z.shape[3] > layout.size[0] or z.shape[4] > layout.size[1])
        )

    def decode(self, z: Tensor, park: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Decode the next latents to the decoder's output ``[B, c, n, H, W]``, on the CPU."""
        layout, (height, width) = self._layout, z.shape[3:]
        assert layout is not None
        rows = [
            [self._tile(z, top, left, layout.size, park) for left in range(0, width, layout.stride[1])]
            for top in range(0, height, layout.stride[0])
        ]
        shown_rows = []
        for above, row in zip([None, *rows], rows, strict=False):
            shown = []
            for column, tile in enumerate(row):
                if above is not None:
                    tile = self._vae.blend_v(above[column], tile, layout.blend[0])
                if column:
                    tile = self._vae.blend_h(row[column - 1], tile, layout.blend[1])
                shown.append(tile[..., : layout.shown[0], : layout.shown[1]])
            shown_rows.append(torch.cat(shown, dim=-1))
        return torch.cat(shown_rows, dim=-2)[..., : height * layout.scale, : width * layout.scale]

    def _tile(
        self, z: Tensor, top: int, left: int, size: tuple[int, int], park: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        stream = self._streams.setdefault((top, left), self._codec.stream(self._vae))
        tile = z[..., top : top + size[0], left : left + size[1]]
        parts = []
        for frame in tile.split(1, dim=2):
            parts += [frames.cpu() for frames in stream.decode(frame)]
        if park is not None:
            stream.park(park)
        return torch.cat(parts, dim=2)


@torch.no_grad()
def decode_video(vae: VAE, latents: Tensor) -> Tensor:
    """Decode normalised latents ``[B, C, F, h, w]`` to a video ``[B, 3, T (F - 1) + 1, H, W]`` in -1..1, in its dtype.

    T is the number of frames per latent frame: Wan's 4, Mochi's 6, a VAE of pictures 1.

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


def _decode_at_once(vae: VAE, latents: Tensor) -> Tensor:
    video, done = torch.empty(0), 0
    for frames in decode_chunks(vae, latents):
        if done == 0:  # allocated once, so that the video never exists twice
            count = frames_of(latents.shape[2], codec_of(vae).frames_per_latent(vae))
            video = frames.new_empty(*frames.shape[:2], count, *frames.shape[3:])
        video[:, :, done : done + frames.shape[2]] = frames
        done += frames.shape[2]
    return video


def _decode_tiled(vae: VAE, latents: Tensor) -> Tensor:
    was_tiling = vae.use_tiling
    vae.use_tiling = True
    try:
        return torch.cat(list(decode_chunks(vae, latents)), dim=2)
    finally:
        vae.use_tiling = was_tiling


def decode_tile_by_tile(vae: VAE, latents: Tensor, tile: int = 16, stride: int = 12) -> Tensor:
    """Decode as `decode_video` with one tile at a time on the device; blend tiles where they overlap.

    Args:
        tile, stride: size and distance of the tiles in latent pixels.
    """
    height, width = latents.shape[3:]
    scale = codec_of(vae).pixels_per_latent(vae)
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
