"""Measure what each change of speed gains and costs, each alone and then all together, in one run and one table.

    python benchmarks/speed.py                        # the embedded model, on the CPU
    python benchmarks/speed.py --shape mid            # a mid-size model of random weights, its adapter of rank 51
    python benchmarks/speed.py --shape 14b --device cuda        # random weights of 14B on a card, within 5 minutes
    python benchmarks/speed.py --tiny                 # every line in seconds, to rehearse

Every round runs every line once, so that what else a machine does slows all of them alike. Columns:

- seconds: denoising and decoding of one clip, the median of the rounds; x: by the full computation's, the median of the
  ratios of each round. Each line runs one step before it is timed.
- step: the median of the seconds of a step but the first, decoding left out.
- peak MB: the most that tensors of a run of two steps and its decoding held beyond the weights (a card: all it held).
- PSNR: to the full computation, from the same noise: of the frames, or of the latents of random weights.
- on the embedded model, over --clips clips: sprite match, the share whose motion is the caption's (by the track of the
  match), the first frame's PSNR to the given one, and the seam: the change where the given frames end, by that around.

"All together" takes the changes that compute the same, but for rounding and for what kept frames see; "all, fast" adds
the fast mode, and 8-bit products where the card has them. The task is --task: text, image (the first latent frame is
kept), extension (four) or completion (half of them).
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _card import Device, check_device, one_line
from _common import table
from _speed_changes import CHANGES, Change, Subject, applied
from _speed_subjects import SHAPES, Shape, load_subject
from core import peak_bytes
from torch import Tensor

from pusa.evaluation.metrics import psnr
from pusa.fsutil import cache_folder
from pusa.models.vae import decode_video

_FULL = "full computation"


@dataclass
class Line:
    """Hold a line of the table: its changes, and what was measured."""

    name: str
    changes: tuple[Change, ...] = ()
    seconds: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    error: str = ""


def lines_of(subject: Subject, only: Sequence[str]) -> tuple[list[Line], dict[str, str]]:
    """List the lines that this subject can run, and why it cannot run the others."""
    obstacles = {change.name: change.obstacle(subject) for change in CHANGES}
    usable = [change for change in CHANGES if not obstacles[change.name] and (not only or change.name in only)]
    lines = [Line(_FULL), *(Line(change.name, (change,)) for change in usable)]
    together = tuple(change for change in usable if change.keeps)
    if len(together) > 1:
        lines.append(Line("all together", together))
    also = tuple(change for change in usable if change.name in ("fast", "fp8 weights"))
    if together and any(change.name == "fast" for change in also):
        kept = tuple(c for c in together if c.name != "merged adapter" or len(also) == 1)  # 8-bit weights are merged
        lines.append(Line("all, fast", (*kept, *also)))
    return lines, {name: reason for name, reason in obstacles.items() if reason}


class Bench:
    """Run lines on a subject, and measure them."""

    def __init__(self, subject: Subject, shape: Shape, device: Device) -> None:
        self.subject, self.shape, self.device = subject, shape, device

    def run(self, steps: int | None = None, clip: int = 0, decode: bool = True) -> tuple[Tensor, list[float]]:
        """Make one clip; return its frames, or of random weights its latents, and the seconds of each step."""
        marks = []

        def mark(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.device.synchronize()
            marks.append(time.perf_counter())
            return {}

        arguments = (
            self.shape.call(clip) | self.subject.call | ({} if steps is None else {"num_inference_steps": steps})
        )
        self.device.synchronize()
        latents = self.subject.pipe(**arguments, callback_on_step_end=mark).frames
        video = decode_video(self.subject.pipe.vae, latents) if decode else None
        self.device.synchronize()
        found = latents if video is None or self.shape.is_random else video
        return found.float().cpu(), [b - a for a, b in pairwise(marks)]

    def time(self, line: Line) -> None:
        """Run a line once, timed, after a step that is not."""
        with applied(self.subject, line.changes):
            self.run(steps=1, decode=False)
            began = time.perf_counter()
            _, steps = self.run()
            line.seconds.append(time.perf_counter() - began)
            line.steps += steps

    def judge(self, line: Line, full: list[Tensor]) -> list[Tensor]:
        """Measure memory and quality of a line against the full computation's clips; return its own."""
        with applied(self.subject, line.changes):
            line.figures["peak MB"] = self.peak_bytes() / 1e6
            clips = [self.run(clip=clip)[0] for clip in range(self.shape.clips)]
        if full:
            line.figures["PSNR"] = statistics.mean(map(self.closeness, clips, full))
        line.figures |= self.shape.judge(clips)
        return clips

    def closeness(self, clip: Tensor, full: Tensor) -> float:
        if not self.shape.is_random:
            return float(psnr(clip, full).mean())
        spread = full.max() - full.min()
        return float(10 * torch.log10(spread**2 / (clip - full).square().mean().clamp(min=1e-12)))

    def peak_bytes(self) -> float:
        if not self.device.is_cuda:
            return peak_bytes(lambda: self.run(steps=2)[0])
        self.device.forget_peak()
        self.run(steps=2)
        return float(self.device.peak_bytes() or 0)


def measure(bench: Bench, lines: list[Line], rounds: int, deadline: float) -> None:
    """Judge all lines, then time them in rounds; a line that fails says why, and the others go on.

    Nothing begins after `deadline`, which leaves lines without figures.
    """
    full: list[Tensor] = []
    for line in lines:
        if time.perf_counter() > deadline:
            line.error = "out of time"
            continue
        try:
            clips = bench.judge(line, full)
        except (RuntimeError, ValueError) as error:
            line.error = one_line(error)
        else:
            full = clips if line.name == _FULL else full
        gc.collect()
    usable = [line for line in lines if not line.error]
    for number in range(rounds):
        for line in usable if number % 2 == 0 else usable[::-1]:
            if time.perf_counter() < deadline:
                bench.time(line)


def rows(lines: list[Line]) -> list[dict[str, Any]]:
    full = lines[0]
    found = []
    for line in lines:
        row: dict[str, Any] = {"line": line.name} | ({"error": line.error} if line.error else {})
        if line.seconds:
            ratios = [a / b for a, b in zip(line.seconds, full.seconds, strict=False)]
            row |= {"seconds": statistics.median(line.seconds), "x": statistics.median(ratios)}
        if line.steps:
            row["step"] = statistics.median(line.steps)
        found.append(row | line.figures)
    return found


def show(found: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in found for name in row if name not in ("line", "error")))
    digits = {"peak MB": 0, "PSNR": 1, "first frame": 1}
    cells = [
        [row["line"], *(f"{row[name]:.{digits.get(name, 2)}f}" if name in row else "" for name in columns)]
        for row in found
    ]
    errors = [f"{row['line']}: {row['error']}" for row in found if "error" in row]
    return "\n".join([table(["", *columns], cells), *errors])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mini")
    parser.add_argument("--task", choices=("text", "image", "extension", "completion"), default="extension")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--rounds", type=int, help="default: 3, and 1 for 14b")
    parser.add_argument("--steps", type=int, help="default: the model's; 4 for mid, 2 for 14b")
    parser.add_argument("--clips", type=int, help="that quality is measured on; default: 4, and 1 for random weights")
    parser.add_argument("--only", nargs="+", default=[], choices=[change.name for change in CHANGES])
    parser.add_argument("--budget-seconds", type=float, default=280.0, help="begin nothing later (14b)")
    parser.add_argument("--pictures", type=Path, default=cache_folder() / "pictures", help="of the small world")
    parser.add_argument("--compiler", default="inductor", help="of compiled blocks, as torch.compile has it")
    parser.add_argument("--tiny", action="store_true", help="a toy in place of the shape, one round")
    options = parser.parse_args(arguments)
    device = Device(options.device)
    check_device(parser, options.device)
    deadline = time.perf_counter() + (options.budget_seconds if options.shape == "14b" else 3600)
    with ExitStack() as stack:
        subject, shape = load_subject("tiny" if options.tiny else options.shape, options, device, stack)
        lines, obstacles = lines_of(subject, options.only)
        rounds = options.rounds or (1 if options.tiny or options.shape == "14b" else 3)
        measure(Bench(subject, shape, device), lines, rounds, deadline)
        large = shape.large(subject, device, deadline)
    found = rows(lines)
    print(f"{shape.title}, {options.task}\n\n{show(found)}\n")
    for name, reason in obstacles.items():
        print(f"{name}: not measured, {reason}")
    print(json.dumps({"benchmark": "speed", **device.description(), "shape": shape.title, "task": options.task,
                      "rows": found, "not_measured": obstacles, **large}))  # fmt: skip
    return 1 if any(row.get("error") not in (None, "out of time") for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
