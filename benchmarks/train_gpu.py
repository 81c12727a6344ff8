"""Training of the 14B transformer on one card: seconds per step, peak memory, share of the matrix-product rate.

    python benchmarks/train_gpu.py                        # 40 layers, rank 512, 81 frames at 480p
    python benchmarks/train_gpu.py --tiny --device cpu    # the same code with a toy, to rehearse

The step is the trainer's own (`pusa.training.run`): batches made in the background, noise per frame, forward under
autocast with gradient checkpointing, backward, gradient norm, AdamW on an fp32 adapter. Weights, clips and prompts are
random and made here; nothing is downloaded. One JSON line is printed. What it says of operations is counted
(`pusa.training.counting`), the second forward of checkpointing included; `share_without_recompute` leaves it out.

The goal, in one run on one card of 139 GB: it fits, and reaches half of the rate that the card has for products of
8192 x 8192 bf16 matrices, which is measured first.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import WAN_14B
from gpu import GRIDS, TOY, TOY_GRIDS, Device, build, emit, matmul_rate
from torch import Tensor

from pusa.training.adapting import prepare
from pusa.training.batches import Loader
from pusa.training.config import config_from
from pusa.training.counting import Workload, flops, memory
from pusa.training.launch import Processes
from pusa.training.run import Job, Run
from pusa.training.trainer import _deterministic

GOAL_BYTES, GOAL_SHARE = 139 * 10**9, 0.5


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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    deadline = time.perf_counter() + options.budget_seconds
    device = Device(options.device)
    model_config, grids = (TOY, TOY_GRIDS) if options.tiny else (WAN_14B, GRIDS)
    grid, text_tokens = grids[options.size], 16 if options.tiny else 512
    rank = min(options.rank, 8) if options.tiny else options.rank
    config = config_from(
        {
            "name": "benchmark",
            "model": {
                "gradient_checkpointing": not options.no_checkpointing,
                "deterministic": not options.not_deterministic,
            },
            "method": {"rank": rank, "alpha": float(rank)},
            "steps": 1 + options.steps,
            "report": {"tracker": "none"},
        }
    )
    work = Workload(
        model=model_config,
        grid=grid,
        text_tokens=text_tokens,
        rank=rank,
        checkpointing=config.model.gradient_checkpointing,
        fused_norms=device.is_cuda,
    )
    counted, expected = flops(work), memory(work)
    found: dict[str, Any] = {
        "case": f"training, {options.size}",
        **device.description(),
        "tiny": options.tiny,
        "layers": model_config["num_layers"],
        "tokens": work.sequence,
        "rank": rank,
        "trained_parameters": work.trained_parameters,
        "checkpointing": config.model.gradient_checkpointing,
        "deterministic": config.model.deterministic,
        "attention": options.attention,
        "flops_per_step": counted.total,
        "expected_peak_bytes": expected.peak,
        "matmul_flops_per_second": matmul_rate(device, 256 if options.tiny else 8192),
    }
    try:
        found |= _steps(options, config, device, model_config, (16, *grid), text_tokens, deadline)
    except torch.OutOfMemoryError as error:
        return found | {"outcome": "out of memory", "error": str(error).partition(". GPU")[0]}
    rate = counted.total / found["seconds_per_step"]
    found |= {
        "flops_per_second": rate,
        "share_of_matmul_rate": rate / found["matmul_flops_per_second"],
        "share_without_recompute": (counted.total - counted.recompute)
        / found["seconds_per_step"]
        / found["matmul_flops_per_second"],
    }
    if device.is_cuda and not options.tiny:
        found |= {
            "fits_139_gb": found["peak_bytes"] <= GOAL_BYTES,
            "reaches_half_of_the_rate": found["share_of_matmul_rate"] >= GOAL_SHARE,
        }
    return found


def _steps(
    options: argparse.Namespace,
    config: Any,
    device: Device,
    model_config: dict[str, Any],
    shape: tuple[int, int, int, int],
    text_tokens: int,
    deadline: float,
) -> dict[str, Any]:
    processes = Processes(0, 1, device.device)
    model = build(model_config, device.device)
    if options.attention:
        model.set_attention_backend(options.attention)
    model, parameters = prepare(model, config, processes, [shape])
    data = RandomClips(shape, text_tokens, model_config["text_dim"])
    with tempfile.TemporaryDirectory() as folder, _deterministic(config, processes):
        job = Job(config, "transformer", Path(folder), processes, data, data, data, None, lambda: False)
        run = Run(job, model, parameters)
        seconds: list[float] = []
        with Loader(run.reader, run.plan, data_rank=0, first_step=0, device=device.device) as loader:
            run._step(loader)  # loads and chooses kernels, and makes the optimizer's states
            device.synchronize()
            device.forget_peak()
            waited = loader.waited_seconds
            while len(seconds) < options.steps and (not seconds or time.perf_counter() + max(seconds) < deadline):
                began = time.perf_counter()
                run._step(loader)
                device.synchronize()
                seconds.append(time.perf_counter() - began)
            waited = loader.waited_seconds - waited
    return {
        "outcome": "done" if len(seconds) == options.steps else "out of time",
        "steps_run": len(seconds),
        "seconds_per_step": statistics.median(seconds),
        "seconds_of_steps": seconds,
        "share_waiting_for_data": waited / sum(seconds),
        "skipped": run.progress.skipped,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak_bytes": device.peak_bytes(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Seconds per training step and peak memory of 14B on one card.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parser.add_argument("--size", choices=sorted(GRIDS), default="480p", help="of 81 frames")
    parser.add_argument("--rank", type=int, default=512, help="of the adapter (a toy has at most 8)")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--not-deterministic", action="store_true", help="allow sums whose order is not fixed")
    parser.add_argument("--attention", help="attention backend of diffusers (default: PyTorch's)")
    parser.add_argument("--budget-seconds", type=float, default=540, help="begin no step that would end later")
    parser.add_argument("--tiny", action="store_true", help="a toy model and toy videos")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device: rehearse with --tiny --device cpu")
    if options.steps < 1:
        parser.error(f"--steps {options.steps} is below 1")
    emit(**measure(options))


if __name__ == "__main__":
    main()
