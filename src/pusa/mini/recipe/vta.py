"""Adapt the small model by vectorised timestep adaptation (VTA, stage 3), with the trainer for the large models.

As in Pusa V1.0 (arXiv 2507.16116), every frame draws an independent timestep from the shifted grid that sampling uses,
without any synchronous sample and without image-to-video samples.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from pusa.data.dataset import LatentDataset
from pusa.data.writer import DatasetWriter
from pusa.mini.recipe.base import MAX_SEQUENCE_LENGTH, TextToVideo
from pusa.mini.recipe.clips import ClipCache
from pusa.mini.world.world import captions
from pusa.training.config import load_config
from pusa.training.distributed import connect_processes
from pusa.training.trainer import train

_EMBED_BATCH = 512


@dataclass(frozen=True)
class VtaPlan:
    """Choose rank, batches and threads of the adapter's training.

    Attributes:
        batch_frames: latent frames per step and process.
        rank: rank of the LoRA. Its alpha grows as the root of the rank, 16 at rank 16, so that a step of a larger one
            is as long (rsLoRA, arXiv 2312.03732).
        workers: threads that read clips and draw noise.
        deterministic: on a GPU, the same weights bit for bit after a kill; off is faster.
        reports: measure the held-out loss on the way, and write curves for TensorBoard if it is installed.
    """

    batch_frames: int
    rank: int = 16
    workers: int = 1
    deterministic: bool = True
    reports: bool = True


def write_dataset(base: TextToVideo, data: ClipCache, folder: Path, *, size: int) -> LatentDataset:
    """Write clips with captions and their embeddings as a dataset, in the format of `pusa data prepare`."""
    processes = connect_processes()
    if processes.is_main and not (folder / "dataset.json").exists():
        part = folder.with_name(folder.name + ".part")
        texts = captions(data.scenes)
        with (
            torch.no_grad(),
            DatasetWriter(part, model="mini", max_sequence_length=MAX_SEQUENCE_LENGTH) as writer,
        ):
            prompts = sorted({"", *texts})
            for first in range(0, len(prompts), _EMBED_BATCH):
                some = prompts[first : first + _EMBED_BATCH]
                for text, embeds in zip(some, base.embed(some).cpu(), strict=True):
                    writer.add_prompt(text, embeds)
            for number, (latents, text) in enumerate(zip(data.latents.cpu(), texts, strict=True)):
                name = f"clip-{number:05d}"
                frames = 4 * latents.shape[1] - 3
                if name not in writer:
                    writer.add(name, latents, text, fps=16, height=size, width=size, frames=frames)
        part.replace(folder)
    processes.wait()
    return LatentDataset(folder)


def train_vta(
    base: TextToVideo, dataset: LatentDataset, run: Path, *, seconds: float, steps: int | None = None, plan: VtaPlan
) -> None:
    """Train the adapter of the frozen `base` in the folder `run`, or resume that run.

    Args:
        seconds: of training, or
        steps: number of steps.
    """
    longest = max(shape[1] for shape in dataset.buckets)
    device = connect_processes().device
    on_cpu = device.type == "cpu"
    no_reports = {} if plan.reports else {"report.held_out_every": None, "report.tracker": "none"}
    config = load_config(
        "mini-vta",
        {
            **no_reports,
            "output": str(run),
            "data.lengths": [(longest + 1) // 2, longest],
            "data.workers": plan.workers,
            "data.prefetch": plan.workers + 2,
            **({"seconds": seconds} if steps is None else {"steps": steps}),
            "batch_frames": plan.batch_frames,
            "method.rank": plan.rank,
            "method.alpha": 4 * math.sqrt(plan.rank),
            "model.attention": "math" if on_cpu else "auto",
            "model.deterministic": plan.deterministic,
        },
    )
    train(config, transformer=base.transformer, dataset=dataset, resume=True)
