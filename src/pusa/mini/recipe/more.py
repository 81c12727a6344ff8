"""Train the model in the package further, on the world of the second edition, for as long as there is time.

``pusa mini train FOLDER --budget more --until base`` keeps the VAE of the package and trains its base further, in the
background if you like: stop it at any moment, and the same command continues where it was, at most a minute before. The
rate falls slowly and the weights are averaged, so that any moment is a good end. Every twenty minutes ``FOLDER/model``
gets the averaged base, and ``FOLDER/progress.jsonl`` its losses on combinations never drawn.

``pusa mini train FOLDER --budget more`` takes the base as it is, trains its adapter, and completes ``FOLDER/model``.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from filelock import FileLock, Timeout
from torch import Tensor

from pusa.mini.recipe.base import (
    BaseObjective,
    TextToVideo,
    held_out_loss,
    held_out_picture_loss,
    make_optimizers,
    sample_loss,
)
from pusa.mini.recipe.clips import ClipCache, ClipPlan, cache_clips
from pusa.mini.recipe.folder import LORA_FILE, Report, Sizes, describe_folder, write_folder
from pusa.mini.recipe.loop import fit, load_averages
from pusa.mini.recipe.model_card import write_further_card
from pusa.mini.recipe.pool import ClipPool, PoolPlan, newest_clips
from pusa.mini.recipe.samples import ClipGenerator, find_alpha, write_sheets
from pusa.mini.recipe.vta import VtaPlan, train_vta, write_dataset
from pusa.mini.world.edition import SECOND
from pusa.mini.world.world import World
from pusa.models.vae import channels_last
from pusa.pipeline import PusaPipeline
from pusa.training.distributed import connect_processes
from pusa.training.export import export_run
from pusa.zoo import MINI_FOLDER

logger = logging.getLogger(__name__)

CHECKPOINT = "base.pt"


@dataclass(frozen=True, kw_only=True)
class MoreBudget(Sizes):
    """Set how the base of the package is trained further.

    Attributes:
        steps: at most, in all.
        batch_tokens: tokens per step and process.
        small_steps: every other of so many steps, at first, is of small clips: as many tokens show twice as many.
        rate: learning rate of Muon; it falls as the root of 1 + steps / `slow_steps`.
        pool_files, pool_every, pool_most: see `PoolPlan`.
        variants: painted variants of each place.
        publish_seconds: time between two models.
        vta_minutes, vta_clips: of the adapter.
        sheet_clips: numbers of clips on the sheets, from captions and from pictures.
    """

    steps: int
    batch_tokens: int
    small_steps: int
    rate: float
    warm_steps: int = 100
    slow_steps: int = 3000
    ema_decay: float = 0.999
    pool_files: int = 24
    pool_every: int = 12
    pool_most: int = 1024
    variants: int = 16
    publish_seconds: float = 1200.0
    vta_minutes: float
    vta_clips: int
    vta: VtaPlan
    sheet_clips: tuple[int, int] = (32, 8)


OBJECTIVE = BaseObjective(vector_share=0.3, clean_start_share=0.5, thing_weight=2.0, caption_dropout=0.25)

_MORE = MoreBudget(
    size=96,
    small_size=64,
    frames=33,
    things=len(SECOND.things),
    heads=8,
    layers=8,
    clips=0,
    small_clips=0,
    objective=OBJECTIVE,
    edition=SECOND,
    steps=100_000,
    # More than for a model trained from nothing: Muon takes a second a step, whatever the batch.
    batch_tokens=4_320,
    small_steps=1000,
    rate=8e-3,
    vta_minutes=40,
    vta_clips=4096,
    vta=VtaPlan(rank=64, batch_frames=80),
)

MORE_BUDGETS = {
    "more": _MORE,
    # a rehearsal of all stages, in half a minute; its model is hardly changed
    "more-rehearsal": replace(
        _MORE,
        size=32,
        small_size=16,
        frames=9,
        steps=6,
        batch_tokens=36,
        small_steps=4,
        rate=1e-4,
        pool_files=2,
        pool_every=2,
        variants=2,
        held_out_clips=64,
        publish_seconds=5.0,
        vta_minutes=0.02,
        vta_clips=32,
        vta=VtaPlan(rank=2, batch_frames=6, reports=False),
        sweep_clips=2,
        sheet_clips=(2, 1),
    ),
}


def run(
    work: Path,
    budget: MoreBudget,
    sprites: Tensor,
    photographs: Tensor,
    *,
    until: str = "export",
    start: Path = MINI_FOLDER,
) -> None:
    """Train the base further until `budget.steps`, or complete the model with an adapter; on a CPU.

    Args:
        until: "base": train the base. "export": take the base as far as it is, train the adapter and write it all.
        start: folder of the model to begin with.

    Raises:
        RuntimeError: another process works in this folder. FileNotFoundError: there is no base yet to complete.
    """
    work.mkdir(parents=True, exist_ok=True)
    with _only_one(work):
        world = World(
            sprites,
            photographs,
            variants=budget.variants,
            motion_frames=budget.frames - 1,
            edition=budget.edition,
        )
        vae = channels_last(AutoencoderKLWan.from_pretrained(start / "vae"))
        report = Report(work / "report.json", budget)
        if until == "base":
            train_more(work, budget, world, vae, start)
        else:
            _complete(work, budget, world, vae, start, report)


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Hold the folder's lock, by the main process for all."""
    processes = connect_processes()
    if not processes.is_main:
        yield
        return
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(f"another process trains in {work}: stop it first, or wait for it") from None
    try:
        yield
    finally:
        lock.release()


def train_more(work: Path, budget: MoreBudget, world: World, vae: AutoencoderKLWan, start: Path) -> None:
    """Train the base of the model in `start` further, or continue from ``work/base.pt``."""
    processes = connect_processes()
    base = TextToVideo.from_folder(start)
    held_out = _held_out(work, budget, world, vae)
    loss_fn = MoreLoss(base, work, budget, world, vae)

    def publish(step: int) -> None:
        entry = {"step": step, **_losses(base, held_out)}
        logger.info("%s", entry)
        with (work / "progress.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        publish_base(work / "model", vae, base, budget)

    fit(
        loss_fn,
        base,
        make_optimizers(base, budget.rate),
        steps=budget.steps,
        schedule=lambda step, _: rate_factor(step, budget),
        checkpoint=work / CHECKPOINT,
        ema_decay=budget.ema_decay,
        publish=publish,
        publish_seconds=budget.publish_seconds,
    )
    if processes.is_main:
        publish(budget.steps)
    processes.wait()


def rate_factor(step: int, budget: MoreBudget) -> float:
    """Return the factor of the learning rates at a step: a short rise, then a fall that never ends."""
    return min(1.0, (step + 1) / budget.warm_steps) / math.sqrt(1 + step / budget.slow_steps)


class MoreLoss:
    """Compute the loss of a step from its seed, on clips from a pool of each size."""

    def __init__(self, base: TextToVideo, work: Path, budget: MoreBudget, world: World, vae: AutoencoderKLWan) -> None:
        self.base, self.budget = base, budget
        self.processes = connect_processes()
        full = budget.clip_plan()
        self.full = _pool(work / "clips", budget, world, vae, base, full)
        small = replace(full, size=budget.small_size)
        self.small = _pool(work / "small_clips", budget, world.half(), vae, base, small)

    def __call__(self, seed: int, progress: float) -> Tensor:
        step = seed // self.processes.world
        is_small = step % 2 == 1 and step < self.budget.small_steps
        pool = self.small if is_small else self.full
        pool.advance(step)
        torch.manual_seed(seed)
        size = pool.plan.clips.size
        tokens = (self.budget.frames // 4 + 1) * (size // 16) ** 2
        return sample_loss(self.base, pool.sample(max(1, self.budget.batch_tokens // tokens)), self.budget.objective)


def _pool(
    folder: Path, budget: MoreBudget, world: World, vae: AutoencoderKLWan, base: TextToVideo, clips: ClipPlan
) -> ClipPool:
    plan = PoolPlan(clips, budget.pool_files, budget.pool_every, budget.pool_most)
    return ClipPool(vae, world, folder, plan, base.tokenizer)


def _held_out(work: Path, budget: MoreBudget, world: World, vae: AutoencoderKLWan) -> ClipCache:
    plan = replace(budget.clip_plan(), clips=budget.held_out_clips, held_out=True)
    return cache_clips(vae, world, work / "held_out", plan)


def _losses(base: TextToVideo, held_out: ClipCache) -> dict[str, float]:
    return {
        "held_out_loss": held_out_loss(base, held_out),
        "held_out_picture_loss": held_out_picture_loss(base, held_out),
    }


def publish_base(folder: Path, vae: AutoencoderKLWan, base: TextToVideo, budget: Sizes) -> None:
    """Write a model folder without an adapter, in one piece: a reader sees the old folder or the new one."""
    part, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write_folder(part, vae, base, budget)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ---- the adapter -----------------------------------------------------------------------------------------------------


def _complete(work: Path, budget: MoreBudget, world: World, vae: AutoencoderKLWan, start: Path, report: Report) -> None:
    """Train the adapter of the averaged base, choose its alpha and write the whole model, with sheets."""
    if not (work / CHECKPOINT).exists():
        raise FileNotFoundError(f"{work} has no base: `pusa mini train {work} --budget more --until base` trains it")
    processes = connect_processes()
    base = TextToVideo.from_folder(start)
    step = load_averages(work / CHECKPOINT, base)
    clips = newest_clips(work / "clips", budget.vta_clips)
    held_out = _held_out(work, budget, world, vae)
    run_folder = work / f"vta-{step}"
    dataset = write_dataset(base, clips, work / f"dataset-{step}", size=budget.size)
    train_vta(base, dataset, run_folder, seconds=60 * budget.vta_minutes, plan=budget.vta)
    if processes.is_main:
        base = TextToVideo.from_folder(start)  # anew: the one above has the adapter
        load_averages(work / CHECKPOINT, base)
        report.add("base", {"steps": step, **_losses(base, held_out)})
        publish_base(work / "model", vae, base, budget)
        lora = work / "model" / LORA_FILE
        export_run(run_folder, lora, dtype=torch.bfloat16)
        describe_folder(work / "model", budget, with_adapter=True)
        found = find_alpha(_generator(work, budget), world, things=budget.things, clips=budget.sweep_clips)
        report.add("strength", found)
        export_run(run_folder, lora, scale=found["factor"], dtype=torch.bfloat16)
        from_captions, from_pictures = budget.sheet_clips
        write_sheets(
            _generator(work, budget),
            world,
            work / "sheets",
            things=budget.things,
            from_captions=from_captions,
            from_pictures=from_pictures,
        )
        write_further_card(work, run_folder, work)
    processes.wait()


def _generator(work: Path, budget: MoreBudget) -> ClipGenerator:
    """Load the model as it is in the folder now."""
    pipe = PusaPipeline.from_pretrained(work / "model", torch_dtype=torch.float32)
    return ClipGenerator(pipe, size=budget.size, frames=budget.frames)
