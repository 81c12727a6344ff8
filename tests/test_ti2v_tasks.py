"""Take a tiny TI2V the whole way: every task from the command line, a job of the server, training and its LoRA."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_samples import serving
from bases import ti2v_folder
from command_line import made_by, pusa
from media_samples import write
from near_engine import NearExecutor
from PIL import Image
from safetensors import safe_open

from pusa.media import read_video

QUICK = ("--steps", 2, "--size", "64x32", "--fps", 16, "--seed", 1)  # as the videos of the tests


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ti2v_folder(tmp_path_factory.mktemp("models") / "ti2v")


def drawn_frames(first: int = 0) -> np.ndarray:
    """Draw nine frames, [9, 32, 64, 3]."""
    y, x = np.mgrid[:32, :64]
    frames = [np.stack([4 * x, 8 * y, (4 * x + 20 * n) % 256], axis=-1) for n in range(first, first + 9)]
    return np.stack(frames).astype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write two pictures and a video of 9 frames."""
    folder = tmp_path_factory.mktemp("files")
    frames = drawn_frames()
    paths = {"first": folder / "first.png", "last": folder / "last.png"}
    for (_, path), frame in zip(paths.items(), (frames[0], frames[-1]), strict=True):
        Image.fromarray(frame).save(path)
    return paths | {"video": write(folder / "video.mp4", frames)}


TASKS: dict[str, tuple[tuple[Any, ...], int]] = {  # arguments, in which {name} is a file; frames of the result
    "text": (("generate", "a cat", "--frames", 9), 9),
    "image": (("generate", "a cat", "--frames", 9, "--image", "{first}", "--noise", 0), 9),
    "keyframes": (("generate", "a cat", "--frames", 9, "--keyframe", "{first}@0:0.2", "--keyframe", "{last}@last"), 9),
    "completion": (("generate", "a cat", "--frames", 17, "--video", "{video}", "--positions", "0,1,2"), 17),
    "extension": (("extend", "{video}", "--prompt", "a cat", "--frames", 9, "--overlap", 5), 13),
    "transition": (("transition", "{video}", "{video}", "--prompt", "a cat", "--frames", 17, "--overlap", 5), 22),
    "loop": (("loop", "a cat", "--frames", 17, "--overlap", 5), 17),
    "long video": (("generate", "a cat", "--frames", 17, "--window", 9, "--overlap", 5), 17),
    "wave": (("generate", "a cat", "--frames", 9, "--schedule", "wave"), 9),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_makes_its_video(task: str, model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    arguments, count = TASKS[task]
    filled = [str(argument).format(**files) for argument in arguments]
    frames = made_by(*filled, "--model", model, *QUICK, output=tmp_path / "made.mp4")
    assert len(frames) == count
    assert frames[0].shape == (32, 64, 3)


def test_the_server_makes_a_video_from_an_image(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    with serving(tmp_path / "server", model=str(model), executor=NearExecutor(str(model))) as server:
        fields = {"prompt": "a cat", "size": "64x32", "num_frames": "9", "num_inference_steps": "2", "seed": "1"}
        upload = {"input_reference": ("first.png", files["first"].read_bytes(), "image/png")}
        job = server.http.post("/v1/videos", data=fields, files=upload).raise_for_status().json()
        job = server.ended(job["id"])
        assert job["status"] == "completed", job
        content = server.http.get(f"/v1/videos/{job['id']}/content").raise_for_status().content
    (tmp_path / "made.mp4").write_bytes(content)
    assert len(read_video(tmp_path / "made.mp4")) == 9


def test_a_few_steps_of_training_give_a_lora_that_generation_takes(
    model: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for number in range(4):
        write(tmp_path / "videos" / f"{number}.mp4", drawn_frames(number))
        (tmp_path / "videos" / f"{number}.txt").write_text(f"a cat, part {number}")
    sizes = ("--size", "64x32", "--frames", 9, "--fps", 16, "--workers", 0)
    prepared = pusa("data", "prepare", "videos", "clips", "--model", model, *sizes)
    assert prepared.exit_code == 0, prepared.output
    changes = {
        "model.source": model,
        "model.dtype": "fp32",
        "model.gradient_checkpointing": "false",
        "data.folders": "clips",
        "data.width": 64,
        "data.height": 32,
        "data.num_frames": 9,
        "method.rank": 4,
        "method.alpha": 4,
        "optimizer.lr": 0.01,
        "batch_size": 2,
        "global_batch": "null",
        "steps": 3,
        "report.tracker": "none",
        "name": "ti2v",
    }
    settings = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    trained = pusa("train", "wan2.2-ti2v-5b-vta", *settings)
    assert trained.exit_code == 0, trained.output
    adapter = tmp_path / "runs" / "ti2v" / "adapter.safetensors"
    with safe_open(adapter, framework="pt") as file:
        assert file.metadata()["steps"] == "3"
    results = []
    for lora in ((), ("--lora", adapter, "--alpha", 1.4)):
        image = ("--image", files["first"], "--noise", 0.2, "--frames", 9)
        asked = ("generate", "a cat", *image, "--model", model, *QUICK, *lora)
        results.append(made_by(*asked, output=tmp_path / f"{len(lora)}.mp4"))
    assert not np.array_equal(*results)
