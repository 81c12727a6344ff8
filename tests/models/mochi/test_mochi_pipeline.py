"""With equal timesteps the pipeline makes what diffusers' own makes, and conditions meet the transformer as asked."""

from typing import Any

import pytest
import torch
from diffusers import MochiPipeline

from pusa import PusaCondition, PusaPipeline
from pusa.conditions import fit_image, pixels
from pusa.models.mochi import tiny
from pusa.models.vae import codec_of

SIZE = {"height": 32, "width": 48, "num_frames": 19}
CALL: dict[str, Any] = {**SIZE, "num_inference_steps": 5, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def pipe() -> PusaPipeline:
    pipe = PusaPipeline(**tiny.components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_text_to_video_is_the_stock_pipelines(pipe: PusaPipeline) -> None:
    stock = MochiPipeline(**tiny.components())
    stock.set_progress_bar_config(disable=True)
    texts = {"prompt": "a red ball rolls", "negative_prompt": "blurred", "guidance_scale": 4.5}
    ours, theirs = (
        model(**texts, **CALL, generator=torch.Generator().manual_seed(0), output_type="latent").frames
        for model in (pipe, stock)
    )
    assert ours.shape == (1, 12, 4, 4, 6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.max() - theirs.min()))
    frames = [
        model(**texts, **CALL, generator=torch.Generator().manual_seed(0), output_type="pt").frames
        for model in (pipe, stock)
    ]
    torch.testing.assert_close(*frames, rtol=0, atol=1e-5)


def test_a_kept_picture_comes_back_unless_conditions_are_as_published(pipe: PusaPipeline) -> None:
    picture = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(1))
    codec, kept = codec_of(pipe.vae), [PusaCondition(image=picture)]
    with torch.no_grad():
        encoded = codec.encode(pipe.vae, pixels([fit_image(picture, 48, 32)]))
    call = {**CALL, "prompt": "", "guidance_scale": 1, "conditions": kept, "output_type": "latent"}
    normalised = pipe(**call).frames
    returned = codec.denormalise(pipe.vae, normalised)[:, :, :1]
    torch.testing.assert_close(returned, encoded, rtol=0, atol=1e-5)
    pipe.normalize_conditions = False
    try:
        published = pipe(**call).frames
        given = PusaCondition(latents=encoded[0])
        same = pipe(**call | {"conditions": [given]}).frames
    finally:
        pipe.normalize_conditions = True
    torch.testing.assert_close(published[:, :, :1], encoded, rtol=0, atol=1e-5)
    assert not torch.allclose(codec.denormalise(pipe.vae, published)[:, :, :1], encoded, atol=1e-2)
    torch.testing.assert_close(same[:, :, 0], published[:, :, 0], rtol=0, atol=1e-5)
