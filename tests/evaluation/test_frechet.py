"""Measure how far two folders of videos are apart: by simple features, or with the user's detector, as FVD."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from pusa.cli.root import main
from pusa.evaluation.frechet import compare, load_i3d, simple_features
from pusa.media import VideoWriter


class Detector(torch.nn.Module):
    """Stand in for I3D: called as that is, with means of the channels as its features."""

    def forward(self, video: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert list(video.shape[3:]) == [224, 224]
        assert [rescale, resize, return_features] == [False, False, True]
        return video.mean(dim=[2, 3, 4])


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt"
    torch.jit.script(Detector()).save(str(path))
    return path


def write_videos(folder: Path, level: int, *, count: int = 3, frames: int = 8) -> Path:
    folder.mkdir()
    for number in range(count):
        draw = np.random.default_rng(number)
        video = (level + draw.integers(0, 60, (frames, 32, 48, 3))).astype(np.uint8)
        with VideoWriter(folder / f"{number}.mp4", width=48, height=32) as writer:
            writer.write(video)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    return (
        write_videos(tmp_path / "real", 60),
        write_videos(tmp_path / "near", 70),
        write_videos(tmp_path / "far", 170),
    )


def test_equal_sets_have_no_distance_and_darker_ones_a_smaller_one_than_bright_ones(folders, detector):
    real = folders[0]
    for chosen in (None, detector):
        found = [compare(real, made, frames=8, detector=chosen).distance for made in folders]
        assert found[0] == pytest.approx(0, abs=1e-6)
        assert found[0] < found[1] < found[2]


def test_the_distance_is_called_fvd_with_the_detector_only(folders, detector):
    real, near, _ = folders
    plain = CliRunner().invoke(main, ["eval", "frechet", str(real), str(near), "--frames", "8"])
    assert plain.output.startswith("Frechet distance on simple features (not FVD): ")
    arguments = ["eval", "frechet", str(real), str(near), "--frames", "8", "--detector", str(detector), "--json"]
    found = json.loads(CliRunner().invoke(main, arguments).output)
    assert found["name"] == "FVD"
    assert (found["real_clips"], found["made_clips"], found["frames"]) == (3, 3, 8)
    # Of means alone: the squared difference of these, where the covariances are alike.
    assert found["distance"] == pytest.approx(3 * (10 / 127.5) ** 2, rel=0.2)


def test_simple_features_see_colour_and_motion():
    still = torch.rand(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 4, -1, -1)
    moving = torch.stack([still[:, :, 0].roll(4 * k, dims=-1) for k in range(4)], dim=2)
    assert simple_features(still).shape == (1, 144)
    assert not bool(simple_features(still)[:, 48:].any())
    assert bool((simple_features(moving)[:, 48:] > 0).any())


def test_what_cannot_be_compared_is_said(folders, tmp_path):
    real, near, _ = folders
    with pytest.raises(ValueError, match=r"0\.mp4 has 8 frames: ask for at most as many"):
        compare(real, near, frames=9)
    with pytest.raises(ValueError, match="has 1 videos: a distance needs at least 2"):
        compare(real, write_videos(tmp_path / "one", 60, count=1), frames=8)
    (tmp_path / "notes.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.pt is no TorchScript file"):
        load_i3d(tmp_path / "notes.pt")
    with pytest.raises(FileNotFoundError, match=r"give the I3D detector, i3d_torchscript\.pt"):
        load_i3d(tmp_path / "none.pt")
