"""Validate while training: fixed prompts and clips, every task, files to look at, no trace in the training."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from training_samples import make_config, write_dataset

from pusa.conditions import pixels
from pusa.data.dataset import LatentDataset
from pusa.lora.adapters import lora_layers
from pusa.media import probe_video, read_video
from pusa.media.previews import Strip, spread, strip_sheet, write_picture
from pusa.pipeline import PusaPipeline
from pusa.training.distributed import Processes
from pusa.training.model import prepare
from pusa.training.reports import Reporter
from pusa.training.reports.validation import TASKS, ValidationSettings, Validator, validate
from pusa.training.trainer import train

QUICK = ValidationSettings(steps=2, guidance=1.0, columns=3)
CLIP = (16, 3, 4, 6)  # 9 frames of 48 x 32 pixels


@pytest.fixture(scope="module")
def pipe() -> PusaPipeline:
    return PusaPipeline.from_pretrained("tiny")


@pytest.fixture
def clip() -> Tensor:
    return torch.randn(CLIP, generator=torch.Generator().manual_seed(0))


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_every_task_is_written_as_a_video_and_all_of_them_as_one_picture(
    pipe: PusaPipeline, clip: Tensor, tmp_path: Path
) -> None:
    paths = validate(pipe, tmp_path, step=7, prompts=["a fox"], latents=[clip], settings=QUICK)
    assert names(paths) == [*(f"1-{task}.mp4" for task in TASKS), "step-00000007.jpg"]
    for path in paths[:-1]:
        info = probe_video(path)
        assert (info.width, info.height, info.frames) == (48, 32, 9)
    assert Image.open(paths[-1]).height > 5 * 32  # the clip itself and four tasks


def test_prompts_alone_give_text_to_video_and_pictures_the_first_frame_too(pipe: PusaPipeline, tmp_path: Path) -> None:
    small = ValidationSettings(steps=1, guidance=1.0, width=48, height=32, num_frames=5)
    assert names(validate(pipe, tmp_path, step=0, prompts=["a", "b"], settings=small))[:2] == [
        "1-text-to-video.mp4",
        "2-text-to-video.mp4",
    ]
    red = pipe.encode_frames(pixels([Image.new("RGB", (48, 32), "red")]))[0]
    paths = validate(pipe, tmp_path, step=1, prompts=["a"], latents=[red], settings=small)
    assert names(paths)[:-1] == ["1-text-to-video.mp4", "1-image-to-video.mp4"]


def test_the_same_weights_give_the_same_videos_at_every_visit(pipe: PusaPipeline, clip: Tensor, tmp_path: Path) -> None:
    visits = []
    for step in range(2):
        torch.manual_seed(step)
        paths = validate(pipe, tmp_path, step=step, prompts=["a fox"], latents=[clip], settings=QUICK)
        visits.append([read_video(path) for path in paths[:-1]])
    for first, second in zip(*visits, strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(visits[0][0], visits[0][1])  # the tasks differ


def test_random_states_and_the_pipeline_are_left_as_they_were(pipe: PusaPipeline, clip: Tensor, tmp_path: Path) -> None:
    pipe.transformer.train()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    scheduler, bars = pipe.scheduler, dict(pipe._progress_bar_config) if hasattr(pipe, "_progress_bar_config") else {}
    validate(pipe, tmp_path, step=0, prompts=["a"], latents=[clip], settings=QUICK)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    assert pipe.scheduler is scheduler
    assert pipe._progress_bar_config == bars
    assert pipe.transformer.training
    pipe.transformer.eval()


def test_validation_uses_the_configured_alpha_and_training_its_scale(clip: Tensor, tmp_path: Path) -> None:
    pipe = PusaPipeline.from_pretrained("tiny")
    config = make_config(None, tmp_path, method={"rank": 4, "alpha": 6.0})
    model, parameters = prepare(pipe.transformer, config, Processes(0, 1, torch.device("cpu")), [CLIP])
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1)
    scalings = [layer.scaling["pusa"] for layer in lora_layers(model).values()]
    videos = []
    for number, alpha in enumerate((0.0, 1.0)):
        settings = ValidationSettings(tasks=("text-to-video",), steps=1, guidance=1.0, alpha=alpha)
        arguments: dict[str, Any] = {"step": number, "prompts": ["a"], "latents": [clip]}
        path, _ = validate(pipe, tmp_path, **arguments, settings=settings)
        videos.append(read_video(path))
    assert not np.array_equal(*videos)
    assert [layer.scaling["pusa"] for layer in lora_layers(model).values()] == scalings == [1.5] * len(scalings)


def test_wrong_inputs_are_refused_before_any_work(pipe: PusaPipeline, clip: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        validate(pipe, tmp_path, step=0, prompts=["a", "b"], latents=[clip])
    assert str(error.value) == "1 latents for 2 prompts: give one for each"
    with pytest.raises(ValueError) as error:
        validate(pipe, tmp_path, step=0, prompts=["a"], settings=ValidationSettings(tasks=("loop",)))  # type: ignore[arg-type]
    assert str(error.value) == f"tasks=['loop']: give some of {', '.join(TASKS)}"
    assert not list(tmp_path.iterdir())


def test_training_gives_the_same_bits_with_and_without_validation(tmp_path: Path) -> None:
    data = LatentDataset(write_dataset(tmp_path / "clips"))
    results = []
    for every in (None, 2):
        output = tmp_path / f"run-{every}"
        config = make_config(tmp_path / "clips", output, steps=4, report={"validate_every": every, "validate_clips": 1})
        settings = ValidationSettings(tasks=("image-to-video",), steps=1)
        train(config, dataset=data, on_validate=Validator(config, data, settings=settings))
        results.append(load_file(output / "adapter.safetensors"))
    plain, validated = results
    assert plain.keys() == validated.keys()
    assert all(torch.equal(plain[name], validated[name]) for name in plain)
    folder = tmp_path / "run-2" / "validation"
    assert sorted(path.name for path in folder.glob("*.jpg")) == ["step-00000002.jpg", "step-00000004.jpg"]
    assert probe_video(folder / "step-00000004" / "1-image-to-video.mp4").frames == 9
    assert not (tmp_path / "run-None" / "validation").exists()


def test_configured_prompts_and_pictures_are_shown_in_the_tracker_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = LatentDataset(write_dataset(tmp_path / "clips"))
    own = write_dataset(tmp_path / "own", clips=0, single_frames=3, seed=1)
    shown: list[tuple[int, Path]] = []
    monkeypatch.setattr(Reporter, "show", lambda _, step, picture: shown.append((step, picture)))
    report = {"validate_every": 2, "validate_on": str(own)}
    config = make_config(tmp_path / "clips", tmp_path / "run", steps=2, report=report)
    settings = ValidationSettings(steps=1, guidance=1.0, num_frames=5)
    train(config, dataset=data, on_validate=Validator(config, data, settings=settings))
    place = tmp_path / "run" / "validation" / "step-00000002"
    tasks = ("image-to-video", "text-to-video")  # a picture has no last frame, and nothing to go on from
    assert sorted(names(list(place.iterdir()))) == [f"{number}-{task}.mp4" for number in (1, 2) for task in tasks]
    assert probe_video(place / "1-image-to-video.mp4").frames == 5
    assert shown == [(2, place.with_suffix(".jpg"))]
    for folder, vae in ((tmp_path / "clips", "one"), (own, "another")):
        facts = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps(facts | {"vae": vae}))
    with pytest.raises(ValueError, match="cannot be joined: vae is one here and another there"):
        Validator(config, LatentDataset(tmp_path / "clips"), settings=settings)


# ---- sheets ----------------------------------------------------------------------------------------------------------


def test_the_frames_of_a_sheet_are_the_first_the_last_and_some_evenly_between() -> None:
    assert spread(81, 5) == [0, 20, 40, 60, 80]
    assert spread(3, 6) == [0, 1, 2]
    assert spread(9, 1) == [0]


def test_a_sheet_shows_each_frame_in_its_place_and_outlines_conditions(tmp_path: Path) -> None:
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (3, 20, 40, 3)).copy()
    strips = [Strip("one", frames, numbers=(0, 4, 8), held={4}), Strip("two, and smaller", frames[:1, :10])]
    picture = strip_sheet(strips, columns=3, cell_width=80, title="three colours")
    pixels = np.asarray(picture).astype(int)
    middle = 6 + 20 + 20 + 20  # the title, the label, half a frame of 40
    for column in range(3):
        at = 6 + column * 86 + 40
        np.testing.assert_allclose(pixels[middle, at], colours[column], atol=3)
    orange = (abs(pixels - np.array([255, 150, 40])).sum(-1) < 10).nonzero()
    assert (min(orange[1]), max(orange[1])) == (90, 173)  # around the second frame
    assert write_picture(picture, tmp_path / "new" / "sheet.png").is_file()
    assert names(list((tmp_path / "new").iterdir())) == ["sheet.png"]


def test_a_long_label_is_shortened_to_the_sheet() -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    assert strip_sheet([Strip("word " * 200, frames)], columns=2, cell_width=100).width < 300


def test_frames_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError) as error:
        Strip("x", np.zeros((2, 4, 4, 3), np.float32))
    assert str(error.value) == "frames float32 [2, 4, 4, 3] are not uint8 [n, H, W, 3]"
