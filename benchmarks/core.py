"""Measure the cost of vectorised timesteps: one per frame against one per sample and one per token; the whole loop.

Everything runs on the same random weights on the CPU, in one process, each variant in turn in every round, so that
other programs on the machine slow all of them alike. The least CPU time of the rounds is compared.

    python benchmarks/core.py

- forward: seconds, peak memory and FLOPs of the three paths, fp32 and bf16. Goals: one timestep per frame takes at most
  2 % more time than one per sample, and 5 % more memory (fp32).
- loop: `PusaPipeline` against stock `WanPipeline` at the same sigmas, from the same noise to the same latents. Goal: no
  slower.
- conditions: the loop with 0 to F known frames. Goal: nothing grows.

Prints tables and one JSON line. Peak memory is what the allocator held at most beyond the weights, so it is exact.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is silent about itself

import torch
from _common import WAN_14B, SameSigmas, in_dtype, stock_twin, table, timesteps_for
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pusa.conditions import PusaCondition
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler

PATHS = ("scalar", "frame", "token")
SIZES: dict[str, dict[str, Any]] = {  # of the transformer; latent frames, height and width; prompt tokens
    "tiny": {"heads": 1, "layers": 1, "ffn": 256, "grid": (5, 8, 8), "text": 16},
    "small": {"heads": 4, "layers": 2, "ffn": 1536, "grid": (21, 16, 20), "text": 64},
    "medium": {"heads": 4, "layers": 4, "ffn": 1536, "grid": (21, 24, 28), "text": 512},
}
Variant = Callable[[], Tensor]


def interleaved(variants: Mapping[str, Variant], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """CPU seconds and seconds by the clock of each variant in each round, after one that does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        names = list(variants) if number % 2 else list(variants)[::-1]  # nobody always follows the same neighbour
        for name in names:
            cpu, clock = time.process_time(), time.perf_counter()
            variants[name]()
            if number >= 0:
                seconds[name].append((time.process_time() - cpu, time.perf_counter() - clock))
    return seconds


def peak_bytes(variant: Variant) -> int:
    """The most memory that tensors made by `variant` held at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        variant()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def rows_of(variants: Mapping[str, Variant], rounds: int, base: str) -> list[dict[str, Any]]:
    """Time and memory of each variant, and both relative to `base`."""
    seconds = interleaved(variants, rounds)
    peaks = {name: peak_bytes(variant) for name, variant in variants.items()}
    rows = []
    for name in variants:
        cpu, clock = zip(*seconds[name], strict=True)
        row = {
            "variant": name,
            "cpu_seconds": min(cpu),
            "median_cpu_seconds": statistics.median(cpu),
            "clock_seconds": min(clock),
            "time_ratio": min(cpu) / min(seconds[base])[0],
            "peak_bytes": peaks[name],
            "memory_ratio": peaks[name] / peaks[base],
        }
        rows.append(row)
    return rows


def show(title: str, rows: list[dict[str, Any]], **extra: list[str]) -> None:
    columns = ["", "CPU s", "(median)", "clock s", "time", "peak MB", "memory", *extra]
    cells = [
        [
            row["variant"],
            f"{row['cpu_seconds']:.4f}",
            f"{row['median_cpu_seconds']:.4f}",
            f"{row['clock_seconds']:.4f}",
            f"{row['time_ratio']:.3f}x",
            f"{row['peak_bytes'] / 1e6:.2f}",
            f"{row['memory_ratio']:.3f}x",
            *(values[i] for values in extra.values()),
        ]
        for i, row in enumerate(rows)
    ]
    print(f"\n{title}\n\n{table(columns, cells)}", flush=True)


def configuration(size: dict[str, Any]) -> dict[str, Any]:
    changes = {"num_attention_heads": size["heads"], "ffn_dim": size["ffn"], "num_layers": size["layers"]}
    return WAN_14B | changes | {"text_dim": 64}


def counted_flops(size: dict[str, Any], times: Tensor, tokens: int) -> dict[str, int]:
    """Count each path's operations by `FlopCounterMode` on a model without memory (attention as plain products)."""
    with torch.device("meta"):
        model = PusaWanTransformer3DModel(**configuration(size))
        latents, text = torch.empty(1, 16, *size["grid"]), torch.empty(1, size["text"], 64)
    flops = {}
    for path in PATHS:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(latents, timesteps_for(path, times, tokens).to("meta"), text, return_dict=False)
        flops[path] = counter.get_total_flops()
    return flops


def measure_forward(model: PusaWanTransformer3DModel, size: dict[str, Any], rounds: int) -> dict[str, Any]:
    frames, height, width = size["grid"]
    tokens = frames * height * width // 4
    times = torch.linspace(0, 1000, frames).unsqueeze(0)  # [1, F]
    latents, text = torch.randn(1, 16, *size["grid"]), torch.randn(1, size["text"], 64)
    flops = counted_flops(size, times, tokens)
    results: dict[str, Any] = {"tokens": tokens, "flops": flops}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        typed = in_dtype(model, dtype)

        def forward(path: str, typed: WanTransformer3DModel = typed, dtype: torch.dtype = dtype) -> Tensor:
            times_ = timesteps_for(path, times, tokens)
            return typed(latents.to(dtype), times_, text.to(dtype), return_dict=False)[0]

        rows = rows_of({path: functools.partial(forward, path) for path in PATHS}, rounds, "scalar")
        difference = (forward("frame") - forward("token")).abs().max().item()
        results[name] = {"paths": rows, "frame_minus_token": difference}
        gflops = [f"{flops[path] / 1e9:.2f} ({flops[path] / flops['scalar']:.4f}x)" for path in PATHS]
        show(f"forward, {name}, {tokens} tokens (per frame - per token: {difference:g})", rows, GFLOP=gflops)
    return results


def pipelines(model: PusaWanTransformer3DModel) -> dict[str, WanPipeline]:
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    made = {
        "stock": WanPipeline(**parts, scheduler=SameSigmas(shift=5.0), transformer=stock_twin(model)),
        "pusa": PusaPipeline(**parts, scheduler=PusaFlowMatchEulerScheduler(shift=5.0), transformer=model),
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def loop_arguments(size: dict[str, Any], steps: int) -> dict[str, Any]:
    frames, height, width = size["grid"]
    return {
        "height": 8 * height,
        "width": 8 * width,
        "num_frames": 4 * frames - 3,
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "prompt_embeds": torch.randn(1, size["text"], 64),
        "negative_prompt_embeds": torch.randn(1, size["text"], 64),
        "latents": torch.randn(1, 16, *size["grid"]),
        "output_type": "latent",
    }


def latents_of(pipe: WanPipeline, arguments: dict[str, Any]) -> Tensor:
    return pipe(**arguments).frames


def measure_loop(model: PusaWanTransformer3DModel, size: dict[str, Any], rounds: int) -> dict[str, Any]:
    arguments = loop_arguments(size, steps=2)
    variants = {name: functools.partial(latents_of, pipe, arguments) for name, pipe in pipelines(model).items()}
    difference = (variants["stock"]() - variants["pusa"]()).abs().max().item()
    rows = rows_of(variants, rounds, "stock")
    show(f"loop, text to video, 2 steps with guidance (difference of the latents: {difference:g})", rows)
    return {"paths": rows, "difference": difference}


def measure_conditions(model: PusaWanTransformer3DModel, size: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    pipe, arguments = pipelines(model)["pusa"], loop_arguments(size, steps=2)
    frames = size["grid"][0]
    known = torch.randn(16, *size["grid"])

    def with_known(count: int) -> Tensor:
        conditions = [PusaCondition(latents=known[:, i : i + 1], latent_index=i) for i in range(count)]
        return pipe(conditions=conditions, **arguments).frames

    counts = sorted({0, 1, 2, 4, frames // 2, frames})
    rows = rows_of({str(n): functools.partial(with_known, n) for n in counts}, rounds, "0")
    show("loop by number of conditions, 2 steps with guidance", rows)
    return rows


def goals(forward: dict[str, Any], loop: dict[str, Any], conditions: list[dict[str, Any]]) -> dict[str, Any]:
    per_frame = next(row for row in forward["fp32"]["paths"] if row["variant"] == "frame")
    pusa = next(row for row in loop["paths"] if row["variant"] == "pusa")
    measured = {
        "per frame / scalar, time": (per_frame["time_ratio"], 1.02),
        "per frame / scalar, fp32 memory": (per_frame["memory_ratio"], 1.05),
        "loop / stock, time": (pusa["time_ratio"], 1.02),  # "no slower", to the precision of these measurements
        "loop / stock, memory": (pusa["memory_ratio"], 1.05),
        "most conditions / none, time": (conditions[-1]["time_ratio"], 1.02),
        "most conditions / none, memory": (max(row["memory_ratio"] for row in conditions), 1.05),
    }
    return {name: {"ratio": ratio, "goal": goal, "met": ratio <= goal} for name, (ratio, goal) in measured.items()}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The cost of one timestep per frame, on the CPU.")
    parser.add_argument("--size", choices=SIZES, default="small", help="of model and video")
    parser.add_argument("--rounds", type=int, default=5, help="of each loop; a forward has three times as many")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    torch.manual_seed(0)
    model = PusaWanTransformer3DModel(**configuration(size)).eval()
    forward = measure_forward(model, size, 3 * options.rounds)  # short, so that noise weighs more
    loop = measure_loop(model, size, options.rounds)
    conditions = measure_conditions(model, size, max(2, options.rounds // 2))
    reached = goals(forward, loop, conditions)
    rows = [(n, f"{g['ratio']:.3f}", f"{g['goal']:.2f}", "met" if g["met"] else "MISSED") for n, g in reached.items()]
    print("\n" + table(("goal", "ratio", "at most", ""), rows) + "\n")
    summary = {
        "benchmark": "core",
        "size": options.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "forward": forward,
        "loop": loop,
        "conditions": conditions,
        "goals": reached,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
