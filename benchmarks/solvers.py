"""Does a second-order multistep solver beat Euler at 4 to 10 steps, with one sigma per latent frame?

Each solver is written elementwise over the frames of a sigma table ``[N + 1, F]``: Euler; Adams-Bashforth 2 on the
velocity (as it is, and with its slope capped at that of equal steps); DPM++ 2M (arXiv 2211.01095) and UniPC-2 with
B2(h) (arXiv 2302.04867), both on the data prediction ``x - sigma * v``. All take one model evaluation per step. Two
flows judge:

- analytic: a Gaussian mixture over whole videos, whose velocity has a closed form for any sigma per frame;
- trained: a small `PusaWanTransformer3DModel`, trained here for `--minutes` on moving discs with captions.

Every solver starts from the same noise and walks the same path as a fine reference. Prints tables and one JSON line.
"""

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from pusa.models.wan import PusaWanTransformer3DModel
from pusa.scheduler import shifted, wave_sigmas

STEPS = (4, 5, 6, 8, 10, 20)
SOLVERS = ("euler", "ab2", "ab2 capped", "dpm++ 2m", "unipc-2")
REFERENCE, WAVE, MEAN = "fine reference", "wave", "mean of tasks"
Metrics = Mapping[str, Callable[[Tensor], float]]
Velocity = Callable[[Tensor, Tensor], Tensor]  # latents [B, C, F, H, W] and sigmas [F] -> noise minus data


# --- solvers ---------------------------------------------------------------------------------------------------------


def log_snr_step(sigma: Tensor, after: Tensor) -> Tensor:
    """Growth of ``lambda = log((1 - sigma) / sigma)``, its infinite ends cut 1e-6 inside (as diffusers does)."""
    return sigma.logit(1e-6) - after.logit(1e-6)


def ratio(step: Tensor, previous: Tensor) -> Tensor:
    """``step / previous``, and 0 where the frame did not move before: no slope is known there."""
    stood = previous == 0
    return torch.where(stood, 0, step / torch.where(stood, 1, previous))


def unic_weights(before2: Tensor, before: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """UniC-2 weights for the step ``before -> sigma``: of the last difference of x0, and of the new one."""
    h = log_snr_step(before, sigma)
    h = torch.where(h == 0, 1, h)  # a frame that stands has weight 0 anyway
    b1 = -1 / torch.expm1(-h) - 1 / h
    b2 = -1 / torch.expm1(-h) - 2 * b1 / h
    growth = ratio(h, log_snr_step(before2, before))
    old = torch.where(growth == 0, 0, (b1 - b2) / (1 + 1 / torch.where(growth == 0, 1, growth)))
    new = torch.where(growth == 0, 0.5, b1 - old)
    is_clean = sigma == 0
    return torch.where(is_clean, 0, old * growth), torch.where(is_clean, 1, new)


def sample(velocity: Velocity, x: Tensor, table: Tensor, solver: str) -> Tensor:
    """Walk down ``table [N + 1, F]`` from ``x [B, C, F, H, W]``; one evaluation per step."""
    walk = multistep_x0 if solver in ("dpm++ 2m", "unipc-2") else multistep_velocity
    return walk(velocity, x, table, solver)


def multistep_velocity(velocity: Velocity, x: Tensor, table: Tensor, solver: str) -> Tensor:
    """Straight or bent steps: ``x += (after - sigma) * (v + slope * (v - v_before))``."""
    rows = table.to(x)[:, :, None, None]  # [N + 1, F, 1, 1]
    v_before = torch.zeros_like(x)
    for k, (sigma, after) in enumerate(pairwise(rows)):
        slope = ratio(after - sigma, sigma - rows[max(k - 1, 0)]) / 2
        if solver == "euler":
            slope = torch.zeros_like(slope)
        elif solver == "ab2 capped":
            slope = slope.clamp(max=0.5)  # what equal steps have: extrapolate by half a difference at most
        v = velocity(x, table[k])
        x = x + (after - sigma) * (v + slope * (v - v_before))
        v_before = v
    return x


def multistep_x0(velocity: Velocity, x: Tensor, table: Tensor, solver: str) -> Tensor:
    """DPM++ 2M, which is also UniP-2; UniPC first corrects each point with the evaluation made there."""
    rows = table.to(x)[:, :, None, None]  # [N + 1, F, 1, 1]
    x0s = [torch.zeros_like(x)] * 2
    x_before = x
    for k, (sigma, after) in enumerate(pairwise(rows)):
        before2, before = rows[max(k - 2, 0)], rows[max(k - 1, 0)]
        x0s.append(x - sigma * velocity(x, table[k]))
        if solver == "unipc-2" and k > 0:
            old, new = unic_weights(before2, before, sigma)
            bend = old * (x0s[-2] - x0s[-3]) + new * (x0s[-1] - x0s[-2])
            x = x_before + ratio(before - sigma, before) * (x0s[-2] - x_before + bend)
        x_before = x
        slope = ratio(log_snr_step(sigma, after), log_snr_step(before, sigma)) / 2
        slope = torch.where(after == 0, 0, slope)  # lambda is infinite there: first order, as is usual
        x = x + ratio(sigma - after, sigma) * (x0s[-1] - x + slope * (x0s[-1] - x0s[-2]))
    return x


def heun(velocity: Velocity, x: Tensor, table: Tensor) -> Tensor:
    """Two evaluations per step: the reference, on a fine table."""
    for sigma, after in pairwise(table):
        change = (after - sigma).to(x)[:, None, None]
        v = velocity(x, sigma)
        x = x + change / 2 * (v + velocity(x + change * v, after))
    return x


def difference_from_diffusers(velocity: Velocity, noise: Tensor, steps: int = 8) -> float:
    """Largest difference between the ends of our UniPC-2 and of diffusers', all frames at one sigma."""
    stock = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    stock.set_timesteps(steps)
    stock.set_begin_index(0)
    stock.sigmas = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), 5.0)
    stock.sigmas[0] = 1 - 1e-6
    table = stock.sigmas[:, None].repeat(1, noise.shape[2])  # [N + 1, F]
    x = noise
    for timestep, sigmas in zip(stock.timesteps, table, strict=False):
        x = stock.step(velocity(x, sigmas), timestep, x).prev_sample
    return float((sample(velocity, noise, table, "unipc-2") - x).abs().max())


# --- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Noise multipliers of the known latent frames; or the wave, in which each frame starts a step after the last."""

    name: str
    guidance: float
    multipliers: tuple[tuple[int, float], ...] = ()

    def table(self, steps: int, frames: int, refine: int = 1) -> Tensor:
        """fp64 ``[rows, F]``; ``refine`` cuts each step into that many, along the same path."""
        if self.name == WAVE:
            return wave_sigmas(frames, steps * refine, delay=refine).double()
        scale = torch.ones(frames, dtype=torch.float64)
        for frame, multiplier in self.multipliers:
            scale[frame] = multiplier
        return shifted(torch.linspace(1, 0, steps * refine + 1, dtype=torch.float64), 5.0)[:, None] * scale


TASKS = (
    Task("text", 1),
    Task("text", 3),
    Task("image", 1, ((0, 0.0),)),
    Task("image", 3, ((0, 0.0),)),
    Task("image, noise 0.2", 3, ((0, 0.2),)),
    Task("start-end, 0.2 0.5", 3, ((0, 0.2), (-1, 0.5))),
)


def add_noise(data: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    sigma = sigmas.to(data)[:, None, None]
    return (1 - sigma) * data + sigma * noise


class EnergyDistance:
    """Unbiased energy distance to held-out data: about 0 for equal distributions, and it may fall below 0."""

    def __init__(self, data: Tensor) -> None:
        self.data = data.flatten(1)
        self.within = self._within(self.data)

    def __call__(self, samples: Tensor) -> float:
        rows = samples.flatten(1)
        return float(2 * torch.cdist(rows, self.data).mean() - self._within(rows) - self.within)

    @staticmethod
    def _within(rows: Tensor) -> Tensor:
        return torch.cdist(rows, rows).sum() / (len(rows) * (len(rows) - 1))


def relative_rms(x: Tensor, target: Tensor, moves: Tensor) -> float:
    """RMS distance over the frames that move, over the target's RMS there."""
    return float((x - target)[:, :, moves].square().mean().sqrt() / target[:, :, moves].square().mean().sqrt())


Key = tuple[float, str, str, str, int]  # guidance, metric, task, solver, evaluations


class Results:
    """Figures on one flow by `Key`, one per seed."""

    def __init__(self, flow: str) -> None:
        self.flow = flow
        self.values: defaultdict[Key, list[float]] = defaultdict(list)

    def compare(
        self, task: Task, velocity: Velocity, start: Tensor, table: Tensor, reference: Tensor, metrics: Metrics
    ) -> None:
        """Run every solver down `table`; take its distance from `reference`, and each of `metrics`."""
        for solver in (REFERENCE, *SOLVERS):
            end = reference if solver == REFERENCE else sample(velocity, start, table, solver)
            figures = {name: measure(end) for name, measure in metrics.items()}
            if solver != REFERENCE:
                figures["RMS from the exact flow"] = relative_rms(end, reference, table[0] > 0)
            for name, value in figures.items():
                self.values[task.guidance, name, task.name, solver, len(table) - 1].append(value)

    def with_task_means(self) -> dict[Key, list[float]]:
        """Also the mean of tasks (seed by seed, the wave left out) per guidance and metric."""
        by_task = defaultdict(list)
        for (guidance, metric, task, solver, steps), values in self.values.items():
            if task != WAVE:
                by_task[guidance, metric, MEAN, solver, steps].append(values)
        return self.values | {key: torch.tensor(values).mean(0).tolist() for key, values in by_task.items()}

    def print(self) -> None:
        """A table per group: mean over seeds, and the standard error of the difference from Euler (same noise)."""
        results = self.with_task_means()
        for group in dict.fromkeys(key[:3] for key in results):
            guidance, metric, task = group
            steps = [key[4] for key in results if key[:4] == (*group, "euler")]
            print(f"\n{self.flow} flow, {task}, guidance {guidance:g}: {metric}")
            print(f"{'solver':16}" + "".join(f"{f'{n} steps':>16}" for n in steps))
            for solver in [s for s in (REFERENCE, *SOLVERS) if (*group, s, steps[0]) in results]:
                cells = [self._cell(results[*group, solver, n], results[*group, "euler", n]) for n in steps]
                print(f"{solver:16}" + "".join(f"{cell:>16}" for cell in cells))

    @staticmethod
    def _cell(values: list[float], euler: list[float]) -> str:
        gap = torch.tensor(values) - torch.tensor(euler)
        spread = f" ±{gap.std() / len(gap) ** 0.5:.3f}" if len(gap) > 1 and gap.any() else ""
        return f"{sum(values) / len(values):.3f}{spread}"

    def summary(self) -> Mapping[str, Mapping[str, list[float]]]:
        """Means over tasks and seeds, a figure per number of steps, by metric and solver."""
        figures: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for (guidance, metric, task, solver, _), values in self.with_task_means().items():
            if task == MEAN:
                figures[f"guidance {guidance:g}, {metric}"][solver].append(round(sum(values) / len(values), 4))
        return figures


# --- analytic flow ---------------------------------------------------------------------------------------------------


class MixtureFlow:
    """Videos ``[B, D, F, 1, 1]`` from a mixture of Gaussians, half of whose components are the asked-for class.

    Each component is a straight path of the D features over the frames, from one of four places in one of four
    directions (the class is the first two), plus a Gaussian wobble correlated over time, with variances from 0.3 down
    to 0.001 (data lie near a thin sheet, as images do). At any sigma per frame the noised components are Gaussian
    again, one F x F covariance per feature, so noise and data have exact posterior means.
    """

    def __init__(self, frames: int = 6, features: int = 12) -> None:
        generator = torch.Generator().manual_seed(1)
        place, motion = torch.randn(2, 4, features, 1, dtype=torch.float64, generator=generator)
        path = torch.linspace(0, 1.5, frames, dtype=torch.float64) * motion  # [4, D, F]
        self.means = (0.8 * place + path[:, None]).flatten(0, 1)  # [K = 16, D, F]
        time_ = torch.linspace(-1, 1, frames, dtype=torch.float64)
        lag = (time_[:, None] - time_).abs()
        variances = torch.logspace(math.log10(0.3), -3, features, dtype=torch.float64)
        self.covariance = variances[:, None, None] * torch.exp(-lag)  # [D, F, F]

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """Videos of the asked-for class, ``[B, D, F, 1, 1]``."""
        kind = torch.randint(len(self.means) // 2, (count,), generator=generator)
        wobble = torch.randn(count, *self.means.shape[1:], dtype=torch.float64, generator=generator)
        root = torch.linalg.cholesky(self.covariance)
        return (self.means[kind] + torch.einsum("dfg,bdg->bdf", root, wobble))[..., None, None]

    def velocity(self, x: Tensor, sigma: Tensor, guidance: float = 1.0) -> Tensor:
        """``E[noise - data | x]``, guided from the whole mixture to the class."""
        clean = 1 - sigma
        mixed = clean[:, None] * self.covariance * clean + (sigma**2).diag()  # [D, F, F]
        inverse = torch.linalg.inv(mixed)
        gap = x[:, None, :, :, 0, 0] - clean * self.means  # [B, K, D, F]
        pull = torch.einsum("dfg,bkdg->bkdf", inverse, gap)
        fit = -0.5 * (gap * pull).sum((2, 3))  # [B, K], log likelihood up to a constant
        data = self.means + torch.einsum("dfg,bkdg->bkdf", self.covariance * clean, pull)
        velocities = sigma * pull - data  # per component
        half = len(self.means) // 2
        asked = torch.einsum("bk,bkdf->bdf", fit[:, :half].softmax(1), velocities[:, :half])
        if guidance != 1:
            free = torch.einsum("bk,bkdf->bdf", fit.softmax(1), velocities)
            asked = free + guidance * (asked - free)
        return asked[..., None, None]


def run_analytic(seeds: int, count: int = 64) -> tuple[Results, float]:
    """The results, and the largest difference between our UniPC-2 and diffusers'."""
    results = Results("analytic")
    flow = MixtureFlow()
    frames = flow.means.shape[-1]
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        data = flow.data(count, generator)
        metrics = {"energy distance to data": EnergyDistance(flow.data(2048, generator))}
        noise = torch.randn(data.shape, dtype=torch.float64, generator=generator)
        for task in (*TASKS, Task(WAVE, 3)):
            velocity = partial(flow.velocity, guidance=task.guidance)
            for n in STEPS:
                table = task.table(n, frames)
                start = add_noise(data, noise, table[0])
                if n == STEPS[0] or task.name == WAVE:  # the path of a wave depends on its number of steps
                    reference = heun(velocity, start, task.table(n, frames, refine=200 // n))
                results.compare(task, velocity, start, table, reference, metrics)
    return results, difference_from_diffusers(flow.velocity, noise)


# --- trained flow ----------------------------------------------------------------------------------------------------

FRAMES, CHANNELS, SIZE, TEXT = 6, 4, 8, 32
MOTIONS = torch.tensor([(0.7, 0, 0), (-0.7, 0, 0), (0, 0.7, 0), (0, -0.7, 0), (0, 0, 0.25), (0, 0, -0.25), (0, 0, 0)])


SMALL: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "num_layers": 4,
    "ffn_dim": 256,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT,
    "freq_dim": 64,
    "rope_max_seq_len": 32,
}


class Discs:
    """A soft disc moves, grows or shrinks over a striped slope of colour: latents ``[B, 4, 6, 8, 8]`` of unit scale.

    A caption names the colour, the motion and the ground; first frame and caption together determine the video.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.colours = 1.5 * torch.randn(6, CHANNELS, generator=generator)
        self.grounds = torch.randn(4, 2, CHANNELS, generator=generator)
        self.waves = torch.tensor([(0.9, 0.0), (0.0, 0.9), (0.7, 0.7), (0.5, -1.2)])
        self.words = [torch.randn(n, TEXT, generator=generator) for n in (6, len(MOTIONS), 4)]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and caption embeddings ``[B, 3, TEXT]``."""
        colour, motion, ground = (torch.randint(len(w), (count,), generator=generator) for w in self.words)
        places = torch.arange(SIZE) + 0.5
        frame = torch.arange(FRAMES)[:, None, None]
        x0, y0, size, phase, light = torch.rand(5, count, 1, 1, 1, generator=generator)
        dx, dy, growth = MOTIONS[motion].T[..., None, None, None]
        x, y = 2.5 + 3 * x0 - 2.5 * dx + frame * dx, 2.5 + 3 * y0 - 2.5 * dy + frame * dy
        radius = 1.5 + size - 2.5 * growth + frame * growth  # [B, F, 1, 1]
        distance = ((places - x) ** 2 + (places[:, None] - y) ** 2).sqrt()
        mask = torch.sigmoid(3 * (radius - distance))[:, None]  # [B, 1, F, H, W]
        kx, ky = self.waves[ground].T[..., None, None]
        stripes = 0.3 * torch.cos(kx * places + ky * places[:, None] + 2 * math.pi * phase[:, 0])  # [B, H, W]
        top, bottom = self.grounds[ground].movedim(1, 0)[..., None, None, None]  # [B, C, 1, 1, 1]
        slope = (places / SIZE)[:, None]
        back = top + (bottom - top) * slope + stripes[:, None, None] + 0.4 * (light[:, None] - 0.5)
        video = back * (1 - mask) + self.colours[colour][..., None, None, None] * mask
        text = torch.stack([w[i] for w, i in zip(self.words, (colour, motion, ground), strict=True)], dim=1)
        return video, text


def noised_times(count: int, generator: torch.Generator) -> Tensor:
    """Shifted sigmas ``[B, F]``: half the batch one per frame (and a fifth of its frames clean), half synchronous."""
    normal = torch.randn(count, FRAMES, generator=generator)
    normal[count // 2 :] = normal[count // 2 :, :1]
    sigma = shifted(normal.sigmoid(), 3.0)
    is_clean = torch.rand(count // 2, FRAMES, generator=generator) < 0.2
    sigma[: count // 2][is_clean] = 0
    return sigma


def train(world: Discs, minutes: float, cache: Path, batch: int = 32) -> PusaWanTransformer3DModel:
    """Velocity regression with 10 % caption dropout; Muon for the blocks' matrices, AdamW for the rest; cached."""
    torch.manual_seed(0)
    model = PusaWanTransformer3DModel(**SMALL)
    file = cache / f"discs-{minutes:g}-minutes.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0),
    ]
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    generator = torch.Generator().manual_seed(0)
    begin, step = time.process_time(), 0
    while (done := (time.process_time() - begin) / (60 * minutes)) < 1:
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * min(1, (step + 1) / 50, (1 - done) / 0.4)
        clean, text = world.draw(batch, generator)
        noise = torch.randn(clean.shape, generator=generator)
        times = noised_times(batch, generator)
        sigma = times[:, None, :, None, None]
        text = text * (torch.rand(batch, 1, 1, generator=generator) >= 0.1)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model((1 - sigma) * clean + sigma * noise, 1000 * times, text, return_dict=False)[0]
        loss = ((velocity.float() - (noise - clean)).square() * (sigma > 0)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
        step += 1
    print(f"trained for {step} steps", flush=True)
    model.load_state_dict(average.module.state_dict())
    torch.save(model.state_dict(), file)
    return model.eval()


def whitening(data: Tensor, components: int = 48) -> Callable[[Tensor], Tensor]:
    """Features of unit variance: the leading principal components of `data`."""
    mean = data.flatten(1).mean(0)
    _, scale, axes = torch.pca_lowrank(data.flatten(1) - mean, q=components, center=False, niter=4)
    axes = axes / scale * len(data) ** 0.5
    return lambda x: (x.float().flatten(1) - mean) @ axes


def guided(model: PusaWanTransformer3DModel, x: Tensor, sigma: Tensor, *, text: Tensor, guidance: float) -> Tensor:
    times = 1000 * sigma.float().repeat(len(x), 1)  # [B, F]
    if guidance == 1:
        return model(x, times, text, return_dict=False)[0]
    both = torch.cat([text, torch.zeros_like(text)])
    asked, free = model(x.repeat(2, 1, 1, 1, 1), times.repeat(2, 1), both, return_dict=False)[0].chunk(2)
    return free + guidance * (asked - free)


@torch.no_grad()
def run_trained(seeds: int, minutes: float, cache: Path, count: int = 16) -> Results:
    """Also measures the distance from the real clip where frames are known; the last of `STEPS` is left out."""
    results = Results("trained")
    world = Discs()
    with torch.enable_grad():
        model = train(world, minutes, cache)
    held_out, _ = world.draw(4096, torch.Generator().manual_seed(1_000_000))
    features = whitening(held_out)
    distance = EnergyDistance(features(held_out))
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(2_000_000 + seed)
        clip, text = world.draw(count, generator)
        noise = torch.randn(clip.shape, generator=generator)
        for task in TASKS:
            velocity = partial(guided, model, text=text, guidance=task.guidance)
            fine = task.table(32, FRAMES)
            start = add_noise(clip, noise, fine[0])
            reference = heun(velocity, start, fine)
            metrics = {"energy distance to data": lambda x: distance(features(x))}
            if task.multipliers:
                metrics["RMS from the real clip"] = partial(relative_rms, target=clip, moves=fine[0] > 0)
            for n in STEPS[:-1]:
                results.compare(task, velocity, start, task.table(n, FRAMES), reference, metrics)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare multistep solvers with Euler, one sigma per latent frame.")
    parser.add_argument("--minutes", type=float, default=3.0, help="processor time to train for; 0: analytic flow only")
    parser.add_argument("--seeds", type=int, default=4, help="independent noises and data per figure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="folder that keeps the trained model (default: a temporary one)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cache = arguments.cache or Path(tempfile.gettempdir()) / "pusa-solvers"
    cache.mkdir(parents=True, exist_ok=True)
    analytic, difference = run_analytic(arguments.seeds)
    flows = [analytic]
    if arguments.minutes > 0:
        flows.append(run_trained(arguments.seeds, arguments.minutes, cache))
    for results in flows:
        results.print()
    summaries = {results.flow: results.summary() for results in flows}
    print(json.dumps({"steps": STEPS, "difference_from_diffusers_unipc": difference, **summaries}))


if __name__ == "__main__":
    main()
