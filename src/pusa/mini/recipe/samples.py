"""Generate clips with a model of the small world, for contact sheets and to choose the alpha of its adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.conditions import PusaCondition
from pusa.media import to_uint8
from pusa.media.previews import Strip, strip_sheet, write_picture
from pusa.mini.recipe.base import MAX_SEQUENCE_LENGTH
from pusa.mini.world.edition import Edition
from pusa.mini.world.vocabulary import MOTIONS
from pusa.mini.world.world import Scenes, World, captions, draw_scenes
from pusa.models.vae import decode_video, encode_video
from pusa.pipeline import PusaPipeline

GUIDANCE, PICTURE_GUIDANCE = 3.0, 1.5
STEPS = 10
FAST_STEPS, FAST_GUIDANCE = 4, 2.0  # docs/speed.md
ALPHA = 1.4  # Pusa V1.0's
STRENGTHS = (0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)
_ENOUGH_DB = 0.5
_BATCH = 8
_SHEET_SEED, _SWEEP_SEED = 1701, 91


class ClipGenerator:
    """Generate clips of one size with a pipeline, on its device.

    Args:
        pipe: the model, with its adapter attached if it has one.
        size: pixels, both ways.
        frames: 4n + 1.
    """

    def __init__(self, pipe: PusaPipeline, *, size: int, frames: int) -> None:
        self.pipe, self.size, self.frames = pipe, size, frames
        pipe.set_progress_bar_config(disable=True)

    def generate(self, texts: Sequence[str], seed: int, *, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Generate a clip per text; its noise depends on its index and `seed` only.

        Args:
            texts: captions, or empty ones.
            first: the first latent frames ``[B, C, 1, h, w]`` of pictures to start from.

        Returns:
            Video ``[B, 3, F, H, W]`` in -1..1 and latents ``[B, C, f, h, w]``, fp32 on the CPU.
        """
        videos, latents = [], []
        for begin in range(0, len(texts), _BATCH):
            chosen = range(begin, min(begin + _BATCH, len(texts)))
            condition_arguments: dict[str, Any] = {}
            if first is not None:
                condition_arguments["conditions"] = [[PusaCondition(latents=first[i], latent_index=0)] for i in chosen]
            # Without a caption there is nothing to guide towards.
            guidance = GUIDANCE if first is None else PICTURE_GUIDANCE
            generated = self.pipe(
                [texts[i] for i in chosen],
                height=self.size,
                width=self.size,
                num_frames=self.frames,
                num_inference_steps=STEPS,
                guidance_scale=guidance if any(texts) else 1.0,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                generator=[torch.Generator().manual_seed(seed + i) for i in chosen],
                output_type="latent",
                **condition_arguments,
            ).frames
            latents.append(generated.float().cpu())
            videos.append(decode_video(self.pipe.vae, generated).float().cpu())
        return torch.cat(videos), torch.cat(latents)

    def first_latents(self, world: World, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """Draw clips and encode their first frames.

        Returns:
            Video ``[B, 3, F, H, W]`` in -1..1 on the CPU, and latents ``[B, C, 1, h, w]``.
        """
        videos, firsts = [], []
        for begin in range(0, len(scenes), _BATCH):
            video, _ = world.render(scenes[begin : begin + _BATCH], self.frames, size=self.size)
            videos.append(video.cpu())
            firsts.append(encode_video(self.pipe.vae, video[:, :, :1]))
        return torch.cat(videos), torch.cat(firsts)


def find_alpha(
    generator: ClipGenerator, world: World, *, things: int, clips: int, strengths: Sequence[float] = STRENGTHS
) -> dict[str, Any]:
    """Measure alphas of the adapter on combinations that training never drew, without a caption, and choose the best.

    A high alpha costs motion and text-to-video, so the best is the smallest whose first frames come within half a
    decibel of the most faithful; `factor` makes it alpha 1.4, which Pusa V1.0 recommends. The pipeline's alpha is
    afterwards 1.4.
    """
    from pusa.evaluation.metrics import psnr, sharpness

    scenes = draw_scenes(20 * clips, _SWEEP_SEED, things=things, held_out=True, edition=world.edition)
    scenes = scenes[scenes.motion != list(MOTIONS).index("fade")][:clips]
    truth, first = generator.first_latents(world, scenes)
    sweep: dict[str, dict[str, float]] = {}
    try:
        for strength in strengths:
            generator.pipe.set_alpha(strength)
            video, _ = generator.generate([""] * len(scenes), 4000, first=first)
            sharp, db = sharpness(video), psnr(video, truth)
            sweep[f"{strength:g}"] = {
                "sharpness_kept": float((sharp[:, -1] / sharp[:, 0]).mean()),
                "frames_1_4_db": float(db[:, 1:5].mean()),
                "all_frames_db": float(db.mean()),
                "first_frame_db": float(db[:, 0].mean()),
            }
    finally:
        generator.pipe.set_alpha(ALPHA)
    fidelity = {strength: sweep[f"{strength:g}"]["frames_1_4_db"] for strength in strengths}
    best = min(strength for strength in strengths if fidelity[strength] >= max(fidelity.values()) - _ENOUGH_DB)
    return {"best": best, "factor": best / ALPHA, "sweep": sweep}


def write_sheets(
    generator: ClipGenerator,
    world: World,
    folder: Path,
    *,
    things: int,
    from_captions: int = 32,
    from_pictures: int = 8,
) -> list[Path]:
    """Write contact sheets of unpicked clips: some from captions, some from pictures with and without captions.

    The scenes follow from a fixed seed: the things in turn, in combinations that training never drew.
    """
    scenes = _sheet_scenes(max(from_captions, from_pictures), things, world.edition)
    texts = captions(scenes)
    video, _ = generator.generate(texts[:from_captions], _SHEET_SEED)
    strips = [Strip(text, to_uint8(clip)) for text, clip in zip(texts, video, strict=False)]
    paths = [write_picture(_sheet(strips, "text to video, unpicked"), folder / "text-to-video.jpg")]
    truth, first = generator.first_latents(world, scenes[:from_pictures])
    strips = []
    for number, text in enumerate(texts[:from_pictures]):
        strips.append(Strip(f"the true clip: {text}", to_uint8(truth[number])))
        for words in (text, ""):
            video, _ = generator.generate([words], _SHEET_SEED + number, first=first[number : number + 1])
            strips.append(Strip(words or "without a caption", to_uint8(video[0]), held=[0]))
    paths.append(write_picture(_sheet(strips, "image to video, unpicked"), folder / "image-to-video.jpg"))
    return paths


def _sheet_scenes(count: int, things: int, edition: Edition) -> Scenes:
    """Draw `count` scenes whose things are the edition's in turn."""
    drawn = draw_scenes(200 * count, _SHEET_SEED, things=things, held_out=True, edition=edition)
    chosen, used = [], set()
    for number in range(count):
        fits = (drawn.thing == edition.things[number % things]).nonzero().flatten().tolist()
        index = next(index for index in fits if index not in used)
        used.add(index)
        chosen.append(index)
    return drawn[torch.tensor(chosen)]


def _sheet(strips: Sequence[Strip], title: str) -> Any:
    return strip_sheet(strips, columns=7, cell_width=112, title=title)
