"""Measure fewer steps, guidance and step caches on the embedded model: clips of its own world, with fixed seeds.

    python benchmarks/fewer_steps.py [PART ...] [--pictures FOLDER] [--photographs FILE ...] [--clips 16]

Parts: `fast` (text to video and image to video in 4 steps at several guidance scales, with 10 steps beside them),
`guidance` (guidance of image to video, for its own things and for photographs that it never saw), `range` (guidance in
a range of the steps) and `cache` (`pusa.acceleration.step_cache`: PSNR to the full computation, and the work that was
done). Without one, all of them. Each prints a table and a JSON line.

Image to video takes half as many clips as text to video.

- sprite match: how well the named thing is found (`pusa.mini.evaluation.templates`), 0..1, in its three best moments;
- motion: the share of clips whose thing moves as the caption says, by the track of that match;
- sharpness: of the last frame, as a share of the true clip's through the VAE;
- PSNR: to the true continuation, in dB, of all frames after the first and of the last one.

Photographs are those inside scikit-image and scikit-learn, if none are given. The pictures of the world are downloaded
to FOLDER if they are missing (about 30 MB; see `pusa.mini.world.pictures`).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _common import conditions_of, kept_frames
from _common import table as as_text
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor

from pusa.acceleration import step_cache
from pusa.conditions import PusaCondition
from pusa.evaluation.metrics import psnr, sharpness
from pusa.fsutil import cache_folder
from pusa.mini.evaluation.photographs import PhotographWorld, installed_photographs, list_photographs
from pusa.mini.evaluation.setup import BATCH, Clips, Evaluator, image_of, load_evaluator
from pusa.mini.world.vocabulary import MOTIONS
from pusa.mini.world.world import captions
from pusa.pipeline import PusaPipeline

_LASTING = tuple(name for name in MOTIONS if name != "fade")  # the thing is still visible at the end
_SCALES = (1.0, 1.5, 2.0, 3.0)

Row = dict[str, float]
Conditions = list[list[PusaCondition]]
Tables = Iterator[tuple[str, dict[str, Row]]]


def first_frames(real: Clips) -> Conditions:
    return [[PusaCondition(image=image_of(clip, 0), noise_multiplier=0.0)] for clip in real.video]


def rows(
    evaluator: Evaluator,
    ways: Sequence[dict[str, Any]],
    make: Callable[..., Tensor],
    measure: Callable[[Tensor], Row],
) -> Iterator[tuple[str, Row]]:
    """Measure each way of generating; yield its name, its figures and the seconds that a clip took to denoise."""
    for settings in ways:
        began = time.monotonic()
        latents = make(**settings)
        seconds = (time.monotonic() - began) / len(latents)
        yield _name(settings), {**measure(evaluator.decode(latents)), "s/clip": seconds}


def _name(settings: dict[str, Any]) -> str:
    names = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
    return ", ".join(f"{names.get(key, key.replace('guidance_', ''))} {value:g}" for key, value in settings.items())


def text_figures(evaluator: Evaluator, real: Clips) -> Callable[[Tensor], Row]:
    """Return what measures clips made from captions alone."""

    def measure(video: Tensor) -> Row:
        found = evaluator.track_figures(real.scenes, evaluator.matcher.track(video, real.scenes.thing))
        return {
            "sprite match": found["sprite match"]["value"],
            "motion": found["motion by track"]["value"],
            "sharpness": _sharpness(video, real),
        }

    return measure


def picture_figures(evaluator: Evaluator, real: Clips, *, has_thing: bool) -> Callable[[Tensor], Row]:
    """Return what measures clips made from first frames."""

    def measure(video: Tensor) -> Row:
        db = psnr(video, real.video)
        row = {
            "PSNR": float(db[:, 1:].mean()),
            "last frame": float(db[:, -1].mean()),
            "sharpness": _sharpness(video, real),
        }
        if has_thing:
            row["sprite match"] = float(evaluator.matcher.track(video, real.scenes.thing).score[:, -1].mean())
        return row

    return measure


def _sharpness(video: Tensor, real: Clips) -> float:
    return float((sharpness(video)[:, -1] / sharpness(real.rebuilt)[:, -1]).mean())


# ---- the parts -------------------------------------------------------------------------------------------------------


def things(evaluator: Evaluator, clips: int) -> Clips:
    return evaluator.real(evaluator.scenes(clips, seed=71, held_out=True, motions=_LASTING))


def fast(evaluator: Evaluator, clips: int, _: Sequence[Path]) -> Tables:
    """Compare 4 steps at several guidance scales with the model's own steps."""
    ways = [{"num_inference_steps": 10, "guidance_scale": 3.0}]
    ways += [{"num_inference_steps": 4, "guidance_scale": scale} for scale in _SCALES]
    yield _from_text(evaluator, clips, ways)
    yield _from_first_frames(evaluator, "things", things(evaluator, clips // 2), ways)


def guidance(evaluator: Evaluator, clips: int, photographs: Sequence[Path]) -> Tables:
    """Compare guidance scales of image to video with captions; without one, both passes are equal."""
    ways = [{"guidance_scale": scale} for scale in (1.5, 3.0)]
    yield _from_first_frames(evaluator, "things", things(evaluator, clips // 2), ways)
    files = list_photographs(photographs) or installed_photographs()
    world = PhotographWorld(files, motion_frames=evaluator.defaults.num_frames - 1)
    yield _from_first_frames(evaluator, "photographs", world.clips(evaluator, clips // 2), ways)


def guidance_range(evaluator: Evaluator, clips: int, _: Sequence[Path]) -> Tables:
    """Compare guidance in a part of the steps with guidance in all of them, and in none."""
    ways: list[dict[str, Any]] = [
        {"num_inference_steps": 4, "guidance_scale": 3.0},
        {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_stop": 0.5},
        {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_stop": 0.25},
        {"num_inference_steps": 4, "guidance_scale": 1.0},
        {"num_inference_steps": 10, "guidance_scale": 3.0},
        {"num_inference_steps": 10, "guidance_scale": 3.0, "guidance_stop": 0.5},
        {"num_inference_steps": 10, "guidance_scale": 3.0, "guidance_start": 0.3},
    ]
    yield _from_text(evaluator, clips, ways)


def _from_text(evaluator: Evaluator, clips: int, ways: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Row]]:
    real = evaluator.real(evaluator.scenes(clips, seed=61))
    texts = captions(real.scenes)

    def make(**way: Any) -> Tensor:
        return evaluator.denoise(texts, seed=1000, **way)

    return f"text to video, {clips} clips", dict(rows(evaluator, ways, make, text_figures(evaluator, real)))


def _from_first_frames(
    evaluator: Evaluator, title: str, real: Clips, ways: Sequence[dict[str, Any]]
) -> tuple[str, dict[str, Row]]:
    texts, conditions = captions(real.scenes), first_frames(real)

    def make(**way: Any) -> Tensor:
        return evaluator.denoise(texts, conditions, seed=2000, **way)

    measure = picture_figures(evaluator, real, has_thing=title == "things")
    return f"image to video, {title}, {len(texts)} clips", dict(rows(evaluator, ways, make, measure))


def cache(evaluator: Evaluator, clips: int, _: Sequence[Path]) -> Tables:
    """Compare the step cache with the full computation, and with fewer steps; PSNR of the decoded videos."""
    shown = things(evaluator, max(2, clips // 8))
    texts = captions(shown.scenes)
    kept = kept_frames("completion", shown.latents.shape[2])
    completion = [conditions_of(z, kept) for z in shown.latents]
    tasks: dict[str, Conditions | None] = {"text to video": None, f"{len(kept)} frames kept": completion}
    for steps in (10, 30):
        for title, conditions in tasks.items():
            yield f"{title}, {steps} steps, {len(texts)} clips", _cached(evaluator, texts, conditions, steps)


def _cached(evaluator: Evaluator, texts: Sequence[str], conditions: Conditions | None, steps: int) -> dict[str, Row]:
    pipe, found = evaluator.pipe, {}

    def make(count: int) -> Tensor:
        return evaluator.decode(evaluator.denoise(texts, conditions, seed=3000, steps=count))

    full = make(steps)
    with _counting(pipe) as computed:
        for count in (steps - 1, steps * 7 // 10):
            found[f"{count} steps"] = _against(full, make(count), computed, evaluator, steps)
        for threshold in (0.1, 0.2):
            step_cache.enable(pipe, threshold=threshold)
            found[f"first_block, {threshold:g}"] = _against(full, make(steps), computed, evaluator, steps)
        step_cache.disable(pipe)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        found["all tokens count, 0.1"] = _against(full, make(steps), computed, evaluator, steps)
        pipe.transformer.disable_cache()
    return found


@contextmanager
def _counting(pipe: PusaPipeline) -> Iterator[list[int]]:
    """Count the passes that get beyond the first block, in a list of one number."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    handle = pipe.transformer.blocks[1].attn1.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def _against(full: Tensor, video: Tensor, computed: list[int], evaluator: Evaluator, steps: int) -> Row:
    """Measure a video against the full one; the work is a share of that of all blocks in all steps."""
    passes, blocks = 2 * steps * -(-len(video) // BATCH), len(evaluator.pipe.transformer.blocks)
    share = computed[0] / passes
    computed[0] = 0
    db = psnr(video, full).mean(1)
    return {"PSNR": float(db.mean()), "worst": float(db.min()), "work": (1 + (blocks - 1) * share) / blocks}


PARTS = {"fast": fast, "guidance": guidance, "range": guidance_range, "cache": cache}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--pictures", type=Path, default=cache_folder() / "pictures", help="of the small world")
    parser.add_argument("--photographs", type=Path, nargs="*", default=[], help="pictures, or folders of them")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--model", default="mini")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"{min(unknown)} is none of {', '.join(PARTS)}")
    evaluator = load_evaluator(arguments.model, arguments.pictures, None)
    for part in arguments.parts or PARTS:
        for title, found in PARTS[part](evaluator, arguments.clips, arguments.photographs):
            columns = list(next(iter(found.values())))
            print(f"\n{part}: {title}")
            print(as_text(["", *columns], [[name, *(f"{row[c]:.2f}" for c in columns)] for name, row in found.items()]))
            print(json.dumps({"part": part, "title": title, "rows": found}), flush=True)


if __name__ == "__main__":
    main()
