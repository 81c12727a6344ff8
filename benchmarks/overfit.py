"""Does VTA teach a model to go on from a first frame, where the same training with one time per clip does not?

One clip (two soft spots that move and fade in, drawn as latents) is seen in eight places of the frame: text cannot say
which, only the first frame can. It is faint there and says little under the noise of a time that all frames share, so a
model with one time per clip has no reason to look at it; only a time of its own says that it can be trusted. (With
`--first 1` it is as bright as the others, shines through noise, and scalar time learns a part of the task.)

A small transformer learns the clip as text-to-video, with one time per clip. From there two adapters are trained, alike
in everything but the times: one per latent frame (VTA), or one per clip (scalar). Each of the three then makes the clip
from its first latent frame, kept exactly (image-to-video at noise multiplier 0), in all places. All are told the time 0
for that frame; scalar time, which never saw frames at unlike times, is also tried with one time for all.

Prints a table and one JSON line. PSNR is of latents, over the frames that were not given: 10 log10(range^2 / MSE), with
the clip's own range of values. The last lines say what can be had without understanding the first frame.

    python benchmarks/overfit.py [--base-steps 1000] [--steps 1500] [--first 0.2] [--work FOLDER]
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.data.dataset import DatasetWriter, LatentDataset
from pusa.lora import load_pusa, unload_lora
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.scheduler import PusaFlowMatchEulerScheduler
from pusa.training.config import TrainConfig, config_from
from pusa.training.reports import read_metrics
from pusa.training.trainer import train

FRAMES, SIDE, CHANNELS = 4, 8, 8
PLACES = 8
SHIFT = 3.0
TEXT_WIDTH, TEXT_LENGTH = 32, 4
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 2,
}


def draw_clip(first: float) -> Tensor:
    """Two soft spots that fade in on their ways through a frame without edges: ``[C, F, h, w]``.

    The brightness rises from `first` to 1.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(SIDE).view(1, SIDE, 1)
    columns = torch.arange(SIDE).view(1, 1, SIDE)
    times = torch.arange(FRAMES).view(FRAMES, 1, 1)
    clip = torch.zeros(CHANNELS, FRAMES, SIDE, SIDE)
    for row, column, down, right in ((1.0, 2.0, 0.5, 1.0), (6.0, 5.0, -1.0, 0.0)):
        near = [
            (place - start - speed * times + SIDE / 2) % SIDE - SIDE / 2
            for place, start, speed in ((rows, row, down), (columns, column, right))
        ]
        spot = torch.exp(-(near[0] ** 2 + near[1] ** 2) / 3)  # [F, h, w]
        clip += torch.randn(CHANNELS, 1, 1, 1, generator=generator) * spot
    fade = torch.linspace(first, 1, FRAMES).view(1, FRAMES, 1, 1)
    return fade * (clip - clip.mean()) / clip.std()


def in_place(clip: Tensor, place: int) -> Tensor:
    """The clip moved by whole patches, around the frame."""
    return clip.roll((2 * (place // 4), 2 * (place % 4)), dims=(2, 3))


def write_dataset(folder: Path, clip: Tensor) -> LatentDataset:
    """The clip in all places, under one caption."""
    generator = torch.Generator().manual_seed(1)
    with DatasetWriter(folder, model="overfit", max_sequence_length=TEXT_LENGTH, dtype=torch.float32) as writer:
        for caption, length in (("", 1), ("two spots", 3)):
            writer.add_prompt(caption, torch.randn(length, TEXT_WIDTH, generator=generator))
        for place in range(PLACES):
            writer.add(
                f"place-{place:02d}",
                in_place(clip, place),
                "two spots",
                fps=16,
                height=8 * SIDE,
                width=8 * SIDE,
                frames=4 * FRAMES - 3,
            )
    return LatentDataset(folder)


def configuration(output: Path, *, times: str, kind: str, steps: int, lr: float) -> TrainConfig:
    return config_from(
        {
            "output": str(output),
            "steps": steps,
            "batch_size": PLACES,
            "ema_decay": 0.99,
            "model": {"source": "overfit", "dtype": "fp32", "gradient_checkpointing": False, "attention": "math"},
            "method": {"kind": kind, "rank": 16, "alpha": 16.0},
            "objective": {"times": times, "shift": SHIFT, "weighting": "none"},
            "optimizer": {"lr": lr, "beta2": 0.98, "weight_decay": 0.0},
            "schedule": {"warmup_steps": 30, "cooldown_share": 0.5, "floor": 0.02},
            "data": {"held_out_share": 0.0},
            "checkpoint": {"every_steps": None},
            "report": {"held_out_every": None, "log_every": 50, "tracker": "none"},
        }
    )


@torch.no_grad()
def from_first_frame(model: Any, clips: Tensor, embeds: Tensor, *, one_time: bool = False, steps: int = 20) -> Tensor:
    """Image-to-video at multiplier 0 by the sampler of the pipeline: ``[B, C, F, h, w]`` from its first frames.

    With `one_time` the model is told that the first frame is as noisy as the others, the time it was trained with.
    """
    scheduler = PusaFlowMatchEulerScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps, noise_multipliers=torch.tensor([0.0] + [1.0] * (FRAMES - 1)))
    latents = scheduler.add_noise(clips, torch.randn(clips.shape, generator=torch.Generator().manual_seed(2)))
    for k, t in enumerate(scheduler.timesteps):
        times = scheduler.frame_timesteps(k).expand(len(clips), -1)  # [B, F]
        if one_time:
            times = times[:, -1:].expand_as(times)
        velocity = model(latents, times, embeds.expand(len(clips), -1, -1), return_dict=False)[0]
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    assert torch.equal(latents[:, :, 0], clips[:, :, 0])
    return latents


def psnr(made: Tensor, clips: Tensor) -> float:
    """Compute the PSNR of the frames without a condition, in dB, over all clips."""
    error = (made - clips)[:, :, 1:].square().mean()
    return float(10 * torch.log10((clips.max() - clips.min()) ** 2 / error))


def measure(work: Path, *, base_steps: int, steps: int, first: float = 0.2, lr: float = 2e-3) -> dict[str, Any]:
    """PSNR by model, and the last losses; `lr` is that of all trainings."""
    clip = draw_clip(first)
    data = write_dataset(work / "clips", clip)
    clips = torch.stack([in_place(clip, place) for place in range(PLACES)])
    embeds = torch.zeros(1, TEXT_LENGTH, TEXT_WIDTH)
    embeds[0, :3] = data.embeds(0)
    torch.manual_seed(0)
    model = PusaWanTransformer3DModel(**TRANSFORMER)
    found: dict[str, Any] = {"psnr_db": {}, "loss": {}, "places": PLACES, "first_brightness": first}
    found |= {"base_steps": base_steps, "steps": steps}

    def judge(name: str, run: Path) -> None:
        found["psnr_db"][name] = psnr(from_first_frame(model, clips, embeds), clips)
        found["loss"][name] = read_metrics(run)[-1]["loss"]

    base = configuration(work / "base", times="scalar", kind="full", steps=base_steps, lr=lr)
    judge("base, scalar time", train(base, transformer=model, dataset=data))
    for name, times in (("VTA", "independent"), ("scalar time", "scalar")):
        run = work / times
        train(configuration(run, times=times, kind="lora", steps=steps, lr=lr), transformer=model, dataset=data)
        judge(f"base + {name}", run)
        if times == "scalar":
            made = from_first_frame(model, clips, embeds, one_time=True)
            found["psnr_db"][f"base + {name}, told one time"] = psnr(made, clips)
        unload_lora(model)
    load_pusa(model, work / "independent", alpha=1.0)
    found["psnr_db"]["base + VTA, another first frame"] = psnr(from_first_frame(model, clips.roll(1, 0), embeds), clips)
    found["psnr_db"]["another place"] = psnr(clips.roll(1, 0), clips)
    found["psnr_db"]["the first frame, standing still"] = psnr(clips[:, :, :1].expand_as(clips), clips)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1500, help="of each adapter")
    parser.add_argument("--first", type=float, default=0.2, help="brightness of the first frame; the last one has 1")
    parser.add_argument("--work", type=Path, help="an empty folder for what is trained; default: a temporary one")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        found = measure(work, base_steps=options.base_steps, steps=options.steps, first=options.first)
    found["seconds"] = round(time.monotonic() - began, 1)
    width = max(map(len, found["psnr_db"]))
    print(f"{'made from the first latent frame by':<{width}}  PSNR of the others, dB")
    for name, value in found["psnr_db"].items():
        print(f"{name:<{width}}  {value:6.2f}")
    print(json.dumps({"benchmark": "overfit", **found}))


if __name__ == "__main__":
    main()
