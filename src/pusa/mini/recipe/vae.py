"""Train the VAE of the small model (stage 1), an `AutoencoderKLWan` with the options of Wan2.2's, 2.7 M parameters.

It trains as an image model first and then, as its kernels are inflated in time from the start, on short windows of
video, which is much better than video alone in the same time.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from pusa.mini.recipe.loop import fit, precision
from pusa.mini.recipe.muon import ConvMuon
from pusa.mini.world.world import World, draw_scenes
from pusa.models.vae import channels_last
from pusa.training.model import without

CONFIG = {
    "base_dim": 32,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
_IMAGE_SHARE = 0.35  # of the time
_CROP = 64  # pixels; the detail is that of the full size, and a step sees more clips
_KL_WEIGHT = 1e-4


def make_vae() -> AutoencoderKLWan:
    """Make a VAE whose convolutions see the present frame only: an image model with kernels inflated in time."""
    vae = AutoencoderKLWan(**CONFIG)
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            with torch.no_grad():
                taps = module.kernel_size[0]
                module.weight[:, :, :-1] = 0
                module.weight *= taps**0.5
    return channels_last(vae)


def train_vae(
    world: World,
    checkpoint: Path,
    *,
    seconds: float,
    steps: int | None = None,
    size: int,
    images: int = 16,
    window_frames: int = 20,
) -> AutoencoderKLWan:
    """Train from scratch, or continue from `checkpoint`, until `seconds` are spent.

    Args:
        world: draws the clips, of all its things, so that the VAE is not limited to those of the text-to-video model.
        checkpoint: a file, which the training writes once a minute.
        seconds: wall time, or
        steps: number of steps.
        size: pixels of the clips; the VAE sees random parts of them.
        images: number per step and process, in the first part.
        window_frames: frames of all windows per step and process, in the second part.
    """
    torch.manual_seed(0)
    vae = make_vae().to(world.device)
    kernels = [m.weight for m in vae.modules() if isinstance(m, nn.Conv3d | nn.Conv2d)]
    rest = without(vae.parameters(), kernels)
    optimizers = [
        ConvMuon(kernels, lr=0.018, momentum=0.9, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=0.018 / 8, betas=(0.9, 0.97), weight_decay=0.0),
    ]

    def loss_fn(seed: int, progress: float) -> Tensor:
        torch.manual_seed(seed)
        is_image = progress < _IMAGE_SHARE
        frames = 1 if is_image else (5, 9)[seed % 2]
        scenes = draw_scenes(images if is_image else window_frames // frames, seed, things=world.things)
        start = int(torch.randint(0, world.motion_frames + 2 - frames, ()))
        video, alpha = _crop(*world.render(scenes, frames, size=size, start=start))
        with precision(video.device):
            posterior = vae.encode(video).latent_dist
            decoded = torch.cat(list(_decode(vae, posterior.sample())), dim=2)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        return reconstruction_loss(decoded.float(), video, 1 + 2 * alpha) + _KL_WEIGHT * kl

    def schedule(step: int, progress: float) -> float:
        warm = min((step + 1) / 40, 1.0)
        if progress < _IMAGE_SHARE:
            return warm
        done = (progress - _IMAGE_SHARE) / (1 - _IMAGE_SHARE)
        return 0.5 * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))

    fit(loss_fn, vae, optimizers, seconds=seconds, steps=steps, schedule=schedule, checkpoint=checkpoint)
    return vae


def _crop(video: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the same random square of ``_CROP`` pixels out of all clips and their alpha."""
    top, left = torch.randint(0, video.shape[-1] - _CROP + 1, (2,)).tolist()
    return tuple(x[..., top : top + _CROP, left : left + _CROP].contiguous() for x in (video, alpha))  # type: ignore[return-value]


def _decode(vae: AutoencoderKLWan, latents: Tensor) -> Iterator[Tensor]:
    """Decode as `vae.decode` does, without its clamp, which would stop the gradient of pixels outside the range."""
    cache = [None] * vae._cached_conv_counts["decoder"]
    for index, z in enumerate(vae.post_quant_conv(latents).split(1, dim=2)):
        frames = vae.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
        yield unpatchify(frames, patch_size=vae.config.patch_size)


def reconstruction_loss(decoded: Tensor, video: Tensor, weight: Tensor) -> Tensor:
    """Sum weighted L1 and MSE and, to keep edges, L1 of differences at three scales, of ``[B, C, F, H, W]`` each."""
    difference = decoded - video
    loss = (weight * (difference.abs() + difference.square())).mean()
    level = difference.transpose(1, 2).flatten(0, 1)  # [B * F, 3, H, W]
    for _ in range(3):
        coarse = F.avg_pool2d(level, 2)
        detail = level - F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        loss = loss + 0.5 * detail.abs().mean()
        level = coarse
    return loss + 0.5 * level.abs().mean()


@torch.no_grad()
def normalise(vae: AutoencoderKLWan, world: World, *, size: int, clips: int) -> None:
    """Measure mean and standard deviation of the latents, channel by channel, and write them into the configuration."""
    video, _ = world.render(draw_scenes(clips, seed=-1, things=world.things), 17, size=size)
    with precision(video.device):
        latents = torch.cat([vae.encode(part).latent_dist.mode().float() for part in video.split(4)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
