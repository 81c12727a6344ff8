"""Write whole models of every base at the smallest size, as folders that users would have; equal for equal seeds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from components import make_transformer
from diffusers import AutoencoderKLWan

from pusa.models import tiny, wan22_vae
from pusa.models.fvdm import tiny as fvdm_tiny
from pusa.models.mochi import tiny as mochi_tiny
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler

_NARROW = {"encoder.conv1.weight": [8, 12, 3, 3, 3], "decoder.conv1.weight": [32, 48, 3, 3, 3]}


def ti2v_components() -> dict[str, Any]:
    """Make the arguments of a pipeline like TI2V-5B's: its VAE, narrow, of 48 channels and 16 x 16 x 4 pixels."""
    torch.manual_seed(0)
    return {
        "tokenizer": tiny.tokenizer(),
        "text_encoder": tiny.text_encoder(),
        "vae": AutoencoderKLWan(**wan22_vae.config_from_shapes(_NARROW)).eval(),
        "transformer": make_transformer(in_channels=48, out_channels=48),
        "expand_timesteps": True,
    }


def ti2v_folder(path: Path) -> Path:
    """Write a tiny TI2V; its sides are multiples of 32, and 9 frames are 3 latent ones."""
    PusaPipeline(**ti2v_components(), scheduler=PusaFlowMatchEulerScheduler()).save_pretrained(path)
    return path


def wan_folder(path: Path) -> Path:
    """Write a tiny Wan; its sides are multiples of 16, and 9 frames are 3 latent ones."""
    PusaPipeline(**tiny.components()).save_pretrained(path)
    return path


def mochi_folder(path: Path) -> Path:
    """Write a tiny Mochi; its sides are multiples of 16, and 13 frames are 3 latent ones."""
    PusaPipeline(**mochi_tiny.components()).save_pretrained(path)
    return path


def fvdm_folder(path: Path, *, num_classes: int | None = None) -> Path:
    """Write a tiny FVDM of up to 16 frames; its sides are multiples of 16."""
    PusaPipeline(**fvdm_tiny.components(num_classes=num_classes)).save_pretrained(path)
    return path


@dataclass(frozen=True)
class TinyBase:
    """Hold how tests make clips by one base.

    Attributes:
        write: writes its folder.
        factor: frames of a latent frame after the first.
        prompt: one that it reads.
        side: pixels.
        latents: latent frames of a window of its clips.
    """

    name: str
    write: Callable[[Path], Path]
    factor: int
    prompt: str = "a cat"
    side: int = 32
    latents: int = 5


BASES = (
    TinyBase("wan", wan_folder, 4),
    TinyBase("ti2v", ti2v_folder, 4),
    TinyBase("mochi", mochi_folder, 6),
    TinyBase("fvdm", fvdm_folder, 1, prompt="", side=64, latents=8),
    TinyBase("fvdm-classes", partial(fvdm_folder, num_classes=5), 1, prompt="3", side=64, latents=8),
)
