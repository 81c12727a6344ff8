"""The tiny components are a whole Mochi, and the same for the same seed."""

import torch
from diffusers import MochiPipeline

from pusa.models.mochi import tiny
from pusa.models.mochi.transformer import PusaMochiTransformer3DModel


def test_they_make_a_pipeline_and_follow_their_seed() -> None:
    state = torch.random.get_rng_state()
    first, same, other = (tiny.components(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("transformer", "vae"):
        ours, again, others = (parts[name].state_dict() for parts in (first, same, other))
        assert all(torch.equal(value, again[key]) for key, value in ours.items())
        assert any(not torch.equal(value, others[key]) for key, value in ours.items())
    pipe = MochiPipeline(**first | {"transformer": PusaMochiTransformer3DModel.from_mochi(first["transformer"])})
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 48, "num_frames": 7, "num_inference_steps": 2, "max_sequence_length": 16}
    frames = pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **call).frames
    stock = MochiPipeline(**same)
    stock.set_progress_bar_config(disable=True)
    expected = stock("a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **call).frames
    assert frames.shape == (1, 7, 3, 32, 48)
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


def test_parts_have_their_dtype() -> None:
    parts = tiny.components(dtype={"default": torch.bfloat16, "vae": torch.float32})
    assert (parts["transformer"].dtype, parts["vae"].dtype) == (torch.bfloat16, torch.float32)
