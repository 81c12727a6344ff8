"""Where pieces of video meet: extension, transition and loop of known clips, made as the command line makes them.

Everything goes through `pusa.generate.generate`, fading at joints and all, so that what is measured is what users get.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pusa import media
from pusa.evaluation.metrics import Figure, as_video, drift, mean, rate, seam, unevenness
from pusa.generate import generate
from pusa.mini.world.world import captions
from pusa.positions import frames_of, latent_frames
from pusa.request import GenerationRequest

if TYPE_CHECKING:
    from pusa.mini.evaluation.setup import Bench, Clips
    from pusa.pipeline import PusaPipeline

EXTENSIONS = 5
STAYING = ("still", "bounce", "spin", "swing", "orbit")
"""Motions that may go on for ever without leaving the view."""


@dataclass
class Joined:
    """A table, and films with their labels, uint8 ``[F, H, W, 3]``."""

    title: str
    table: dict[str, dict[str, Figure]] = field(default_factory=dict)
    films: list[tuple[str, np.ndarray]] = field(default_factory=list)


def film(request: GenerationRequest, pipe: "PusaPipeline") -> np.ndarray:
    """The frames of a request, uint8 ``[F, H, W, 3]``, without any loss by a codec."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in generate(request, Path(folder) / "%04d.png", pipeline=pipe):
            pass
        return np.stack([np.asarray(media.read_image(file)) for file in sorted(Path(folder).glob("*.png"))])


def vae_seam(video: Tensor, rebuilt: Tensor) -> Tensor:
    """Where a video goes over into its own reconstruction, in its middle: what the VAE's loss adds to a joint."""
    joint = video.shape[2] // 2
    return seam(torch.cat([video[:, :, :joint], rebuilt[:, :, joint:]], dim=2), joint)


def request_for(bench: "Bench", prompt: str, seed: int, **asked: Any) -> GenerationRequest:
    """A request that leaves all else to the model."""
    return GenerationRequest(model=bench.model, prompt=prompt, seed=seed, **asked)


def extension(bench: "Bench", count: int, out: Path) -> Joined:
    """Five extensions, one after another, of held-out clips."""
    result = Joined(f"extension, {EXTENSIONS} in a row")
    real = bench.real(bench.scenes(count, seed=101, held_out=True, motions=STAYING))
    length = real.video.shape[2]
    probe_request = request_for(bench, "", 0, task="extend", conditions=[{"kind": "video", "file": "clip.mp4"}])
    kept = probe_request.resolved(bench.defaults).overlap
    new = length - kept  # frames that each extension adds
    total = frames_of(latent_frames(length) + (EXTENSIONS - 1) * new // 4)
    result.table["real clips"] = {
        "seam": mean(seam(real.video, length // 2)),
        "thing at the end": rate(bench.thing_in(real.rebuilt[:, :, -3:]) == real.scenes.thing),
    }
    result.table["real clips going over into their reconstruction"] = {"seam": mean(vae_seam(real.video, real.rebuilt))}
    films = []
    for number, text in enumerate(captions(real.scenes)):
        given = [{"kind": "video", "file": str(_file(bench, real, number, out))}]
        request = request_for(bench, text, 5000 + number, task="extend", conditions=given, frames=total)
        films.append(film(request, bench.pipe))
        result.films.append((f"extension: {text}", films[-1]))
    video = torch.cat([as_video(frames) for frames in films])
    later = torch.stack([seam(video, length + new * number) for number in range(1, EXTENSIONS)], dim=1)
    drifted = drift(video, new)
    ends = video[:, :, -length:]
    result.table["extended"] = {
        "seam": mean(seam(video, length)),
        "seams of later extensions": mean(later.mean(1)),
        "colour drift": mean(drifted.colour),
        "contrast kept": mean(drifted.contrast),
        "motion kept": mean(drifted.motion),
        "thing at the end": rate(bench.thing_in(video[:, :, -3:]) == real.scenes.thing),
        "Frechet": bench.frechet(bench.judge(ends).features),
    }
    return result


def transition(bench: "Bench", count: int, out: Path) -> Joined:
    """From one held-out clip to another, with the overlap that users get and with a shorter one."""
    result = Joined("transition")
    real = bench.real(bench.scenes(2 * count, seed=102, held_out=True, motions=STAYING))
    length = real.video.shape[2]
    result.table["real clips"] = {
        "seams": mean(seam(real.video, length // 2)),
        "unevenness": mean(unevenness(real.video)),
    }
    texts = captions(real.scenes)
    files = [_file(bench, real, number, out) for number in range(2 * count)]
    for name, overlap in _overlaps(bench):
        films = []
        for number in range(count):
            pair = [{"kind": "video", "file": str(file)} for file in (files[number], files[count + number])]
            text = texts[count + number]
            request = request_for(bench, text, 6000 + number, task="transition", conditions=pair, overlap=overlap)
            films.append(film(request, bench.pipe))
            result.films.append((f"transition, {name}: to {text}", films[-1]))
        video = torch.cat([as_video(frames) for frames in films])
        end = video.shape[2] - length
        between = video[:, :, length - 1 : end + 1]
        result.table[name] = {
            "seams": mean(torch.stack([seam(video, length), seam(video, end)], dim=1).mean(1)),
            "frames between": {"value": float(end - length), "n": count},
            "unevenness": mean(unevenness(between)),
            "Frechet": bench.frechet(bench.judge(_middle_of(video, length)).features),
        }
    return result


def loop(bench: "Bench", count: int, out: Path) -> Joined:
    """Clips of held-out combinations whose end runs into their beginning."""
    result = Joined("loop")
    scenes = bench.scenes(count, seed=103, held_out=True, motions=STAYING)
    real = bench.real(scenes)
    result.table["real clips"] = {
        "seam": mean(seam(real.video, real.video.shape[2] // 2)),
        "unevenness": mean(unevenness(real.video)),
        "thing": rate(bench.judge(real.rebuilt).thing == scenes.thing),
    }
    for name, overlap in _overlaps(bench):
        films = []
        for number, text in enumerate(captions(scenes)):
            frames = film(request_for(bench, text, 7000 + number, task="loop", overlap=overlap), bench.pipe)
            films.append(frames)
            result.films.append((f"loop, {name}: {text}", np.concatenate([frames, frames[:1]])))
        video = torch.cat([as_video(frames) for frames in films])
        around = torch.cat([video, video[:, :, :9]], dim=2)
        seen = bench.judge(_middle_of(around, bench.defaults.num_frames))
        result.table[name] = {
            "seam": mean(seam(around, video.shape[2])),
            "unevenness": mean(unevenness(around)),
            "thing": rate(seen.thing == scenes.thing),
            "Frechet": bench.frechet(seen.features),
        }
    return result


def _overlaps(bench: "Bench") -> Sequence[tuple[str, int | None]]:
    """As users get it, and a quarter of the window, where that is less."""
    usual = request_for(bench, "x", 0, task="loop").resolved(bench.defaults).overlap
    short = frames_of(max(1, latent_frames(bench.defaults.num_frames) // 4))
    return [
        (f"overlap {usual} frames (the default)", None),
        *([(f"overlap {short} frames", short)] if short < usual else []),
    ]


def _middle_of(video: Tensor, length: int) -> Tensor:
    start = max(0, (video.shape[2] - length) // 2)
    return video[:, :, start : start + length]


def _file(bench: "Bench", real: "Clips", number: int, out: Path) -> Path:
    """A real clip as a user would have it, in ``out/clips``."""
    folder = out / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:02d}.mp4"
    size = bench.defaults.width
    with media.VideoWriter(path, width=size, height=size, fps=bench.defaults.fps) as writer:
        writer.write(media.to_uint8(real.video[number : number + 1]))
    return path
