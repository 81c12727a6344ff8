"""The sampler walks each latent frame down its own column of the sigma table, exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _golden import TRAJECTORIES
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pusa.scheduler import PusaFlowMatchEulerScheduler, PusaSchedulerOutput, shifted, wave_sigmas

STEPS = (1, 4, 10, 30)


def scheduler_with(steps: int | None = 10, multipliers: Any = None, **kwargs: Any) -> PusaFlowMatchEulerScheduler:
    scheduler = PusaFlowMatchEulerScheduler()
    if multipliers is not None:
        multipliers = torch.as_tensor(multipliers)
    scheduler.set_timesteps(steps, noise_multipliers=multipliers, **kwargs)
    return scheduler


def noise_like_latents(batch: int = 1, frames: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, frames, 2, 2, generator=torch.Generator().manual_seed(seed))


def step(scheduler: PusaFlowMatchEulerScheduler, velocity: Tensor, timestep: Tensor | float, latents: Tensor) -> Tensor:
    output = scheduler.step(velocity, timestep, latents)
    assert isinstance(output, PusaSchedulerOutput)
    return output.prev_sample


def walk(scheduler: PusaFlowMatchEulerScheduler, latents: Tensor, velocity: Tensor) -> Tensor:
    """All steps, along a velocity that never changes."""
    for t in scheduler.timesteps:
        latents = step(scheduler, velocity, t, latents)
    return latents


# ---- the same numbers as the original -----------------------------------------------------------------------------


def test_grids_match_the_original(golden_json: Callable) -> None:
    tables = golden_json("scheduler/tables")["tables"]
    assert {"1", "10", "50", "10_shift3.0_denoise1.0", "10_shift8.0_denoise1.0"} <= tables.keys()
    for name, recorded in tables.items():
        steps, shift, strength = name, "shift5", "denoise1"
        if "_" in name:
            steps, shift, strength = name.split("_")
        grid = torch.linspace(float(strength.removeprefix("denoise")), 0, int(steps) + 1)
        sigmas = shifted(grid, float(shift.removeprefix("shift")))
        torch.testing.assert_close(sigmas[:-1], torch.tensor(recorded["sigmas"]), rtol=0, atol=1.2e-7)
        assert sigmas[-1] == 0
        if strength.startswith("denoise1"):
            scheduler = PusaFlowMatchEulerScheduler(shift=float(shift.removeprefix("shift")))
            scheduler.set_timesteps(int(steps))
            assert torch.equal(scheduler.sigmas, sigmas)
            torch.testing.assert_close(scheduler.timesteps, torch.tensor(recorded["timesteps"]), rtol=0, atol=1.2e-4)


@pytest.mark.parametrize("rounding", [False, True], ids=["t2v_pipeline", "multiframe_v2v_pipelines"])
def test_timesteps_of_the_model_match_the_original(golden_json: Callable, rounding: bool) -> None:
    scheduler = PusaFlowMatchEulerScheduler(reference_rounding=rounding)
    recorded = "multiframe_v2v_pipelines" if rounding else "t2v_pipeline"
    for steps, table in golden_json("scheduler/tables")["tables"].items():
        if not steps.isdigit():
            continue
        scheduler.set_timesteps(int(steps))
        timesteps = torch.stack([scheduler.frame_timesteps(k)[0, 0] for k in range(int(steps))])
        expected = torch.tensor(table[f"model_timesteps_{recorded}"]["fp32"])
        torch.testing.assert_close(timesteps, expected, rtol=0, atol=0 if rounding else 1.2e-4)


class Trajectory:
    """One recorded run of the original, and ours from the same noise with the same analytic model."""

    def __init__(self, golden_json: Callable, golden_tensors: Callable, name: str, model: str, steps: int) -> None:
        cases = golden_json("scheduler/index")["cases"]
        case = next(c for c in cases if c["case"] == name and c["dtype"] == "fp32")
        tensors = golden_tensors(f"scheduler/{Path(case['file']).stem}")
        self.recorded = {
            key.rsplit(".", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{model}.{steps}.")
        }
        multipliers = torch.ones(case["latent_frames"])
        multipliers[case["cond_indices"]] = torch.tensor(case["noise_multipliers"])
        # The original truncates the model's timesteps in its multi-frame and V2V pipelines, and not in its T2V one.
        rounding = case["pipeline"] != "WanVideoPusaPipeline"
        self.scheduler = PusaFlowMatchEulerScheduler(reference_rounding=rounding)
        self.scheduler.set_timesteps(steps, noise_multipliers=multipliers)
        self.noise, self.x0 = tensors["noise"], tensors["x0"]
        clean = torch.zeros_like(self.noise)
        if case["cond_indices"]:
            clean[:, :, case["cond_indices"]] = tensors["cond_latents"]
        self.clean = clean
        latents = self.scheduler.add_noise(clean, self.noise)
        after, timesteps = [], []
        for k in range(steps):
            t = self.scheduler.frame_timesteps(k)  # [1, F]
            if model == "linear":
                velocity = self.noise - self.x0
            else:
                velocity = torch.tanh(latents) * t[:, None, :, None, None] / 1000
            latents = step(self.scheduler, velocity, self.scheduler.timesteps[k], latents)
            timesteps.append(t)
            after.append(latents)
        if len(self.recorded["latents"]) < steps:
            after = [after[k] for k in (0, 1, 15, 29)]  # all that was stored of 30 steps of the linear model
        self.latents = torch.cat(after)
        self.timesteps = torch.cat(timesteps)


@pytest.mark.parametrize("model", ["linear", "tanh"])
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectories_match_the_original(
    golden_json: Callable, golden_tensors: Callable, name: str, model: str
) -> None:
    for steps in STEPS:
        run = Trajectory(golden_json, golden_tensors, name, model, steps)
        table = run.scheduler.frame_sigmas[:, 0]  # [N + 1, F or 1]
        for ours, recorded in ((table[:-1], "sigma"), (table[1:], "sigma_next")):
            expected = run.recorded[recorded]
            torch.testing.assert_close(ours.expand_as(expected), expected, rtol=0, atol=1.2e-7)
        assert torch.equal(run.timesteps.expand_as(run.recorded["model_timestep"]), run.recorded["model_timestep"])
        torch.testing.assert_close(run.latents, run.recorded["latents"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", STEPS[1:])
def test_a_clip_of_conditions_alone_is_walked_to_its_end(
    golden_json: Callable, golden_tensors: Callable, steps: int
) -> None:
    """On purpose unlike the original, which takes the largest m * t among the frames for the base timestep.

    When every frame is conditioned, no frame has t itself, and it finds wrong steps. Frame f must fall by m_f in all.
    """
    run = Trajectory(golden_json, golden_tensors, "edge_all_conditioned", "linear", steps)
    multipliers = torch.tensor([0.2, 0.5])
    fallen = (run.scheduler.frame_sigmas[:-1] - run.scheduler.frame_sigmas[1:]).sum(dim=0)[0]  # [F]
    torch.testing.assert_close(fallen, multipliers)
    m = multipliers.view(1, 1, 2, 1, 1)
    expected = (1 - m) * run.clean + m * run.x0  # the share m of noise, replaced by the model's data
    torch.testing.assert_close(run.latents[-1:], expected, rtol=0, atol=2e-6)

    original_fall = (run.recorded["sigma"] - run.recorded["sigma_next"]).sum(dim=0)
    assert (original_fall - multipliers).abs().max() > 0.05
    assert (run.recorded["latents"][-1:] - expected).abs().max() > 0.1


def test_a_frame_with_very_little_noise_still_moves(golden_json: Callable, golden_tensors: Callable) -> None:
    """On purpose unlike the original, which truncates m * t to 0 below 1 and then freezes the frame with its noise."""
    run = Trajectory(golden_json, golden_tensors, "edge_tiny_multiplier", "linear", 30)
    m = 0.005
    expected = (1 - m) * run.clean[:, :, 0] + m * run.x0[:, :, 0]
    torch.testing.assert_close(run.latents[-1:, :, 0], expected, rtol=0, atol=2e-6)
    assert (run.recorded["latents"][-1:, :, 0] - expected).abs().max() > 1e-3
    torch.testing.assert_close(run.latents[:, :, 1:], run.recorded["latents"][:, :, 1:], rtol=0, atol=1e-6)


SINGLE_STEPS = {  # id: (step of 10, noise multipliers); the others are quirks of the original, tested above
    0: (0, [1.0] * 6),
    1: (3, [1.0] * 6),
    2: (5, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]),
    4: (9, [1.0] * 6),
    5: (0, [1.0] * 6),
    6: (0, [0.2, 1.0, 1.0, 1.0, 1.0, 1.0]),
    7: (1, [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    9: (9, [0.0, 0.3, 1.0, 1.0, 1.0, 0.5]),
}


@pytest.mark.parametrize("number", SINGLE_STEPS)
def test_single_steps_match_the_original(golden_json: Callable, golden_tensors: Callable, number: int) -> None:
    recorded = golden_json("scheduler/single_steps")[number]
    tensors = golden_tensors("scheduler/single_steps")
    assert recorded["id"] == number
    k, multipliers = SINGLE_STEPS[number]
    scheduler = scheduler_with(recorded["num_steps"], multipliers)
    for row, sigmas in ((k, recorded["sigma"]), (k + 1, recorded["sigma_next"])):
        torch.testing.assert_close(scheduler.frame_sigmas[row, 0], torch.tensor(sigmas), rtol=0, atol=1.2e-7)
    ours = step(scheduler, tensors[f"{number}.model_output"], scheduler.timesteps[k], tensors[f"{number}.sample"])
    torch.testing.assert_close(ours, tensors[f"{number}.prev_sample"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [0, 1])
def test_noise_on_conditions_matches_the_original(golden_json: Callable, golden_tensors: Callable, number: int) -> None:
    recorded = next(r for r in golden_json("scheduler/single_steps") if r["id"] == f"addnoise{number}")
    clean, noise, out = (
        golden_tensors("scheduler/single_steps")[f"addnoise{number}.{n}"] for n in ("x", "noise", "out")
    )
    scheduler = scheduler_with(recorded["num_steps"], [recorded["noise_multiplier"]])
    torch.testing.assert_close(scheduler.add_noise(clean, noise), out, rtol=0, atol=1e-6)


# ---- multipliers and tables -------------------------------------------------------------------------------------


def test_table_shapes() -> None:
    scheduler = scheduler_with(10)
    assert scheduler.sigmas.shape == (11,)
    assert scheduler.timesteps.shape == (10,)
    assert scheduler.frame_sigmas.shape == (11, 1, 1)  # nothing distinguishes samples or frames
    assert scheduler_with(10, [1.0, 0.5, 0.0]).frame_sigmas.shape == (11, 1, 3)
    per_video = scheduler_with(10, [[1.0, 0.5, 0.0], [0.2, 1.0, 1.0]])
    assert per_video.frame_sigmas.shape == (11, 2, 3)
    assert per_video.frame_timesteps(4).shape == (2, 3)
    for each in (scheduler, per_video):
        assert each.frame_sigmas.dtype == each.sigmas.dtype == each.timesteps.dtype == torch.float32
        assert (each.frame_sigmas[-1] == 0).all()


def test_a_multiplier_scales_its_column() -> None:
    scheduler = scheduler_with(10, [[1.0, 0.5, 0.0], [0.2, 1.0, 1.0]])
    expected = scheduler.sigmas.view(-1, 1, 1) * torch.tensor([[1.0, 0.5, 0.0], [0.2, 1.0, 1.0]])
    assert torch.equal(scheduler.frame_sigmas, expected)
    for k in range(10):
        assert torch.equal(scheduler.frame_timesteps(k), 1000 * expected[k])


def test_multiplier_0_keeps_a_frame_to_the_bit() -> None:
    scheduler = scheduler_with(10, [[0.0, 1.0, 0.3, 1.0], [1.0, 1.0, 1.0, 0.0]])
    clean, noise = noise_like_latents(2, seed=1), noise_like_latents(2, seed=2)
    start = scheduler.add_noise(clean, noise)
    end = walk(scheduler, start, 100 * noise_like_latents(2, seed=3))
    for latents in (start, end):
        assert torch.equal(latents[0, :, 0], clean[0, :, 0])
        assert torch.equal(latents[1, :, 3], clean[1, :, 3])
    assert torch.equal(start[0, :, 1], noise[0, :, 1])  # multiplier 1 starts from the noise itself
    assert not torch.equal(end[1, :, 0], clean[1, :, 0])


def test_the_true_velocity_leads_to_the_data_from_any_multiplier() -> None:
    data, noise = noise_like_latents(2, seed=1), noise_like_latents(2, seed=2)
    scheduler = scheduler_with(10, torch.rand(2, 4, generator=torch.Generator().manual_seed(0)))
    end = walk(scheduler, scheduler.add_noise(data, noise), noise - data)
    torch.testing.assert_close(end, data, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ([1.0, 1.3], r"noise_multiplier=1.3 is outside 0..1"),
        ([-0.1], r"noise_multiplier=-0.1 is outside 0..1"),
        ([float("nan")], r"noise_multiplier=nan is outside 0..1"),
        ([[[1.0]]], r"noise_multipliers of shape \[1, 1, 1\]: give \[F\] or \[B, F\]"),
    ],
)
def test_multipliers_out_of_range_are_refused(multipliers: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler_with(10, multipliers)


def test_multipliers_must_fit_the_table() -> None:
    with pytest.raises(ValueError, match=r"noise_multipliers of shape \[1, 3\] do not fit .* \[1, 4\]"):
        scheduler_with(None, torch.ones(3), frame_sigmas=wave_sigmas(4, 5))


def test_user_tables() -> None:
    table = torch.tensor([[1.0, 0.6, 0.0], [0.7, 0.6, 0.0], [0.0, 0.1, 0.0]])  # [N + 1, F]
    scheduler = scheduler_with(None, frame_sigmas=table)
    assert torch.equal(scheduler.frame_sigmas, table.unsqueeze(1))
    assert torch.equal(scheduler.sigmas, torch.tensor([1.0, 0.7, 0.1]))  # the noisiest frame of each row
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 700.0]))
    one = torch.ones(1, 1, 3, 1, 1)
    first = step(scheduler, one, scheduler.timesteps[0], 0 * one)
    second = step(scheduler, one, scheduler.timesteps[1], first)
    torch.testing.assert_close(first.flatten(), torch.tensor([-0.3, 0.0, 0.0]))
    torch.testing.assert_close(second.flatten(), torch.tensor([-1.0, -0.5, 0.0]))  # frame 1 stops with noise 0.1 left

    scaled = scheduler_with(None, [1.0, 0.5, 1.0], frame_sigmas=table)
    torch.testing.assert_close(scaled.frame_sigmas[:, 0, 1], 0.5 * table[:, 1])
    per_video = scheduler_with(None, frame_sigmas=torch.stack([table, table / 2], dim=1))
    assert per_video.frame_sigmas.shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.0, 0.6]]), "rises at step 1 in latent frame 1"),
        (torch.tensor([[1.2], [0.0]]), "outside 0..1"),
        (torch.tensor([[1.0], [float("nan")]]), "outside 0..1"),
        (torch.tensor([[1.0, 1.0]]), r"shape \[1, 2\]: give \[N \+ 1, F\] or \[N \+ 1, B, F\]"),
        (torch.tensor([1.0, 0.0]), r"shape \[2\]: give"),
    ],
)
def test_bad_tables_are_refused(table: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler_with(None, frame_sigmas=table)


def test_steps_and_a_table_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="either num_inference_steps or frame_sigmas"):
        scheduler_with(10, frame_sigmas=wave_sigmas(2, 10))
    with pytest.raises(ValueError, match="either num_inference_steps or frame_sigmas"):
        scheduler_with(None)
    with pytest.raises(ValueError, match="num_inference_steps=0 is below 1"):
        scheduler_with(0)


def test_device_of_the_tables() -> None:
    scheduler = scheduler_with(10, [1.0, 0.0], device="meta")
    assert scheduler.frame_sigmas.device.type == scheduler.timesteps.device.type == "meta"
    assert scheduler.frame_timesteps(0).device.type == "meta"
    assert scheduler.sigmas.device.type == "cpu"  # read once per step, without a synchronisation


# ---- stepping ---------------------------------------------------------------------------------------------------


def test_every_timestep_finds_its_step_up_to_200_steps() -> None:
    """The original finds the nearest rounded timestep, and takes wrong steps from 60 of them on."""
    zero, one = torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    for steps in range(1, 201):
        scheduler = scheduler_with(steps)
        changes = torch.cat([step(scheduler, one, t, zero).flatten() for t in scheduler.timesteps])
        assert torch.equal(changes, scheduler.sigmas.diff())


def test_steps_may_come_in_any_order() -> None:
    scheduler = scheduler_with(10)
    zero, one = torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    for k in (7, 2, 2, 9, 0):
        change = scheduler.step(one, float(scheduler.timesteps[k]), zero, return_dict=False)[0]
        assert change == scheduler.sigmas[k + 1] - scheduler.sigmas[k]
        assert scheduler.step_index == k + 1


def test_an_unknown_timestep_is_refused() -> None:
    scheduler = scheduler_with(10)
    latents = noise_like_latents()
    with pytest.raises(ValueError, match=r"timestep=123\.5 is none of the 10 timesteps"):
        scheduler.step(latents, 123.5, latents)
    rounded = scheduler.timesteps[1].bfloat16().float()  # what a careless cast makes of 978.26
    with pytest.raises(ValueError, match="timestep=980 is none"):
        scheduler.step(latents, rounded, latents)


def test_equal_timesteps_of_a_table_are_steps_in_turn() -> None:
    table = torch.tensor([[1.0, 1.0], [1.0, 0.5], [1.0, 0.0], [0.0, 0.0]])
    scheduler = scheduler_with(None, frame_sigmas=table)
    assert scheduler.timesteps.tolist() == [1000.0] * 3
    end = walk(scheduler, torch.zeros(1, 1, 2, 1, 1), torch.ones(1, 1, 2, 1, 1))
    assert end.flatten().tolist() == [-1.0, -1.0]


def test_counted_steps_ignore_the_timestep_and_end() -> None:
    scheduler = scheduler_with(4)
    one = torch.ones(1, 1, 1, 1, 1)
    scheduler.set_begin_index(1)
    assert scheduler.begin_index == 1
    assert scheduler.step_index is None
    latents = 0 * one
    for _ in range(3):
        latents = step(scheduler, one, -1.0, latents)
    torch.testing.assert_close(latents.flatten(), -scheduler.sigmas[1:2])
    assert scheduler.step_index == 4
    with pytest.raises(ValueError, match="all 4 steps are done"):
        scheduler.step(one, -1.0, latents)
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None
    assert scheduler.begin_index is None


def test_reduced_precision_latents_are_stepped_in_fp32() -> None:
    scheduler = scheduler_with(7, [1.0, 0.3])
    generator = torch.Generator().manual_seed(0)
    latents, velocity = (torch.randn(1, 64, 2, 8, 8, generator=generator).bfloat16() for _ in range(2))
    ours = step(scheduler, velocity, scheduler.timesteps[2], latents)
    change = (scheduler.frame_sigmas[3] - scheduler.frame_sigmas[2]).view(1, 1, 2, 1, 1)
    expected = latents.float() + change * velocity.float()
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected.bfloat16())  # rounded once
    mixed = step(scheduler, velocity, scheduler.timesteps[2], latents.float())
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, expected)


# ---- waves --------------------------------------------------------------------------------------------------------


def test_a_wave_without_delay_is_the_synchronous_table() -> None:
    assert torch.equal(wave_sigmas(5, 10, delay=0), scheduler_with(10).sigmas[:, None].expand(11, 5))


@pytest.mark.parametrize("delay", [1, 3])
def test_in_a_wave_every_frame_takes_the_same_walk_later(delay: int) -> None:
    frames, steps = 6, 10
    table = wave_sigmas(frames, steps, delay=delay)
    assert table.shape == (steps + delay * (frames - 1) + 1, frames)
    assert (table[0] == 1).all()
    assert (table[-1] == 0).all()
    assert (table.diff(dim=0) <= 0).all()
    assert (table.diff(dim=1) >= 0).all()  # later frames are noisier
    walk_of_one = scheduler_with(steps).sigmas
    for frame in range(frames):
        start = delay * frame
        assert torch.equal(table[start : start + steps + 1, frame], walk_of_one)


def test_finished_frames_of_a_wave() -> None:
    scheduler = scheduler_with(None, frame_sigmas=wave_sigmas(4, 3, delay=2))
    finished = [scheduler.finished_frames(k) for k in range(len(scheduler.timesteps))]
    assert finished == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_finished_frames_lead_from_the_first_and_hold_for_all_samples() -> None:
    one = scheduler_with(2, [0.0, 1.0, 0.0])  # the last frame is clean, but does not come next
    assert [one.finished_frames(k) for k in (0, 1)] == [1, 3]
    two = scheduler_with(2, [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    assert [two.finished_frames(k) for k in (0, 1)] == [1, 3]


def test_a_wave_ends_at_the_data() -> None:
    data, noise = noise_like_latents(2, frames=5, seed=1), noise_like_latents(2, frames=5, seed=2)
    scheduler = scheduler_with(None, [1.0, 1.0, 0.4, 1.0, 0.0], frame_sigmas=wave_sigmas(5, 8, delay=2))
    start = scheduler.add_noise(data, noise)
    torch.testing.assert_close(walk(scheduler, start, noise - data), data, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0, "num_inference_steps": 5}, "num_frames=0 is below 1"),
        ({"num_frames": 3, "num_inference_steps": 0}, "num_inference_steps=0 is below 1"),
        ({"num_frames": 3, "num_inference_steps": 5, "delay": -1}, "delay=-1 is below 0"),
    ],
)
def test_impossible_waves_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wave_sigmas(**arguments)


# ---- configuration ----------------------------------------------------------------------------------------------


def test_saved_schedulers_load_in_plain_diffusers_and_here(tmp_path: Path) -> None:
    PusaFlowMatchEulerScheduler(shift=3.0, reference_rounding=True).save_pretrained(tmp_path)
    assert '"_class_name": "FlowMatchEulerDiscreteScheduler"' in (tmp_path / "scheduler_config.json").read_text()
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert stock.config.shift == 3.0
    ours = PusaFlowMatchEulerScheduler.from_pretrained(tmp_path)
    assert type(ours) is PusaFlowMatchEulerScheduler
    assert ours.config.shift == 3.0
    assert ours.config.reference_rounding is False  # only for comparisons, and unknown to the stock class


def test_takes_the_shift_of_a_stock_scheduler() -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler = PusaFlowMatchEulerScheduler.from_config(stock.config)
    scheduler.set_timesteps(10)
    expected = shifted(torch.linspace(1, 0, 11), 7.0)
    assert torch.equal(scheduler.sigmas, expected)
    stock.set_timesteps(sigmas=torch.linspace(1, 0, 11)[:-1].tolist())
    torch.testing.assert_close(stock.sigmas, expected, rtol=0, atol=2e-7)


def test_a_shift_must_be_positive() -> None:
    with pytest.raises(ValueError, match="shift=0 is not above 0"):
        PusaFlowMatchEulerScheduler(shift=0)


def _end_point(order: int, steps: int, **table: Tensor) -> Tensor:
    """Walk the flow of data whose velocity bends: x(sigma) = data * cos(sigma) + noise * sin(sigma)."""
    scheduler = PusaFlowMatchEulerScheduler(shift=1.0, solver_order=order)
    scheduler.set_timesteps(None if table else steps, **table)
    rows = scheduler.frame_sigmas.expand(-1, 1, 3)
    data, noise = torch.randn(2, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def at(sigma: Tensor) -> tuple[Tensor, Tensor]:
        s = sigma[:, None, :, None, None]
        return data * s.cos() + noise * s.sin(), -data * s.sin() + noise * s.cos()

    x, _ = at(rows[0])
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(at(rows[k])[1], t, x).prev_sample
    return (x - at(rows[-1])[0]).abs().max()


@pytest.mark.parametrize(("order", "least"), [(1, 1.8), (2, 3.4)])
def test_halving_the_steps_divides_the_error_by_the_solver_order(order: int, least: float) -> None:
    errors = [float(_end_point(order, steps)) for steps in (20, 40, 80)]
    assert errors[0] / errors[1] > least
    assert errors[1] / errors[2] > least


def test_the_second_order_starts_anew_where_a_frame_starts_late_and_keeps_what_is_kept() -> None:
    wave = wave_sigmas(3, 8, delay=3, shift=1.0)
    assert _end_point(2, 0, frame_sigmas=wave) < _end_point(1, 0, frame_sigmas=wave)
    scheduler = PusaFlowMatchEulerScheduler(solver_order=2)
    scheduler.set_timesteps(4, noise_multipliers=torch.tensor([0.0, 1.0]))
    x = start = torch.randn(1, 2, 2, 3, 3)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.randn(1, 2, 2, 3, 3), t, x).prev_sample
    assert torch.equal(x[:, :, :1], start[:, :, :1])
    assert not torch.equal(x[:, :, 1:], start[:, :, 1:])


def test_the_second_order_caps_its_slope_at_that_of_equal_steps() -> None:
    scheduler = PusaFlowMatchEulerScheduler(solver_order=2)
    scheduler.set_timesteps(frame_sigmas=torch.tensor([[1.0], [0.9], [0.1], [0.0]]))
    shape = 1, 1, 1, 1, 1
    x = torch.zeros(shape)
    for t, velocity in zip(scheduler.timesteps, (1.0, 3.0, 4.0), strict=True):
        x = scheduler.step(torch.full(shape, velocity), t, x).prev_sample
    # Euler; then 8 times as long a step, with slope 1 / 2 and not 8 / 2; then 1 / 8 as long a step, with 1 / 16.
    assert float(x) == pytest.approx(-0.1 * 1 - 0.8 * (3 + 2 / 2) - 0.1 * (4 + 1 / 16), abs=1e-6)


def test_the_second_order_forgets_the_run_before() -> None:
    scheduler = PusaFlowMatchEulerScheduler(solver_order=2)
    velocities = torch.randn(3, 1, 2, 2, 3, 3)

    def run() -> Tensor:
        scheduler.set_timesteps(3)
        scheduler.set_begin_index(0)
        x = torch.ones(1, 2, 2, 3, 3)
        for v, t in zip(velocities, scheduler.timesteps, strict=True):
            x = scheduler.step(v, t, x).prev_sample
        return x

    assert torch.equal(run(), run())


def test_there_is_no_third_order() -> None:
    with pytest.raises(ValueError, match="solver_order=3 is neither 1 nor 2"):
        PusaFlowMatchEulerScheduler(solver_order=3)
