"""Go from videos in a folder to a video: prepare, train until the held-out loss falls, load, generate."""

import json
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from click.testing import Result
from media_samples import moving_gradient, write
from paths import SHARED

from pusa import PusaCondition, PusaPipeline
from pusa.data.dataset import LatentDataset
from pusa.media import read_video
from pusa.training.reports import read_metrics

pytestmark = pytest.mark.slow
CLIPS, FRAMES = 12, 9
CAPTIONS = ("a man walks", "the camera stands still", "evening light")


def pusa(*args: object) -> Result:
    result = command_line.pusa(*args)
    assert result.exit_code == 0, result.output
    return result


def write_clips(folder: Path) -> Path:
    """A dozen short videos with captions beside them: pieces of a real one, or drawn where it is not here."""
    folder.mkdir()
    real = SHARED / "inputs" / "input_video.mp4"
    if real.is_file():
        frames = read_video(real, fit=(96, 64))
        height, width = (side // 2 * 2 for side in frames.shape[1:3])
        frames = frames[:, :height, :width]
    else:
        frames = moving_gradient(8 * CLIPS + FRAMES)
    starts = np.linspace(0, len(frames) - FRAMES, CLIPS).astype(int)
    for index, start in enumerate(starts):
        write(folder / f"{index:02d}.mp4", frames[start : start + FRAMES], fps=16)
        (folder / f"{index:02d}.txt").write_text(CAPTIONS[index % 3])
    return folder


def test_a_dozen_videos_become_an_adapter_that_generates(tmp_path: Path) -> None:
    videos, data, run = write_clips(tmp_path / "videos"), tmp_path / "data", tmp_path / "run"
    pusa("data", "prepare", videos, data, "--model", "tiny", "--size", "96x64", "--frames", FRAMES, "--workers", 0)
    assert len(LatentDataset(data)) == CLIPS

    changes = {
        "output": run,
        "data.folders": data,
        "data.held_out_share": 0.25,
        "data.lengths": [],
        "model.source": "tiny",
        "model.dtype": "fp32",
        "steps": 40,
        "batch_size": 4,
        "method.rank": 8,
        "method.alpha": 8,
        "optimizer.lr": 5e-3,
        "report.held_out_every": 20,
        "report.tracker": "none",
        "checkpoint.every_steps": None,
    }
    settings = [f"{name}={json.dumps(v) if not isinstance(v, Path) else v}" for name, v in changes.items()]
    pusa("train", "mini-vta", *settings)
    before, half, after = (e["held_out_loss"] for e in read_metrics(run) if "held_out_loss" in e)
    assert after < half < before

    clip = read_video(videos / "00.mp4")
    pipe = PusaPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)

    def generate() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        conditions = [PusaCondition(image=clip[0], latent_index=0, noise_multiplier=0.0)]
        options = {"height": 64, "width": 96, "num_frames": FRAMES, "num_inference_steps": 4, "max_sequence_length": 64}
        return pipe(CAPTIONS[0], conditions=conditions, generator=generator, **options).frames[0]

    base = generate()
    assert pipe.load_pusa(run, alpha=1.0) == 30  # 10 layers in each of 3 blocks
    made = generate()
    assert made.shape == (FRAMES, 64, 96, 3)
    assert np.isfinite(made).all()
    np.testing.assert_array_equal(made[0], base[0])  # given, and kept
    assert np.abs(made[1:] - base[1:]).max() > 1e-3
