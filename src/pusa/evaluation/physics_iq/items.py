"""Build the items of a Physics-IQ run: a request for each scene, and which of its frames are scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pusa import zoo
from pusa.defaults import GenerationDefaults
from pusa.evaluation.physics_iq.dataset import (
    GIVEN_SECONDS,
    SECONDS,
    SOURCE_FPS,
    STORED_FPS,
    Conditioning,
    Dataset,
    Scene,
)
from pusa.evaluation.runs import Item, RunFolder, seed_of
from pusa.evaluation.runs.cut import Cut
from pusa.positions import frames_of, latent_frames
from pusa.request import ConditionSpec, GenerationRequest, placeholder_request
from pusa.request.generation import DEFAULT_MODEL

SUITE = "physics-iq"


def prepare(
    folder: Path,
    dataset: Dataset,
    conditioning: Conditioning,
    settings: Mapping[str, Any],
    *,
    noise: Sequence[float] = (0.0,),
    partial: bool = False,
) -> RunFolder:
    """Make the folder of a run, or open it if it is there with the same settings.

    Args:
        conditioning: "image" continues the switch frame, "video" the end of the 3 seconds before it.
        settings: fields of a `GenerationRequest` that hold for every scene. Each scene's seed is derived from ``seed``.
        noise: multiplier of the frames that are given; for "video" one for all or one for each latent frame.
        partial: take only the scenes whose files are here.

    Raises:
        FileNotFoundError: files of the download are missing.
        ValueError: a rate that the benchmark cannot be scored at, settings that do not fit, another run's folder.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    settings = {"model": DEFAULT_MODEL, **settings}
    defaults = zoo.defaults_of(settings["model"])
    fps = check_fps(settings.get("fps", defaults.fps))
    scenes = dataset.complete_scenes(conditioning, fps, partial=partial)
    values = {
        "conditioning": conditioning,
        "fps": fps,
        "data": str(dataset.root),
        "noise": list(noise),
        "request": settings,
    }
    shared = _shared_values(conditioning, settings, defaults, fps)
    items = [_item(scene, dataset, conditioning, shared, noise) for scene in scenes]
    items[0].request.resolved(defaults)  # what does not fit one scene fits none
    return RunFolder.create(folder, SUITE, values, items)


def check_fps(fps: float) -> int:
    """Return a rate as a whole number. Raises ValueError for one that 5 seconds cannot be scored at."""
    if not 1 <= fps <= SOURCE_FPS or fps != int(fps):
        stored = ", ".join(map(str, STORED_FPS))
        raise ValueError(
            f"fps={fps:g}: Physics-IQ compares {SECONDS} s at a whole number of frames per second up to {SOURCE_FPS}; "
            f"its download has {stored}"
        )
    return int(fps)


def _shared_values(
    conditioning: Conditioning, settings: Mapping[str, Any], defaults: GenerationDefaults, fps: int
) -> dict[str, Any]:
    """Return the fields of every scene's request: the model makes as few frames as hold `SECONDS` of new ones."""
    factor, wanted = defaults.frames_per_latent, SECONDS * fps
    fields = {**settings, "fps": float(fps)}
    if conditioning == "image":
        return fields | {"task": "generate", "frames": _at_least(wanted, factor)}
    window = fields.get("window") or defaults.num_frames
    longest = frames_of(latent_frames(wanted, factor) + latent_frames(window, factor), factor)
    trial = {"task": "extend", "frames": longest, "conditions": [_condition("video", "a.mp4")]}
    overlap = placeholder_request(defaults, **fields | trial).resolved(defaults).overlap
    given = GIVEN_SECONDS * fps
    if overlap > given:
        raise ValueError(
            f"overlap={overlap}: a model may see {GIVEN_SECONDS} s, which are {given} frames at {fps} fps: give less"
        )
    return fields | {"task": "extend", "overlap": overlap, "frames": _at_least(overlap + wanted, factor)}


def _item(
    scene: Scene,
    dataset: Dataset,
    conditioning: Conditioning,
    shared: Mapping[str, Any],
    noise: Sequence[float],
) -> Item:
    fps = int(shared["fps"])
    given = dataset.switch_frame(scene) if conditioning == "image" else dataset.conditioning(scene, fps)
    request = GenerationRequest(
        **{
            **shared,
            "prompt": scene.prompt,
            "conditions": [_condition(conditioning, str(given), list(noise))],
            "seed": seed_of(shared.get("seed", 0), SUITE, scene.number),
        }
    )
    made = None if conditioning == "image" else shared["frames"] - shared["overlap"]
    labels = {
        "number": scene.number,
        "view": scene.view.removeprefix("perspective-"),
        "scenario": scene.scenario.removeprefix("trimmed-"),
        "category": scene.category,
    }
    cut = Cut(SECONDS * fps, before_end=made, crf=min(Cut.crf, request.crf))
    return Item(scene.video_name, request, labels, cut)


def _condition(kind: Conditioning, file: str, noise: list[float] | None = None) -> ConditionSpec:
    """Build the condition of what a model may see.

    The evaluator scales videos to the real one's size whatever their shape, so a picture is stretched to the model's
    size, where cutting its edges would move every pixel away from its place in the real video.
    """
    return ConditionSpec(kind=kind, file=file, noise=noise, fit="stretch")


def _at_least(frames: int, factor: int) -> int:
    """Return the smallest length of a model's videos that has so many frames."""
    return frames_of(-((1 - frames) // factor) + 1, factor)
