"""Check that a transformer of any base stays what it was in diffusers' hands: turned into ours, and with its caches."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from torch import Tensor, nn

CACHE_STEPS = 8


def step_caches(blocks: str) -> dict[str, Any]:
    """Make diffusers' caches between steps, for a model whose list of blocks has this name; all of them skip work."""
    mag_ratios = [1.0] * CACHE_STEPS
    return {
        "first block": FirstBlockCacheConfig(threshold=10.0),
        "MagCache": MagCacheConfig(
            threshold=10.0, num_inference_steps=CACHE_STEPS, mag_ratios=mag_ratios, retention_ratio=0.25
        ),
        "PAB": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_block_identifiers=[blocks],
            current_timestep_callback=lambda: 500,
        ),
        "TaylorSeer": TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=2, cache_identifiers=[rf"{blocks}\.\d+\.attn1"]
        ),
    }


def assert_cache_skips_work(
    model: Any, cache: Any, timestep: Tensor, velocity: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """Take steps with a cache: the first is exact, some attentions are left out, and without it all is as before."""
    attentions: list[None] = []  # the work that is left
    for block in model.blocks:
        block.attn1.to_q.register_forward_hook(lambda *_: attentions.append(None))
    expected = velocity(model, timestep)
    attentions.clear()

    model.enable_cache(cache)
    sigmas = torch.linspace(1, 0, CACHE_STEPS + 1)[:-1]
    for k, sigma in enumerate(sigmas.tolist()):
        with model.cache_context("cond", step_index=k, sigma=sigma, num_inference_steps=CACHE_STEPS):
            output = velocity(model, timestep * sigma)
        if k == 0:
            assert torch.equal(output, expected)
        assert output.isfinite().all()
    assert len(model.blocks) <= len(attentions) < len(sigmas) * len(model.blocks)

    model.disable_cache()
    assert torch.equal(velocity(model, timestep), expected)


def assert_promoted_in_place(stock: Any, promote: Callable[[Any], Any], kind: type, block_kind: type) -> None:
    """Turn a stock model into one of `kind`: the same object and the same memory, once and for all."""
    storage = {name: parameter.data_ptr() for name, parameter in stock.named_parameters()}
    keys = list(stock.state_dict())
    model = promote(stock)
    assert model is stock
    assert isinstance(stock, kind)
    assert all(type(block) is block_kind for block in model.blocks)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == storage
    assert list(model.state_dict()) == keys
    assert promote(model) is model
