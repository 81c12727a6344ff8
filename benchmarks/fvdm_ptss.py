"""Train a small FVDM from nothing with several probabilities p of a time for each frame, and compare what they can do.

FVDM (arXiv 2410.03160) draws one time for a clip, or with probability p one for each frame, and found p = 0.2 best. The
same network learns clips of the drawn world (`pusa.mini.world`; moving shapes, no downloads), in pixels, once for
each p, from the same weights and clips. Then it makes clips of scenes that it has never seen: from the first frame
(image to video), from the first and the last (interpolation), and from nothing.

Prints a table and writes a JSON file. `psnr`: of the frames that were not given, against the clip of the same scene, in
dB; what moves where cannot be known from one frame, so that interpolation says more. `frechet`: the Frechet distance
between made and drawn clips on simple features (means, deviations and changes of 4 x 4 cells), with the drawn clips
against others like them as the least that can be had. It is not FVD. `standing still` and `fading` are what can be had
without a model: the first frame, or a blend of the first and the last.

    python benchmarks/fvdm_ptss.py --minutes 60 -o ptss.json [--p 0 0.2 1] [--work FOLDER]
"""

import argparse
import copy
import json
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import conditions_of, table
from torch import Tensor

from pusa.ddim import PusaDDIMScheduler
from pusa.evaluation.frechet import simple_features
from pusa.evaluation.metrics import frechet_distance
from pusa.mini.world.scenery import CANVAS
from pusa.mini.world.world import World, draw_scenes
from pusa.models.fvdm.transformer import FVDMTransformer3DModel
from pusa.pipeline import PusaPipeline
from pusa.training.batches import Shape
from pusa.training.config import TrainConfig, config_from
from pusa.training.reports import read_metrics
from pusa.training.trainer import train

SIDE, FRAMES = 32, 8
TASKS: dict[str, tuple[int, ...]] = {  # frames that are given
    "image to video": (0,),
    "interpolation": (0, FRAMES - 1),
    "from nothing": (),
}
_CLIPS_PER_CALL = 64


@dataclass(frozen=True)
class Plan:
    """Set the amount of work.

    Steps, or minutes, of each training; `batch` clips a step; `clips` to learn, and `tests` to make by each model for
    each task; DDIM `sampling_steps`; patch, width and number of blocks of the network.
    """

    steps: int | None
    minutes: float | None
    batch: int
    clips: int
    tests: int
    sampling_steps: int
    patch: int
    width: int
    depth: int
    seed: int


# ---- the drawn world -------------------------------------------------------------------------------------------------


def draw_shapes(size: int = 64) -> Tensor:
    """Draw things for the world: discs, squares, rings and triangles of three colours, ``[12, 4, size, size]``."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = (x.square() + y.square()).sqrt()
    masks = [
        radius < 0.8,
        torch.maximum(x.abs(), y.abs()) < 0.7,
        (radius < 0.85) & (radius > 0.4),
        (y < 0.7) & (y > 2 * x.abs() - 0.8),
    ]
    colours = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.95, 0.85, 0.2]])
    sprites = [torch.cat([colour.view(3, 1, 1) * mask, mask[None]]) for mask in masks for colour in colours]
    return torch.stack(sprites).float()


def draw_clips(world: World, count: int, seed: int, *, held_out: bool = False) -> Tensor:
    """Draw clips in -1..1, ``[count, 3, FRAMES, SIDE, SIDE]``; held out: of scenes that training never sees."""
    scenes = draw_scenes(count, seed, things=world.things, held_out=held_out, picture_share=0.0)
    parts = [world.render(scenes[first : first + 64], FRAMES, size=SIDE)[0] for first in range(0, count, 64)]
    return torch.cat(parts)


class Clips:
    """Give clips to the trainer from memory: its `Data` protocol, for a model without text."""

    max_sequence_length = 1

    def __init__(self, clips: Tensor) -> None:
        self._clips = clips
        self.buckets: dict[Shape, list[int]] = {}
        if len(clips):
            channels, frames, height, width = clips.shape[1:]
            self.buckets[channels, frames, height, width] = list(range(len(clips)))

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def hash(self) -> str:
        return f"{len(self)} clips, {float(self._clips.double().sum()):.6f}"

    @property
    def empty_embeds(self) -> Tensor:
        return torch.zeros(1, 0)

    def latents(self, index: int) -> Tensor:
        return self._clips[index]

    def embeds(self, index: int) -> Tensor:
        return torch.zeros(1, 0)

    def split(self, held_out_share: float, seed: int = 0) -> tuple["Clips", "Clips"]:
        return self, Clips(self._clips[:0])


# ---- training and sampling -------------------------------------------------------------------------------------------


def configuration(output: Path, p: float, plan: Plan) -> TrainConfig:
    budget = {"steps": plan.steps} if plan.minutes is None else {"seconds": 60 * plan.minutes}
    return config_from(
        {
            **budget,
            "name": f"p-{p:g}",
            "output": str(output),
            "batch_size": plan.batch,
            "ema_decay": 0.999,
            "seed": plan.seed,
            "model": {"source": "drawn", "dtype": "fp32", "gradient_checkpointing": False},
            "method": {"kind": "full"},
            "objective": {"asynchronous": p},
            "optimizer": {"lr": 5e-4, "beta2": 0.99, "weight_decay": 0.0},
            "schedule": {"warmup_steps": 50, "cooldown_share": 0.3, "floor": 0.02},
            "data": {"held_out_share": 0.0},
            "checkpoint": {"every_steps": None, "every_seconds": 600.0, "keep_last": 1},
            "report": {"held_out_every": None, "log_every": 50, "tracker": "none"},
        }
    )


def new_network(plan: Plan) -> FVDMTransformer3DModel:
    """Make the network, in pixels: the same weights for the same seed."""
    torch.manual_seed(plan.seed)
    return FVDMTransformer3DModel(
        input_size=SIDE,
        patch_size=plan.patch,
        in_channels=3,
        hidden_size=plan.width,
        depth=plan.depth,
        num_heads=plan.width // 32,
        num_frames=FRAMES,
    )


def make_clips(model: FVDMTransformer3DModel, clips: Tensor, given: Sequence[int], plan: Plan) -> Tensor:
    """Make clips ``[N, 3, F, side, side]`` that keep the given frames of `clips`, by the pipeline."""
    pipe = PusaPipeline(None, None, None, PusaDDIMScheduler(), model)
    pipe.set_progress_bar_config(disable=True)
    device, made = next(model.parameters()).device, []
    for first in range(0, len(clips), _CLIPS_PER_CALL):
        part = clips[first : first + _CLIPS_PER_CALL].to(device)
        generator = torch.Generator().manual_seed(plan.seed + first)
        result = pipe(
            prompt_embeds=torch.zeros(len(part), 1, 0, device=device),
            conditions=[conditions_of(clip, list(given)) for clip in part] if given else [],
            width=SIDE * pipe.vae_scale_factor_spatial,
            height=SIDE * pipe.vae_scale_factor_spatial,
            num_frames=FRAMES,
            num_inference_steps=plan.sampling_steps,
            guidance_scale=1.0,
            generator=generator,
            output_type="latent",
        )
        made.append(result.frames.float().cpu().clamp(-1, 1))
    return torch.cat(made)


# ---- measures --------------------------------------------------------------------------------------------------------


def psnr(made: Tensor, clips: Tensor, given: Sequence[int]) -> float:
    """Compute the PSNR in dB of the mean error of frames that were not given, over all clips: some stand still."""
    free = [frame for frame in range(FRAMES) if frame not in given]
    return float(10 * torch.log10(4 / (made - clips)[:, :, free].square().mean()))


def without_a_model(clips: Tensor, given: Sequence[int]) -> Tensor:
    """Stand still at the first frame, or fade from the first to the last."""
    first = clips[:, :, :1]
    if len(given) < 2:
        return first.expand_as(clips)
    return torch.lerp(first, clips[:, :, -1:], torch.linspace(0, 1, FRAMES).view(1, 1, -1, 1, 1))


def judge(made: Tensor, clips: Tensor, given: Sequence[int]) -> dict[str, float]:
    found = {"frechet": frechet_distance(simple_features(made), simple_features(clips))}
    return {"psnr_db": psnr(made, clips, given), **found} if given else found


def measure(work: Path, shares: Sequence[float], plan: Plan) -> dict[str, Any]:
    """Train and measure a model for each p."""
    blank = torch.zeros(1, 3, CANVAS, CANVAS)
    world = World(draw_shapes(), blank, variants=2, motion_frames=12, seed=plan.seed).half()
    data = Clips(draw_clips(world, plan.clips, seed=plan.seed))
    clips, others = (draw_clips(world, plan.tests, seed=1000 + n, held_out=True) for n in (0, 1))
    results: dict[str, Any] = {}
    start = new_network(plan)
    for p in shares:
        run = train(
            configuration(work / f"p-{p:g}", p, plan), transformer=copy.deepcopy(start), dataset=data, resume=True
        )
        model = FVDMTransformer3DModel.from_pretrained(run / "model" / "transformer")
        last = read_metrics(run)[-1]
        found: dict[str, Any] = {"steps": last["step"], "seconds": last["seconds"], "loss": last["loss"]}
        for task, given in TASKS.items():
            found[task] = judge(make_clips(model, clips, given, plan), clips, given)
            print(f"p {p:g}: {task}: {found[task]}", flush=True)
        results[f"p {p:g}"] = found
    least = frechet_distance(simple_features(others), simple_features(clips))
    no_model = {
        task: judge(without_a_model(clips, given), clips, given) if given else {"frechet": least}
        for task, given in TASKS.items()
    }
    results["without a model"] = no_model
    return {
        "plan": vars(plan),
        "parameters": sum(parameter.numel() for parameter in start.parameters()),
        "frechet_of_drawn_clips": least,
        "results": results,
    }


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            str(result.get("steps", "")),
            *(
                f"{result[task].get(measure, math.nan):.2f}".replace("nan", "")
                for task in TASKS
                for measure in ("psnr_db", "frechet")
                if measure == "frechet" or TASKS[task]
            ),
        ]
        for name, result in found["results"].items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--p", type=float, nargs="+", default=[0.0, 0.2, 1.0], metavar="P")
    parser.add_argument("--steps", type=int, default=3000, help="of each training")
    parser.add_argument("--minutes", type=float, help="of each training, instead of steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--clips", type=int, default=4096, help="to learn")
    parser.add_argument("--tests", type=int, default=256, help="to make for each task")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--patch", type=int, default=4, help="pixels of a token's side; 8 is four times as fast")
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder of the trainings, which go on [default: a temporary one]")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    plan = Plan(
        steps=None if options.minutes else options.steps,
        minutes=options.minutes,
        batch=options.batch,
        clips=options.clips,
        tests=options.tests,
        sampling_steps=options.sampling_steps,
        patch=options.patch,
        width=options.width,
        depth=options.depth,
        seed=options.seed,
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pusa.training").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.work or Path(folder), options.p, plan)
    columns = ["", "steps", "i2v psnr", "i2v frechet", "between psnr", "between frechet", "nothing frechet"]
    print(table(columns, rows_of(found)))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
