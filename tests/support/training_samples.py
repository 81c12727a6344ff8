"""Make datasets of random latents and configurations of a few steps, for tests of training."""

from pathlib import Path
from typing import Any

import torch

from pusa.data.dataset import DatasetWriter
from pusa.training.config import TrainConfig, config_from

SHAPE = (16, 3, 4, 6)  # latents of 9 frames of 48 x 32 pixels: 18 tokens
TEXT_WIDTH = 48


def write_dataset(folder: Path, *, clips: int = 8, single_frames: int = 0, seed: int = 0) -> Path:
    """Random clips, and random pictures as clips of one frame, under two captions."""
    generator = torch.Generator().manual_seed(seed)
    captions = ["a fox in the snow", "a boat"]
    with DatasetWriter(folder, model="tiny", max_sequence_length=8) as writer:
        for length, caption in zip((1, 5, 3), ("", *captions), strict=True):
            writer.add_prompt(caption, torch.randn(length, TEXT_WIDTH, generator=generator))
        for index in range(clips + single_frames):
            shape = SHAPE if index < clips else (SHAPE[0], 1, *SHAPE[2:])
            writer.add(
                f"clip-{index}",
                torch.randn(shape, generator=generator),
                captions[index % 2],
                fps=16,
                height=32,
                width=48,
                frames=4 * shape[1] - 3,
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
