"""Training of the 14B transformer on one card: seconds per step, peak memory, share of the matrix-product rate.

    python benchmarks/train_gpu.py                        # 40 layers, rank 512, 81 frames at 480p
    python benchmarks/train_gpu.py --tiny --device cpu    # the same code with a toy, to rehearse

The step is the trainer's own (`pusa.training.run`): batches made in the background, noise per frame, forward under
autocast with gradient checkpointing, backward, gradient norm, AdamW on an fp32 adapter. Weights, clips and prompts are
random and made here; nothing is downloaded. One JSON line is printed. What it says of operations is counted
(`pusa.training.flops`), the second forward of checkpointing included; `share_without_recompute` leaves it out.

The goal, in one run on one card of 139 GB: it fits, and reaches half of the rate that the card has for products of
8192 x 8192 bf16 matrices, which is measured first.

Where the card's memory or `--budget-seconds` is too small for all 40 layers, fewer are trained and the line says how
many and why (`--layers` says it beforehand): layers are alike, and a step of them takes its share of the time. What the
time is thought to be is said too: making the adapter runs on the CPU, at `SETUP_SECONDS` per parameter.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _card import (
    GRIDS,
    TOY,
    TOY_GRIDS,
    Device,
    Records,
    add_device_options,
    attempt,
    build,
    check_device,
    matmul_rate,
    seconds_of_process,
)
from _common import WAN_14B
from torch import Tensor

from pusa.training.batches import Loader
from pusa.training.config import config_from
from pusa.training.distributed import Processes
from pusa.training.flops import Workload, flops, memory
from pusa.training.model import prepare
from pusa.training.run import Run, RunContext
from pusa.training.trainer import deterministic

GOAL_BYTES, GOAL_SHARE = 139 * 10**9, 0.5
SETUP_SECONDS = 7e-8  # per trained parameter, on one core of the CPU that this was written on
GUESSED_SHARE, USABLE_MEMORY = 0.35, 0.92  # of the rate, before a step is measured; of the card's memory


class RandomClips:
    """A dataset of one shape, drawn when it is read, as `pusa.training.batches.Data` wants it."""

    hash = "random"

    def __init__(self, shape: tuple[int, int, int, int], text_tokens: int, text_dim: int, clips: int = 8) -> None:
        self.shape, self.max_sequence_length, self.text_dim = shape, text_tokens, text_dim
        self.buckets = {shape: list(range(clips))}

    def __len__(self) -> int:
        return len(self.buckets[self.shape])

    def latents(self, index: int) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(index))

    def embeds(self, index: int) -> Tensor:
        return torch.randn(self.max_sequence_length, self.text_dim, generator=torch.Generator().manual_seed(index))

    @property
    def empty_embeds(self) -> Tensor:
        return torch.zeros(1, self.text_dim)

    def split(self, held_out_share: float, seed: int = 0) -> tuple["RandomClips", "RandomClips"]:
        return self, self


def workload(options: argparse.Namespace, device: Device, layers: int | None = None) -> Workload:
    """Describe a step of so many layers (of all, if None)."""
    model, grids = (TOY, TOY_GRIDS) if options.tiny else (WAN_14B, GRIDS)
    return Workload(
        model=model if layers is None else model | {"num_layers": layers},
        grid=grids[options.size],
        text_tokens=16 if options.tiny else 512,
        rank=min(options.rank, 8) if options.tiny else options.rank,
        checkpointing=not options.no_checkpointing,
        fused_norms=device.is_cuda,
    )


def expected_seconds(work: Workload, rate: float, steps: int) -> float:
    """Guess the time of making the adapter and of `steps` steps after one that is not timed."""
    return work.trained_parameters * SETUP_SECONDS + (1 + steps) * flops(work).total / (GUESSED_SHARE * rate)


def choose_layers(options: argparse.Namespace, device: Device, rate: float, left: float) -> tuple[int, str | None]:
    """Give the most layers that fit into memory and time, and what limits them; 0 where not even one does."""
    whole = workload(options, device)["num_layers"]
    if options.layers is not None:
        return min(options.layers, whole), "--layers" if options.layers < whole else None
    total, why = device.total_bytes(), None
    if total is None:  # a CPU, whose time is not guessed
        return (whole, None) if left > 0 else (0, "time")
    for layers in range(whole, 0, -1):
        work = workload(options, device, layers)
        if memory(work).peak > USABLE_MEMORY * total:
            why = "memory"
        elif expected_seconds(work, rate, options.steps) > left:
            why = "time"
        else:
            return layers, why
    return 0, why


def measure(options: argparse.Namespace, spent_seconds: float = 0.0) -> dict[str, Any]:
    deadline = time.perf_counter() + options.budget_seconds - spent_seconds
    device = Device(options.device)
    rate = matmul_rate(device, 64 if options.tiny else 8192)
    layers, why = choose_layers(options, device, rate, deadline - time.perf_counter())
    work = workload(options, device, layers or 1)
    found: dict[str, Any] = {
        **device.description(),
        "tiny": options.tiny,
        "layers": layers,
        "of_layers": workload(options, device)["num_layers"],
        "layers_limited_by": why,
        "tokens": work.sequence,
        "rank": work.rank,
        "checkpointing": work.checkpointing,
        "deterministic": not options.not_deterministic,
        "attention": options.attention,
        "matmul_flops_per_second": rate,
    }
    if layers == 0:
        left = deadline - time.perf_counter()
        return found | {"outcome": "skipped", "why": f"{max(left, 0):.0f} s left: too little {why} for a single layer"}
    counted = flops(work)
    found |= {
        "trained_parameters": work.trained_parameters,
        "flops_per_step": counted.total,
        "expected_peak_bytes": memory(work).peak,
        "expected_seconds": expected_seconds(work, rate, options.steps) if device.is_cuda else None,
    }
    found |= attempt(lambda: _steps(options, work, device, deadline))
    if "seconds_per_step" not in found:
        return found
    reached = counted.total / found["seconds_per_step"]
    without_recompute = (counted.total - counted.recompute) / found["seconds_per_step"]
    found |= {
        "flops_per_second": reached,
        "share_of_matmul_rate": reached / rate,
        "share_without_recompute": without_recompute / rate,
    }
    if device.is_cuda and layers == found["of_layers"] and not options.tiny:
        found |= {
            "fits_139_gb": found["peak_bytes"] <= GOAL_BYTES,
            "reaches_half_of_the_rate": found["share_of_matmul_rate"] >= GOAL_SHARE,
        }
    return found


def _steps(options: argparse.Namespace, work: Workload, device: Device, deadline: float) -> dict[str, Any]:
    """Train: one step that is not timed, then as many as asked for and as the time allows."""
    config = config_from(
        {
            "name": "benchmark",
            "model": {"gradient_checkpointing": work.checkpointing, "deterministic": not options.not_deterministic},
            "method": {"rank": work.rank, "alpha": float(work.rank or 1)},
            "steps": 1 + options.steps,
            "report": {"tracker": "none"},
        }
    )
    began, shape = time.perf_counter(), (16, *work.grid)
    processes = Processes(0, 1, device.device)
    model = build(dict(work.model), device.device)
    if options.attention:
        model.set_attention_backend(options.attention)
    model, parameters = prepare(model, config, processes, [shape])
    data = RandomClips(shape, work.text_tokens, work["text_dim"])
    device.synchronize()
    setup = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder, deterministic(config, processes):
        context = RunContext(config, "transformer", Path(folder), processes, data, data, data, None, lambda: False)
        run = Run(context, model, parameters)
        seconds: list[float] = []
        with Loader(run.reader, run.plan, data_rank=0, first_step=0, device=device.device) as loader:
            began = time.perf_counter()
            run.train_step(loader)  # loads and chooses kernels, and makes the optimizer's states
            device.synchronize()
            first = longest = time.perf_counter() - began
            device.forget_peak()
            waited = loader.waited_seconds
            while len(seconds) < options.steps and time.perf_counter() + longest < deadline:
                began = time.perf_counter()
                run.train_step(loader)
                device.synchronize()
                seconds.append(time.perf_counter() - began)
                longest = max(seconds)
            waited = loader.waited_seconds - waited
    timed: dict[str, Any] = {}
    if seconds:
        timed = {
            "seconds_per_step": statistics.median(seconds),
            "seconds_of_steps": seconds,
            "share_waiting_for_data": waited / sum(seconds),
            "peak_bytes": device.peak_bytes(),
        }
    return {
        "outcome": "done" if len(seconds) == options.steps else "out of time",
        "setup_seconds": setup,
        "first_step_seconds": first,
        "steps_run": len(seconds),
        **timed,
        "skipped": run.progress.skipped,
        "finite": math.isfinite(sum(float(p.detach().sum()) for p in parameters.values())),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def main(arguments: list[str] | None = None, spent_seconds: float = 0.0) -> int:
    """Print one line of JSON, and return what the process exits with: 1 after an error."""
    parser = argparse.ArgumentParser(description="Seconds per training step and peak memory of 14B on one card.")
    add_device_options(parser, budget=540.0)
    parser.add_argument("--size", choices=sorted(GRIDS), default="480p", help="of 81 frames")
    parser.add_argument("--rank", type=int, default=512, help="of the adapter (a toy has at most 8)")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--layers", type=int, help="of 40 (default: as many as memory and time allow)")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--not-deterministic", action="store_true", help="allow sums whose order is not fixed")
    parser.add_argument("--attention", help="attention backend of diffusers (default: PyTorch's)")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    for name in ("steps", "layers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is below 1")
    records = Records(Device(options.device).name)
    records.add(f"training, {options.size}", **measure(options, spent_seconds))
    return 1 if records.failures() else 0


if __name__ == "__main__":
    sys.exit(main(spent_seconds=seconds_of_process()))
