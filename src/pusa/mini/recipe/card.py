"""Train the embedded model on one data-centre GPU within a fixed time, in one process and without downloads.

``pusa mini train FOLDER --budget card --pictures PACK`` takes eight minutes in all. It keeps the VAE of the package and
runs five stages, each with its own deadline; time that an earlier one loses is taken from the base.

    clips       drawn and encoded on the GPU, kept in its memory
    base        compiled, on one timestep per clip and, for a share of clips, one per latent frame
    adapter     VTA on the frozen base, by the trainer that adapts the large models
    strength    the alpha of the adapter, chosen on combinations never drawn
    sheets      contact sheets of unpicked clips

``FOLDER/model`` is written after the base and again with the adapter. ``FOLDER/throughput.jsonl`` records the
work and the time of each stage.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pusa.mini.recipe.base import BaseObjective, BaseSchedule, TextToVideo, held_out_loss, train_base
from pusa.mini.recipe.clips import ClipCache, draw_clips
from pusa.mini.recipe.folder import LORA_FILE, Report, Sizes, describe_folder, write_folder
from pusa.mini.recipe.loop import LossNotFiniteError, load_averages
from pusa.mini.recipe.samples import ALPHA, ClipGenerator, find_alpha, write_sheets
from pusa.mini.recipe.vta import VtaPlan, train_vta, write_dataset
from pusa.mini.world.world import World
from pusa.models.vae import channels_last
from pusa.pipeline import PusaPipeline
from pusa.resources import is_bf16_fast
from pusa.training.export import export_run
from pusa.training.reports import read_metrics
from pusa.zoo import MINI_FOLDER

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CardBudget(Sizes):
    """Set sizes, and times in seconds.

    Attributes:
        seconds: time of all stages together.
        small_clips_seconds, clips_seconds: time limits for drawing the clips of each size.
        vta_seconds, export_seconds: time reserved after the base, which has the rest.
        vta_clips: number of clips that train the adapter.
        sheet_clips: numbers of clips on the sheets, from captions and from pictures.
    """

    picture_share: float = 1 / 3
    schedule: BaseSchedule
    seconds: float
    small_clips_seconds: float
    clips_seconds: float
    vta_seconds: float
    export_seconds: float
    vta_clips: int
    vta: VtaPlan
    strengths: tuple[float, ...]
    sheet_clips: tuple[int, int]


_ENOUGH_SMALL_CLIPS = 1 / 16  # of those planned
_AROUND_TRAINING_SECONDS = 8.0  # the trainer's own clock counts steps only
_OBJECTIVE = BaseObjective(vector_share=0.3, clean_start_share=0.5, thing_weight=2.0, caption_dropout=0.25)

CARD_BUDGETS = {
    # Width 384 in 3 heads of 128, as wide as Wan's own. Eight layers, not twelve: 20 M parameters are about what five
    # minutes of a card train best, and with an adapter of rank 64 the package stays below 60 MB (twelve take 82).
    "card": CardBudget(
        size=128,
        small_size=64,
        frames=33,
        things=24,
        heads=3,
        head_channels=128,
        layers=8,
        clips=98_304,
        small_clips=131_072,
        objective=_OBJECTIVE,
        schedule=BaseSchedule(
            batch_tokens=36_864,
            small_batch_tokens=18_432,
            small_share=0.25,
            short_share=0.0,
            rate=1.2e-2,
            adam_rate=1.5e-3,
            warm_steps=300,
            cool_from=0.4,
            ema_decay=0.999,
        ),
        seconds=480,
        small_clips_seconds=15,
        clips_seconds=55,
        vta_seconds=78,
        export_seconds=40,
        vta_clips=8192,
        vta=VtaPlan(rank=64, batch_frames=256, workers=8, deterministic=False, reports=False),
        strengths=(0.7, 1.0, 1.4, 1.7),
        sheet_clips=(32, 8),
    ),
    # a rehearsal of the same code on a CPU; its model is useless
    "card-rehearsal": CardBudget(
        size=16,
        small_size=16,
        frames=9,
        things=4,
        heads=1,
        layers=1,
        clips=64,
        small_clips=64,
        held_out_clips=64,
        objective=_OBJECTIVE,
        schedule=BaseSchedule(
            batch_tokens=96,
            small_share=0.4,
            short_share=0.0,
            rate=1.5e-2,
            cool_from=0.4,
            compiler="aot_eager",  # inductor takes most of a minute on a CPU
        ),
        seconds=10,  # less than the stages take, so that each has the second that is the least
        small_clips_seconds=1,
        clips_seconds=1,
        vta_seconds=3,
        export_seconds=15,
        vta_clips=32,
        vta=VtaPlan(rank=2, batch_frames=6, workers=1, reports=False),
        strengths=(1.0, 1.4),
        sweep_clips=2,
        sheet_clips=(2, 1),
    ),
}


class Clock:
    """Track the time left of `seconds`, and write a line about each stage to ``throughput.jsonl``."""

    def __init__(self, folder: Path, seconds: float, device: torch.device) -> None:
        self.path, self.device = folder / "throughput.jsonl", device
        self.began = time.monotonic()
        self.end = self.began + seconds

    def left(self, keep: float = 0.0) -> float:
        """Return the seconds until `keep` seconds before the end, at least 1, so that a late stage does something."""
        return max(1.0, self.end - keep - time.monotonic())

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; entries that the caller adds to the dictionary go into its line."""
        began = time.monotonic()
        facts: dict[str, Any] = {}
        logger.info("%s: %.0f s left", name, self.left())
        yield facts
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        seconds = time.monotonic() - began
        line = {"stage": name, "device": device_name(self.device), "seconds": round(seconds, 2), **facts}
        if "flops" in facts:
            line["flops_per_second"] = facts["flops"] / seconds
        if "clips" in facts:
            line["clips_per_second"] = round(facts["clips"] / seconds, 1)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("%s", line)


def run(work: Path, budget: CardBudget, sprites: Tensor, photographs: Tensor, *, device: torch.device) -> None:
    """Train within the budget and write the model to ``work/model``.

    If a stage fails, the error is logged and the model of the stage before stays; without a base there is no model.

    Args:
        sprites, photographs: as `pusa.mini.world.world.World` takes them.

    Raises:
        RuntimeError: a stage failed; the others have run.
    """
    work.mkdir(parents=True, exist_ok=True)
    clock, report = Clock(work, budget.seconds, device), Report(work / "report.json", budget)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    world = World(sprites, photographs, motion_frames=budget.frames - 1, device=device)
    vae = channels_last(AutoencoderKLWan.from_pretrained(MINI_FOLDER / "vae")).to(device)
    small, full, held_out = _draw(clock, budget, vae, world)
    base = _train_base(clock, budget, work, small, full, held_out, report)
    write_folder(work / "model", vae, base, budget)
    failures = []
    try:
        _adapt(clock, budget, work, base, full)
    except Exception as error:
        logger.exception("the adapter")
        failures.append(f"the adapter: {error}")
    for name, stage in (("strength", _export), ("sheets", _sheets)):
        try:
            stage(clock, budget, work, world, report)
        except Exception as error:
            logger.exception("%s", name)
            failures.append(f"{name}: {error}")
    if failures:
        raise RuntimeError("; ".join(failures))


def _draw(
    clock: Clock, budget: CardBudget, vae: AutoencoderKLWan, world: World
) -> tuple[ClipCache | None, ClipCache, ClipCache]:
    """Draw small, full and held-out clips; without small ones if the time allowed too few, which would be memorised."""
    full = budget.clip_plan(budget.picture_share)
    small = replace(full, clips=budget.small_clips, size=budget.small_size)
    held_out = replace(full, clips=budget.held_out_clips, held_out=True, picture_share=None)
    drawn = {}
    with _cudnn_benchmark():
        with clock.stage("clips, a first batch of each size"):
            for plan in (small, full):
                draw_clips(vae, world, plan, deadline=0.0)
        for name, plan, seconds in (
            ("held-out", held_out, math.inf),
            ("small", small, budget.small_clips_seconds),
            ("full", full, budget.clips_seconds),
        ):
            with clock.stage(f"clips, {name}") as facts:
                drawn[name] = draw_clips(vae, world, plan, deadline=time.monotonic() + seconds)
                facts["clips"] = len(drawn[name])
    enough = _ENOUGH_SMALL_CLIPS * budget.small_clips
    return drawn["small"] if len(drawn["small"]) >= enough else None, drawn["full"], drawn["held-out"]


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN try its kernels for each shape, which pays where shapes repeat for a minute."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = before


def _train_base(
    clock: Clock,
    budget: CardBudget,
    work: Path,
    small: ClipCache | None,
    full: ClipCache,
    held_out: ClipCache,
    report: Report,
) -> TextToVideo:
    """Train the base until only the time for adapter and export is left.

    After an error, training continues from the last checkpoint with a third of the rates, and without compiled blocks
    unless the error was a loss that is not finite. If that fails too, the last checkpoint is the base.

    Returns:
        A base whose blocks are not compiled.
    """
    device, checkpoint = full.latents.device, work / "base.pt"
    base = _new_base(budget).to(device)
    with clock.stage("base") as facts:
        deadline = clock.end - budget.vta_seconds - budget.export_seconds
        schedule = replace(budget.schedule, deadline=deadline)
        try:
            train_base(base, small, full, checkpoint, schedule, budget.objective)
        except Exception as error:
            logger.exception("the base is trained on with a third of the rates")
            slower = replace(
                schedule,
                rate=schedule.rate / 3,
                adam_rate=schedule.adam_rate and schedule.adam_rate / 3,
                compiled=schedule.compiled and isinstance(error, LossNotFiniteError),
            )
            base = _new_base(budget, base.tokenizer).to(device)
            try:
                train_base(base, small, full, checkpoint, slower, budget.objective)
            except Exception:
                if not checkpoint.exists():
                    raise
                logger.exception("the base is that of its last checkpoint")
                load_averages(checkpoint, base)
        facts |= _throughput(base, budget, work, full)
    base = base.copy().to(device)
    report.add("base", {"held_out_loss": held_out_loss(base, held_out)})
    return base


def _new_base(budget: CardBudget, tokenizer: PreTrainedTokenizerFast | None = None) -> TextToVideo:
    torch.manual_seed(0)
    return budget.make_base(tokenizer)


def _throughput(base: TextToVideo, budget: CardBudget, work: Path, full: ClipCache) -> dict[str, Any]:
    """Count steps and estimate their operations: six for each parameter of the blocks and each token."""
    lines = (work / "base.jsonl").read_text().splitlines()
    steps = json.loads(lines[-1])["step"]
    parameters = sum(p.numel() for p in base.transformer.blocks.parameters())
    schedule = budget.schedule
    small = schedule.small_share * (schedule.small_batch_tokens or schedule.batch_tokens)
    tokens = round(steps * (small + (1 - schedule.small_share) * schedule.batch_tokens))
    per_clip = full.latents.shape[2] * full.latents.shape[3] * full.latents.shape[4] // 4
    return {"steps": steps, "tokens": tokens, "clips": tokens // per_clip, "flops": 6 * parameters * tokens}


def _adapt(clock: Clock, budget: CardBudget, work: Path, base: TextToVideo, full: ClipCache) -> None:
    """Train the adapter on some of the clips; it stays attached to the base."""
    with clock.stage("adapter") as facts:
        some = full.first(budget.vta_clips)
        dataset = write_dataset(base, some, work / "dataset", size=budget.size)
        seconds = clock.left(budget.export_seconds + _AROUND_TRAINING_SECONDS)
        train_vta(base, dataset, work / "vta", seconds=seconds, plan=budget.vta)
        done = [entry for entry in read_metrics(work / "vta") if "clips" in entry][-1]
        facts |= {"steps": done["step"], "clips": done["clips"], "share_waiting_for_data": done["data_share"]}


def _export(clock: Clock, budget: CardBudget, work: Path, world: World, report: Report) -> None:
    """Export the adapter into the model's folder, scaled so that the best alpha found is `ALPHA`."""
    with clock.stage("strength"):
        lora = work / "model" / LORA_FILE
        # As it was trained, until the sweep has tried others.
        export_run(work / "vta", lora, scale=1 / ALPHA, dtype=torch.bfloat16)
        describe_folder(work / "model", budget, with_adapter=True)
        generator = ClipGenerator(_load(work, world.device), size=budget.size, frames=budget.frames)
        found = find_alpha(generator, world, things=budget.things, clips=budget.sweep_clips, strengths=budget.strengths)
        report.add("strength", found)
        export_run(work / "vta", lora, scale=found["factor"], dtype=torch.bfloat16)


def _sheets(clock: Clock, budget: CardBudget, work: Path, world: World, report: Report) -> None:
    with clock.stage("sheets"):
        generator = ClipGenerator(_load(work, world.device), size=budget.size, frames=budget.frames)
        from_captions, from_pictures = budget.sheet_clips
        write_sheets(
            generator,
            world,
            work / "sheets",
            things=budget.things,
            from_captions=from_captions,
            from_pictures=from_pictures,
        )


def _load(work: Path, device: torch.device) -> PusaPipeline:
    dtype = torch.bfloat16 if is_bf16_fast(device.type) else torch.float32
    return PusaPipeline.from_pretrained(work / "model", torch_dtype=dtype).to(device)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
