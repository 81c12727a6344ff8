"""The recipe of the small model, from nothing to a folder that `PusaPipeline.from_pretrained` takes.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m pusa.training.mini_recipe --work FOLDER

Run it again after an interruption: finished stages are skipped and a broken one goes on where it was.
"""

import argparse
import json
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from safetensors.torch import load_model, save_model

from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler
from pusa.training.mini_base import MAX_SEQUENCE_LENGTH, SHIFT, TextToVideo, cache_latents, load_latents, train_base
from pusa.training.mini_loop import rank
from pusa.training.mini_vae import channels_last, normalise, train_vae
from pusa.training.mini_vta import train_vta
from pusa.training.world import World, load_sprites

logger = logging.getLogger(__name__)

LORA_FILE = "pusa_lora.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where everything is written; the model in WORK/model")
    parser.add_argument("--minutes-vae", type=float, default=20)
    parser.add_argument("--minutes-base", type=float, default=35)
    parser.add_argument("--minutes-vta", type=float, default=12)
    parser.add_argument("--shards", type=int, default=64, help="of 64 clips each, to train the transformer on")
    parser.add_argument("--alpha", type=float, default=1.0, help="the LoRA's strength that pusa.json recommends")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)

    if rank() == 0:
        load_sprites(work / "npm")
    _wait()
    world = World(load_sprites(work / "npm"))

    if not (work / "vae" / "config.json").exists():
        vae = train_vae(world, work / "vae.pt", seconds=60 * options.minutes_vae)
        normalise(vae, world)
        if rank() == 0:
            vae.save_pretrained(work / "vae")
    _wait()
    vae = channels_last(AutoencoderKLWan.from_pretrained(work / "vae"))

    cache_latents(vae, world, work / "latents", shards=options.shards)
    _wait()
    data = load_latents(work / "latents")
    logger.info("%d clips, %d processes", len(data.latents), dist.get_world_size() if dist.is_initialized() else 1)

    base_file = work / "base.safetensors"
    if base_file.exists():
        base = TextToVideo()
        load_model(base, base_file)
    else:
        base = train_base(data, work / "base.pt", seconds=60 * options.minutes_base)
        if rank() == 0:
            save_model(base, str(base_file))
    if rank() == 0:
        write_folder(work / "model", vae, base, alpha=options.alpha)
    if not (work / "model" / LORA_FILE).exists():
        train_vta(base, data, work / "vta.pt", work / "model" / LORA_FILE, seconds=60 * options.minutes_vta)
    _wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def write_folder(folder: Path, vae: AutoencoderKLWan, base: TextToVideo, *, alpha: float) -> None:
    """A folder in diffusers layout, and ``pusa.json``: how the model is meant to be used (see `pusa.zoo`)."""
    pipe = PusaPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=vae,
        scheduler=PusaFlowMatchEulerScheduler(shift=SHIFT),
        transformer=base.transformer,
    )
    pipe.save_pretrained(folder)
    card = {
        "title": "practice model: 24 things, 8 motions, 8 places at 64 pixels",
        "defaults": {
            "width": 64,
            "height": 64,
            "num_frames": 33,
            "fps": 16.0,
            "steps": 10,
            "guidance": 3.0,
            "shift": SHIFT,
            "alpha": alpha,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "negative_prompt": "",
        },
        "lora": {"transformer": LORA_FILE},
    }
    (folder / "pusa.json").write_text(json.dumps(card, indent=2) + "\n")


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
