"""Measure what compiling, merging and 8-bit weights gain and cost, each alone, on one model.

    python benchmarks/kernel_gains.py [--model mini] [--device cpu] [--rounds 5]

Runs alternate, so that what else the machine does slows all of them alike; a ratio is the median of those of the
rounds. It prints a table and a line of JSON.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _card import Device
from torch import Tensor

from pusa import PusaPipeline
from pusa.acceleration import attention, compilation
from pusa.acceleration.quantization import multiplies_in_8_bits, quantize
from pusa.evaluation.metrics import psnr
from pusa.lora.adapters import adapter_names
from pusa.models.vae import decode_video

PROMPT = "a red ball moves to the right"


def alternate(runs: dict[str, Callable[[], Any]], rounds: int, device: Device) -> dict[str, list[float]]:
    """Time runs in turns, after one that is not counted; return the seconds of each by name."""
    first = {name: device.seconds(run) for name, run in runs.items()}
    print("first runs: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in first.items()), flush=True)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(device.seconds(run))
    return found


def show(found: dict[str, list[float]]) -> dict[str, float]:
    """Print the least time of each run, and its ratio to the first one."""
    base = next(iter(found.values()))
    ratios = {}
    for name, seconds in found.items():
        ratios[name] = round(statistics.median(a / b for a, b in zip(seconds, base, strict=True)), 3)
        print(f"  {name:<28} {min(seconds):8.3f} s   {ratios[name]:.2f}x", flush=True)
    return ratios


def closeness(first: Tensor, second: Tensor) -> float:
    """Compare videos in -1..1, in decibels."""
    return round(float(psnr(first, second).mean()), 2)


class Measurement:
    """Load copies of a model and run them."""

    def __init__(self, model: str, device: Device, rounds: int) -> None:
        self.model, self.device, self.rounds = model, device, rounds

    def load(self, *, merge: bool) -> PusaPipeline:
        pipe = PusaPipeline.from_pretrained(self.model)
        pipe.set_progress_bar_config(disable=True)
        if merge and adapter_names(pipe.transformer):
            pipe.merge_lora()
        return pipe.to(self.device.device)

    def forward_of(self, pipe: PusaPipeline) -> Callable[[], Any]:
        """Return a forward of the model's own size, with one frame kept."""
        model = pipe.transformer
        channels, frames, height, width = pipe._resolve_size(None, None, None).shape
        x = torch.randn(1, channels, frames, height, width, device=self.device.device, dtype=model.dtype)
        t = torch.full((1, frames), 500.0, device=self.device.device)
        t[0, 0] = 0
        text = torch.randn(1, pipe.defaults.max_sequence_length, model.config.text_dim).to(x)

        @torch.no_grad()
        def run() -> None:
            model(x, t, text, return_dict=False)

        return run

    def forwards(self) -> dict[str, float]:
        runs = {}
        for name, merge, compiled in (
            ("adapter beside the weights", False, False),
            ("merged", True, False),
            ("merged, compiled", True, True),
        ):
            pipe = self.load(merge=merge)
            if compiled:
                compilation.compile_blocks(pipe)
            runs[name] = self.forward_of(pipe)
        print("one forward", flush=True)
        return show(alternate(runs, self.rounds, self.device))

    def decodes(self) -> dict[str, float]:
        pipe, compiled = self.load(merge=False), self.load(merge=False)
        compilation.compile_decoder(compiled.vae)
        z = torch.randn(1, *pipe._resolve_size(None, None, None).shape, device=self.device.device)
        print("decoding one clip", flush=True)
        found = alternate(
            {
                "eager": lambda: decode_video(pipe.vae, z),
                "compiled": lambda: decode_video(compiled.vae, z),
            },
            self.rounds,
            self.device,
        )
        ratios = show(found)
        difference = closeness(decode_video(pipe.vae, z), decode_video(compiled.vae, z))
        print(f"  compiled to eager: {difference} dB")
        return {**ratios, "psnr_compiled": difference}

    def storages(self) -> dict[str, float]:
        """Make one clip by weights of each kind, and compare it with full ones and with another seed."""
        clips = {}
        for name, kind, is_fast, seed in (
            ("full", None, False, 0),
            ("fp8 weights", "fp8", False, 0),
            ("int8 weights", "int8", False, 0),
            ("int8 multiplication", "int8", True, 0),
            ("fp8 multiplication", "fp8", True, 0),
            ("full, another seed", None, False, 1),
        ):
            if name == "fp8 multiplication" and not multiplies_in_8_bits("fp8", self.device.device, has_adapters=False):
                continue
            pipe = self.load(merge=True)
            if kind is not None:
                quantize(pipe.transformer, kind, dtype=pipe.transformer.dtype, is_fast=is_fast)
            generator = torch.Generator().manual_seed(seed)
            latents = pipe(PROMPT, generator=generator, output_type="latent").frames
            clips[name] = decode_video(pipe.vae, latents).float().cpu()
        found = {name: closeness(clip, clips["full"]) for name, clip in clips.items() if name != "full"}
        print("a clip, to full weights", flush=True)
        for name, decibels in found.items():
            print(f"  {name:<28} {decibels:8.2f} dB", flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="forwards, decodes, storages; all if none is given")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = Device(args.device)
    print(attention.describe(attention.choose(device.capability)))
    measurement = Measurement(args.model, device, args.rounds)
    parts = args.parts or ["forwards", "decodes", "storages"]
    print(json.dumps({part: getattr(measurement, part)() for part in parts}))


if __name__ == "__main__":
    main()
