"""The recipe of the embedded model, from nothing to a folder that `PusaPipeline.from_pretrained` takes.

``pusa mini train`` starts it, in one process on a GPU and in two on a CPU. Run it again after an interruption: finished
stages are skipped and a broken one goes on where it was. A `Budget` says how large everything is and how long it takes.
"""

import argparse
import json
import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from safetensors.torch import load_model, save_model
from torch import Tensor

from pusa.models.vae import channels_last, decode_video, encode_video
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler
from pusa.training import picture_pack, pictures
from pusa.training.export import export_run
from pusa.training.launch import launched
from pusa.training.mini_base import (
    MAX_SEQUENCE_LENGTH,
    SHIFT,
    TextToVideo,
    cache_latents,
    held_out_loss,
    train_base,
)
from pusa.training.mini_card import write_card
from pusa.training.mini_loop import rank
from pusa.training.mini_vae import normalise, psnr, train_vae
from pusa.training.mini_vta import train_vta, write_dataset
from pusa.training.scenery import PLACES
from pusa.training.vocabulary import CAMERAS, MOTIONS, PHOTOGRAPH_WORDS, THINGS
from pusa.training.world import PHOTOGRAPH, World, draw_scenes

logger = logging.getLogger(__name__)

LORA_FILE = "pusa_lora.safetensors"
STAGES = ("vae", "base", "vta", "export")
_ALPHA = 1.4  # Pusa V1.0's
_ENOUGH_DB = 0.5
_STRENGTHS = (0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)


@dataclass(frozen=True)
class Budget:
    """Sizes in pixels and frames, times in minutes; `things` is how many of `THINGS` the transformer learns."""

    size: int
    small_size: int
    frames: int
    things: int
    heads: int
    layers: int
    vae_minutes: float
    vae_gate_db: float
    base_minutes: float
    vta_minutes: float
    clips: int
    small_clips: int
    batch_tokens: int
    sweep_clips: int = 8

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // 4 + 1


BUDGETS = {
    # three commands of under ten minutes: --until vae, --until base, and the rest
    "gpu": Budget(
        size=128,
        small_size=64,
        frames=81,
        things=len(THINGS),
        heads=10,
        layers=10,
        vae_minutes=7.5,
        vae_gate_db=30,
        base_minutes=8.5,
        vta_minutes=4,
        clips=6144,
        small_clips=12288,
        batch_tokens=32_768,
    ),
    "cpu": Budget(
        size=96,
        small_size=64,
        frames=33,
        things=32,
        heads=8,
        layers=8,
        vae_minutes=31,
        vae_gate_db=30,
        base_minutes=103,
        vta_minutes=12,
        clips=4096,
        small_clips=6144,
        batch_tokens=2_880,
    ),
    # a rehearsal of everything, in a few minutes; what comes out is good for nothing
    "rehearsal": Budget(
        size=64,
        small_size=64,
        frames=17,
        things=4,
        heads=2,
        layers=2,
        vae_minutes=0.3,
        vae_gate_db=0,
        base_minutes=0.5,
        vta_minutes=0.3,
        clips=64,
        small_clips=64,
        batch_tokens=640,
        sweep_clips=4,
    ),
}


def run(work: Path, budget: Budget, *, until: str = STAGES[-1], device: torch.device, pack: Path | None = None) -> None:
    """Do what is not done yet, up to and with stage `until`; the model comes to lie in ``work/model``.

    Pictures are fetched into ``work/pictures``, unless there is a `pack` of them (see `pusa.training.picture_pack`).
    """
    work.mkdir(parents=True, exist_ok=True)
    sprites, photographs = picture_pack.load_pack(pack) if pack else _fetched(work / "pictures")
    if len(sprites) < budget.things:
        raise ValueError(f"{pack} has sprites of {len(sprites)} things and this budget is for {budget.things}")
    motion_frames = budget.frames - 1
    world = World(sprites, photographs, motion_frames=motion_frames, device=device)
    report = Report(work / "report.json", budget)

    if not (work / "vae" / "config.json").exists():
        vae = train_vae(world, work / "vae.pt", seconds=60 * budget.vae_minutes, size=budget.size)
        normalise(vae, world, size=budget.size)
        if rank() == 0:
            vae.save_pretrained(work / "vae")
    _wait()
    vae = channels_last(AutoencoderKLWan.from_pretrained(work / "vae")).to(device)
    if rank() == 0 and "vae" not in report:
        scores = measure_vae(vae, world, size=budget.size, frames=budget.frames)
        report.add("vae", scores)
        if scores["held_out_db"] < budget.vae_gate_db:
            logger.warning("the VAE reaches %.1f dB, not %.0f", scores["held_out_db"], budget.vae_gate_db)
    if until == "vae":
        return

    cache = partial(cache_latents, vae, world, frames=budget.frames, things=budget.things)
    full = cache(work / "latents", clips=budget.clips, size=budget.size)
    held_out = cache(work / "held_out", clips=256, size=budget.size, held_out=True)
    base_file = work / "base.safetensors"
    if not base_file.exists():
        torch.manual_seed(0)
        base = TextToVideo(heads=budget.heads, layers=budget.layers)
        small = cache(work / "small_latents", clips=budget.small_clips, size=budget.small_size)
        logger.info("%d small and %d full clips", len(small), len(full))
        seconds, tokens = 60 * budget.base_minutes, budget.batch_tokens
        train_base(base, small, full, work / "base.pt", seconds=seconds, batch_tokens=tokens, device=device)
        if rank() == 0:
            report.add("base", {"held_out_loss": held_out_loss(base, held_out)})
            save_model(base.to("cpu"), str(base_file))
    _wait()
    if until == "base":
        return
    base = TextToVideo(heads=budget.heads, layers=budget.layers)  # anew: the one that was trained is compiled
    load_model(base, base_file)
    if not (work / "vta" / "adapter.safetensors").exists():
        dataset = write_dataset(base, full, work / "dataset", size=budget.size)
        frames = budget.batch_tokens * 256 // budget.size**2  # a latent frame has (size / 16) ** 2 tokens
        train_vta(base, dataset, work / "vta", seconds=60 * budget.vta_minutes, batch_frames=frames)
    if until == "vta":
        return
    if rank() == 0:
        base = TextToVideo(heads=budget.heads, layers=budget.layers)  # without the adapter
        load_model(base, base_file)
        write_folder(work / "model", vae, base, budget)
        lora = work / "model" / LORA_FILE
        if "strength" not in report:
            export_run(work / "vta", lora)
            judge = world if device.type == "cpu" else World(sprites, photographs, motion_frames=motion_frames)
            report.add("strength", find_strength(work, judge, budget))
        export_run(work / "vta", lora, scale=report.content["strength"]["factor"], dtype=torch.bfloat16)
        write_card(work, work)
    _wait()


def _fetched(cache: Path) -> tuple[Tensor, Tensor]:
    """Sprites and photographs, downloaded into `cache` by one process."""
    if rank() == 0:
        pictures.fetch(cache)
    _wait()
    return pictures.load_sprites(cache), pictures.load_photographs(cache)


class Report:
    """What the stages measured, as JSON in the working folder; the card and the documentation are made from it."""

    def __init__(self, path: Path, budget: Budget) -> None:
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"budget": asdict(budget)}

    def __contains__(self, name: str) -> bool:
        return name in self.content

    def add(self, name: str, values: object) -> None:
        self.content[name] = values
        self.path.write_text(json.dumps(self.content, indent=2) + "\n")
        logger.info("%s: %s", name, values)


@torch.no_grad()
def measure_vae(vae: AutoencoderKLWan, world: World, *, size: int, frames: int, clips: int = 48) -> dict[str, float]:
    """Mean PSNR in dB over clips of combinations that training never drew, and over photographs, which it did."""
    scores = {}
    scenes = draw_scenes(clips, 77, things=world.things, held_out=True)
    pictured = draw_scenes(40 * clips, 78, things=world.things)
    pictured = pictured[(pictured.place == PHOTOGRAPH) & (pictured.thing < 0)][:clips]
    for name, chosen in (("held_out", scenes), ("photographs", pictured)):
        frame_scores = []
        for first in range(0, len(chosen), 8):
            video, _ = world.render(chosen[first : first + 8], frames, size=size)
            with torch.autocast(video.device.type, torch.bfloat16):
                decoded = decode_video(vae, encode_video(vae, video))
            frame_scores.append(psnr(decoded, video))
        db = torch.cat(frame_scores)  # [clips, frames]
        scores[f"{name}_db"] = float(db.mean())
        scores[f"{name}_first_frame_db"] = float(db[:, 0].mean())
    return scores


def find_strength(work: Path, world: World, budget: Budget) -> dict[str, Any]:
    """Try strengths of the adapter on combinations that training never drew, without a caption.

    Strength costs motion and text-to-video, so the best is the smallest whose first frames come within half a decibel
    of the most faithful; `factor` makes it alpha 1.4, which Pusa V1.0 recommends.
    """
    from pusa.evaluation.mini import quick_scores
    from pusa.evaluation.probes import train_probes

    pipe = PusaPipeline.from_pretrained(work / "model")  # says in pusa.json that the adapter belongs to it
    # Only what is in a frame is asked here, not how it moves.
    probes = train_probes(world, pipe.vae, things=budget.things, size=budget.size, frame_steps=200, motion_steps=8)
    score = partial(quick_scores, pipe, world, probes, model=work / "model", clips=budget.sweep_clips)
    sweep = {f"{strength:g}": score(alpha=strength) for strength in _STRENGTHS}
    fidelity = {strength: sweep[f"{strength:g}"]["frames_1_4_db"] for strength in _STRENGTHS}
    best = min(strength for strength in _STRENGTHS if fidelity[strength] >= max(fidelity.values()) - _ENOUGH_DB)
    return {"best": best, "factor": best / _ALPHA, "sweep": sweep}


def write_folder(folder: Path, vae: AutoencoderKLWan, base: TextToVideo, budget: Budget) -> None:
    """A folder in diffusers layout, bf16, and ``pusa.json``: how the model is meant to be used (see `pusa.zoo`)."""
    pipe = PusaPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=vae,
        scheduler=PusaFlowMatchEulerScheduler(shift=SHIFT),
        transformer=base.transformer,
    )
    pipe.to(torch.bfloat16, silence_dtype_warnings=True)
    pipe.save_pretrained(folder)
    seconds = budget.frames / 16
    title = (
        f"embedded model: {budget.things} things, {len(MOTIONS)} motions, {budget.size} pixels, {seconds:.0f} seconds"
    )
    card = {
        "title": title,
        "defaults": {
            "width": budget.size,
            "height": budget.size,
            "num_frames": budget.frames,
            "fps": 16.0,
            "steps": 10,
            "guidance": 3.0,
            "shift": SHIFT,
            "alpha": _ALPHA,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "negative_prompt": "",
            "encode": "repeat",
        },
        "lora": {"transformer": LORA_FILE},
        "words": {
            "things": [list(names[1:]) for names in THINGS[: budget.things]],
            "motions": [list(words) for words in MOTIONS.values()],
            "places": [list(place.phrases) for place in PLACES],
            "cameras": [words.removeprefix(", ") for words in CAMERAS.values() if words],
            "pictures": list(PHOTOGRAPH_WORDS),
        },
    }
    (folder / "pusa.json").write_text(json.dumps(card, indent=2) + "\n")


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--budget", choices=BUDGETS, required=True)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run(options.work, BUDGETS[options.budget], until=options.until, device=launched().device, pack=options.pictures)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
