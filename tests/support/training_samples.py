"""Make datasets of random latents and configurations of a few steps, for tests of training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.data.dataset import DatasetWriter
from pusa.training.config import TrainConfig, config_from

SHAPE = (16, 3, 4, 6)  # latents of 9 frames of 48 x 32 pixels: 18 tokens
TEXT_WIDTH = 48


def write_dataset(
    folder: Path,
    *,
    clips: int = 8,
    single_frames: int = 0,
    seed: int = 0,
    shape: tuple[int, int, int, int] = SHAPE,
    texts: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write random clips, and random pictures as clips of one frame, under two captions, or those of `texts`."""
    generator = torch.Generator().manual_seed(seed)
    if texts is None:
        lengths = {"": 1, "a fox in the snow": 5, "a boat": 3}
        texts = {text: torch.randn(length, TEXT_WIDTH, generator=generator) for text, length in lengths.items()}
    captions = [text for text in texts if text] or [""]
    with DatasetWriter(folder, model="tiny", max_sequence_length=8) as writer:
        for caption, embeds in texts.items():
            writer.add_prompt(caption, embeds)
        for index in range(clips + single_frames):
            sizes = shape if index < clips else (shape[0], 1, *shape[2:])
            writer.add(
                f"clip-{index}",
                torch.randn(sizes, generator=generator),
                captions[index % len(captions)],
                fps=16,
                height=32,
                width=48,
                frames=4 * sizes[1] - 3,
            )
    return folder


def make_config(folder: Path | None, output: Path, /, **changes: Any) -> TrainConfig:
    """Six steps of two clips in fp32, rank 4; changes by section (``method={"rank": 8}``) or field."""
    values: dict[str, Any] = {
        "name": "test",
        "output": str(output),
        "steps": 6,
        "batch_size": 2,
        "model": {"source": "tiny", "dtype": "fp32", "gradient_checkpointing": False},
        "data": {"folders": [str(folder)] if folder else [], "held_out_share": 0.25},
        "method": {"rank": 4, "alpha": 4.0},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every_steps": None},
        "report": {"held_out_every": None, "tracker": "none"},
    }
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    for field, other in (("batch_frames", "batch_size"), ("seconds", "steps")):
        if field in changes:
            values[other] = None
    return config_from(values)
