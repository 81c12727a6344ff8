"""Check that metrics of videos and samples have the values of their definitions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pusa.evaluation import metrics


def ramp(frames: int, step: float = 0.02, jump_at: int | None = None, jump: float = 0.0) -> Tensor:
    """A grey video whose level rises by `step` from frame to frame, and by `jump` more before frame `jump_at`."""
    levels = torch.arange(frames) * step - 0.5
    if jump_at is not None:
        levels[jump_at:] += jump
    return levels.view(1, 1, frames, 1, 1).expand(1, 3, frames, 8, 8)


def test_psnr_of_a_known_error() -> None:
    video = torch.zeros(2, 3, 4, 8, 8)
    other = video.clone()
    other[1, :, 2] += 0.2  # a tenth of the range
    db = metrics.psnr(video, other)
    assert db.shape == (2, 4)
    assert db[1, 2] == pytest.approx(20.0, abs=1e-4)
    assert db[0, 0] == metrics.EQUAL_DB


def test_uint8_frames_become_a_video_of_the_vae_s_range() -> None:
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    frames[1, :, :, 2] = 255
    video = metrics.as_video(frames)
    assert video.shape == (1, 3, 2, 4, 6)
    assert (video[0, :2] == -1).all()
    assert (video[0, 2, 1] == 1).all()


def test_an_even_motion_has_no_seam_and_a_jump_has_its_size() -> None:
    assert float(metrics.seam(ramp(20), 10)) == pytest.approx(1.0, abs=1e-3)
    jumping = ramp(20, jump_at=10, jump=0.04)
    assert float(metrics.seam(jumping, 10)) == pytest.approx(3.0, abs=1e-3)
    assert float(metrics.seam(jumping, 9)) < 1


@pytest.mark.parametrize("joint", [0, 20])
def test_a_joint_outside_the_video_is_refused(joint: int) -> None:
    with pytest.raises(ValueError) as error:
        metrics.seam(ramp(20), joint)
    assert str(error.value) == f"joint={joint} is outside 1..19: it is the first frame after a joint"


def test_unevenness_is_one_for_even_motion_and_grows_with_a_cut() -> None:
    assert float(metrics.unevenness(ramp(9))) == pytest.approx(1.0, abs=1e-3)
    # eight changes of .02, one of them .08 more
    assert float(metrics.unevenness(ramp(9, jump_at=4, jump=0.08))) == pytest.approx(0.1 / 0.03, rel=1e-3)


def test_blur_lowers_sharpness() -> None:
    sharp = torch.randn(1, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool3d(sharp, (1, 3, 3), stride=1, padding=(0, 1, 1))
    assert (metrics.sharpness(blurred) < 0.6 * metrics.sharpness(sharp)).all()


def test_drift_tells_colour_contrast_and_motion() -> None:
    generator = torch.Generator().manual_seed(0)
    first = 0.2 * torch.randn(1, 3, 6, 8, 8, generator=generator)
    last = 0.5 * first
    last = last + torch.tensor([0.2, 0.0, -0.1]).view(1, 3, 1, 1, 1)
    found = metrics.drift(torch.cat([first, last], dim=2), 6)
    middle = first.mean(dim=(2, 3, 4))[0]
    moved = (0.5 * middle + torch.tensor([0.2, 0.0, -0.1]) - middle).abs().mean() * 127.5
    assert float(found.colour) == pytest.approx(float(moved), rel=1e-4)
    assert float(found.contrast) == pytest.approx(0.5, rel=1e-4)
    assert float(found.motion) == pytest.approx(0.5, rel=1e-4)


def test_the_first_jump_is_that_of_latent_frames_0_and_1() -> None:
    latents = torch.zeros(2, 4, 3, 2, 2)
    latents[0, :, 1] = 2.0
    latents[:, :, 2] = 9.0
    assert metrics.first_jump(latents).tolist() == [2.0, 0.0]


def test_the_frechet_distance_of_normal_samples_is_that_of_their_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20_000, 3, generator=generator)
    assert metrics.frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)
    moved = first + torch.tensor([2.0, 0.0, 0.0])
    assert metrics.frechet_distance(first, moved) == pytest.approx(4.0, abs=1e-3)
    wider = 3 * torch.randn(20_000, 3, generator=generator)  # (3 - 1)^2 for each of three axes
    assert metrics.frechet_distance(first, wider) == pytest.approx(12.0, rel=0.03)


def test_the_frechet_distance_needs_a_covariance() -> None:
    with pytest.raises(ValueError) as error:
        metrics.frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    assert str(error.value) == "1 and 5 samples: a covariance needs at least 2"


def test_a_rate_carries_wilson_s_interval() -> None:
    hits = torch.tensor([True] * 9 + [False])
    found = metrics.rate(hits)
    assert found["value"] == pytest.approx(0.9)
    assert found["n"] == 10
    assert (found["low"], found["high"]) == (pytest.approx(0.596, abs=1e-3), pytest.approx(0.982, abs=1e-3))
    assert metrics.rate(torch.tensor([True, True]))["low"] > 0.3  # all of few is not certainty
    assert metrics.rate(torch.zeros(0, dtype=torch.bool)) == {"value": None, "n": 0}


def test_a_mean_carries_its_standard_error() -> None:
    found = metrics.mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found == {"value": 2.5, "n": 4, "error": pytest.approx(math.sqrt(5 / 3) / 2)}
    assert metrics.mean(torch.tensor([7.0])) == {"value": 7.0, "n": 1, "error": None}


def test_a_ratio_is_that_of_means_and_certain_if_all_pairs_agree() -> None:
    below = torch.tensor([1.0, 2.0, 5.0])
    assert metrics.ratio(2 * below, below) == {"value": 2.0, "n": 3, "error": pytest.approx(0.0, abs=1e-9)}
    assert metrics.ratio(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))["error"] > 0.5
