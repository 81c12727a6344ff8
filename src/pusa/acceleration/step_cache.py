"""Skip most blocks of a step at which little changes: diffusers' first-block cache, decided by the frames that move.

The first block always runs. Where its output has changed by less than a threshold since the last step that was
computed, the other blocks add what they added then. diffusers averages that change over all tokens: kept frames do not
change, so that with many of them every step would look alike. Here only frames count whose timestep has changed since.

A step that is computed in full leaves no trace of those before it. Every `PERIOD`-th one is, and the last, so that a
run can go on from there and make the same video to the bit.
"""

from typing import Any, Literal, get_args

import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK, FBCHeadBlockHook, FBCSharedBlockState
from torch import Tensor, nn

from pusa.acceleration.blocks import blocks_of
from pusa.lora.sources import transformers_of
from pusa.models.bases import base_of

StepCache = Literal["none", "first_block"]

PERIOD = 4
"""Steps 0, 4, 8, ... are computed in full."""

THRESHOLD = 0.1
"""Relative change of the first block's output below which a step is not computed; measured in docs/speed.md."""


class Config(FirstBlockCacheConfig):
    """Configure a first-block cache that counts moving frames only; `enable` sets it."""


class _Head(FBCHeadBlockHook):
    """Decide, after the first block, if the others run."""

    def __init__(self, hook: FBCHeadBlockHook) -> None:
        super().__init__(hook.state_manager, hook.threshold)
        self.timesteps: Tensor | None = None  # [B, F], of the forward pass that runs

    @torch.compiler.disable
    def _should_compute_remaining_blocks(self, hidden_states_residual: Tensor) -> bool:
        state: Any = self.state_manager.get_state()
        context = self.state_manager.context
        index, steps = context.step_index, context.num_inference_steps
        is_next = index is not None and getattr(state, "index", None) == index - 1
        is_computed = (
            not is_next or _is_full(index, steps) or self._change(state, hidden_states_residual) > self.threshold
        )
        state.index = index
        if is_computed:
            state.timesteps = self.timesteps
        return is_computed

    def _change(self, state: FBCSharedBlockState, residual: Tensor) -> float:
        """Compute the relative change of the first block's output over moving frames; infinity where none moves."""
        before, held, now = state.head_block_residual, getattr(state, "timesteps", None), self.timesteps
        if held is None or now is None or before.shape != residual.shape or held.shape != now.shape:
            return torch.inf
        frames = (now.shape[1], -1) if now.ndim == 2 else (1, -1)
        moves = (now != held).float().view(now.shape[0], -1)  # [B, F]
        change, size = (
            (values.abs().unflatten(1, frames).mean((2, 3), dtype=torch.float32) * moves).sum()
            for values in (residual - before, before)
        )
        ratio = float(change / size)  # waits for the device, once a pass
        return ratio if ratio == ratio else torch.inf  # 0 / 0: nothing moves


def enable(pipe: Any, kind: StepCache = "first_block", *, threshold: float = THRESHOLD) -> None:
    """Skip blocks from the next call on; ``"none"`` undoes it. State of earlier calls is dropped.

    A pass keeps three tensors of the size of its tokens, ``[B, S, D]``. Where ranks share the tokens of a pass,
    `pusa.acceleration.parallel.enable` refuses a cache: each would decide for itself.

    Args:
        pipe: a `PusaPipeline`, whose weights are where they stay.
        threshold: relative change, above 0; larger skips more.

    Raises:
        ValueError: an unknown kind, a model that can have none, another cache of diffusers is enabled, or blocks that
            were compiled together with their hooks; `pusa.acceleration.compilation` compiles inside them.
    """
    if kind not in get_args(StepCache):
        raise ValueError(f"step_cache={kind!r} is none of {', '.join(get_args(StepCache))}")
    disable(pipe)
    if kind == "none":
        return
    for model in transformers_of(pipe):
        if obstacle := base_of(model).step_cache_obstacle:
            raise ValueError(f"step_cache={kind}: this model computes all blocks of every step, as {obstacle}")
        blocks = list(blocks_of(model).values())
        if any(block._compiled_call_impl is not None for block in blocks):
            raise ValueError(
                "a step cache decides between two blocks, and the blocks are compiled with their hooks: compile them "
                "with pusa.acceleration.compilation.compile_blocks, or leave the cache out"
            )
        model.enable_cache(Config(threshold=threshold))
        first = HookRegistry.check_if_exists_or_initialize(blocks[0])
        head = _Head(first.get_hook(_FBC_LEADER_BLOCK_HOOK))
        first.remove_hook(_FBC_LEADER_BLOCK_HOOK, recurse=False)
        first.register_hook(head, _FBC_LEADER_BLOCK_HOOK)
        HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
        model.step_cache_handle = model.register_forward_pre_hook(_note_timesteps(head), with_kwargs=True)


def disable(pipe: Any) -> None:
    """Compute every block of every step again; a cache that the caller has enabled through diffusers stays."""
    for model in transformers_of(pipe):
        if isinstance(getattr(model, "_cache_config", None), Config):
            model.disable_cache()
            model.step_cache_handle.remove()


def is_resumable(kind: StepCache, steps_done: int, steps: int | None = None) -> bool:
    """Tell if a run with a cache can go on after so many steps and make the same video to the bit.

    Args:
        steps: of the run, if they are known: its last step is computed in full, and after it none is left.
    """
    return kind == "none" or _is_full(steps_done, steps)


def _is_full(index: int, steps: int | None) -> bool:
    """Tell if a step is computed in full whatever changes: every `PERIOD`-th, and the last; True after that, too."""
    return index % PERIOD == 0 or (steps is not None and index + 1 >= steps)


def resumable_every(kind: StepCache, every: int) -> int:
    """Round a number of steps between two checkpoints up, so that all are where a run can go on."""
    return every if kind == "none" else -(-every // PERIOD) * PERIOD


def _note_timesteps(head: _Head) -> Any:
    def note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        head.timesteps = kwargs["timestep"] if "timestep" in kwargs else args[1]

    return note
