"""The 14B transformer on one card: seconds per step, peak memory and share of the card's matrix-product rate.

    python benchmarks/gpu.py                        # 40 layers of random bf16 weights, 81 frames at 480p and 720p
    python benchmarks/gpu.py --short                # every question once, in 170 seconds: see `_short.py`
    python benchmarks/gpu.py --tiny --device cpu    # the same code with a toy, to rehearse

Nothing is downloaded: weights, latents and prompt embeddings are random (speed does not depend on them), and no video
is decoded. The first latent frame is known and stays clean, as in image-to-video. Every case is one JSON line, printed
as soon as it is known:

- the card, its measured bf16 rate on 8192 x 8192 matrices of random numbers, and how far the paths agree on it;
- one timestep per frame (`PusaPipeline`): 4 steps without guidance, 10 steps with;
- the stock scalar path and the stock per-token path (`WanPipeline`, the latter with `expand_timesteps`): two steps.

A case stops where the time budget ends (`steps_run` below `steps`) and is skipped where not even a step would fit.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from _card import (
    GRIDS,
    TOY,
    TOY_GRIDS,
    Device,
    add_device_options,
    arguments_for,
    build,
    check_device,
    emit,
    make_pipeline,
    matmul_rate,
    seconds_of_process,
)
from _common import WAN_14B, forward_flops, in_dtype, stock_twin, timesteps_for
from _short import Short
from diffusers import WanPipeline
from torch import Tensor

from pusa.conditions import PusaCondition
from pusa.models.wan import PusaWanTransformer3DModel


@dataclass(frozen=True)
class Case:
    size: str
    path: str  # "frame", "scalar" or "token"
    steps: int
    guidance: float = 1.0

    @property
    def forwards_per_step(self) -> int:
        return 2 if self.guidance > 1 else 1


CASES = (  # the longest comes last: it gives up steps when the budget is small
    Case("480p", "frame", steps=4),
    Case("480p", "scalar", steps=2),
    Case("480p", "token", steps=2),
    Case("720p", "frame", steps=4),
    Case("720p", "scalar", steps=2),
    Case("720p", "token", steps=2),
    Case("480p", "frame", steps=10, guidance=3.0),
    Case("720p", "frame", steps=10, guidance=3.0),
)


class Bench:
    """The cases, on one model, within a time budget."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.deadline = time.perf_counter() + options.budget_seconds
        self.device = Device(options.device)
        self.config, self.grids = (TOY, TOY_GRIDS) if options.tiny else (WAN_14B, GRIDS)
        self.text_tokens = 16 if options.tiny else 512
        emit(case="device", tiny=options.tiny, attention=options.attention, **self.device.description())
        self.rate = matmul_rate(self.device, 64 if options.tiny else 8192)
        emit(case="matmul", dtype="bf16", flops_per_second=self.rate)
        self.numerics()
        begin = time.perf_counter()
        self.model = build(self.config, self.device.device)
        if options.attention:
            self.model.set_attention_backend(options.attention)
        self.device.synchronize()
        emit(
            case="model",
            parameters=sum(p.numel() for p in self.model.parameters()),
            layers=self.config["num_layers"],
            weight_bytes=sum(p.numel() * p.element_size() for p in self.model.parameters()),
            seconds=time.perf_counter() - begin,
        )
        self.share = 0.4  # of the rate: a guess until the first case, then what the last case reached
        self.warm: set[tuple[str, str]] = set()

    def numerics(self) -> None:
        """Compare the paths on this device, at a small size."""
        torch.backends.cudnn.allow_tf32 = False  # or the patch embedding would not be fp32
        device, grid = self.device.device, (5, 16, 16)
        torch.manual_seed(0)
        model = PusaWanTransformer3DModel(**TOY).eval()
        latents, text = torch.randn(1, 16, *grid), torch.randn(1, 16, TOY["text_dim"])
        times = torch.tensor([[0.0, 1000.0, 937.5, 333.25, 12.0]])
        on_cpu = model(latents, times, text, return_dict=False)[0]
        model.to(device)
        models = {"fp32": model, "bf16": in_dtype(model, torch.bfloat16)}

        def velocity(name: str, path: str, times: Tensor) -> Tensor:
            model = models[name] if path == "frame" else stock_twin(models[name])
            t = timesteps_for(path, times.to(device), grid[0] * grid[1] * grid[2] // 4)
            return model(latents.to(device, model.dtype), t, text.to(device, model.dtype), return_dict=False)[0].float()

        spread = (on_cpu.max() - on_cpu.min()).item()
        for name in models:
            frame, same = velocity(name, "frame", times), torch.full_like(times, 500.0)
            by_token = (frame - velocity(name, "token", times)).abs().max().item()
            by_scalar = velocity(name, "frame", same) - velocity(name, "scalar", same)
            from_cpu = (frame.cpu() - on_cpu).abs().max().item()
            emit(
                case="numerics",
                dtype=name,
                frame_equals_token=by_token == 0,
                frame_minus_token_of_range=by_token / spread,
                frame_minus_scalar_of_range=by_scalar.abs().max().item() / spread,
                minus_cpu_fp32_of_range=from_cpu / spread,
            )
        arguments = arguments_for(grid, 16, TOY["text_dim"], device)
        known = torch.randn(16, 1, *grid[1:], device=device)
        condition = PusaCondition(latents=known, latent_index=2, noise_multiplier=0.0)
        pipe = make_pipeline(models["bf16"], "frame")
        kept = pipe(conditions=[condition], num_inference_steps=4, guidance_scale=3.0, **arguments).frames[0, :, 2:3]
        emit(case="numerics", dtype="bf16", noise_multiplier_0_is_kept=torch.equal(kept, known))

    def step_flops(self, case: Case) -> int:
        grid = self.grids[case.size]
        tokens = grid[0] * grid[1] * grid[2] // 4
        timesteps = {"scalar": 1, "frame": grid[0], "token": tokens}[case.path]
        return case.forwards_per_step * forward_flops(self.config, grid, self.text_tokens, timesteps)

    def arguments(self, size: str) -> dict[str, Any]:
        return arguments_for(self.grids[size], self.text_tokens, self.config["text_dim"], self.device.device)

    def needs_warm_up(self, case: Case) -> bool:
        """Return True if a forward must come first, so that no case pays for loading and choosing kernels."""
        return (case.size, case.path) not in self.warm

    def run(self, case: Case) -> None:
        flops = self.step_flops(case)
        described = {
            "case": f"{case.size}, {case.path}",
            "pipeline": "PusaPipeline" if case.path == "frame" else "WanPipeline",
            "steps": case.steps,
            "guidance": case.guidance,
            "flops_per_step": flops,
        }
        needed = flops / (self.share * self.rate) * (1 + self.needs_warm_up(case))
        left = self.deadline - time.perf_counter()
        if needed > left:
            emit(**described, outcome="skipped", why=f"{left:.0f} s left, the first step needs about {needed:.0f} s")
            return
        pipe, arguments = make_pipeline(self.model, case.path), self.arguments(case.size)
        if case.path == "frame":
            known = torch.randn(16, 1, *self.grids[case.size][1:], device=self.device.device)
            arguments["conditions"] = [PusaCondition(latents=known, latent_index=0)]
        held = self.device.held_bytes()
        seconds: list[float] = []
        last = 0.0

        def after_step(pipe: WanPipeline, k: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal last
            self.device.synchronize()
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
            pipe._interrupt = now + max(seconds) > self.deadline
            return {}

        try:
            if self.needs_warm_up(case):
                pipe(num_inference_steps=1, guidance_scale=1.0, **arguments)
                self.warm.add((case.size, case.path))
            self.device.forget_peak()
            self.device.synchronize()
            began = last = time.perf_counter()
            pipe(
                num_inference_steps=case.steps,
                guidance_scale=case.guidance,
                callback_on_step_end=after_step,
                **arguments,
            )
        except torch.OutOfMemoryError as error:
            emit(**described, outcome="out of memory", error=str(error).partition(". GPU")[0], held_bytes=held)
            return
        total, per_step = time.perf_counter() - began, statistics.median(seconds)
        self.share = flops / per_step / self.rate
        peak = self.device.peak_bytes()
        emit(
            **described,
            outcome="done" if len(seconds) == case.steps else "out of time",
            steps_run=len(seconds),
            seconds=total,
            seconds_per_step=per_step,
            seconds_of_steps=seconds,
            flops_per_second=flops / per_step,
            share_of_matmul_rate=self.share,
            peak_bytes=peak,
            peak_beyond_weights_bytes=None if peak is None or held is None else peak - held,
        )


@torch.no_grad()
def main(arguments: list[str] | None = None, spent_seconds: float = 0.0) -> int:
    """Measure, and return what the process exits with; `spent_seconds` of a short run's budget are gone already."""
    parser = argparse.ArgumentParser(description="Seconds per step and peak memory of the 14B transformer on one card.")
    add_device_options(parser)
    parser.add_argument("--short", action="store_true", help="every question once, the most important ones first")
    parser.add_argument("--budget-seconds", type=float, help="begin nothing that would end later (540; short: 170)")
    parser.add_argument("--attention", help="attention backend of diffusers (default: PyTorch's); short tries them all")
    parser.add_argument(
        "--compiler", default="inductor", help="of a short run's compiled case, as torch.compile has it"
    )
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    if options.short and options.attention:
        parser.error("--short tries every attention backend: leave --attention out")
    if options.budget_seconds is None:
        options.budget_seconds = 170.0 if options.short else 540.0
    torch.manual_seed(0)
    if options.short:
        return Short(options, spent_seconds).run()
    bench = Bench(options)
    for case in CASES:
        bench.run(case)
    return 0


if __name__ == "__main__":
    sys.exit(main(spent_seconds=seconds_of_process()))
