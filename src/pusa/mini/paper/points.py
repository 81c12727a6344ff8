"""Measure the points of `pusa eval paper`, each an adapter under one setting of the sampler.

All figures are of normalised latents whose truth is known: clips of combinations that training never saw, the same
clips and the same noise at every point, so that two points can be compared clip by clip.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pusa.evaluation.metrics import first_jump
from pusa.fsutil import replacing
from pusa.lora.layouts import read_lora
from pusa.mini.paper.training import BATCH, SEED, Plan, adapter_path, load_base, things_of
from pusa.mini.recipe.base import SHIFT, TextToVideo
from pusa.mini.recipe.clips import load_latents
from pusa.mini.recipe.loop import precision
from pusa.mini.world.columns import Columns
from pusa.mini.world.scenery import PLACES
from pusa.mini.world.vocabulary import MOTIONS
from pusa.mini.world.world import captions
from pusa.models.vae import channels_last, decode_video, encode_video
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.positions import frames_of
from pusa.scheduler import PusaFlowMatchEulerScheduler
from pusa.training.batches import generator_of
from pusa.training.config import ObjectiveConfig
from pusa.training.objective import add_noise, draw_sigmas, frame_errors, velocity_target

GUIDANCE = 3.0
STEPS = 10
_LOSSES = {
    "independent": ("independent", True),
    "image": ("image_to_video", True),
    "image, no caption": ("image_to_video", False),
    "text": ("scalar", True),
}


@dataclass(frozen=True)
class Point:
    """Describe one adapter (or none) under one setting of the sampler, and its measures.

    `measures`: "losses"; "image", image-to-video without a caption; "caption", with one; "text", text-to-video.
    """

    name: str
    measures: tuple[str, ...]
    regime: str | None = None
    step: int = 0
    alpha: float = 1.0
    steps: int = STEPS
    noise: float = 0.0

    def cost(self, plan: Plan) -> int:
        """Count the forward passes of one clip that the point takes."""
        each = {"losses": 0, "image": self.steps, "caption": 2 * self.steps, "text": 2 * self.steps}
        losses = len(_LOSSES) * plan.loss_clips if "losses" in self.measures else 0
        return plan.clips * sum(each[measure] for measure in self.measures) + losses


# ---- clips -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutClips(Columns):
    """Hold clips ``[N, C, F, h, w]`` that training never saw, and what belongs to them.

    That is their noise, embeddings ``[N, L, D]``, things and places ``[N]``.

    The camera never moves. In `still` clips the thing does not move either, so that all frames are like the first.
    """

    latents: Tensor
    noise: Tensor
    embeds: Tensor
    thing: Tensor
    place: Tensor
    still: Tensor

    def batches(self, size: int) -> "Iterator[HeldOutClips]":
        for start in range(0, len(self), size):
            yield self[start : start + size]


def choose_clips(work: Path, base: TextToVideo, count: int, loss_count: int) -> tuple[HeldOutClips, HeldOutClips]:
    """Choose `count` clips to generate from, at most half of them still, and others for the losses."""
    data = load_latents(work / "held_out", things=things_of(work), held_out=True)
    names, scenes = list(MOTIONS), data.scenes
    is_steady = scenes.camera == 0
    is_still = is_steady & (scenes.motion == names.index("still"))
    # What fades is not kept to the end by a perfect model either.
    is_moving = is_steady & (scenes.motion != names.index("still")) & (scenes.motion != names.index("fade"))
    still = is_still.nonzero().flatten()[: count // 2]
    chosen = torch.cat([still, is_moving.nonzero().flatten()[: count - len(still)]])
    rest = torch.ones(len(data), dtype=torch.bool)
    rest[chosen] = False
    others = rest.nonzero().flatten()[:loss_count]
    for wanted, found in ((count, chosen), (loss_count, others)):
        if len(found) < wanted:
            raise ValueError(f"{work / 'held_out'} has {len(found)} fitting clips and {wanted} are needed")
    texts = captions(scenes)

    def pick(indices: Tensor) -> HeldOutClips:
        latents = data.latents[indices].float()
        noise = [torch.randn(latents.shape[1:], generator=generator_of(SEED, "noise", i)) for i in indices.tolist()]
        with torch.no_grad():
            embeds = base.embed([texts[i] for i in indices.tolist()])
        columns = (scenes.thing[indices], scenes.place[indices], is_still[indices])
        return HeldOutClips(latents, torch.stack(noise), embeds, *columns)

    return pick(chosen), pick(others)


class Probe(nn.Module):
    """Classify thing and place of single latent frames ``[N, 16, h, w]``: logits ``[N, T + 1]`` and ``[N, P + 2]``."""

    def __init__(self, things: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.GroupNorm(8, 128),
            nn.SiLU(),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.SiLU(),
        )
        self.thing = nn.Linear(256, things + 1)
        self.place = nn.Linear(256, len(PLACES) + 2)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.body(frames)
        pooled = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        return self.thing(pooled), self.place(pooled)

    @torch.no_grad()
    def probabilities(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Classify each frame of clips ``[N, C, F, h, w]``: ``[N, F, T + 1]`` and ``[N, F, P + 2]``."""
        things, places = self(latents.transpose(1, 2).flatten(0, 1))
        frames = (len(latents), -1)
        return things.softmax(1).unflatten(0, frames), places.softmax(1).unflatten(0, frames)


def probe_path(out: Path) -> Path:
    return out / "probe.safetensors"


def train_probe(work: Path, out: Path, steps: int) -> None:
    """Train the probe on cached clips with some noise, as generated ones are never quite clean, and write it."""
    torch.manual_seed(SEED)
    data = load_latents(work / "latents", things=things_of(work))
    scenes, things = data.scenes, things_of(work)
    is_usable = (scenes.second < 0) & ((scenes.thing < 0) | (scenes.motion != list(MOTIONS).index("fade")))
    clips = is_usable.nonzero().flatten()
    probe = Probe(things)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = clips[torch.randint(len(clips), (128,))]
        frames = data.latents[chosen, :, torch.randint(data.latents.shape[2], (128,))].float()
        noisy = frames + 0.3 * torch.rand(128, 1, 1, 1) * torch.randn_like(frames)
        thing, place = probe(noisy)
        labels = torch.where(scenes.thing[chosen] < 0, things, scenes.thing[chosen])
        loss = F.cross_entropy(thing, labels) + 0.5 * F.cross_entropy(place, scenes.place[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with replacing(probe_path(out)) as part:
        save_file(probe.state_dict(), part)


# ---- judging -------------------------------------------------------------------------------------------------------


def likeness(latents: Tensor, real: Tensor) -> Tensor:
    """Compute the PSNR in dB of latents, whose variance is 1, against real ones: ``[N, C, F, h, w]`` to ``[N]``."""
    error = (latents - real).square().mean(dim=(1, 2, 3, 4))
    return -10 * torch.log10(error.clamp(min=1e-8))


def change(latents: Tensor) -> Tensor:
    """Compute the root mean square difference of neighbouring latent frames from the second on: 0 is frozen."""
    return latents[:, :, 1:].diff(dim=2).square().mean(dim=(1, 2, 3, 4)).sqrt()


@dataclass
class Judge:
    """Measure points with the base, any adapter merged into its weights, the clips and the probe."""

    work: Path
    out: Path
    plan: Plan
    base: TextToVideo = field(init=False)
    clips: HeldOutClips = field(init=False)
    loss_clips: HeldOutClips = field(init=False)
    empty: Tensor = field(init=False)
    untouched: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.base = load_base(self.work)
        self.clips, self.loss_clips = choose_clips(self.work, self.base, self.plan.clips, self.plan.loss_clips)
        with torch.no_grad():
            self.empty = self.base.embed([""])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = PusaWanTransformer3DModel.from_wan(self.base.transformer).to(self.device)
        if self.plan.compiled:
            self.model.compile_repeated_blocks(fullgraph=True)

    @torch.no_grad()
    def adapt(self, adapter: Path | None, alpha: float) -> None:
        """Set every adapted weight to ``W + alpha * B A``, always from the original W."""
        for name, weight in self.untouched.items():
            self.model.get_submodule(name).weight.copy_(weight)
        for name, (a, b) in read_lora(adapter).pairs.items() if adapter is not None else ():
            weight = self.model.get_submodule(name).weight
            self.untouched.setdefault(name, weight.detach().clone())
            weight += alpha * (b.float() @ a.float()).to(weight)

    @property
    def probe(self) -> Probe:
        probe = Probe(things_of(self.work))
        probe.load_state_dict(load_file(probe_path(self.out)))
        return probe.eval()

    def measure(self, point: Point) -> dict[str, dict[str, list[float]]]:
        """Measure a point: {measure: {figure: one value per clip}}."""
        adapter = None if point.regime is None else adapter_path(self.out, point.regime, point.step)
        self.adapt(adapter, point.alpha)
        results = {}
        for measure in point.measures:
            if measure == "losses":
                results[measure] = self.losses()
            else:
                results[measure] = self.clip_figures(self.generate(measure, point), with_image=measure != "text")
        return results

    @torch.no_grad()
    def velocity(self, x: Tensor, sigmas: Tensor, embeds: Tensor) -> Tensor:
        """Predict the velocity of latents ``[B, C, F, h, w]`` at sigmas ``[B, F]``, in fp32 on the CPU."""
        backends = [SDPBackend.MATH] if self.device.type == "cpu" else [SDPBackend.EFFICIENT_ATTENTION]
        x, times, embeds = x.to(self.device), 1000 * sigmas.to(self.device), embeds.to(self.device)
        with precision(self.device), sdpa_kernel(backends):
            return self.model(x, times, embeds, return_dict=False)[0].float().cpu()

    def losses(self) -> dict[str, list[float]]:
        """Compute unweighted squared errors of the velocity on noisy frames, by the distribution of timesteps."""
        errors: dict[str, list[float]] = {name: [] for name in _LOSSES}
        for name, (times, with_caption) in _LOSSES.items():
            objective = ObjectiveConfig.model_validate({"times": times, "shift": SHIFT})
            drawn = [
                draw_sigmas(self.loss_clips.latents.shape[2], objective, generator_of(SEED, "levels", times, i))
                for i in range(len(self.loss_clips))
            ]
            levels = torch.stack(drawn).split(BATCH)
            for clips, sigmas in zip(self.loss_clips.batches(BATCH), levels, strict=True):
                embeds = clips.embeds if with_caption else self.empty.expand_as(clips.embeds)
                velocity = self.velocity(add_noise(clips.latents, clips.noise, sigmas), sigmas, embeds)
                error = frame_errors(velocity, velocity_target(clips.latents, clips.noise))
                noisy = (sigmas > 0).float()
                errors[name] += ((error * noisy).sum(1) / noisy.sum(1)).tolist()
        return errors

    def generate(self, task: str, point: Point) -> Tensor:
        """Generate clips ``[N, C, F, h, w]`` for task "image" (no caption), "caption" or "text" (no image)."""
        frames = self.clips.latents.shape[2]
        multipliers = torch.ones(frames)
        if task != "text":
            multipliers[0] = point.noise
        scheduler = PusaFlowMatchEulerScheduler(shift=SHIFT)
        generated = []
        for clips in self.clips.batches(BATCH):
            scheduler.set_timesteps(point.steps, noise_multipliers=multipliers)
            nothing = self.empty.expand_as(clips.embeds)
            x = scheduler.add_noise(clips.latents, clips.noise)  # only the first frame's clean latents get in
            for k, timestep in enumerate(scheduler.timesteps):
                sigmas = scheduler.frame_sigmas[k].expand(len(clips), -1)
                velocity = self.velocity(x, sigmas, nothing)
                if task != "image":
                    velocity = velocity + GUIDANCE * (self.velocity(x, sigmas, clips.embeds) - velocity)
                x = scheduler.step(velocity, timestep, x).prev_sample
            generated.append(x)
        return torch.cat(generated)

    def clip_figures(self, latents: Tensor, *, with_image: bool) -> dict[str, list[float]]:
        """Compute the figures of generated or real clips; docs/paper_in_small.md defines them."""
        things, places = self.probe.probabilities(latents)
        if not with_image:
            thing, place = things.mean(1).argmax(1), places.mean(1).argmax(1)
            return {
                "thing": (thing == self.clips.thing).float().tolist(),
                "place": (place == self.clips.place).float().tolist(),
                "change": change(latents).tolist(),
            }
        real = self.clips.latents
        return {
            "likeness": likeness(latents[:, :, 1:], real[:, :, 1:]).tolist(),
            "first": likeness(latents[:, :, :1], real[:, :, :1]).tolist(),
            "jump": first_jump(latents).tolist(),
            "change": change(latents).tolist(),
            "kept": (things[:, -1].argmax(1) == self.clips.thing).float().tolist(),
        }

    def references(self) -> dict[str, Any]:
        """Compute the figures of the real clips, and of their first frame as a still video."""
        real = self.clips.latents
        vae = channels_last(AutoencoderKLWan.from_pretrained(self.work / "vae", torch_dtype=torch.bfloat16))
        first = decode_video(vae, real[:, :, :1])
        frames = frames_of(real.shape[2], vae.config.scale_factor_temporal)
        stills = first.expand(-1, -1, frames, -1, -1)
        frozen = torch.cat([encode_video(vae, part) for part in stills.split(BATCH)])
        frozen[:, :, 0] = real[:, :, 0]
        return {
            "still": self.clips.still.tolist(),
            "real": {
                "image": self.clip_figures(real, with_image=True),
                "text": self.clip_figures(real, with_image=False),
            },
            "frozen": {"image": self.clip_figures(frozen, with_image=True)},
        }

    def seconds_per_forward(self) -> float:
        """Time a forward pass of one clip over two batches, after two warm-up batches."""
        clips = next(self.clips.batches(BATCH))
        sigmas = torch.full((len(clips), clips.latents.shape[2]), 0.5)
        for turn in range(4):
            if turn == 2:
                began = time.monotonic()
            self.velocity(clips.latents, sigmas, clips.embeds)
        return (time.monotonic() - began) / (2 * len(clips))


@lru_cache(maxsize=1)
def cached_judge(work: Path, out: Path, plan: Plan) -> Judge:
    """Return the `Judge` of this process: loading, and compiling above all, takes longer than a point."""
    return Judge(work, out, plan)


# ---- how far weights moved -----------------------------------------------------------------------------------------

KINDS = {"self-attention": ".attn1.", "cross-attention": ".attn2.", "feed-forward": ".ffn."}


def relative_weight_changes(base: TextToVideo, adapter: Path) -> dict[str, float]:
    """Compute, by kind of layer, the Frobenius norm of all B A over that of the weights they are added to."""
    sums = {kind: [0.0, 0.0] for kind in KINDS}
    for name, (a, b) in read_lora(adapter).pairs.items():
        kind = next(kind for kind, part in KINDS.items() if part in name)
        sums[kind][0] += float((b.double() @ a.double()).square().sum())
        sums[kind][1] += float(base.transformer.get_submodule(name).weight.double().square().sum())
    return {kind: math.sqrt(difference / weight) if weight else 0.0 for kind, (difference, weight) in sums.items()}
