"""Measure denoising on several ranks against one: seconds per step, and the difference to the video of one process.

    python benchmarks/parallel.py --device cpu                    # two and four CPU processes, a small model
    python benchmarks/parallel.py --device cuda --model wan2.1-14b --size 832x480 --frames 81   # 1, 2, 4, ... GPUs

Each way of sharing runs the same request once to warm up and once for the clock. Prints a table and one JSON line. CPU
ranks share the cores of one machine, so there the ratio shows the cost of sharing, not its gain.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _common import table

from pusa import media
from pusa.acceleration.decisions import Parallel
from pusa.acceleration.launch import launch
from pusa.events import Step
from pusa.generate import generate
from pusa.numerals import parse_size
from pusa.request import GenerationRequest


def ways(most: int, guided: bool) -> Iterator[tuple[str, Parallel]]:
    """Name the ways in which up to `most` ranks share a pass or the two of guidance."""
    count = 2
    while count <= most:
        if guided:
            name = "guidance 2" + (f" x ulysses {count // 2}" if count > 2 else "")
            yield name, Parallel(guidance=2, ulysses=count // 2)
        yield f"ulysses {count}", Parallel(ulysses=count)
        count *= 2


def seconds_per_step(request: GenerationRequest, output: Path, ranks: Any) -> float:
    """Make a video twice; return the seconds per step of the second time, from its first step to its last."""
    for _ in range(2):
        clock = [
            time.perf_counter()
            for event in generate(request, output, ranks=ranks)
            if isinstance(event, Step) and event.stage == "denoise"
        ]
    return (clock[-1] - clock[0]) / (len(clock) - 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--size", default="96x64")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--ranks", type=int, help="the most ranks [default: GPUs, or 4 CPU processes]")
    options = parser.parse_args(arguments)
    width, height = parse_size(options.size, "--size")
    request = GenerationRequest(
        **{name: getattr(options, name) for name in ("model", "frames", "steps", "guidance")},
        **{"width": width, "height": height, "prompt": "a balloon rises in the sky", "seed": 0},
    )
    most = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 4)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        alone = Path(folder) / "alone.mp4"
        rows.append({"ranks": 1, "way": "one process", "seconds": seconds_per_step(request, alone, None), "change": 0})
        expected = media.read_video(alone)
        for name, parallel in ways(most, options.guidance > 1):
            output = Path(folder) / "shared.mp4"
            with launch(parallel.ranks, device_type=options.device) as ranks:
                ranks.parallel = parallel
                try:
                    seconds = seconds_per_step(request, output, ranks)
                except ValueError as error:  # the model's heads do not divide among so many ranks
                    print(f"{name}: {error}", file=sys.stderr)
                    continue
            change = int(np.abs(media.read_video(output).astype(int) - expected).max())
            rows.append({"ranks": parallel.ranks, "way": name, "seconds": seconds, "change": change})
    for row in rows:
        row["ratio"] = rows[0]["seconds"] / row["seconds"]
    cells = [[row["way"], row["ranks"], f"{row['seconds']:.3f}", f"{row['ratio']:.2f}x", row["change"]] for row in rows]
    print(table(["", "ranks", "s per step", "speed", "largest change of a pixel (of 255)"], cells), flush=True)
    print(json.dumps({"device": options.device, "model": options.model, "size": options.size, "rows": rows}))


if __name__ == "__main__":
    main()
