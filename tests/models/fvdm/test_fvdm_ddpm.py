"""FVDM's diffusion has one timestep per frame; benchmarks/_fvdm_checks.py compares it with recorded numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pusa.models.fvdm import ddpm

SHAPE = 2, 4, 3, 5, 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_alpha_bar_is_the_recorded_one(golden_json: Callable) -> None:
    for t, recorded in golden_json("fvdm/schedules")["alphas_cumprod_at"].items():
        assert float(ddpm.alphas_cumprod()[int(t)]) == pytest.approx(recorded, abs=1e-15)


def test_string_respacing_ends_at_999_and_a_whole_stride_does_not() -> None:
    assert ddpm.timestep_map("10") == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert ddpm.timestep_map("50")[-1] == 999
    assert ddpm.timestep_map("ddim50")[-1] == 980
    assert ddpm.timestep_map("1000") == ddpm.timestep_map("ddim1000") == list(range(1000))
    assert ddpm.timestep_map("1") == [0]


@pytest.mark.parametrize("respacing", ["0", "1001", "ten", "ddim", "", "5,5"])
def test_impossible_respacings_are_refused(respacing: str) -> None:
    with pytest.raises(ValueError, match="give a number of steps from 1 to 1000"):
        ddpm.timestep_map(respacing)


def test_not_every_number_has_a_whole_stride() -> None:
    with pytest.raises(ValueError, match="no whole stride gives 60 of 1000 steps"):
        ddpm.timestep_map("ddim60")


def test_noise_and_clean_latents_come_back_out_of_the_mixture() -> None:
    clean, noise = drawn(*SHAPE), drawn(*SHAPE, seed=1)
    t = torch.tensor([[0, 500, 900], [10, 0, 300]])
    noisy = ddpm.q_sample(clean, noise, t)
    torch.testing.assert_close(ddpm.predict_clean(noisy, noise, t), clean, rtol=0, atol=1e-4)
    alone = ddpm.q_sample(clean[:, :, 1:2], noise[:, :, 1:2], t[:, 1:2])
    assert torch.equal(noisy[:, :, 1:2], alone)  # frames do not mix


def test_the_variance_does_not_reach_the_noise_nor_the_bound_the_noise() -> None:
    clean, noise = drawn(*SHAPE), drawn(*SHAPE, seed=1)
    t = torch.tensor([[0, 500, 900], [10, 0, 300]])
    prediction = drawn(2, 8, 3, 5, 6, seed=2).requires_grad_()
    losses = ddpm.training_losses(prediction, clean, noise, ddpm.q_sample(clean, noise, t), t)
    assert torch.equal(losses.loss, losses.mse + losses.vb)
    (of_bound,) = torch.autograd.grad(losses.vb.sum(), prediction, retain_graph=True)
    (of_error,) = torch.autograd.grad(losses.mse.sum(), prediction)
    assert (of_bound[:, :4] == 0).all()
    assert (of_bound[:, 4:] != 0).any()
    assert (of_error[:, 4:] == 0).all()
    only = ddpm.training_losses(prediction[:, :4], clean, noise, ddpm.q_sample(clean, noise, t), t)
    assert torch.equal(only.loss, losses.mse)
    assert (only.vb == 0).all()


def test_the_likelihood_counts_only_where_every_frame_is_at_the_last_step() -> None:
    noise = drawn(*SHAPE, seed=1)
    clean = drawn(*SHAPE).clamp(-1, 1)  # both ends of the range among them
    place = 0.3 * drawn(*SHAPE, seed=2)
    prediction = torch.cat([noise, place], dim=1)  # the true noise: the mean of the step back is the data itself

    def bound(first: list[int], second: list[int]) -> Tensor:
        t = torch.tensor([first, second])
        return ddpm.training_losses(prediction, clean, noise, ddpm.q_sample(clean, noise, t), t).vb

    least, most = float(ddpm.posterior(clean, clean, torch.zeros(2, 3).long())[1].max()), float(ddpm.betas()[0].log())
    normal = torch.distributions.Normal(0, ((place + 1) / 2 * (most - least) + least).mul(0.5).exp())
    inside = normal.cdf(torch.tensor(1 / 255)) - normal.cdf(torch.tensor(-1 / 255))
    end = normal.cdf(torch.tensor(1 / 255))
    bits = -torch.where(clean.abs() > 0.999, end, inside).log2().mean(dim=(1, 2, 3, 4))
    found = bound([0, 0, 0], [0, 0, 1])
    assert float(found[0]) == pytest.approx(float(bits[0]), rel=2e-3)  # the published approximation of the normal
    divergence = bound([1, 0, 0], [0, 0, 1])
    assert found[1] == divergence[1]
    assert abs(float(divergence[0]) - float(bits[0])) > 0.1


def test_a_prediction_has_once_or_twice_the_channels() -> None:
    zeros = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"prediction of 5 channels for latents of 4: give the noise.* \(8\)"):
        ddpm.training_losses(torch.zeros(2, 5, 3, 5, 6), zeros, zeros, zeros, torch.zeros(2, 3).long())


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_random_timesteps_have_the_recorded_statistics(p: float, golden_json: Callable) -> None:
    recorded = golden_json("fvdm/ptss")[f"p={p}"]
    generator = torch.Generator().manual_seed(5)
    drawn = torch.cat([ddpm.draw_ptss(1, 16, p, generator, per="batch") for _ in range(4000)])  # [4000, 16]
    share = (drawn != drawn[:, :1]).any(dim=1).float().mean()
    assert float(share) == pytest.approx(recorded["share_async"], abs=0.03)
    assert float(drawn.float().mean()) == pytest.approx(499.5, abs=15)
    assert float(torch.corrcoef(drawn[:, :2].T.float())[0, 1]) == pytest.approx(1 - p, abs=0.05)


def test_the_decision_is_of_the_batch_or_of_each_video() -> None:
    def decisions(per: str) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        t = torch.stack([ddpm.draw_ptss(4, 16, 0.5, generator, per=per) for _ in range(200)])  # [200, 4, 16]
        return (t != t[:, :, :1]).any(dim=2).float()  # [200, 4]

    of_batch, of_video = decisions("batch"), decisions("sample")
    assert (of_batch == of_batch[:, :1]).all()
    assert not (of_video == of_video[:, :1]).all(dim=1).all()
    assert float(of_video.mean()) == pytest.approx(0.5, abs=0.06)
    with pytest.raises(ValueError, match="per='frame' is neither"):
        decisions("frame")
    with pytest.raises(ValueError, match=r"p=1\.5 is outside 0..1"):
        ddpm.draw_ptss(1, 2, 1.5, None)


def test_dropped_labels_become_no_class() -> None:
    labels = torch.arange(1000) % 7
    kept = ddpm.drop_labels(labels, 7, 0.1, torch.Generator().manual_seed(0))
    assert float((kept == 7).float().mean()) == pytest.approx(0.1, abs=0.03)
    assert torch.equal(kept[kept != 7], labels[kept != 7])
    assert torch.equal(ddpm.drop_labels(labels, 7, 0.0, None), labels)
