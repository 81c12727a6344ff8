"""Measure seams of extensions, transitions and loops of clips whose truth is known.

All videos come from `pusa.generate.generate`, with its cross-fades at joints, so that the figures are those of users.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pusa import media
from pusa.evaluation.metrics import as_video, drift, mean, rate, seam, unevenness
from pusa.generate import generate
from pusa.media.previews import Strip
from pusa.mini.evaluation.setup import Clips, Evaluator, Part, share
from pusa.mini.world.world import captions
from pusa.pipeline import PusaPipeline
from pusa.positions import frames_of, latent_frames
from pusa.request import GenerationRequest

EXTENSIONS = 5
STAYING = ("still", "bounce", "spin", "swing", "orbit")
"""Motions that never leave the view, however long they last."""


def generate_frames(request: GenerationRequest, pipe: PusaPipeline) -> np.ndarray:
    """Generate the frames of a request, uint8 ``[F, H, W, 3]``, without any loss by a codec."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in generate(request, Path(folder) / "%04d.png", pipeline=pipe):
            pass
        return np.stack([np.asarray(media.read_image(file)) for file in sorted(Path(folder).glob("*.png"))])


def vae_seam(video: Tensor, rebuilt: Tensor) -> Tensor:
    """Measure the seam of a video that changes into its own reconstruction in its middle: the VAE's part of a seam."""
    joint = video.shape[2] // 2
    return seam(torch.cat([video[:, :, :joint], rebuilt[:, :, joint:]], dim=2), joint)


def request_for(evaluator: Evaluator, prompt: str, seed: int, **fields: Any) -> GenerationRequest:
    """Make a request that leaves all other fields to the model."""
    return GenerationRequest(model=evaluator.model, prompt=prompt, seed=seed, **fields)


def extension(evaluator: Evaluator, clips: int, *, out: Path, **_: Any) -> Part:
    """Measure `EXTENSIONS` successive extensions of held-out clips."""
    count, part = share(clips, 0.1), Part()
    table = part.tables.setdefault(f"extension, {EXTENSIONS} in a row", {})
    real = evaluator.real(evaluator.scenes(count, seed=101, held_out=True, motions=STAYING))
    length = real.video.shape[2]
    probe_request = request_for(evaluator, "", 0, task="extend", conditions=[{"kind": "video", "file": "clip.mp4"}])
    overlap = probe_request.resolved(evaluator.defaults).overlap
    new = length - overlap  # frames that each extension adds
    factor = evaluator.defaults.frames_per_latent
    total = frames_of(latent_frames(length, factor) + (EXTENSIONS - 1) * new // factor, factor)
    table["real clips"] = {
        "seam": mean(seam(real.video, length // 2)),
        "thing at the end": rate(evaluator.thing_in(real.rebuilt[:, :, -3:]) == real.scenes.thing),
    }
    table["real clips going over into their reconstruction"] = {"seam": mean(vae_seam(real.video, real.rebuilt))}
    videos = []
    for number, text in enumerate(captions(real.scenes)):
        conditions = [{"kind": "video", "file": str(_file(evaluator, real, number, out))}]
        request = request_for(evaluator, text, 5000 + number, task="extend", conditions=conditions, frames=total)
        videos.append(generate_frames(request, evaluator.pipe))
        part.strips.append(Strip(f"extension: {text}", videos[-1]))
    video = torch.cat([as_video(frames) for frames in videos])
    later = torch.stack([seam(video, length + new * number) for number in range(1, EXTENSIONS)], dim=1)
    drifted = drift(video, new)
    ends = video[:, :, -length:]
    table["extended"] = {
        "seam": mean(seam(video, length)),
        "seams of later extensions": mean(later.mean(1)),
        "colour drift": mean(drifted.colour),
        "contrast kept": mean(drifted.contrast),
        "motion kept": mean(drifted.motion),
        "thing at the end": rate(evaluator.thing_in(video[:, :, -3:]) == real.scenes.thing),
        "Frechet": evaluator.frechet(evaluator.classify(ends).features),
    }
    return part


def transition(evaluator: Evaluator, clips: int, *, out: Path, **_: Any) -> Part:
    """Measure transitions between held-out clips, with the default overlap and with a shorter one."""
    count, part = share(clips, 0.1), Part()
    table = part.tables.setdefault("transition", {})
    real = evaluator.real(evaluator.scenes(2 * count, seed=102, held_out=True, motions=STAYING))
    length = real.video.shape[2]
    table["real clips"] = {
        "seams": mean(seam(real.video, length // 2)),
        "unevenness": mean(unevenness(real.video)),
    }
    texts = captions(real.scenes)
    files = [_file(evaluator, real, number, out) for number in range(2 * count)]
    for name, overlap in _overlaps(evaluator):
        videos = []
        for number in range(count):
            pair = [{"kind": "video", "file": str(file)} for file in (files[number], files[count + number])]
            text = texts[count + number]
            request = request_for(evaluator, text, 6000 + number, task="transition", conditions=pair, overlap=overlap)
            videos.append(generate_frames(request, evaluator.pipe))
            part.strips.append(Strip(f"transition, {name}: to {text}", videos[-1]))
        video = torch.cat([as_video(frames) for frames in videos])
        end = video.shape[2] - length
        between = video[:, :, length - 1 : end + 1]
        table[name] = {
            "seams": mean(torch.stack([seam(video, length), seam(video, end)], dim=1).mean(1)),
            "frames between": {"value": float(end - length), "n": count},
            "unevenness": mean(unevenness(between)),
            "Frechet": evaluator.frechet(evaluator.classify(_middle_of(video, length)).features),
        }
    return part


def loop(evaluator: Evaluator, clips: int, *, out: Path, **_: Any) -> Part:
    """Measure loops of held-out combinations, with the default overlap and with a shorter one."""
    count, part = share(clips, 0.1), Part()
    table = part.tables.setdefault("loop", {})
    scenes = evaluator.scenes(count, seed=103, held_out=True, motions=STAYING)
    real = evaluator.real(scenes)
    table["real clips"] = {
        "seam": mean(seam(real.video, real.video.shape[2] // 2)),
        "unevenness": mean(unevenness(real.video)),
        "thing": rate(evaluator.classify(real.rebuilt).thing == scenes.thing),
    }
    for name, overlap in _overlaps(evaluator):
        videos = []
        for number, text in enumerate(captions(scenes)):
            request = request_for(evaluator, text, 7000 + number, task="loop", overlap=overlap)
            frames = generate_frames(request, evaluator.pipe)
            videos.append(frames)
            part.strips.append(Strip(f"loop, {name}: {text}", np.concatenate([frames, frames[:1]])))
        video = torch.cat([as_video(frames) for frames in videos])
        around = torch.cat([video, video[:, :, :9]], dim=2)
        predictions = evaluator.classify(_middle_of(around, evaluator.defaults.num_frames))
        table[name] = {
            "seam": mean(seam(around, video.shape[2])),
            "unevenness": mean(unevenness(around)),
            "thing": rate(predictions.thing == scenes.thing),
            "Frechet": evaluator.frechet(predictions.features),
        }
    return part


def _overlaps(evaluator: Evaluator) -> Sequence[tuple[str, int | None]]:
    """List the default overlap, and a quarter of the window if that is less, each with its name."""
    default = request_for(evaluator, "x", 0, task="loop").resolved(evaluator.defaults).overlap
    factor = evaluator.defaults.frames_per_latent
    short = frames_of(max(1, latent_frames(evaluator.defaults.num_frames, factor) // 4), factor)
    return [
        (f"overlap {default} frames (the default)", None),
        *([(f"overlap {short} frames", short)] if short < default else []),
    ]


def _middle_of(video: Tensor, length: int) -> Tensor:
    start = max(0, (video.shape[2] - length) // 2)
    return video[:, :, start : start + length]


def _file(evaluator: Evaluator, real: Clips, number: int, out: Path) -> Path:
    """Write a real clip as an MP4 file to ``out/clips``."""
    folder = out / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:02d}.mp4"
    size = evaluator.defaults.width
    with media.VideoWriter(path, width=size, height=size, fps=evaluator.defaults.fps) as writer:
        writer.write(media.to_uint8(real.video[number : number + 1]))
    return path
