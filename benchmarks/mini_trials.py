"""Compare changes of the small model's recipe in short trials, each continuing from the model in the package.

    python benchmarks/mini_trials.py WORK [--pictures PACK] [--steps 180] [--only NAME ...]
    python benchmarks/mini_trials.py WORK --steps 1100 --only first-edition all   # about an hour of a core each
    python benchmarks/mini_trials.py WORK --table

All trials see as many clips in as many steps of the same size, so that a busy machine changes no result; `--size 64`
makes a step cheap. A trial trains and measures the base alone, without an adapter, on combinations never drawn:

- the held-out loss, one timestep for the whole clip, at eight sigmas (low, middle, high and their mean);
- the same where things are, and the loss of image-to-video (the first latent frame clean);
- text-to-video with captions: the sprite match, see `pusa.mini.evaluation.templates`;
- image-to-video without a caption: PSNR of frames 1 to 4 and the sprite match of the last frame.

One JSON line a trial goes to ``WORK/trials.jsonl``, a contact sheet of its clips to ``WORK/NAME-STEPS.jpg``.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from pusa.evaluation.metrics import psnr, sharpness
from pusa.media import to_uint8
from pusa.media.previews import Strip, strip_sheet, write_picture
from pusa.mini.evaluation.templates import Matcher
from pusa.mini.recipe.base import (
    SHIFT,
    BaseObjective,
    BaseSchedule,
    TextToVideo,
    held_out_losses,
    train_base,
    velocity_errors,
)
from pusa.mini.recipe.clips import ClipCache, ClipPlan, cache_clips
from pusa.mini.recipe.recipe import load_pictures
from pusa.mini.recipe.samples import ClipGenerator
from pusa.mini.world.world import World, captions
from pusa.models.vae import channels_last
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler
from pusa.zoo import MINI_FOLDER

FRAMES, THINGS = 33, 32
FIRST_EDITION = BaseObjective()
ALL = BaseObjective(vector_share=0.3, clean_start_share=0.5, thing_weight=2.0, caption_dropout=0.25)
PICTURES = 1 / 3
TRIALS: dict[str, tuple[BaseObjective, float | None]] = {  # and the share of photographs and textures
    "first-edition": (FIRST_EDITION, None),
    "vector-times": (replace(FIRST_EDITION, vector_share=0.3), None),
    "vector-times-clean-start": (replace(FIRST_EDITION, vector_share=0.3, clean_start_share=0.5), None),
    "thing-weight": (replace(FIRST_EDITION, thing_weight=2.0), None),
    "caption-dropout": (replace(FIRST_EDITION, caption_dropout=0.25), None),
    "pictures": (FIRST_EDITION, PICTURES),
    "all": (ALL, PICTURES),
}


class Trials:
    """Run trials on shared data."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.vae = channels_last(AutoencoderKLWan.from_pretrained(MINI_FOLDER / "vae"))
        pictures = load_pictures(self.work, options.pictures, things=THINGS)
        self.world = World(*pictures, motion_frames=FRAMES - 1)
        self.held_out = self.clips("held_out", 256, None, held_out=True)

    def clips(self, name: str, count: int, picture_share: float | None, *, held_out: bool = False) -> ClipCache:
        plan = ClipPlan(
            clips=count,
            size=self.options.size,
            frames=FRAMES,
            things=THINGS,
            picture_share=picture_share,
            held_out=held_out,
        )
        return cache_clips(self.vae, self.world, self.work / f"{name}-{self.options.size}", plan)

    def run(self, name: str) -> dict[str, Any]:
        """Train and measure one trial."""
        objective, picture_share = TRIALS[name]
        data = self.clips("pictures" if picture_share else "clips", self.options.clips, picture_share)
        base = TextToVideo.from_folder(MINI_FOLDER)
        schedule = BaseSchedule(
            batch_tokens=self.options.batch_tokens,
            steps=self.options.steps,
            short_share=0.0,
            rate=self.options.rate,
            cool_from=0.3,
            ema_decay=0.995,
        )
        began = time.process_time()
        checkpoint = self.work / f"{name}-{self.options.steps}.pt"
        if self.options.steps:
            train_base(base, None, data, checkpoint, schedule, objective)
        spent = time.process_time() - began
        result = {
            "trial": name,
            "steps": self.options.steps,
            "size": self.options.size,
            "core_minutes": round(spent / 60, 1),
            "objective": asdict(objective),
            "picture_share": picture_share,
            **self.judge(base, name),
        }
        with (self.work / "trials.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        return result

    @torch.no_grad()
    def judge(self, base: TextToVideo, name: str) -> dict[str, float]:
        """Measure all that the table shows, and write the sheet."""
        base = base.copy()
        levels = held_out_losses(base, self.held_out, batches=32)
        scores = {
            "loss": sum(levels) / 8,
            "loss_low": sum(levels[:3]) / 3,
            "loss_middle": sum(levels[3:6]) / 3,
            "loss_high": sum(levels[6:]) / 2,
            **self.frame_losses(base),
        }
        pipe = PusaPipeline(
            tokenizer=base.tokenizer,
            text_encoder=base.text_encoder,
            vae=self.vae,
            scheduler=PusaFlowMatchEulerScheduler(shift=SHIFT),
            transformer=base.transformer,
        )
        generator = ClipGenerator(pipe, size=self.options.size, frames=FRAMES)
        scenes = self.held_out.scenes[: self.options.judged]
        truth, first = generator.first_latents(self.world, scenes)
        texts = captions(scenes)
        from_captions, _ = generator.generate(texts, 500)
        from_pictures, _ = generator.generate([""] * len(texts), 500, first=first)
        matcher = Matcher(self.world.sprites[:THINGS])
        scores["t2v_sprite_match"] = float(matcher.track(from_captions, scenes.thing).score.mean())
        scores["i2v_frames_1_4_db"] = float(psnr(from_pictures[:, :, 1:5], truth[:, :, 1:5]).mean())
        scores["i2v_sprite_match_at_end"] = float(matcher.track(from_pictures, scenes.thing).score[:, -1].mean())
        sharp = sharpness(from_pictures)
        scores["i2v_sharpness_kept"] = float((sharp[:, -1] / sharp[:, 0]).mean())
        strips = [Strip(text, to_uint8(clip)) for text, clip in zip(texts, from_captions, strict=True)]
        strips += [
            Strip(f"{t} (its picture)", to_uint8(c), held=[0]) for t, c in zip(texts, from_pictures, strict=True)
        ]
        picture = strip_sheet(strips, columns=7, cell_width=96, title=f"{name}, {self.options.steps} steps")
        write_picture(picture, self.work / f"{name}-{self.options.steps}.jpg")
        return scores

    def frame_losses(self, base: TextToVideo) -> dict[str, float]:
        """Measure the loss where things are (one time per clip), and that of image-to-video."""
        things, total, pictured = 0.0, 0.0, 0.0
        with torch.random.fork_rng():
            for batch in range(16):
                torch.manual_seed(1000 + batch)
                chosen = torch.randint(len(self.held_out), (8,))
                clean = self.held_out.latents[chosen].float()
                mask = self.held_out.mask[chosen].float() / 255
                embeds = base.embed(captions(self.held_out.scenes[chosen]))
                sigma = (torch.arange(8) + 0.5) / 8
                sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
                errors = velocity_errors(base.transformer, clean, sigma, embeds)
                things, total = things + float((errors * mask).sum()), total + float(mask.sum())
                given = sigma[:, None].repeat(1, clean.shape[2])
                given[:, 0] = 0
                pictured += float(velocity_errors(base.transformer, clean, given, embeds)[:, 1:].mean()) / 16
        return {"loss_of_things": things / total, "loss_i2v": pictured}


def table(path: Path) -> str:
    """All trials so far as Markdown."""
    results = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in results[0] if name.startswith(("loss", "t2v", "i2v"))]
    rows = [f"| trial | steps | core minutes | {' | '.join(name.replace('_', ' ') for name in names)} |"]
    rows.append("|---" * (len(names) + 3) + "|")
    for result in results:
        values = " | ".join(f"{result[name]:.2f}" if "_db" in name else f"{result[name]:.4f}" for name in names)
        rows.append(f"| {result['trial']} | {result['steps']} | {result['core_minutes']} | {values} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Short trials of changes of the small model's recipe.")
    parser.add_argument("work", type=Path, help="folder for clips, checkpoints, results")
    parser.add_argument("--pictures", type=Path, help="a picture pack instead of what npm and apt bring")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--steps", type=int, default=180, help="0 judges the model in the package as it is")
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--judged", type=int, default=16, help="clips made for the sheet and the sprite match")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch-tokens", type=int, default=2304)
    parser.add_argument("--rate", type=float, default=8e-3, help="of Muon")
    parser.add_argument("--table", action="store_true", help="only print the results so far")
    options = parser.parse_args()
    if not options.table:
        trials = Trials(options)
        for name in options.only:
            print(json.dumps(trials.run(name)), flush=True)
    print(table(options.work / "trials.jsonl"))


if __name__ == "__main__":
    main()
