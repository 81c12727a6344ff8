"""Stage 3: vectorised timestep adaptation (VTA) of the small model, by the trainer that adapts the large ones.

As in Pusa V1.0 (arXiv 2507.16116): every frame's time is drawn on its own, without any synchronous sample, from the
shifted grid that sampling uses; nothing shows the model an image to be continued.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from pusa.training.config import load_config
from pusa.training.dataset import LatentDataset
from pusa.training.dataset_writer import DatasetWriter
from pusa.training.mini_base import MAX_SEQUENCE_LENGTH, Latents, TextToVideo
from pusa.training.mini_loop import rank
from pusa.training.trainer import train
from pusa.training.world import captions


def write_dataset(base: TextToVideo, data: Latents, folder: Path, *, size: int) -> LatentDataset:
    """Clips with their captions and these captions' embeddings, as `pusa data prepare` leaves them."""
    if rank() == 0 and not (folder / "dataset.json").exists():
        part = folder.with_name(folder.name + ".part")
        texts = captions(data.scenes)
        with (
            torch.no_grad(),
            DatasetWriter(part, model="mini", max_sequence_length=MAX_SEQUENCE_LENGTH) as writer,
        ):
            for text in sorted({"", *texts}):
                length = len(base.tokenizer(text).input_ids)
                writer.add_prompt(text, base.embed([text])[0, :length].cpu())
            for number, (latents, text) in enumerate(zip(data.latents, texts, strict=True)):
                name = f"clip-{number:05d}"
                frames = 4 * latents.shape[1] - 3
                if name not in writer:
                    writer.add(name, latents, text, fps=16, height=size, width=size, frames=frames)
        part.replace(folder)
    if dist.is_initialized():
        dist.barrier()
    return LatentDataset(folder)


def train_vta(base: TextToVideo, dataset: LatentDataset, run: Path, *, seconds: float, batch_frames: int) -> None:
    """Adapt `base`, whose weights stay as they are, in the folder `run`, on from where it was."""
    longest = max(shape[1] for shape in dataset.buckets)
    config = load_config(
        "mini-vta",
        {
            "output": str(run),
            "data.lengths": [(longest + 1) // 2, longest],
            "seconds": seconds,
            "batch_frames": batch_frames,
        },
    )
    train(config, transformer=base.transformer, dataset=dataset, resume=True)
