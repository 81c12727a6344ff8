"""Measure waves: time to the first frame and in all, and what the film shows, beside all frames together.

    python benchmarks/waves.py --pictures FOLDER [--model mini] [--clips 36] [--schedules even wave:2]

Clips: captions of held-out combinations, by the model's own steps and guidance. Times: seconds from the start of
denoising until the first frames are written ("first") and until the file is whole ("all"); medians of three clips,
after one that is not counted. Steps: those of a clip. The probes (thing, motion, place; `pusa.mini.evaluation`) are
trained on the pictures of the small world first, which are downloaded into FOLDER if they are missing; trained ones are
kept in FOLDER/probes. Change: mean absolute difference of neighbouring frames (0..255), over the first eight and the
last eight of a clip.

Prints a table and a JSON line. Without --pictures it measures times alone.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import table
from torch import Tensor

from pusa import PusaPipeline, zoo
from pusa.evaluation.metrics import changes
from pusa.events import Frames, Stage
from pusa.generate import generate
from pusa.positions import latent_frames
from pusa.request import GenerationRequest
from pusa.request.schedule import delay_of
from pusa.scheduler import wave_sigmas

SCHEDULES = ("even", "wave:1", "wave:2", "wave:3")


def times(pipe: PusaPipeline, model: str, schedule: str, folder: Path, repeats: int) -> dict[str, float]:
    """Measure seconds from the first step to the first decoded frames, and to the last."""
    first, whole = [], []
    for number in range(repeats + 1):
        request = GenerationRequest(model=model, prompt="a rocket rises in space", seed=number, schedule=schedule)
        began = shown = 0.0
        for event in generate(request, folder / "clip.mp4", pipeline=pipe):
            if isinstance(event, Stage) and event.stage == "denoise" and not began:
                began = time.monotonic()
            if isinstance(event, Frames) and not shown:
                shown = time.monotonic()
        ended = time.monotonic()
        if number:
            first.append((shown or ended) - began)
            whole.append(ended - began)
    return {"first": statistics.median(first), "all": statistics.median(whole)}


def denoise(evaluator: Any, texts: list[str], schedule: str) -> Tensor:
    """Denoise a clip for each caption with the same noise for all schedules."""
    d, delay = evaluator.defaults, delay_of(schedule)
    if delay is None:
        return evaluator.denoise(texts, seed=1000)
    shift = evaluator.pipe.scheduler.config.shift
    sigmas = wave_sigmas(latent_frames(d.num_frames), d.steps, delay=delay, shift=shift)
    return evaluator.denoise(texts, seed=1000, num_inference_steps=None, frame_sigmas=sigmas)


def change(video: Tensor) -> tuple[float, float]:
    """Return the mean absolute difference of neighbouring frames at the beginning and at the end, 0..255."""
    steps = changes(video).mean(0) * 127.5
    return float(steps[:8].mean()), float(steps[-8:].mean())


def figures(evaluator: Any, clips: int, schedule: str) -> dict[str, float]:
    from pusa.mini.world.world import captions

    scenes = evaluator.scenes(clips, seed=62, held_out=True)
    video = evaluator.decode(denoise(evaluator, captions(scenes), schedule))
    found = evaluator.caption_figures(scenes, video)
    early, late = change(video)
    names = ("thing", "motion", "place", "sprite match", "Frechet")
    return {name: found[name]["value"] for name in names} | {"change, early": early, "change, late": late}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--probes", type=Path, help="Folder with probes.safetensors. [default: FOLDER/probes]")
    parser.add_argument("--clips", type=int, default=36)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    args = parser.parse_args()
    evaluator = None
    if args.pictures:
        from pusa.mini.evaluation.setup import load_evaluator

        evaluator = load_evaluator(args.model, args.pictures, args.probes or args.pictures / "probes")
    pipe = evaluator.pipe if evaluator else PusaPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    defaults = zoo.defaults_of(args.model)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for schedule in args.schedules:
            delayed = (delay_of(schedule) or 0) * (latent_frames(defaults.num_frames) - 1)
            row: dict[str, float] = {"steps": defaults.steps + delayed}
            row |= times(pipe, args.model, schedule, Path(folder), args.repeats)
            if evaluator:
                row |= figures(evaluator, args.clips, schedule)
            rows[schedule] = {name: round(value, 3) for name, value in row.items()}
            print(schedule, rows[schedule], flush=True)
    names = list(next(iter(rows.values())))
    print(table(["schedule", *names], [[schedule, *(f"{row[n]:g}" for n in names)] for schedule, row in rows.items()]))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
