"""Measure how well a model of the small world follows captions and pictures (``pusa eval mini``).

Each part is a function from an `Evaluator` to tables and contact sheets. A row of a table is a way to generate clips,
a column a measure; the row of real clips through the VAE applies the measure to the ground truth (the ceiling). Seeds
are fixed: the same model gives the same figures.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.conditions import PusaCondition
from pusa.evaluation.metrics import drift, first_jump, mean, psnr, rate, ratio, sharpness, unevenness
from pusa.media.previews import strip_sheet, write_picture
from pusa.mini.evaluation import joints
from pusa.mini.evaluation.photographs import PhotographWorld
from pusa.mini.evaluation.probes import DISTORTIONS
from pusa.mini.evaluation.report import as_markdown
from pusa.mini.evaluation.setup import Clips, Evaluator, Part, Row, Table, image_of, share
from pusa.mini.world.vocabulary import MOTIONS
from pusa.mini.world.world import captions, draw_scenes
from pusa.positions import frames_of, latent_frames

logger = logging.getLogger(__name__)

CLIPS = 32
"""Clips of a combination of settings in text-to-video, at the model's own number of steps; other parts take a share."""

REAL = "real clips through the VAE"
_LASTING = tuple(name for name in MOTIONS if name != "fade")  # the thing is still visible at the end
_STRIPS = 8  # clips in a contact sheet


# ---- the parts -------------------------------------------------------------------------------------------------------


def probes(evaluator: Evaluator, clips: int, **_: Any) -> Part:
    """Measure the probes on real, reconstructed, grey and wrongly coloured clips, and on things they do not know."""
    table: Table = {}
    real = evaluator.real(evaluator.scenes(clips, seed=41))
    for kind, video in (("real clips", real.video), (REAL, real.rebuilt)):
        table[kind] = evaluator.caption_figures(real.scenes, video)
        for name, distorted in DISTORTIONS.items():
            table[f"{kind}, {name}"] = evaluator.probe_figures(real.scenes, evaluator.classify(distorted(video)))
    table["chance"] = evaluator.chance()
    part = Part({"the probes on clips whose truth is known": table})
    other_things = draw_scenes(40 * clips, seed=42, things=evaluator.world.things)
    other_things = other_things[(other_things.thing >= evaluator.things) & (other_things.second < 0)][:clips]
    if len(other_things):
        predictions = evaluator.classify(
            evaluator.world.render(other_things, evaluator.defaults.num_frames, size=evaluator.defaults.width)[0]
        )
        called = {"called one of the model's things": rate(predictions.thing < evaluator.things)}
        other_thing = torch.roll(real.scenes.thing, 1)
        apart = real.scenes.thing != other_thing
        named = evaluator.matcher.track(real.rebuilt[apart], other_thing[apart])
        part.tables["the probes on what they should not find"] = {
            "real clips of other things": called,
            f"{REAL}, looked through for another sprite": {"sprite match": mean(evaluator.sprite_match(named))},
        }
    return part


def vae(evaluator: Evaluator, clips: int, *, photographs: PhotographWorld | None = None, **_: Any) -> Part:
    """Measure the PSNR of the VAE's reconstructions."""
    table: Table = {}
    sets = {"held-out clips": evaluator.real(evaluator.scenes(clips, seed=51, held_out=True))}
    if photographs is not None:
        sets["photographs never trained on, the camera moving"] = photographs.clips(evaluator, clips)
    for name, real in sets.items():
        db = psnr(real.rebuilt, real.video)
        table[name] = {
            "PSNR, dB": mean(db.mean(1)),
            "first frame, dB": mean(db[:, 0]),
            "worst clip, dB": {"value": float(db.mean(1).min()), "n": len(db)},
        }
    return Part({"the VAE": table})


def text_to_video(evaluator: Evaluator, clips: int, *, steps: Sequence[int], **_: Any) -> Part:
    """Measure how often clips show what their captions name, for trained and for held-out combinations."""
    part = Part()
    default_steps = evaluator.defaults.steps
    for title, held_out, seed in (("trained combinations", False, 61), ("held-out combinations", True, 62)):
        scenes = evaluator.scenes(clips, seed=seed, held_out=held_out)
        texts = captions(scenes)
        table: Table = {REAL: evaluator.caption_figures(scenes, evaluator.real(scenes).rebuilt)}
        for number in steps:
            # Fewer clips where more steps cost more, and where they are only for comparison.
            count = clips if number == default_steps else max(2, round(clips * min(0.6, default_steps / number)))
            video = evaluator.decode(evaluator.denoise(texts[:count], steps=number, seed=1000))
            table[f"{number} steps"] = evaluator.caption_figures(scenes[:count], video)
            if number == default_steps or default_steps not in steps:
                part.show((f"{title}, {number} steps: {text}" for text in texts[:_STRIPS]), video)
        if evaluator.has_adapter:
            count = max(2, round(0.4 * clips))
            with evaluator.without_adapter():
                video = evaluator.decode(evaluator.denoise(texts[:count], seed=1000))
            table[f"{default_steps} steps, without the adapter"] = evaluator.caption_figures(scenes[:count], video)
        table["chance"] = evaluator.chance()
        part.tables[f"text to video, {title}"] = table
    return part


def image_to_video(evaluator: Evaluator, clips: int, *, photographs: PhotographWorld | None = None, **_: Any) -> Part:
    """Measure clips from the first frames of held-out clips and of photographs, with and without captions."""
    part = Part()
    real = evaluator.real(evaluator.scenes(share(clips, 0.4), seed=71, held_out=True, motions=_LASTING))
    table: Table = {REAL: _kept_row(evaluator, real, real.latents, real.rebuilt)}
    for name, texts, noise, adapted in _ways(evaluator, captions(real.scenes)):
        latents = _from_first_frames(evaluator, real, texts, noise, adapted)
        video = evaluator.decode(latents)
        table[name] = _kept_row(evaluator, real, latents, video)
        part.show((f"{name}: {text or 'no caption'}" for text in texts[: _STRIPS // 2]), video, held=[0])
    part.tables["image to video, held-out clips"] = table
    if photographs is not None:
        pictures = photographs.clips(evaluator, share(clips, 0.4))
        table = {REAL: _photograph_row(evaluator, photographs, pictures, pictures.latents, pictures.rebuilt)}
        for name, texts, noise, adapted in _ways(evaluator, captions(pictures.scenes)):
            latents = _from_first_frames(evaluator, pictures, texts, noise, adapted)
            video = evaluator.decode(latents)
            table[name] = _photograph_row(evaluator, photographs, pictures, latents, video)
            part.show((f"{name}: {text or 'no caption'}" for text in texts[: _STRIPS // 2]), video, held=[0])
        part.tables["image to video, photographs never trained on"] = table
    return part


def _ways(evaluator: Evaluator, texts: list[str]) -> list[tuple[str, list[str], float, bool]]:
    """List the ways to generate: name, captions, noise multiplier, and True if the adapter acts."""
    silent = [""] * len(texts)
    if not evaluator.has_adapter:
        return [("with captions", texts, 0.0, True), ("without captions", silent, 0.0, True)]
    return [
        ("with captions", texts, 0.0, True),
        ("with captions, noise 0.2", texts, 0.2, True),
        ("without captions", silent, 0.0, True),
        ("with captions, without the adapter", texts, 0.0, False),
        ("without captions, without the adapter", silent, 0.0, False),
    ]


def _from_first_frames(evaluator: Evaluator, real: Clips, texts: Sequence[str], noise: float, adapted: bool) -> Tensor:
    conditions = [[PusaCondition(image=image_of(clip, 0), noise_multiplier=noise)] for clip in real.video]
    if adapted:
        return evaluator.denoise(texts, conditions, seed=2000)
    with evaluator.without_adapter():
        return evaluator.denoise(texts, conditions, seed=2000)


def _beginning(real: Clips, latents: Tensor, video: Tensor) -> Row:
    first = video[:, :, :1]
    return {
        "first frame against the VAE's, dB": mean(psnr(first, real.rebuilt[:, :, :1])),
        "first frame, dB": mean(psnr(first, real.video[:, :, :1])),
        "frames 1-4, dB": mean(psnr(video[:, :, 1:5], real.video[:, :, 1:5]).mean(1)),
        "jump": ratio(first_jump(latents), first_jump(real.latents)),
    }


def _kept_row(evaluator: Evaluator, real: Clips, latents: Tensor, video: Tensor) -> Row:
    predictions = evaluator.classify(video)
    track = evaluator.matcher.track(video, real.scenes.thing)
    return _beginning(real, latents, video) | {
        "thing at the end": rate(evaluator.thing_in(video[:, :, -3:]) == real.scenes.thing),
        "sprite match at the end": mean(track.score[:, -1]),
        "motion": rate(predictions.motion == real.scenes.motion),
        "camera": rate((predictions.camera == real.scenes.camera)[real.scenes.camera > 0]),
        "Frechet": evaluator.frechet(predictions.features),
    }


def _photograph_row(
    evaluator: Evaluator, photographs: PhotographWorld, real: Clips, latents: Tensor, video: Tensor
) -> Row:
    predictions = evaluator.classify(video)
    sharp, true_sharp = sharpness(video), sharpness(real.rebuilt)
    return _beginning(real, latents, video) | {
        "last frame, dB": mean(photographs.nearest_end(evaluator, real, video[:, :, -1:])),
        "sharpness kept": ratio(sharp[:, -1] / sharp[:, 0], true_sharp[:, -1] / true_sharp[:, 0]),
        "colour drift": mean(drift(video, 4).colour),
        "camera": rate(predictions.camera == real.scenes.camera),
    }


def start_end(evaluator: Evaluator, clips: int, **_: Any) -> Part:
    """Measure clips from the first and the last frame of held-out clips."""
    return _keyframes(evaluator, clips, "start and end", places=(0, -1), seed=81)


def keyframes(evaluator: Evaluator, clips: int, **_: Any) -> Part:
    """Measure clips from the first, the middle and the last frame of held-out clips."""
    middle = latent_frames(evaluator.defaults.num_frames, evaluator.defaults.frames_per_latent) // 2
    return _keyframes(evaluator, clips, "keyframes", places=(0, middle, -1), seed=82)


def _keyframes(evaluator: Evaluator, clips: int, title: str, *, places: tuple[int, ...], seed: int) -> Part:
    part = Part()
    factor = evaluator.defaults.frames_per_latent
    count = latent_frames(evaluator.defaults.num_frames, factor)
    fixed = [frames_of(place % count + 1, factor) - 1 for place in places]  # the last frame that a place stands for
    real = evaluator.real(evaluator.scenes(share(clips, 0.25), seed=seed, held_out=True, motions=_LASTING))
    texts = captions(real.scenes)
    conditions = [
        [
            PusaCondition(image=image_of(clip, frame), latent_index=p, encode=evaluator.defaults.encode)
            for frame, p in zip(fixed, places, strict=True)
        ]
        for clip in real.video
    ]
    table: Table = {REAL: _between_row(evaluator, real, real.rebuilt, fixed)}
    video = evaluator.decode(evaluator.denoise(texts, conditions, seed=3000))
    table["with captions"] = _between_row(evaluator, real, video, fixed)
    part.show((f"{title}: {text}" for text in texts[:_STRIPS]), video, held=fixed)
    if evaluator.has_adapter:
        with evaluator.without_adapter():
            base = evaluator.decode(evaluator.denoise(texts, conditions, seed=3000))
        table["with captions, without the adapter"] = _between_row(evaluator, real, base, fixed)
        part.show((f"{title}, without the adapter: {text}" for text in texts[: _STRIPS // 4]), base, held=fixed)
    part.tables[title] = table
    return part


def _between_row(evaluator: Evaluator, real: Clips, video: Tensor, fixed: list[int]) -> Row:
    db = psnr(video, real.video)
    free = [frame for frame in range(video.shape[2]) if frame not in fixed]
    names = ["first given frame, dB", *[f"given frame {frame}, dB" for frame in fixed[1:-1]], "last given frame, dB"]
    return {
        **{name: mean(db[:, frame]) for name, frame in zip(names, fixed, strict=True)},
        "between, dB": mean(db[:, free].mean(1)),
        "unevenness": mean(unevenness(video)),
        "thing in the middle": rate(_middle(evaluator, video) == real.scenes.thing),
        "Frechet": evaluator.frechet(evaluator.classify(video).features),
    }


def _middle(evaluator: Evaluator, video: Tensor) -> Tensor:
    middle = video.shape[2] // 4  # far from every given frame
    return evaluator.thing_in(video[:, :, middle : middle + 3])


PARTS: dict[str, Callable[..., Part]] = {
    "probes": probes,
    "vae": vae,
    "t2v": text_to_video,
    "i2v": image_to_video,
    "start-end": start_end,
    "keyframes": keyframes,
    "extension": joints.extension,
    "transition": joints.transition,
    "loop": joints.loop,
}


# ---- the report ------------------------------------------------------------------------------------------------------


def evaluate(
    evaluator: Evaluator,
    out: Path,
    *,
    parts: Sequence[str] = tuple(PARTS),
    clips: int = CLIPS,
    steps: Sequence[int] = (4, 10, 30),
    photographs: PhotographWorld | None = None,
) -> dict[str, Any]:
    """Run the parts one after another and write the report after each.

    Args:
        evaluator: the model with its world and probes, see `pusa.mini.evaluation.setup.load_evaluator`.
        out: folder for ``report.json`` and ``report.md``, written after each part, and a contact sheet per part. Parts
            that an earlier run has left there stay, if they are of the same model and are not done again.
        clips: see `CLIPS`.
        steps: numbers of denoising steps that text-to-video is tried at.

    Returns:
        The report: settings, and by part its seconds and tables.

    Raises:
        ValueError: an unknown part.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"no part is called {unknown[0]!r}: there are {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": evaluator.model,
        "size": evaluator.defaults.width,
        "frames": evaluator.defaults.num_frames,
        "things": evaluator.known,
        "steps": evaluator.defaults.steps,
        "guidance": evaluator.defaults.guidance,
        "alpha": evaluator.defaults.alpha if evaluator.has_adapter else None,
        "weights": evaluator.digest(),
    }
    file = out / "report.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if report.get("settings") != settings:
        report = {"settings": settings, "parts": {}}
    for name in PARTS:
        if name not in parts:
            continue
        began = time.monotonic()
        part = PARTS[name](evaluator, clips, steps=steps, photographs=photographs, out=out)
        seconds = time.monotonic() - began
        report["parts"][name] = {"clips": clips, "seconds": round(seconds, 1), "tables": part.tables}
        if part.strips:
            picture = strip_sheet(
                part.strips, columns=9, cell_width=112, title=f"pusa eval mini, {name}: {evaluator.model}"
            )
            write_picture(picture, out / f"{name}.png")
        report["parts"] = {part_name: report["parts"][part_name] for part_name in PARTS if part_name in report["parts"]}
        file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        (out / "report.md").write_text(as_markdown(report))
        logger.info("%s: %.0f s", name, seconds)
    return report
