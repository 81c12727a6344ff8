"""Quantise, cache, compile and share every base: each change works, or says why it cannot."""

import copy

import pytest
import torch
from studied_bases import Studied
from torch import Tensor

from pusa import zoo
from pusa.acceleration import attention, compilation, parallel, quantization, step_cache
from pusa.acceleration.decisions import Card, LoadOptions, Machine, Parallel
from pusa.acceleration.needs import shapes_of
from pusa.acceleration.planning import plans
from pusa.models.frame_skipping import frame_obstacle
from pusa.models.fvdm import tiny as fvdm_tiny
from pusa.pipeline import PusaPipeline


def call(studied: Studied, **options: object) -> Tensor:
    side = studied.base.side
    size = {"height": side, "width": side, "num_frames": studied.length(3)}
    generator = torch.Generator().manual_seed(0)
    guidance = {} if studied.base.name == "fvdm" else {"guidance_scale": 2.0}
    return studied.pipe(
        studied.base.prompt,
        generator=generator,
        output_type="latent",
        num_inference_steps=4,
        **size,
        **guidance,
        **options,
    ).frames


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_weights_in_fewer_bits_change_the_result_a_little(storage: str, studied: Studied) -> None:
    exact = call(studied)
    whole = studied.pipe.transformer
    studied.pipe.transformer = copy.deepcopy(whole)
    try:
        quantization.quantize(studied.pipe.transformer, storage, dtype=torch.float32)
        assert quantization.storage_of(studied.pipe.transformer) == storage
        rounded = call(studied)
    finally:
        studied.pipe.transformer = whole
    assert 0 < (rounded - exact).abs().max() < 0.3 * exact.abs().max()


def test_attention_is_chosen(studied: Studied) -> None:
    exact = call(studied)
    try:
        attention.apply(studied.pipe, "native_math")
        assert attention.current(studied.pipe.transformer) == "_native_math"
        assert torch.allclose(call(studied), exact, atol=1e-3)
    finally:
        attention.remove(studied.pipe)


def test_a_step_cache_skips_blocks_or_says_why_it_cannot(studied: Studied) -> None:
    if studied.pipe.base.step_cache_obstacle:
        with pytest.raises(ValueError, match="step_cache=first_block: this model computes all blocks of every step"):
            step_cache.enable(studied.pipe)
        return
    exact = call(studied)
    step_cache.enable(studied.pipe, threshold=1e9)
    try:
        assert not torch.equal(call(studied), exact)
    finally:
        step_cache.disable(studied.pipe)
    assert torch.equal(call(studied), exact)


def test_blocks_of_two_kinds_are_compiled_in_the_order_in_which_they_run() -> None:
    pipe = PusaPipeline(**fvdm_tiny.components())
    asked = {"num_frames": 4, "num_inference_steps": 2, "output_type": "latent"}

    def call() -> Tensor:
        return pipe("", generator=torch.Generator().manual_seed(0), **asked).frames

    exact = call()
    assert compilation.compile_blocks(pipe, backend="eager") == len(pipe.transformer.blocks) == 4
    assert [block.is_temporal for block in pipe.transformer.blocks] == [False, True, False, True]
    assert torch.allclose(call(), exact, atol=1e-4)
    compilation.remove(pipe)
    assert torch.equal(call(), exact)


def test_plans_and_ranks_share_only_what_a_model_divides(studied: Studied) -> None:
    """Share guidance's passes anywhere, the tokens of a pass where diffusers knows how the transformer divides them."""
    model = studied.pipe.transformer
    parallel.check_tokens(model, Parallel(guidance=2))
    if studied.pipe.base.name == "Wan":
        parallel.check_tokens(model, Parallel(ulysses=3))
        with pytest.raises(ValueError, match="ulysses=4: 3 attention heads do not divide among so many ranks"):
            parallel.check_tokens(model, Parallel(ulysses=4))
    else:
        with pytest.raises(ValueError, match=r"gpus=2: 2 of them would share the tokens .* give --gpus 2"):
            parallel.check_tokens(model, Parallel(ulysses=2))
    shape = shapes_of(zoo.in_folder(studied.folder)).transformer
    assert shape.shares_tokens == bool(getattr(model, "_cp_plan", None))
    assert shape.stores_frames == (not frame_obstacle(studied.pipe))


def test_large_models_are_planned_for_the_cards_that_can_work_for_them() -> None:
    card = Card(memory_bytes=80 * 10**9, capability=(9, 0))
    machine = Machine(cards=(card,) * 4, ram_bytes=500 * 10**9, disk_bytes=10**12)
    mochi, wan = (plans(name, machine=machine)[0].parallel for name in ("pusa-v0.5", "wan2.1-14b"))
    assert (mochi.guidance, mochi.ulysses) == (2, 1)
    assert (wan.guidance, wan.ulysses) == (2, 2)
    refused = plans("pusa-v0.5", machine=machine, options=LoadOptions(gpus=4))[0].problem
    assert "pusa-v0.5 cannot be shared by 4 cards (only guidance's passes are)" in refused
    stored = plans("pusa-v0.5", machine=machine, still_frames=20)
    assert stored[0].peak_bytes == plans("pusa-v0.5", machine=machine)[0].peak_bytes
