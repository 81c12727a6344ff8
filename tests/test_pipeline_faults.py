"""NaN and infinity are found where they arise, experts change over as in the original, schedulers are ours."""

import logging
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from pusa import PusaCondition, PusaFlowMatchEulerScheduler
from pusa.models.finite import FiniteSteps, NotFiniteError

SMALL: dict[str, Any] = {
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "output_type": "latent",
}


def overflow_at(model: Any, step: int) -> None:
    """Let a transformer compute infinity from its `step`-th call on, counted from 1."""
    calls = 0

    def corrupt(_: Any, __: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return (output[0] / 0.0, *output[1:]) if calls >= step else output

    model.register_forward_hook(corrupt)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_transformer_that_overflows_is_named_with_the_step(tiny_pipeline: Any, step: int) -> None:
    pipe = tiny_pipeline()
    overflow_at(pipe.transformer, step)
    with pytest.raises(NotFiniteError, match=rf"^the transformer has computed NaN or infinity in step {step} of 4:"):
        pipe("a cat", **SMALL)


def test_the_second_expert_is_blamed_for_its_own_and_resumed_steps_count_from_the_start(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline(experts=2)
    overflow_at(pipe.transformer_2, 1)
    with pytest.raises(NotFiniteError, match=r"the transformer_2 has computed NaN or infinity in step 3 of 4"):
        pipe("a cat", **SMALL)
    latents = torch.zeros(1, 16, 2, 2, 2)
    with pytest.raises(NotFiniteError, match=r"transformer_2 .* in step 4 of 4"):
        pipe("a cat", latents=latents, start_step=3, **SMALL)


def test_steps_are_read_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = FiniteSteps(0, 3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", lambda *_: pytest.fail("waited for the device"))
        patch.setattr(torch.Tensor, "item", lambda *_: pytest.fail("waited for the device"))
        for value in (0.0, float("nan"), float("nan")):
            steps.record(torch.tensor([value]), "transformer")
    with pytest.raises(NotFiniteError, match="step 2 of 3"):
        steps.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_the_caller_gives_is_checked_at_the_door(tiny_pipeline: Any, value: float) -> None:
    pipe = tiny_pipeline()
    embeds = torch.zeros(1, 8, 48)
    bad = embeds.index_fill(1, torch.tensor([3]), value)
    with pytest.raises(ValueError, match="prompt_embeds holds NaN or infinity"):
        pipe(prompt_embeds=bad, **SMALL)
    with pytest.raises(ValueError, match="negative_prompt_embeds holds NaN or infinity"):
        pipe(prompt_embeds=embeds, negative_prompt_embeds=bad, **{**SMALL, "guidance_scale": 2.0})
    with pytest.raises(ValueError, match="latents holds NaN or infinity"):
        pipe(prompt_embeds=embeds, latents=torch.full((1, 16, 2, 2, 2), value), **SMALL)
    condition = PusaCondition(latents=torch.full((16, 1, 2, 2), value), latent_index=0)
    with pytest.raises((NotFiniteError, ValueError), match="NaN or infinity"):
        pipe(prompt_embeds=embeds, conditions=[condition], **SMALL)


def test_the_text_encoder_and_the_vae_are_blamed_for_their_own(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    latents = pipe("a cat", **SMALL).frames
    with pytest.raises(NotFiniteError, match=r"the vae has decoded NaN or infinity from finite latents"):
        pipe("a cat", **{**SMALL, "output_type": "np"})
    with pytest.raises(ValueError, match="the latents to decode hold NaN"):
        pipe.decode(latents / 0.0)
    with torch.no_grad():
        pipe.text_encoder.encoder.final_layer_norm.weight.fill_(float("inf"))
    with pytest.raises(NotFiniteError, match="the text_encoder has computed NaN or infinity"):
        pipe("a cat", **SMALL)


# ---- experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [0.5, 0.875, 0.9, 1.0])
@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
def test_experts_change_over_by_the_timestep_as_in_the_original(
    tiny_pipeline: Any, boundary: float, shift: float
) -> None:
    pipe = tiny_pipeline(experts=2)
    pipe.register_to_config(boundary_ratio=boundary)
    pipe._set_guidance(1.0, 1.0)
    pipe.scheduler = PusaFlowMatchEulerScheduler(shift=shift)
    for steps in range(1, 61):
        pipe.scheduler.set_timesteps(steps)
        high = [t >= boundary * 1000 for t in pipe.scheduler.timesteps.tolist()]
        assert [pipe._expert(k)[0] == "transformer" for k in range(steps)] == high


@pytest.mark.parametrize(("steps", "high"), [(4, 2), (8, 3), (10, 4), (14, 6), (20, 8), (28, 11), (30, 11), (42, 16)])
def test_at_09_the_step_on_the_boundary_is_the_high_noise_experts(tiny_pipeline: Any, steps: int, high: int) -> None:
    """4, 8, 10, 20 and 30 steps are recorded from the original; 14, 28 and 42 hit 900 exactly."""
    pipe = tiny_pipeline(experts=2)
    pipe.register_to_config(boundary_ratio=0.9)
    pipe._set_guidance(1.0, 1.0)
    pipe.scheduler.set_timesteps(steps)
    exact = [5 * (1 - k / steps) / (1 + 4 * (1 - k / steps)) for k in range(steps)]
    assert sum(sigma >= 0.9 - 1e-9 for sigma in exact) == high
    assert sum(pipe._expert(k)[0] == "transformer" for k in range(steps)) == high


# ---- schedulers ----------------------------------------------------------------------------------------------------


def test_a_foreign_scheduler_that_is_given_is_replaced_with_a_word(
    tiny_pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    with caplog.at_level(logging.WARNING, logger="pusa"):
        assert tiny_pipeline(scheduler=foreign).scheduler.config.shift == 5.0
    assert "UniPCMultistepScheduler has one sigma for all frames" in caplog.text
    assert "with shift 5, not 3" in caplog.text
    caplog.clear()
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)
    with caplog.at_level(logging.WARNING, logger="pusa"):
        assert tiny_pipeline(scheduler=euler).scheduler.config.shift == 3.0
    assert "use_karras_sigmas of FlowMatchEulerDiscreteScheduler is not supported here" in caplog.text


@pytest.mark.parametrize(
    "foreign", [UniPCMultistepScheduler(flow_shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)]
)
def test_a_foreign_scheduler_that_is_assigned_is_refused_with_the_one_to_give(tiny_pipeline: Any, foreign: Any) -> None:
    pipe = tiny_pipeline()
    before = pipe.scheduler
    with pytest.raises(TypeError, match=r"one per latent frame: give PusaFlowMatchEulerScheduler\(shift=3\)"):
        pipe.scheduler = foreign
    with pytest.raises(TypeError, match="one sigma for all frames"):
        pipe.register_modules(scheduler=foreign)
    assert pipe.scheduler is before
    pipe.scheduler = PusaFlowMatchEulerScheduler(shift=3.0)
    assert pipe.config.scheduler is not None
