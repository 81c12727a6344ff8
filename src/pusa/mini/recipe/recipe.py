"""Train the embedded model from scratch and write a folder for `PusaPipeline.from_pretrained`.

``pusa mini train`` starts the recipe, in one process on a GPU and in two on a CPU. Run it again after an interruption:
it skips finished stages and resumes a broken one. A `RecipeBudget` sets all sizes and times.
"""

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pusa.evaluation.metrics import psnr
from pusa.mini.recipe import card, more
from pusa.mini.recipe.base import BaseSchedule, held_out_loss, train_base
from pusa.mini.recipe.clips import ClipCache, cache_clips
from pusa.mini.recipe.folder import LORA_FILE, Report, Sizes, describe_folder, write_folder
from pusa.mini.recipe.loop import precision
from pusa.mini.recipe.model_card import write_card
from pusa.mini.recipe.samples import ClipGenerator, find_alpha
from pusa.mini.recipe.vae import normalise, train_vae
from pusa.mini.recipe.vta import VtaPlan, train_vta, write_dataset
from pusa.mini.world import picture_pack, pictures
from pusa.mini.world.vocabulary import THINGS
from pusa.mini.world.world import PHOTOGRAPH, World, draw_scenes
from pusa.models.vae import channels_last, decode_video, encode_video
from pusa.pipeline import PusaPipeline
from pusa.training.distributed import connect_processes
from pusa.training.export import export_run
from pusa.training.reports.charts import load_figure_class

logger = logging.getLogger(__name__)

STAGES = ("vae", "base", "vta", "export")
_BASE_FILE = "base.safetensors"


@dataclass(frozen=True, kw_only=True)
class RecipeBudget(Sizes):
    """Set sizes, and times in minutes.

    Attributes:
        vae_steps, base_steps, vta_steps: number of steps of a stage, however long they take; None: by the minutes.
        vae_clips: number of clips, and of photographs, that measure the VAE.
        normalising_clips: number of clips that measure the latents' mean and deviation.
    """

    vae_minutes: float
    vae_gate_db: float
    base_minutes: float
    vta_minutes: float
    batch_tokens: int
    rank: int = 16
    compiled: bool = True
    vae_images: int = 16
    vae_window_frames: int = 20
    vae_clips: int = 48
    normalising_clips: int = 64
    vae_steps: int | None = None
    base_steps: int | None = None
    vta_steps: int | None = None
    held_out_clips: int = 256


BUDGETS = {
    # three commands of under ten minutes: --until vae, --until base, and the rest
    "gpu": RecipeBudget(
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
        vae_images=64,
        vae_window_frames=80,
    ),
    "cpu": RecipeBudget(
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
    # a rehearsal of everything, in a few steps; its model is useless
    "rehearsal": RecipeBudget(
        size=64,
        small_size=32,
        frames=9,
        things=4,
        heads=2,
        layers=2,
        vae_minutes=0.1,
        vae_steps=6,  # three of pictures, three of clips, which have two lengths
        vae_gate_db=0,
        base_minutes=0.1,
        base_steps=6,  # of both sizes and both lengths
        vta_minutes=0.1,
        vta_steps=3,
        clips=64,
        small_clips=64,
        batch_tokens=160,
        vae_images=4,
        vae_window_frames=10,
        vae_clips=8,
        normalising_clips=8,
        held_out_clips=64,
        sweep_clips=4,
    ),
}


def load_pictures(work: Path, pack: Path | None, *, things: int) -> tuple[Tensor, Tensor]:
    """Load sprites and photographs from a picture pack; None: from downloads into the working folder.

    Raises:
        ValueError: the pack has too few sprites.
    """
    if pack is None:
        processes = connect_processes()
        if processes.is_main:
            pictures.fetch(work / "pictures")
        processes.wait()
        return pictures.load_sprites(work / "pictures"), pictures.load_photographs(work / "pictures")
    sprites, photographs = picture_pack.load_pack(pack)
    if len(sprites) < things:
        raise ValueError(f"{pack} has sprites of {len(sprites)} things and this budget is for {things}")
    return sprites, photographs


def run(
    work: Path, budget: RecipeBudget, *, until: str = STAGES[-1], device: torch.device, pack: Path | None = None
) -> None:
    """Run the unfinished stages up to and including `until`; write the model to ``work/model``.

    Raises:
        RuntimeError: matplotlib, which draws the charts of the last stage, is not installed.
    """
    if until == STAGES[-1]:
        load_figure_class()
    work.mkdir(parents=True, exist_ok=True)
    sprites, photographs = load_pictures(work, pack, things=budget.things)
    world = World(sprites, photographs, motion_frames=budget.frames - 1, device=device)
    report = Report(work / "report.json", budget)
    vae = _run_vae_stage(work, budget, world, report)
    if until == "vae":
        return
    plan = budget.clip_plan()
    full = cache_clips(vae, world, work / "latents", plan)
    held_out = cache_clips(vae, world, work / "held_out", replace(plan, clips=budget.held_out_clips, held_out=True))
    if not (work / _BASE_FILE).exists():
        small = cache_clips(
            vae, world, work / "small_latents", replace(plan, clips=budget.small_clips, size=budget.small_size)
        )
        _run_base_stage(work, budget, small.to(device), full.to(device), held_out, report)
    if until == "base":
        return
    base = budget.make_base()  # anew: the one that was trained is compiled
    load_model(base, work / _BASE_FILE)
    if not (work / "vta" / "adapter.safetensors").exists():
        dataset = write_dataset(base, full, work / "dataset", size=budget.size)
        frames = budget.batch_tokens * 256 // budget.size**2  # a latent frame has (size / 16) ** 2 tokens
        vta = VtaPlan(frames, rank=budget.rank)
        train_vta(base, dataset, work / "vta", seconds=60 * budget.vta_minutes, steps=budget.vta_steps, plan=vta)
    processes = connect_processes()
    if until == STAGES[-1] and processes.is_main:
        cpu_world = world if device.type == "cpu" else World(sprites, photographs, motion_frames=budget.frames - 1)
        _run_export_stage(work, budget, vae, base.tokenizer, cpu_world, report)
    processes.wait()


def _run_vae_stage(work: Path, budget: RecipeBudget, world: World, report: Report) -> AutoencoderKLWan:
    """Train the VAE, unless it is there, and measure it; return it on the world's device."""
    processes = connect_processes()
    if not (work / "vae" / "config.json").exists():
        vae = train_vae(
            world,
            work / "vae.pt",
            seconds=60 * budget.vae_minutes,
            steps=budget.vae_steps,
            size=budget.size,
            images=budget.vae_images,
            window_frames=budget.vae_window_frames,
        )
        normalise(vae, world, size=budget.size, clips=budget.normalising_clips)
        if processes.is_main:
            vae.save_pretrained(work / "vae")
    processes.wait()
    vae = channels_last(AutoencoderKLWan.from_pretrained(work / "vae")).to(world.device)
    if processes.is_main and "vae" not in report:
        scores = measure_vae(vae, world, size=budget.size, frames=budget.frames, clips=budget.vae_clips)
        report.add("vae", scores)
        if scores["held_out_db"] < budget.vae_gate_db:
            logger.warning("the VAE reaches %.1f dB, not %.0f", scores["held_out_db"], budget.vae_gate_db)
    return vae


def _run_base_stage(
    work: Path, budget: RecipeBudget, small: ClipCache, full: ClipCache, held_out: ClipCache, report: Report
) -> None:
    """Train the base and write it to the working folder."""
    torch.manual_seed(0)
    base = budget.make_base().to(full.latents.device)
    logger.info("%d small and %d full clips", len(small), len(full))
    schedule = BaseSchedule(
        seconds=60 * budget.base_minutes,
        steps=budget.base_steps,
        batch_tokens=budget.batch_tokens,
        compiled=budget.compiled,
    )
    train_base(base, small, full, work / "base.pt", schedule, budget.objective)
    processes = connect_processes()
    if processes.is_main:
        report.add("base", {"held_out_loss": held_out_loss(base, held_out)})
        save_model(base.to("cpu"), str(work / _BASE_FILE))
    processes.wait()


def _run_export_stage(
    work: Path,
    budget: RecipeBudget,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    report: Report,
) -> None:
    """Write the model folder, choose the alpha of its adapter, and write the card."""
    base = budget.make_base(tokenizer)  # without the adapter
    load_model(base, work / _BASE_FILE)
    write_folder(work / "model", vae, base, budget)
    lora = work / "model" / LORA_FILE
    export_run(work / "vta", lora)
    describe_folder(work / "model", budget, with_adapter=True)
    if "strength" not in report:
        pipe = PusaPipeline.from_pretrained(work / "model")
        generator = ClipGenerator(pipe, size=budget.size, frames=budget.frames)
        report.add("strength", find_alpha(generator, world, things=budget.things, clips=budget.sweep_clips))
    export_run(work / "vta", lora, scale=report.content["strength"]["factor"], dtype=torch.bfloat16)
    write_card(work, work)


@torch.no_grad()
def measure_vae(vae: AutoencoderKLWan, world: World, *, size: int, frames: int, clips: int) -> dict[str, float]:
    """Measure the mean PSNR in dB over clips of combinations never trained on, and over photographs trained on."""
    scores = {}
    scenes = draw_scenes(clips, 77, things=world.things, held_out=True)
    photograph_scenes = draw_scenes(40 * clips, 78, things=world.things)
    photograph_scenes = photograph_scenes[(photograph_scenes.place == PHOTOGRAPH) & (photograph_scenes.thing < 0)][
        :clips
    ]
    for name, chosen in (("held_out", scenes), ("photographs", photograph_scenes)):
        frame_scores = []
        for first in range(0, len(chosen), 8):
            video, _ = world.render(chosen[first : first + 8], frames, size=size)
            with precision(video.device):
                decoded = decode_video(vae, encode_video(vae, video))
            frame_scores.append(psnr(decoded, video))
        db = torch.cat(frame_scores)  # [clips, frames]
        scores[f"{name}_db"] = float(db.mean())
        scores[f"{name}_first_frame_db"] = float(db[:, 0].mean())
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--budget", choices=[*BUDGETS, *card.CARD_BUDGETS, *more.MORE_BUDGETS], required=True)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--pictures", type=Path, help="a picture pack, instead of what npm and apt bring")
    parser.add_argument("--seconds", type=float, help="all the time that a card's budget has")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    device = connect_processes().device
    if options.budget in BUDGETS:
        run(options.work, BUDGETS[options.budget], until=options.until, device=device, pack=options.pictures)
    elif options.budget in more.MORE_BUDGETS:
        further = more.MORE_BUDGETS[options.budget]
        loaded = load_pictures(options.work, options.pictures, things=further.edition.sprites)
        more.run(options.work, further, *loaded, until=options.until)
    else:
        budget = card.CARD_BUDGETS[options.budget]
        if options.seconds is not None:
            budget = replace(budget, seconds=options.seconds)
        card.run(
            options.work, budget, *load_pictures(options.work, options.pictures, things=budget.things), device=device
        )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
