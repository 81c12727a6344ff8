"""Measure drafts and their finals on the embedded model: time, kept motion, sharpness, and what they show.

    python benchmarks/draft.py [--pictures FOLDER]      # figures of docs/speed.md
    python benchmarks/draft.py --clips 2 --multipliers 0.6 --sizes 80      # rehearses

A draft has a smaller size and fewer steps. Its final is made from the enlarged draft: every latent frame is conditioned
on it, with one noise multiplier for all. Drafts and finals go through the same code as `pusa generate --draft` and
`pusa final`, but for the file between them. Columns:

- seconds: denoising, encoding and decoding of one clip, the median; of a final with its draft.
- kept motion: the correlation of the changes from frame to frame with those of the enlarged draft, both blurred to
  blocks of 8 pixels. 1: every change is that of the draft. The row of another seed gives the scale.
- track: mean distance of the sprite from its place in the draft, in percent of the frame's width, where both find it.
- to the draft: PSNR of the clip, reduced to the draft's size, to the draft.
- sharpness: of all frames, by that of the normal clip with the same seed.
- sprite match: how well the named thing is found in its three best moments, 0..1; motion: the share of clips whose
  thing moves as the caption says, by the track of that match (`pusa.mini.evaluation.templates`).

The pictures of the world are downloaded to FOLDER if they are missing (about 30 MB).
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import table
from torch import Tensor

from pusa.conditions import PusaCondition
from pusa.evaluation.metrics import psnr, sharpness
from pusa.fsutil import cache_folder
from pusa.media import to_uint8
from pusa.mini.evaluation.setup import Evaluator, load_evaluator
from pusa.mini.evaluation.templates import Track
from pusa.mini.world.world import Scenes, captions

_BLOCK = 8  # pixels that a change is averaged over, so that detail, which a draft has not, does not count
_SEEN = 0.25  # score of a placement that counts as found


@dataclass
class Clips:
    """Hold the clips of one way to make them, ``[B, 3, F, H, W]`` in -1..1, and the seconds of each."""

    video: Tensor
    seconds: list[float] = field(default_factory=list)


def make(
    evaluator: Evaluator,
    texts: Sequence[str],
    seed: int,
    *,
    size: int,
    steps: int,
    condition: Callable[[int], PusaCondition] | None = None,
) -> Clips:
    """Make a clip of each text, one after the other; `condition` makes that of the text with a number."""
    videos, seconds = [], []
    for number, text in enumerate(texts):
        began = time.perf_counter()
        conditions = None if condition is None else [[condition(number)]]
        latents = evaluator.denoise([text], conditions, steps=steps, seed=seed + number, height=size, width=size)
        videos.append(evaluator.decode(latents))
        seconds.append(time.perf_counter() - began)
    return Clips(torch.cat(videos), seconds)


def make_finals(evaluator: Evaluator, texts: Sequence[str], drafts: Tensor, multiplier: float, *, steps: int) -> Clips:
    """Make the final of each draft, ``[B, 3, F, h, w]``."""

    def condition(number: int) -> PusaCondition:
        return PusaCondition(video=to_uint8(drafts[number : number + 1]), noise_multiplier=multiplier)

    return make(evaluator, texts, 1000, size=evaluator.defaults.width, steps=steps, condition=condition)


def enlarged(video: Tensor, size: int) -> Tensor:
    """Enlarge clips as a comparison sees them, ``[B, 3, F, size, size]``."""
    frames = video.transpose(1, 2).flatten(0, 1)
    larger = F.interpolate(frames, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return larger.unflatten(0, (len(video), -1)).transpose(1, 2).clamp(-1, 1)


def kept_motion(video: Tensor, draft: Tensor) -> Tensor:
    """Correlate the changes between frames of two clips of one size, ``[B]``."""
    maps = []
    for clips in (video, draft):
        change = clips[:, :, 1:] - clips[:, :, :-1]  # [B, 3, F - 1, H, W]
        maps.append(F.avg_pool3d(change, (1, _BLOCK, _BLOCK)).flatten(1))
    first, second = (values - values.mean(1, keepdim=True) for values in maps)
    return F.cosine_similarity(first, second, dim=1)


def track_distance(first: Track, second: Track) -> Tensor:
    """Return the mean distance of two tracks in percent of the width, ``[B]``; NaN where neither moment finds both."""
    seen = (first.score > _SEEN) & (second.score > _SEEN)
    distance = torch.hypot(first.x - second.x, first.y - second.y) * 50  # x and y are in halves of the frame
    return torch.where(seen, distance, torch.nan).nanmean(1)


def figures(
    evaluator: Evaluator, scenes: Scenes, clips: Clips, normal: Clips, draft: Tensor, draft_seconds: float = 0.0
) -> dict[str, float]:
    """Measure clips against the normal ones of the same seeds and against the drafts, ``[B, 3, F, h, w]``."""
    size = normal.video.shape[-1]
    video = clips.video if clips.video.shape[-1] == size else enlarged(clips.video, size)
    large = enlarged(draft, size)
    track, draft_track = (evaluator.matcher.track(some, scenes.thing) for some in (video, large))
    found = evaluator.track_figures(scenes, track)
    return {
        "seconds": statistics.median(clips.seconds) + draft_seconds,
        "kept motion": float(kept_motion(video, large).mean()),
        "track": float(track_distance(track, draft_track).nanmean()),
        "to the draft": float(psnr(enlarged(video, draft.shape[-1]), draft).mean()),
        "sharpness": float(sharpness(video).mean() / sharpness(normal.video).mean()),
        "sprite match": found["sprite match"]["value"],
        "motion": found["motion by track"]["value"],
    }


def final_steps(rule: str, steps: int, multiplier: float) -> int:
    return steps if rule == "all" else max(1, round(steps * multiplier))


def measure(evaluator: Evaluator, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure normal clips, drafts of each size and number of steps, and finals of each multiplier and rule."""
    scenes = evaluator.scenes(options.clips, seed=61)
    texts, rows = captions(scenes), {}
    size, steps = evaluator.defaults.width, evaluator.defaults.steps
    make(evaluator, texts[:1], 0, size=size, steps=1)  # warm up
    normal, other = (make(evaluator, texts, seed, size=size, steps=steps) for seed in (0, 500))
    for small, few in itertools.product(options.sizes, options.steps):
        name = f"draft of {small}, {few} steps"
        draft = make(evaluator, texts, 0, size=small, steps=few)
        if "normal" not in rows:
            rows["normal"] = figures(evaluator, scenes, normal, normal, draft.video)
            rows["normal, another seed"] = figures(evaluator, scenes, other, normal, draft.video)
        rows[name] = figures(evaluator, scenes, draft, normal, draft.video)
        for multiplier, rule in itertools.product(options.multipliers, options.rules):
            count = final_steps(rule, steps, multiplier)
            finals = make_finals(evaluator, texts, draft.video, multiplier, steps=count)
            seconds = statistics.median(draft.seconds)
            title = f"{name}; final {multiplier:g}, {count} steps"
            rows[title] = figures(evaluator, scenes, finals, normal, draft.video, seconds)
            print(json.dumps({title: rows[title]}), flush=True)
    return rows


_FORMATS = {"seconds": ".2f", "kept motion": ".2f", "track": ".1f", "to the draft": ".1f"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--pictures", type=Path, default=cache_folder() / "pictures", help="of the small world")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--sizes", type=int, nargs="+", default=[48, 64, 80])
    parser.add_argument("--steps", type=int, nargs="+", default=[4])
    parser.add_argument("--multipliers", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--rules", nargs="+", choices=("all", "share"), default=["share"], help="steps of the final")
    options = parser.parse_args(arguments)
    evaluator = load_evaluator(options.model, options.pictures, None)
    rows = measure(evaluator, options)
    columns = list(next(iter(rows.values())))
    cells = [[name, *(format(row[c], _FORMATS.get(c, ".2f")) for c in columns)] for name, row in rows.items()]
    print(table(["", *columns], cells))
    about = {"benchmark": "draft", "clips": options.clips, "threads": torch.get_num_threads()}
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
