"""Measure the gain, and the cost, of making several videos of one shape at once.

    python benchmarks/batching.py                       # the embedded model at its own settings, batches of 2 and 4
    python benchmarks/batching.py --model FOLDER --steps 10
    OMP_NUM_THREADS=1 python benchmarks/batching.py --cpu-time        # on a machine that is busy with other things

Seconds for each video are those of denoising (with guidance as the model has it) and of decoding; runs alternate, and
the quickest of each counts. The last column is how far the first video of a batch is from the same one made alone, from
the same noise: the largest difference of its latents by their range. 0 is equal to the bit, which a seed promises.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pusa.models.vae import decode_video
from pusa.pipeline import PusaPipeline

PROMPTS = ("a red ball rolls over the grass", "a blue car", "a green tree", "a yellow bird")


def make(pipe: PusaPipeline, batch: int, steps: int, clock: Callable[[], float]) -> tuple[Tensor, float, float]:
    """Latents ``[batch, C, F, h, w]``; seconds of denoising and of decoding."""

    def now() -> float:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        return clock()

    began = now()
    latents = pipe(
        [PROMPTS[number % len(PROMPTS)] for number in range(batch)],
        negative_prompt=[""] * batch,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(number) for number in range(batch)],
        output_type="latent",
    ).frames
    denoised = now()
    decode_video(pipe.vae, latents)
    return latents, denoised - began, now() - denoised


def measure(
    pipe: PusaPipeline, batches: Sequence[int], steps: int, rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """A row for each size of batch: seconds for each video, and the first one's distance from itself alone."""
    make(pipe, 1, 1, clock)
    rows = {batch: {"batch": batch, "denoise": float("inf"), "decode": float("inf")} for batch in batches}
    alone = make(pipe, 1, steps, clock)[0][0]
    for _ in range(rounds):
        for batch, row in rows.items():
            latents, denoise, decode = make(pipe, batch, steps, clock)
            row["denoise"] = min(row["denoise"], denoise / batch)
            row["decode"] = min(row["decode"], decode / batch)
            row["distance"] = float((latents[0] - alone).abs().max() / (alone.max() - alone.min()))
    single = rows[1]["denoise"] + rows[1]["decode"]
    return [{**row, "gain": 1 - (row["denoise"] + row["decode"]) / single} for row in rows.values()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cpu-time", action="store_true", help="of the process, rather than by the wall clock")
    options = parser.parse_args(arguments)
    pipe = PusaPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.to("cuda")
    steps = options.steps or pipe.defaults.steps
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = measure(pipe, sorted({1, *options.batches}), steps, options.rounds, clock)
    print(f"{'batch':>5} {'denoise, s':>11} {'decode, s':>10} {'gain':>6} {'distance':>9}")
    for row in rows:
        print(
            f"{row['batch']:5} {row['denoise']:11.3f} {row['decode']:10.3f} {row['gain']:6.0%} {row['distance']:9.1e}"
        )
    about = {"model": options.model, "steps": steps, "device": pipe.device.type, "threads": torch.get_num_threads()}
    print(json.dumps({**about, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
