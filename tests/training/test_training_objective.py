"""Check the frame-aware flow matching loss: the released code's numbers and the paper's alternatives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa.training.config import ObjectiveConfig
from pusa.training.objective import (
    LossBins,
    add_noise,
    draw_sigmas,
    frame_errors,
    sigma_weights,
    training_grid,
    velocity_target,
    weighted_loss,
)

HIGH, LOW = (0.875, 1.0), (0.0, 0.875)


def draws(count: int = 400, frames: int = 5, noise_range: tuple[float, float] = (0.0, 1.0), **choices: Any) -> Tensor:
    """Levels of many clips, ``[count, frames]``."""
    objective, generator = ObjectiveConfig(**choices), torch.Generator().manual_seed(0)
    return torch.stack([draw_sigmas(frames, objective, generator, noise_range) for _ in range(count)])


# ---- the same numbers as the original ------------------------------------------------------------------------------


def test_path_target_grid_and_weight_are_the_released_code_s(
    golden_tensors: Callable[[str], dict[str, Tensor]],
) -> None:
    recorded = golden_tensors("scheduler/single_steps")
    train = {name.removeprefix("train."): t for name, t in recorded.items() if name.startswith("train.")}
    sigmas = train["timestep"] / 1000
    assert torch.equal(add_noise(train["x"], train["noise"], sigmas), train["out"])
    assert torch.equal(velocity_target(train["x"], train["noise"]), train["target"])
    torch.testing.assert_close(sigma_weights(sigmas[0], 5.0), train["weight_row0"], rtol=1e-6, atol=1e-6)
    nearest = (training_grid(5.0) - sigmas.flatten()[:, None]).abs().amin(dim=1)
    assert nearest.max() < 1e-7  # the recorded timesteps are indices into the grid


def test_weights_have_mean_one_over_the_grid_and_vanish_for_pure_noise() -> None:
    for shift in (1.0, 3.0, 5.0):
        weights = sigma_weights(training_grid(shift), shift)
        assert weights.mean() == pytest.approx(1, abs=1e-5)
        assert weights[0] == 0
        assert weights.min() >= 0


def test_released_weighting_multiplies_two_means_and_the_per_frame_one_does_not() -> None:
    errors, sigmas = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[0.5, 1.0], [0.5, 0.9]])
    w = sigma_weights(sigmas, 5.0)
    losses = {
        name: float(weighted_loss(errors, sigmas, ObjectiveConfig(weighting=name)))
        for name in ("per_sample", "per_frame", "none")
    }
    assert losses["none"] == pytest.approx(2.0)
    assert losses["per_frame"] == pytest.approx(float((w * errors).mean()))
    assert losses["per_sample"] == pytest.approx(float((errors.mean(dim=1) * w.mean(dim=1)).mean()))
    assert losses["per_sample"] != pytest.approx(losses["per_frame"])


def test_the_default_objective_is_the_released_one() -> None:
    objective = ObjectiveConfig()
    assert (objective.times, objective.asynchronous, objective.distribution) == ("independent", 1.0, "shifted")
    assert (objective.shift, objective.weighting, objective.caption_dropout, objective.clean_frames) == (
        5.0,
        "per_sample",
        0.0,
        0.0,
    )


# ---- how times are drawn -------------------------------------------------------------------------------------------


def test_shifted_times_are_uniform_indices_into_the_grid() -> None:
    sigmas = draws().flatten()
    assert torch.isin(sigmas, training_grid(5.0)).all()
    assert (sigmas > 5 / 6).float().mean() == pytest.approx(0.5, abs=0.04)  # the grid's middle


def test_uniform_times_are_uniform() -> None:
    sigmas = draws(distribution="uniform").flatten()
    histogram = torch.histc(sigmas, bins=5, min=0, max=1) / sigmas.numel()
    torch.testing.assert_close(histogram, torch.full((5,), 0.2), rtol=0, atol=0.04)


def test_independent_times_differ_and_do_not_go_together() -> None:
    sigmas = draws(distribution="uniform")
    assert (sigmas.diff(dim=1) != 0).float().mean() > 0.99
    correlation = torch.corrcoef(sigmas.T) - torch.eye(5)
    assert correlation.abs().max() < 0.2


@pytest.mark.parametrize(("asynchronous", "shared"), [(1.0, 0.0), (0.2, 0.8), (0.0, 1.0)])
def test_ptss_draws_independent_times_with_its_probability(asynchronous: float, shared: float) -> None:
    sigmas = draws(asynchronous=asynchronous, distribution="uniform")
    are_shared = (sigmas == sigmas[:, :1]).all(dim=1).float().mean()
    assert are_shared == pytest.approx(shared, abs=0.06)


def test_scalar_time_is_shared_by_all_frames() -> None:
    sigmas = draws(times="scalar")
    assert (sigmas == sigmas[:, :1]).all()
    assert len(sigmas[:, 0].unique()) > 300


def test_image_to_video_has_a_clean_first_frame_and_one_time_for_the_others() -> None:
    sigmas = draws(times="image_to_video")
    assert (sigmas[:, 0] == 0).all()
    assert (sigmas[:, 1:] == sigmas[:, 1:2]).all()
    assert (sigmas[:, 1] > 0).all()
    assert (draws(times="image_to_video", frames=1) > 0).all()  # of a picture something must be left to learn


def test_a_share_of_frames_is_clean_but_never_all() -> None:
    sigmas = draws(clean_frames=0.5)
    assert (sigmas == 0).float().mean() == pytest.approx(0.4, abs=0.04)  # the noisiest of five stays noisy
    assert (sigmas > 0).any(dim=1).all()
    assert (draws(frames=1, clean_frames=0.9) > 0).all()


@pytest.mark.parametrize("times", ["independent", "scalar", "image_to_video"])
@pytest.mark.parametrize("frames", [1, 3, 21])
def test_an_expert_sees_clips_whose_noisiest_frame_is_in_its_range(times: str, frames: int) -> None:
    high, low = (draws(noise_range=r, times=times, frames=frames, clean_frames=0.3) for r in (HIGH, LOW))
    assert (high.amax(dim=1) >= 0.875).all()
    assert (low.amax(dim=1) < 0.875).all()
    assert high.max() > 0.99
    if times == "independent" and frames > 1:  # kept frames are less noisy than the expert's range
        assert (high < 0.875).any()


def test_a_range_without_levels_is_refused() -> None:
    with pytest.raises(ValueError) as refused:
        draws(noise_range=(0.0, 0.004), count=1)
    assert str(refused.value) == "no level of the grid with shift 5 lies in the noise range 0.0..0.004"


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["per_sample", "per_frame", "none"])
def test_clean_frames_do_not_count(weighting: str) -> None:
    objective = ObjectiveConfig(weighting=weighting)
    errors, sigmas = torch.tensor([[100.0, 1.0, 2.0]]), torch.tensor([[0.0, 0.5, 0.9]])
    assert weighted_loss(errors, sigmas, objective) == weighted_loss(errors[:, 1:], sigmas[:, 1:], objective)
    errors.requires_grad_(True)
    weighted_loss(errors, sigmas, objective).backward()
    assert errors.grad is not None
    assert errors.grad[0, 0] == 0


def test_errors_are_means_over_a_frame() -> None:
    velocity, target = torch.zeros(1, 2, 3, 2, 2), torch.zeros(1, 2, 3, 2, 2)
    velocity[:, :, 1] = 2.0
    torch.testing.assert_close(frame_errors(velocity, target), torch.tensor([[0.0, 4.0, 0.0]]))


def test_loss_is_recorded_by_level_and_by_frame() -> None:
    bins = LossBins(3)
    bins.add(torch.tensor([[9.0, 1.0, 3.0]]), torch.tensor([[0.0, 0.55, 1.0]]))
    bins.add(torch.tensor([[2.0, 5.0]]), torch.tensor([[0.95, 0.51]]))
    bins.add(torch.tensor([[float("nan"), float("inf")]]), torch.tensor([[0.95, 0.51]]))  # of a step that is skipped
    assert bins.by_level() == {"0.5": 3.0, "0.9": 2.5}
    assert bins.by_frame() == {"0": 2.0, "1": 3.0, "2": 3.0}
    assert bins.mean() == 2.75
