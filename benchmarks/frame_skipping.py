"""Measure what frames that are not computed save, and how far they change the video, by the refresh interval.

Clips of a model are denoised again with some of their latent frames kept: the first (image to video), the first four
(extension), every second one (completion). Every interval takes the same noise as the full computation, and runs right
after it, so that a machine that is busy for a while slows all of them. Prints a table and a JSON line.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from _common import conditions_of, kept_frames, table
from torch import Tensor

from pusa.conditions import PusaCondition
from pusa.evaluation.metrics import psnr
from pusa.models.frame_skipping import FrameSchedule
from pusa.models.vae import decode_video
from pusa.pipeline import PusaPipeline

PROMPTS = (
    "a red balloon rises in the sky",
    "a penguin slides to the right at the beach",
    "a green apple grows in a garden",
    "a rocket flies to the left in the mountains",
)
TASKS = ("image", "extension", "completion")
NEVER = 1000  # steps: the first and the last step alone compute every frame


class Comparison:
    """Collect seconds and PSNR by task and interval; interval 1 is the full computation."""

    def __init__(self, pipe: PusaPipeline, intervals: Sequence[int], *, frames: int, steps: int) -> None:
        self.pipe, self.intervals, self.frames, self.steps = pipe, intervals, frames, steps
        self.seconds: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        self.psnr: defaultdict[tuple[str, int], list[float]] = defaultdict(list)

    def _denoise(self, prompt: str, seed: int, every: int = 1, conditions: Sequence[PusaCondition] = ()) -> Tensor:
        return self.pipe(
            prompt,
            conditions=conditions,
            num_frames=self.frames,
            num_inference_steps=self.steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            refresh_every=every,
        ).frames

    def compare(self, task: str, prompt: str, seed: int) -> None:
        """Keep frames of a clip of the model, and make the others with other noise, once for each interval."""
        clip = self._denoise(prompt, seed)
        conditions = conditions_of(clip[0], kept_frames(task, clip.shape[2]))
        whole = None
        for interval in (1, *self.intervals):
            begin = time.perf_counter()
            latents = self._denoise(prompt, seed + 1000, interval, conditions)
            self.seconds[task, interval].append(time.perf_counter() - begin)
            video = decode_video(self.pipe.vae, latents)
            whole = video if whole is None else whole
            if interval > 1:
                self.psnr[task, interval].append(float(psnr(video, whole).mean()))

    def rows(self, task: str) -> list[list[str]]:
        """Write a row for each interval: the steps that compute every frame, the time by that of all, the PSNR."""
        rows = []
        for interval in (1, *self.intervals):
            moves = torch.ones(self.steps, 2, dtype=torch.bool)
            moves[:, 0] = False
            schedule = FrameSchedule.of(moves, interval)
            whole = [k for k in range(self.steps) if schedule.at(k) is None or len(schedule.steps[k].computed) == 2]
            ratio = sum(self.seconds[task, interval]) / sum(self.seconds[task, 1])
            found = self.psnr[task, interval]
            figure = f"{sum(found) / len(found):.1f} ({min(found):.1f})" if found else ""
            at = "all" if interval == 1 else ", ".join(map(str, whole))
            rows.append([task, "1" if interval == 1 else str(interval), at, f"{ratio:.2f}", figure])
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clips", type=int, default=4, help=f"of each task, at most {len(PROMPTS)}")
    parser.add_argument("--intervals", type=int, nargs="+", default=[NEVER, 5, 3, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    pipe = PusaPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    comparison = Comparison(pipe, arguments.intervals, frames=arguments.frames, steps=arguments.steps)
    for task in arguments.tasks:
        for seed, prompt in enumerate(PROMPTS[: arguments.clips]):
            comparison.compare(task, prompt, seed)
        print(f"{task}: done", flush=True)
    rows = [row for task in arguments.tasks for row in comparison.rows(task)]
    print(table(["task", "interval", "steps that compute all", "time", "PSNR (worst), dB"], rows))
    print(json.dumps({"frames": arguments.frames, "steps": arguments.steps, "rows": rows}))


if __name__ == "__main__":
    main()
