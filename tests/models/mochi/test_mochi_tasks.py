"""A tiny Pusa V0.5 makes every task of the published one from the command line, with the multipliers of its README."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import made_by, pusa
from media_samples import write
from PIL import Image

from pusa import GenerationRequest, PusaPipeline, zoo
from pusa.models.mochi import checkpoint, tiny

QUICK = ("--steps", 2, "--size", "48x32", "--seed", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write Mochi's folder, a V0.5 transformer in genmo's layout, two pictures and a video of 19 frames."""
    place = tmp_path_factory.mktemp("files")
    PusaPipeline(**tiny.components()).save_pretrained(place / "mochi")
    checkpoint.save_transformer(tiny.components(seed=1)["transformer"], place / "pusa_v0_dit.safetensors")
    y, x = np.mgrid[:32, :48]
    frames = np.stack([np.stack([5 * x, 8 * y, (4 * x + 12 * n) % 256], axis=-1) for n in range(19)]).astype(np.uint8)
    for name, frame in (("first", frames[0]), ("last", frames[-1])):
        Image.fromarray(frame).save(place / f"{name}.png")
    names = {"model": "mochi", "transformer": "pusa_v0_dit.safetensors", "first": "first.png", "last": "last.png"}
    return {name: place / file for name, file in names.items()} | {"video": write(place / "video.mp4", frames, fps=30)}


TASKS: dict[str, tuple[tuple[Any, ...], int]] = {  # arguments, in which {name} is a file; frames of the result
    "text": (("generate", "a cat", "--frames", 19), 19),
    "image": (("generate", "a cat", "--frames", 19, "--image", "{first}"), 19),
    "image at a later place": (("generate", "a cat", "--frames", 19, "--keyframe", "{first}@2:0.4"), 19),
    "start and end": (
        ("generate", "a cat", "--frames", 19, "--keyframe", "{first}@0", "--keyframe", "{last}@last"),
        19,
    ),
    "completion": (("generate", "a cat", "--frames", 25, "--video", "{video}", "--positions", "0,1,2,3"), 25),
    "extension": (("extend", "{video}", "--prompt", "a cat", "--frames", 19, "--overlap", 7), 31),
    "transition": (("transition", "{video}", "{video}", "--prompt", "a cat", "--frames", 31, "--overlap", 7), 50),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_makes_its_video(task: str, files: dict[str, Path], tmp_path: Path) -> None:
    arguments, count = TASKS[task]
    filled = [str(argument).format(**files) for argument in arguments]
    parts = ("--model", files["model"], "--transformer", files["transformer"])
    frames = made_by(*filled, *parts, *QUICK, output=tmp_path / "made.mp4")
    assert len(frames) == count
    assert frames[0].shape == (32, 48, 3)


def test_the_preset_has_the_published_multipliers() -> None:
    defaults = zoo.get("pusa-v0.5").defaults
    images = [{"kind": "image", "file": "a.png", "positions": [place]} for place in (0, 13, 27)]
    video = [{"kind": "video", "file": "a.mp4", "positions": [0, 1, 2, 3]}]

    def noise(preset: str, conditions: list[dict[str, Any]]) -> list[list[float]]:
        request = GenerationRequest(prompt="a cat", preset=preset, conditions=conditions)
        return [condition.noise for condition in request.resolved(defaults).conditions]

    assert noise("balanced", images) == [[0.3], [0.7], [0.7]]
    assert noise("balanced", video) == [[0.1, 0.2, 0.3, 0.4]]
    assert noise("faithful", images) == [[0.0], [0.0], [0.0]]
    resolved = GenerationRequest(prompt="a cat").resolved(defaults)
    assert (resolved.width, resolved.height, resolved.frames, resolved.fps) == (848, 480, 163, 30)
    assert (resolved.steps, resolved.guidance, resolved.negative_prompt) == (30, 4.5, "")


def test_a_video_says_how_it_was_made_and_is_made_again(files: dict[str, Path], tmp_path: Path) -> None:
    model = ("--model", files["model"])
    made = made_by("generate", "a cat", "--frames", 13, *model, *QUICK, output=tmp_path / "made.mp4")
    about = pusa("info", tmp_path / "made.mp4", "--json")
    request = json.loads(about.output)["request"]
    assert (request["frames_per_latent"], request["shift"]) == (6, 1.0)
    again = made_by("replay", tmp_path / "made.mp4", *model, output=tmp_path / "again.mp4")
    assert np.array_equal(made, again)
