"""Wan2.2 TI2V-5B: its sizes and defaults, and image-to-video as diffusers' own pipeline makes it."""

import pytest
import torch
from bases import ti2v_components
from diffusers import WanImageToVideoPipeline
from PIL import Image

from pusa import GenerationRequest, PusaCondition, PusaPipeline, zoo
from pusa.conditions import fit_image
from pusa.request import rounding_notes
from pusa.scheduler import PusaFlowMatchEulerScheduler

DEFAULTS = zoo.defaults_of("wan2.2-ti2v-5b")


def test_the_defaults_are_those_of_its_own_configuration() -> None:
    assert (DEFAULTS.width, DEFAULTS.height, DEFAULTS.num_frames, DEFAULTS.fps) == (1280, 704, 121, 24)
    assert (DEFAULTS.steps, DEFAULTS.shift, DEFAULTS.guidance) == (50, 5, 5)
    model = zoo.get("wan2.2-ti2v-5b")
    assert model.expand_timesteps
    assert not zoo.get("wan2.1-14b").expand_timesteps
    assert dict(model.parameters) == {"transformer": 4_999_787_712, "text_encoder": 5_680_910_336, "vae": 704_688_668}


def test_sizes_are_rounded_to_multiples_of_32() -> None:
    request = GenerationRequest(prompt="a cat", width=1280, height=720, seed=0)
    resolved = request.resolved(DEFAULTS)
    assert (resolved.width, resolved.height) == (1280, 736)
    notes = rounding_notes(request, resolved, DEFAULTS.size_multiple)
    assert notes == ["height 720 becomes 736: it has to be a multiple of 32"]
    assert request.resolved(zoo.defaults_of("wan2.1-14b")).height == 720


def test_images_are_kept_as_they_are_as_in_its_training() -> None:
    """Keep them unless a request says otherwise; other models have the preset of Pusa V1.0, 0.2 for one image."""
    image = {"kind": "image", "file": "cat.png"}
    video = {"kind": "video", "file": "cat.mp4", "positions": ["0", "1"]}
    request = GenerationRequest(prompt="a cat", conditions=[image, image | {"positions": ["last"]}])
    assert [condition.noise for condition in request.resolved(DEFAULTS).conditions] == [[0.0], [0.0]]
    of_others = request.resolved(zoo.defaults_of("wan2.1-14b"))
    assert [condition.noise for condition in of_others.conditions] == [[0.2], [0.5]]
    creative = GenerationRequest(prompt="a cat", preset="creative", conditions=[image])
    assert creative.resolved(DEFAULTS).conditions[0].noise == [0.4]
    asked = GenerationRequest(prompt="a cat", conditions=[image | {"noise": [0.3]}])
    assert asked.resolved(DEFAULTS).conditions[0].noise == [0.3]
    kept = GenerationRequest(prompt="a cat", conditions=[video])
    assert kept.resolved(DEFAULTS).conditions[0].noise == [0.0, 0.3]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_an_image_at_the_first_frame_without_a_lora_equals_the_pipeline_of_diffusers(guidance: float) -> None:
    image = Image.effect_mandelbrot((96, 64), (-3, -2.5, 2, 2.5), 20).convert("RGB")
    call = {"prompt": "a cat", "negative_prompt": "", "height": 64, "width": 96, "num_frames": 9}
    call |= {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "latent", "max_sequence_length": 16}
    call["latents"] = torch.randn(1, 48, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    # The scheduler of diffusers has another grid of sigmas, which is not the point here.
    scheduler = PusaFlowMatchEulerScheduler(shift=5.0)
    stock = WanImageToVideoPipeline(**ti2v_components(), scheduler=scheduler, image_encoder=None, image_processor=None)
    expected = stock(image=fit_image(image, 96, 64, "crop"), **call).frames
    pipe = PusaPipeline(**ti2v_components(), scheduler=PusaFlowMatchEulerScheduler(shift=5.0))
    made = pipe(conditions=[PusaCondition(image=image, latent_index=0)], **call).frames
    assert (made - expected).abs().max() < 1e-5 * (expected.max() - expected.min())
