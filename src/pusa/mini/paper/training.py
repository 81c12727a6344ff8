"""Train the adapters of `pusa eval paper`, one at a time on the same frozen base, with the trainer for all models."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor

from pusa.lora import export_lora
from pusa.mini.recipe.base import MAX_SEQUENCE_LENGTH, SHIFT, TextToVideo
from pusa.mini.recipe.clips import ClipCache, load_latents
from pusa.mini.world.world import captions
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.training.batches import Shape
from pusa.training.config import TrainConfig, load_config
from pusa.training.reports import read_metrics
from pusa.training.trainer import train

REGIMES: dict[str, dict[str, Any]] = {
    "independent": {"times": "independent", "asynchronous": 1.0},
    "image-to-video": {"times": "image_to_video"},
    "p 0.2": {"times": "independent", "asynchronous": 0.2},
    "p 0.5": {"times": "independent", "asynchronous": 0.5},
    "p 0.8": {"times": "independent", "asynchronous": 0.8},
}
"""The compared timestep distributions: the paper's own, its image-to-video baseline, FVDM's partly synchronous ones."""

BEST_ALPHAS = (1.4, 2.0, 3.0)
"""Beside 1, those at which every regime is measured: the paper compares regimes at the best alpha of each."""

CURVE = 4
"""Parts of a training; each ends with an exported adapter."""

BATCH = 4
"""Clips per pass, in training and in measuring: another shape would be compiled anew."""

SEED = 0
"""Seed everything but the trainings, so that all seeds are measured on the same clips with the same noise."""


@dataclass(frozen=True)
class Plan:
    """Set the amount of work.

    Optimizer `steps` per training (a multiple of `CURVE`), `clips` generated per point and `loss_clips` for the losses
    (multiples of `BATCH`).
    """

    steps: int
    clips: int
    loss_clips: int
    probe_steps: int
    compiled: bool
    seed: int = 0  # of the trainings


# ---- the base ------------------------------------------------------------------------------------------------------


def load_base(work: Path) -> TextToVideo:
    """Load the text-to-video model of a working folder of `pusa mini train`, frozen.

    Raises:
        FileNotFoundError: its base is not finished.
    """
    for name in ("report.json", "base.safetensors", "vae/config.json", "latents", "held_out"):
        if not (work / name).exists():
            raise FileNotFoundError(f"{work} has no {name}: finish `pusa mini train {work} --until base` first")
    budget = json.loads((work / "report.json").read_text())["budget"]
    base = TextToVideo(heads=budget["heads"], layers=budget["layers"])
    load_model(base, work / "base.safetensors")
    return base.requires_grad_(False).eval()


def things_of(work: Path) -> int:
    return json.loads((work / "report.json").read_text())["budget"]["things"]


class CaptionedLatents:
    """Serve cached clips in memory as a dataset of the trainer; each clip keeps one caption."""

    def __init__(self, latents: Tensor, embeds: Tensor, empty_embeds: Tensor) -> None:
        self._latents, self._embeds = latents, embeds
        self.empty_embeds = empty_embeds
        self.max_sequence_length = MAX_SEQUENCE_LENGTH
        self.hash = f"{len(latents)} clips of the small world"

    @classmethod
    def of(cls, base: TextToVideo, data: ClipCache) -> "CaptionedLatents":
        with torch.no_grad():
            texts = captions(data.scenes)
            embeds = torch.cat([base.embed(texts[i : i + 256]) for i in range(0, len(texts), 256)])
            return cls(data.latents, embeds, base.embed([""])[0])

    @property
    def buckets(self) -> Mapping[Shape, range]:
        c, f, h, w = self._latents.shape[1:]
        return {(c, f, h, w): range(len(self))} if len(self) else {}

    def __len__(self) -> int:
        return len(self._latents)

    def latents(self, index: int) -> Tensor:
        return self._latents[index].float()

    def embeds(self, index: int) -> Tensor:
        return self._embeds[index]

    def split(self, held_out_share: float, seed: int = 0) -> "tuple[CaptionedLatents, CaptionedLatents]":
        """Return all clips and none: the held-out clips are cached elsewhere."""
        none = CaptionedLatents(self._latents[:0], self._embeds[:0], self.empty_embeds)
        return self, none


# ---- training ------------------------------------------------------------------------------------------------------


def train_config(output: Path, regime: str, steps: int, *, on_cpu: bool, seed: int = 0) -> TrainConfig:
    """Return the recipe's configuration with a constant rate and a moving average.

    Each point of a curve is thus an end point, the same in every run of the same length.
    """
    return load_config(
        "mini-vta",
        {
            "name": regime.replace(" ", "-"),
            "output": str(output),
            "steps": steps,
            "batch_size": BATCH,
            "ema_decay": 0.98,
            "seed": seed,
            "model.attention": "math" if on_cpu else "auto",
            "data.held_out_share": 0.0,
            "data.lengths": [],
            **{f"objective.{name}": value for name, value in REGIMES[regime].items()},
            "objective.shift": SHIFT,
            "schedule.warmup_steps": min(30, steps // 4),
            "schedule.cooldown_share": 0.0,
            "checkpoint.every_steps": None,
            "checkpoint.keep_last": 1,
            "report.log_every": 1,
            "report.held_out_every": None,
            "report.validate_every": max(1, steps // CURVE),
            "report.tracker": "none",
        },
    )


def adapter_path(out: Path, regime: str, step: int) -> Path:
    return out / "adapters" / f"{regime.replace(' ', '-')}-{step}.safetensors"


def train_regime(work: Path, out: Path, plan: Plan, regime: str) -> None:
    """Train one adapter, or resume its training, and export it after each part of the curve."""
    _train(work, out / "training" / regime.replace(" ", "-"), regime, plan, keep_in=out)


def _train(work: Path, output: Path, regime: str, plan: Plan, *, keep_in: Path | None) -> None:
    base, data = _training_set(work)
    transformer = PusaWanTransformer3DModel.from_wan(copy.deepcopy(base.transformer))
    if plan.compiled:
        transformer.compile_repeated_blocks(fullgraph=True)

    def keep(step: int, model: Any) -> None:
        if keep_in is not None:
            export_lora(model, adapter_path(keep_in, regime, step))

    config = train_config(output, regime, plan.steps, on_cpu=not torch.cuda.is_available(), seed=plan.seed)
    train(config, transformer=transformer, dataset=data, on_validate=keep, resume=True)


@lru_cache(maxsize=1)
def _training_set(work: Path) -> tuple[TextToVideo, CaptionedLatents]:
    base = load_base(work)
    return base, CaptionedLatents.of(base, load_latents(work / "latents", things=things_of(work)))


def seconds_per_training_step(work: Path, output: Path, *, compiled: bool) -> float:
    """Time three steps of the trainer, after three that compile the blocks."""
    plan = Plan(steps=6, clips=0, loss_clips=0, probe_steps=0, compiled=compiled)
    _train(work, output, "independent", plan, keep_in=None)
    seconds = [entry["seconds"] for entry in read_metrics(output) if "loss" in entry]
    return (seconds[5] - seconds[2]) / 3
