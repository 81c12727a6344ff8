"""Build what `speed.py` measures: the embedded model, and random models of a middle size and of 14B."""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _card import GRIDS, TOY, Device, arguments_for, build, make_pipeline
from _common import WAN_14B, conditions_of, kept_frames
from _speed_changes import CHANGES, Subject, applied
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from pusa.defaults import FastSettings
from pusa.evaluation.metrics import psnr, seam
from pusa.mini.evaluation.setup import load_evaluator
from pusa.mini.world.world import captions
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.pipeline import PusaPipeline
from pusa.positions import frames_of

SHAPES = ("mini", "mid", "14b")
MID: dict[str, Any] = WAN_14B | {"num_attention_heads": 4, "ffn_dim": 2048, "num_layers": 4, "text_dim": 256}
MID_GRID, MID_TEXT = (21, 16, 20), 64
_RANK_SHARE = 0.1  # of the width, as Pusa's 512 is of 5120


@dataclass
class Shape:
    """Hold what a subject is asked for, and how its clips are judged.

    Attributes:
        call: arguments of the pipeline for a clip, by its number.
        judge: figures of clips beside PSNR.
        large: further figures that a shape alone has, as JSON.
    """

    title: str
    is_random: bool
    call: Callable[[int], dict[str, Any]]
    clips: int = 1
    judge: Callable[[list[Tensor]], dict[str, float]] = lambda clips: {}
    large: Callable[[Subject, Device, float], dict[str, Any]] = field(default=lambda subject, device, deadline: {})


def load_subject(name: str, options: argparse.Namespace, device: Device, stack: ExitStack) -> tuple[Subject, Shape]:
    """Build the subject of a name of `SHAPES`, or "tiny"; files that it needs live as long as `stack`."""
    if name == "mini":
        return _mini(options, device)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pusa-speed-")))
    return _random(name, options, device, folder)


# ---- the embedded model ----------------------------------------------------------------------------------------------


def _mini(options: argparse.Namespace, device: Device) -> tuple[Subject, Shape]:
    evaluator = load_evaluator("mini", options.pictures, None)
    evaluator.pipe.to(device.device)
    d, count = evaluator.defaults, options.clips or 4
    scenes = evaluator.scenes(count, seed=61, motions=("left", "right", "up", "down"))
    texts, real = captions(scenes), evaluator.real(scenes)
    kept = kept_frames(options.task, real.latents.shape[2])

    def call(clip: int) -> dict[str, Any]:
        return {
            "prompt": texts[clip],
            "negative_prompt": d.negative_prompt,
            "conditions": conditions_of(real.latents[clip], kept),
            "num_inference_steps": options.steps or d.steps,
            "guidance_scale": d.guidance,
            "generator": torch.Generator().manual_seed(clip),
            "output_type": "latent",
        }

    def judge(clips: list[Tensor]) -> dict[str, float]:
        video = torch.cat(clips)
        by_track = evaluator.track_figures(scenes, evaluator.matcher.track(video, scenes.thing))
        found = {"sprite match": by_track["sprite match"]["value"], "motion": by_track["motion by track"]["value"]}
        if kept:
            found["first frame"] = float(psnr(video[:, :, :1], real.video[:, :, :1]).mean())
        if options.task in ("image", "extension"):
            found["seam"] = float(seam(video, frames_of(len(kept))).mean())
        return found

    subject = Subject(evaluator.pipe, device.device, d.guidance, d.fast, compiler=options.compiler)
    return subject, Shape(f"embedded model, {d.width} x {d.height}, {d.num_frames} frames", False, call, count, judge)


# ---- random weights --------------------------------------------------------------------------------------------------


def _random(name: str, options: argparse.Namespace, device: Device, folder: Path) -> tuple[Subject, Shape]:
    torch.manual_seed(0)
    is_card = name == "14b"
    if name == "mid":
        model, grid, text = PusaWanTransformer3DModel(**MID).eval().to(device.device), MID_GRID, MID_TEXT
    elif is_card:
        model, grid, text = build(WAN_14B, device.device), GRIDS["480p"], 512
    else:
        model, grid, text = PusaWanTransformer3DModel(**TOY).eval().to(device.device), (4, 4, 4), 16
    pipe = make_pipeline(model, "frame")
    assert isinstance(pipe, PusaPipeline)
    pipe.vae = _vae(is_card, device)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    rank = max(4, round(_RANK_SHARE * width))
    pipe.load_pusa(random_adapter(model, rank, folder / "adapter.safetensors"), alpha=1.4)
    arguments = arguments_for(grid, text, model.config.text_dim, device.device)
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        arguments[key] = arguments[key].to(model.dtype)
    kept = kept_frames(options.task, grid[0])
    known = torch.randn(16, *grid)
    steps = options.steps or (2 if is_card or name == "tiny" else 4)

    def call(clip: int) -> dict[str, Any]:
        more = {"num_inference_steps": steps, "guidance_scale": 3.0, "conditions": conditions_of(known, kept)}
        return arguments | more

    size = f"width {width}, {model.config.num_layers} blocks, rank {rank}, {grid[0] * grid[1] * grid[2] // 4} tokens"
    shape = Shape(f"random weights, {size}", True, call, large=_goals if is_card else lambda *_: {})
    return Subject(pipe, device.device, 3.0, FastSettings(), compiler=options.compiler), shape


def _vae(is_card: bool, device: Device) -> AutoencoderKLWan:
    """Make a VAE of random weights: Wan's own on a card, a small one elsewhere."""
    vae = AutoencoderKLWan() if is_card else AutoencoderKLWan(base_dim=8)
    return vae.eval().to(device.device)


def random_adapter(model: WanTransformer3DModel, rank: int, file: Path) -> Path:
    """Write a LoRA of random matrices for every linear layer of the blocks' attention and feed-forward."""
    keys: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            shapes = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
            for key, shape in shapes.items():
                keys[f"transformer.{name}.{key}.weight"] = 0.02 * torch.randn(shape, dtype=module.weight.dtype)
    save_file(keys, file)
    return file


def _goals(subject: Subject, device: Device, deadline: float) -> dict[str, Any]:
    """Measure a card: 4 fast steps with their decoding at 480p, and 4 steps at 720p."""
    changes = tuple(c for c in CHANGES if (c.keeps or c.name == "fast") and not c.obstacle(subject))
    found: dict[str, Any] = {}
    with applied(subject, changes):
        for size, decodes in (("480p", True), ("720p", False)):
            if time.perf_counter() > deadline:
                found[size] = "out of time"
                continue
            model = subject.pipe.transformer
            arguments = arguments_for(GRIDS[size], 512, model.config.text_dim, device.device) | subject.call

            def make(arguments: dict[str, Any] = arguments, decodes: bool = decodes) -> None:
                latents = subject.pipe(**arguments).frames
                if decodes:
                    subject.pipe.decode(latents, "pt")

            subject.pipe(**arguments | {"num_inference_steps": 1})
            found[size] = {"seconds": device.seconds(make), "steps": 4, "decoded": decodes}
    return found
