"""The DDIM sampler walks each frame down its column of the same table; recorded tasks are in `benchmarks/parity.py`."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from _fvdm_checks import sample
from _golden import Golden
from diffusers import DDIMScheduler
from torch import Tensor

from pusa.ddim import PusaDDIMScheduler
from pusa.models.fvdm import ddpm
from pusa.scheduler import check_scheduler, check_start, check_table, from_other, wave_sigmas

Predict = Callable[[Tensor, Tensor], Tensor]


def scheduler_with(steps: int | None = 10, multipliers: Any = None, **options: Any) -> PusaDDIMScheduler:
    scheduler = PusaDDIMScheduler(published_zero=options.pop("published_zero", False))
    multipliers = None if multipliers is None else torch.as_tensor(multipliers)
    scheduler.set_timesteps(steps, noise_multipliers=multipliers, **options)
    return scheduler


def drawn(batch: int = 1, frames: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, frames, 2, 2, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, t: Tensor) -> Tensor:
    """Predict some noise, with a second half as of a variance, from latents and timesteps [B, F]."""
    eps = torch.tanh(x + t[:, None, :, None, None] / 500) + 0.1 * x.mean(dim=2, keepdim=True)
    return torch.cat([eps, 7 * eps], dim=1)


def walk(scheduler: PusaDDIMScheduler, x: Tensor, first: int = 0, predict: Predict = network) -> list[Tensor]:
    """Take the steps from `first` on; return the latents before each, and after the last."""
    scheduler.set_begin_index(first)
    passed = [x]
    for k in range(first, len(scheduler.timesteps)):
        t = scheduler.frame_timesteps(k).expand(x.shape[0], x.shape[2])
        x = scheduler.step(predict(x, t), scheduler.timesteps[k], x).prev_sample
        passed.append(x)
    return passed


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_grid_is_the_published_respacing() -> None:
    scheduler = scheduler_with(50, [1.0, 1.0])
    expected = ddpm.timestep_map("50")[::-1]
    assert scheduler.timesteps.tolist() == expected
    assert [scheduler.frame_timesteps(k)[0, 1].item() for k in range(50)] == expected
    assert scheduler.sigmas.shape == (51,)
    assert scheduler.sigmas[0] == 1
    assert scheduler.sigmas[-1] == 0
    assert torch.equal(scheduler.sigmas[:-1], (torch.tensor(expected) + 1) / 1000)
    assert torch.equal(scheduler.highest_sigmas, scheduler.sigmas)
    assert scheduler.frame_sigmas.dtype == scheduler.sigmas.dtype == scheduler.timesteps.dtype == torch.float32
    assert scheduler_with(1).timesteps.tolist() == [999]  # the published map of one step is 0, and no noise
    with pytest.raises(ValueError, match="num_inference_steps=1001 is above 1000"):
        scheduler_with(1001)


def test_a_multiplier_scales_its_column_to_the_nearest_timestep() -> None:
    scheduler = scheduler_with(10, [[1.0, 0.2, 0.0], [0.5, 1.0, 1.0]])
    assert scheduler.frame_sigmas.shape == (11, 2, 3)
    assert scheduler.frame_timesteps(0).tolist() == [[999, 199, 0], [499, 999, 999]]
    assert scheduler.frame_timesteps(1)[0].tolist() == [888, 177, 0]  # 0.2 * 0.889 is 0.178 in thousandths
    places = scheduler.frame_sigmas * 1000
    torch.testing.assert_close(places, places.round(), rtol=0, atol=1e-4)
    assert (scheduler.frame_sigmas.diff(dim=0) <= 0).all()
    assert scheduler_with(10, [0.0003]).frame_sigmas.max() == 0  # below half of a thousandth: clean


def test_other_tables_checks_and_waves_are_the_same_as_for_flow_matching() -> None:
    wave = wave_sigmas(4, 5, delay=2, shift=1.0)
    scheduler = scheduler_with(None, frame_sigmas=wave)
    assert [scheduler.finished_frames(k) for k in range(11)] == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    torch.testing.assert_close(scheduler.frame_sigmas[:, 0], wave, rtol=0, atol=5e-4)
    assert scheduler.moves.tolist() == (wave[1:] != wave[:-1]).tolist()
    check_table(scheduler, wave, videos=2, frames=4, boundary_ratio=None)
    check_start(wave, 4, None)
    with pytest.raises(ValueError, match="rises at step 0 in latent frame 0"):
        scheduler_with(None, frame_sigmas=torch.tensor([[0.2], [0.3]]))
    with pytest.raises(ValueError, match=r"noise_multiplier=1\.3 is outside 0\.\.1"):
        scheduler_with(10, [1.3])
    with pytest.raises(ValueError, match="either num_inference_steps or frame_sigmas"):
        scheduler_with(None)
    with pytest.raises(ValueError, match="num_inference_steps=0 is below 1"):
        scheduler_with(0)


def test_pipelines_take_it_as_it_is() -> None:
    scheduler = PusaDDIMScheduler(published_zero=True)
    check_scheduler(scheduler)
    assert from_other(scheduler) is scheduler
    with pytest.raises(TypeError, match="DDIMScheduler, which has one sigma for all frames"):
        check_scheduler(DDIMScheduler())


# ---- steps ---------------------------------------------------------------------------------------------------------


def test_equal_columns_are_the_steps_of_diffusers() -> None:
    stock = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="leading"
    )
    stock.set_timesteps(50)  # 980, 960, ... 0
    table = torch.tensor([*((t + 1) / 1000 for t in stock.timesteps.tolist()), 0.0]).unsqueeze(1)
    scheduler = scheduler_with(None, frame_sigmas=table)
    ours = theirs = drawn()
    for k, t in enumerate(stock.timesteps):
        eps = network(theirs, torch.full((1, 4), float(t)))[:, :3]
        assert torch.allclose(
            scheduler.denoised(k, eps, theirs), stock.step(eps, t, theirs).pred_original_sample, rtol=1e-4, atol=1e-4
        )
        ours = scheduler.step(network(ours, scheduler.frame_timesteps(k).expand(1, 4)), scheduler.timesteps[k], ours)[0]
        theirs = stock.step(eps, t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_true_noise_leads_to_the_data_from_any_multiplier() -> None:
    data, noise = drawn(2, seed=1), drawn(2, seed=2)
    multipliers = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    scheduler = scheduler_with(10, multipliers)
    end = walk(scheduler, scheduler.add_noise(data, noise), predict=lambda *_: noise)[-1]
    torch.testing.assert_close(end, data, rtol=0, atol=2e-5)
    at_start = scheduler.denoised(0, noise, scheduler.add_noise(data, noise))
    torch.testing.assert_close(at_start, data, rtol=0, atol=1e-3)


def test_sampling_starts_from_the_noise_itself_the_data_itself_and_the_mixtures_between() -> None:
    data, noise = drawn(seed=1), drawn(seed=2)
    start = scheduler_with(10, [1.0, 0.0, 0.25, 0.001]).add_noise(data, noise)
    assert torch.equal(start[:, :, 0], noise[:, :, 0])
    assert torch.equal(start[:, :, 1], data[:, :, 1])
    mixed = ddpm.q_sample(data, noise, torch.tensor([[0, 0, 249, 0]]))
    assert torch.equal(start[:, :, 2:], mixed[:, :, 2:])


def test_a_clean_frame_is_kept_to_the_bit_or_replaced_as_published() -> None:
    data, noise = drawn(seed=1), drawn(seed=2)
    kept = scheduler_with(10, [0.0, 1.0, 1.0, 0.3])
    replaced = scheduler_with(10, [0.0, 1.0, 1.0, 0.3], published_zero=True)
    start = kept.add_noise(data, noise)
    assert torch.equal(start, replaced.add_noise(data, noise))
    for x in walk(kept, start):
        assert torch.equal(x[:, :, 0], data[:, :, 0])
    assert not kept.moves[:, 0].any()
    assert replaced.moves[:, 0].all()
    passed = walk(replaced, start)
    for k, (before, after) in enumerate(pairwise(passed)):
        t = replaced.frame_timesteps(k)
        assert t[0, 0] == 0
        prediction = ddpm.predict_clean(before, network(before, t)[:, :3], t.long())
        torch.testing.assert_close(after[:, :, 0], prediction[:, :, 0], rtol=0, atol=1e-5)
        assert torch.equal(replaced.denoised(k, network(before, t), before)[:, :, 0], after[:, :, 0])
    torch.testing.assert_close(walk(kept, start)[1][:, :, 1:], passed[1][:, :, 1:], rtol=0, atol=0)


def test_the_recorded_drift_of_a_kept_frame_is_there_and_gone(golden: Path, golden_json: Callable) -> None:
    data = Golden(golden)
    condition = data.tensors("fvdm/sampling_ddim10")["condition_latents"][0, 0]
    drifts = (sample(data, "i2v")[:, 0] - condition).abs().amax(dim=(1, 2, 3))
    recorded = torch.tensor(golden_json("fvdm/parity")["i2v_kept_frame_drift_per_step"])
    torch.testing.assert_close(drifts, recorded, rtol=0, atol=1e-5)
    assert torch.equal(sample(data, "i2v", published_zero=False)[:, 0], condition.expand(10, -1, -1, -1))


def test_frames_of_equal_sigmas_do_not_move() -> None:
    table = torch.tensor([[1.0, 1.0, 0.3], [1.0, 0.5, 0.3], [0.0, 0.0, 0.3]])
    passed = walk(scheduler_with(None, frame_sigmas=table), drawn(frames=3))
    assert torch.equal(passed[0][:, :, 0], passed[1][:, :, 0])
    assert torch.equal(passed[0][:, :, 2], passed[2][:, :, 2])
    assert not torch.equal(passed[0][:, :, 1], passed[1][:, :, 1])


@pytest.mark.parametrize("published_zero", [False, True])
def test_a_resumed_run_is_equal_to_the_bit(published_zero: bool) -> None:
    def scheduler() -> PusaDDIMScheduler:
        return scheduler_with(10, [0.0, 1.0, 0.4, 1.0], published_zero=published_zero)

    passed = walk(scheduler(), scheduler().add_noise(drawn(seed=1), drawn(seed=2)))
    resumed = scheduler()
    assert torch.equal(walk(resumed, passed[6], first=6)[-1], passed[-1])
    assert resumed.step_index == 10
    with pytest.raises(ValueError, match="all 10 steps are done"):
        resumed.step(passed[-1], 0, passed[-1])


def test_steps_are_found_by_their_timestep() -> None:
    scheduler, x = scheduler_with(10), drawn()
    counted = walk(scheduler_with(10), x)
    found = x
    for k, t in enumerate(scheduler.timesteps):
        found = scheduler.step(network(found, t.expand(1, 4)), t, found, return_dict=False)[0]
        assert scheduler.step_index == k + 1
    assert torch.equal(found, counted[-1])
    with pytest.raises(ValueError, match="timestep=5 is none of the 10 timesteps"):
        scheduler.step(x, 5, x)


def test_reduced_precision_latents_are_stepped_in_fp32() -> None:
    scheduler, x = scheduler_with(10), drawn().bfloat16()
    eps = network(x, torch.full((1, 4), 555.0))
    t = scheduler.timesteps[4]
    ours = scheduler.step(eps.bfloat16(), t, x).prev_sample
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, scheduler.step(eps.bfloat16().float(), t, x.float()).prev_sample.bfloat16())


def test_its_device_and_configuration(tmp_path: Path) -> None:
    scheduler = scheduler_with(10, [0.0, 1.0], device="meta")
    assert scheduler.frame_sigmas.device.type == scheduler.timesteps.device.type == "meta"
    assert scheduler.frame_timesteps(0).device.type == "meta"
    assert scheduler.sigmas.device.type == scheduler.moves.device.type == "cpu"
    PusaDDIMScheduler(published_zero=True).save_pretrained(tmp_path)
    again = PusaDDIMScheduler.from_pretrained(tmp_path)
    assert again.config.published_zero is True
    assert again.config.num_train_timesteps == 1000
    assert PusaDDIMScheduler.from_config(again.config, published_zero=False).config.published_zero is False
    with pytest.raises(ValueError, match="num_train_timesteps=500: this DDPM has 1000"):
        PusaDDIMScheduler(num_train_timesteps=500)
