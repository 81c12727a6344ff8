"""Show latents as pictures by a linear map, without the VAE: thousands of times cheaper than its decoder.

A map takes a latent pixel with its eight neighbours to 4 x 4 pixels of RGB. It is fitted by least squares to what a
VAE's own encoder makes of drawn clips: seconds of work, once for each VAE. The package has that of the embedded model.
"""

import hashlib
import logging
import math
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa.fsutil import cache_folder, replacing
from pusa.models.vae import codec_of, encode_video
from pusa.models.vaes.codec import VAE

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_name("latent_previews.safetensors")
_SUBPIXELS = 4  # of a latent pixel, in each direction; 8 look no better (benchmarks/latent_preview.py)
_CELLS = 8  # latent pixels of a drawn clip, in each direction
_CLIPS = 24
_RIDGE = 1e-3  # keeps the coefficients small where the clips say little


class FrameDecoder(Protocol):
    """Show one latent frame."""

    def __call__(self, latents: Tensor, index: int) -> Tensor:
        """Return latent frame `index` of normalised latents ``[1, C, F, h, w]`` as uint8 ``[H, W, 3]``, on the CPU."""


class LatentPreview:
    """Show a latent frame by a linear map, at 4 pixels for each latent pixel in each direction.

    Args:
        maps: ``[2, 9 * C + 1, 48]``: from a latent pixel, its neighbours and 1 to its pixels; one for the first latent
            frame, which is one frame of the video, and one for all later ones, which are four.
    """

    def __init__(self, maps: Tensor) -> None:
        self._maps = maps.float().cpu()

    def __call__(self, latents: Tensor, index: int) -> Tensor:
        z = latents[:1, :, index].float().cpu()
        pixels = _features(z) @ self._maps[min(index, 1)]
        pixels = pixels.view(*z.shape[2:], -1).permute(2, 0, 1)
        picture = F.pixel_shuffle(pixels, _SUBPIXELS).permute(1, 2, 0)
        return ((picture.clamp(-1, 1) + 1) * 127.5).round().byte()


def preview_of(vae: VAE, *, shipped: Path = SHIPPED, folder: Path | None = None) -> LatentPreview:
    """Read the map of a VAE from the package or from `folder`, or fit it and keep it there.

    Args:
        folder: None: ``previews`` in the folder of PUSA_CACHE, or in ``~/.cache/pusa``.

    Raises:
        ValueError: the VAE makes NaN or infinity of pictures.
    """
    folder = cache_folder() / "previews" if folder is None else folder
    identity = identity_of_vae(vae)
    kept = folder / f"{identity}.safetensors"
    for path in (shipped, kept):
        if (maps := _read(path, identity)) is not None:
            return LatentPreview(maps)
    maps = fit(vae)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as part:
            save_file({identity: maps.half()}, part)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the previews of this VAE will be fitted again", kept, error)
    return LatentPreview(maps)


def _read(path: Path, identity: str) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(identity) if identity in file.keys() else None  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        logger.warning("%s is damaged (%s): the previews of this VAE are fitted again", path, error)
        return None


def identity_of_vae(vae: VAE) -> str:
    """Hash the encoder of a VAE: names, shapes and some values of its parameters, the same in fp32 and in bf16."""
    digest = hashlib.sha256(str(codec_of(vae).normalisation(vae)).encode())
    for name, parameter in vae.encoder.named_parameters():
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].to("cpu", torch.bfloat16)
        digest.update(f"{name}:{list(parameter.shape)};".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def fit(vae: VAE, *, clips: int = _CLIPS, seed: int = 0) -> Tensor:
    """Fit the maps of a VAE, ``[2, 9 * C + 1, 48]``, to what its encoder makes of drawn clips of two latent frames.

    The clips are encoded where the VAE is, in its dtype.

    Args:
        vae: its decoder is not used.
        clips: how many at least; VAEs with more channels take more.
        seed: of the drawing.

    Raises:
        ValueError: the VAE makes NaN or infinity of them.
    """
    codec = codec_of(vae)
    scale, factor = codec.pixels_per_latent(vae), codec.frames_per_latent(vae)
    clips = max(clips, math.ceil(6 * (9 * codec.channels(vae) + 1) / _CELLS**2))
    videos = draw_clips(clips, size=_CELLS * scale, frames=factor + 1, seed=seed)
    # Several at a time: torch is slow for one alone on a CPU, and a card needs memory for each.
    latents = torch.cat([encode_video(vae, batch).cpu() for batch in videos.split(8)])
    if not bool(latents.isfinite().all()):
        raise ValueError("the VAE makes NaN or infinity of pictures: load it in fp32")
    # The frame after the middle of a later latent frame, Wan's third of four, is the nearest to their mean.
    shown = (0, factor // 2 + 1)
    return torch.stack([_least_squares(latents[:, :, i], videos[:, :, k], scale) for i, k in enumerate(shown)])


def _least_squares(latents: Tensor, frames: Tensor, scale: int) -> Tensor:
    """Fit a map from latents ``[n, C, h, w]`` to frames ``[n, 3, H, W]``."""
    inputs = _features(latents).double()
    pixels = F.pixel_unshuffle(F.avg_pool2d(frames, scale // _SUBPIXELS), _SUBPIXELS)
    targets = pixels.permute(0, 2, 3, 1).flatten(0, 2).double()
    ridge = _RIDGE * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    return torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ targets).float()


def _features(latents: Tensor) -> Tensor:
    """Gather each latent pixel of ``[n, C, h, w]`` with its neighbours and 1, ``[n * h * w, 9 * C + 1]``."""
    padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
    rows = F.unfold(padded, 3).transpose(1, 2).flatten(0, 1)
    return F.pad(rows, (0, 1), value=1.0)


def draw_clips(count: int, *, size: int, frames: int = 5, seed: int = 0) -> Tensor:
    """Draw clips ``[count, 3, frames, size, size]`` in -1..1: clouds and ellipses of all colours, half of them moving.

    The clouds have the spectra of photographs (amplitude 1/f to 1/f^2).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    side = 2 * size  # a canvas for a window that moves
    frequency = torch.fft.fftfreq(side)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt().clamp(min=1 / side)
    noise = torch.fft.fft2(torch.randn(count, 3, side, side, generator=generator))
    clouds = torch.fft.ifft2(noise / radius ** (1 + uniform(1, 1, 1))).real
    grey = clouds.mean(dim=1, keepdim=True)
    clouds = grey + (clouds - grey) * uniform(1, 1, 1)
    clouds = (clouds - clouds.mean((2, 3), keepdim=True)) / clouds.std((2, 3), keepdim=True)
    canvas = torch.tanh(clouds * (0.2 + 0.6 * uniform(1, 1, 1)) + 2.4 * (uniform(3, 1, 1) - 0.5))
    place = torch.arange(side)
    for _ in range(6):
        centre, axes = side * uniform(2, 1), size * (0.05 + 0.25 * uniform(2, 1))
        y, x = ((place - centre) / axes).square().unbind(1)
        inside = torch.sigmoid(8 * (1 - y[:, :, None] - x[:, None, :]))[:, None]
        canvas = torch.lerp(canvas, 2 * uniform(3, 1, 1) - 1, inside)
    pixels_per_frame = 6 * (uniform(2) - 0.5) * (uniform(1) > 0.5)
    corners = [(size // 2 + pixels_per_frame * t).round().long().clamp(0, size).tolist() for t in range(frames)]
    windows = [
        torch.stack([canvas[i, :, y : y + size, x : x + size] for i, (y, x) in enumerate(corner)]) for corner in corners
    ]
    return torch.stack(windows, dim=2)
