"""Make the folder of an FVDM model: of a new network, to be trained from nothing, or of a checkpoint of FVDM or Latte.

Training, data preparation, generation and the server then take the folder as any other model.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from pusa.fsutil import check_new_folder, replacing_folder
from pusa.models.bases import base_of
from pusa.models.fvdm.checkpoint import load_checkpoint
from pusa.models.fvdm.transformer import FVDMTransformer3DModel, config_of
from pusa.models.vae import codec_of
from pusa.pipeline import PusaPipeline
from pusa.zoo import CARD_FILE


def make_fvdm(
    folder: Path,
    *,
    vae: str | Path,
    size: str = "S/2",
    width: int | None = None,
    height: int | None = None,
    num_frames: int = 16,
    num_classes: int | None = None,
    fps: float = 8.0,
    seed: int = 0,
    checkpoint: Path | None = None,
    num_heads: int | None = None,
) -> Path:
    """Write a model's folder in diffusers layout, with a card of its frame rate.

    Args:
        folder: appears when it is whole; one that exists must be empty.
        vae: an `AutoencoderKL`: a folder, one of a pipeline with it, or a Hub id (stabilityai/sd-vae-ft-ema).
        size: depth and width by name, and the patch: see `pusa.models.fvdm.transformer.config_of`.
        width, height: pixels, multiples of the VAE's times the patch; None: 256, of a checkpoint its own.
        num_frames: the most that a video may have.
        num_classes: of a network whose prompt is the number of a class; None: it has none.
        fps: frames per second of its videos.
        seed: of a new network's weights.
        checkpoint: a ``.pt`` or ``.safetensors`` file, whose moving average is taken; it tells the size, the frames and
            the classes.
        num_heads: of a checkpoint of none of the paper's sizes.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is not empty, a size does not fit, or the checkpoint is damaged or of another network.
        FileNotFoundError: there is no such checkpoint or VAE.
    """
    check_new_folder(folder)
    if (width is None) != (height is None):
        raise ValueError("width and height go together: give both or neither")
    pictures = _load_vae(vae)
    factor, channels = codec_of(pictures).pixels_per_latent(pictures), pictures.config.latent_channels
    if checkpoint is not None:
        sides = None if height is None or width is None else (height // factor, width // factor)
        model = load_checkpoint(checkpoint, num_heads=num_heads, input_size=sides)
    else:
        config = config_of(size, num_frames=num_frames, num_classes=num_classes, in_channels=channels)
        model = _new_network(config, width or 256, height or 256, factor, seed)
    if model.config.in_channels != channels:
        raise ValueError(
            f"the network has {model.config.in_channels} latent channels and the VAE {channels}: give the VAE that it "
            "was trained with"
        )
    base = base_of(model)
    pipe = PusaPipeline(None, None, pictures, base.scheduler(), model)
    with replacing_folder(folder) as part:
        pipe.save_pretrained(part)
        _write_card(part, f"{base.name} of {sum(p.numel() for p in model.parameters()):,} parameters", fps)
    return folder


def _load_vae(source: str | Path) -> AutoencoderKL:
    folder = Path(source).expanduser()
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    try:
        return AutoencoderKL.from_pretrained(folder if folder.is_dir() else str(source))
    except OSError as error:
        raise FileNotFoundError(
            f"vae={source} is no VAE of pictures: give the folder of an AutoencoderKL, of a pipeline with one, or a "
            f"Hub id such as stabilityai/sd-vae-ft-ema ({error})"
        ) from error


def _new_network(config: dict[str, Any], width: int, height: int, factor: int, seed: int) -> FVDMTransformer3DModel:
    multiple = factor * config["patch_size"]
    if width % multiple or height % multiple or min(width, height) < multiple:
        raise ValueError(f"size {width}x{height}: sides are multiples of {multiple}")
    sides = height // factor, width // factor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FVDMTransformer3DModel(**config, input_size=sides[0] if sides[0] == sides[1] else sides).eval()


def _write_card(folder: Path, title: str, fps: float) -> None:
    """Write what the configurations of the parts do not tell; `Base.defaults_of` reads the rest from them."""
    (folder / CARD_FILE).write_text(json.dumps({"title": title, "defaults": {"fps": fps}}, indent=2) + "\n")
