"""Frames that do not move leave most steps out: which, how far the video changes, and what is stored of them."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from pusa.conditions import PusaCondition
from pusa.models.frame_skipping import REFRESH_EVERY, FrameSchedule, FrameStore, StepFrames
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler, wave_sigmas

FRAMES, TOKENS = 5, 6  # latent frames, and tokens of each
CLIP = {"height": 32, "width": 48, "num_frames": 17, "max_sequence_length": 16, "num_inference_steps": 10}


def schedule(multipliers: Sequence[Any] = (), *, steps: int = 10, table: Tensor | None = None, every: int = 5) -> Any:
    scheduler = PusaFlowMatchEulerScheduler()
    given = {"frame_sigmas": table} if table is not None else {"num_inference_steps": steps}
    scheduler.set_timesteps(**given, noise_multipliers=torch.tensor(multipliers) if len(multipliers) else None)
    return FrameSchedule.of(scheduler.moves, every)


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_a_kept_frame_is_computed_at_the_first_every_fifth_and_the_last_step() -> None:
    found = schedule([0, 1, 1, 0.5])
    assert [k for k in range(10) if found.at(k).computed == (0, 1, 2, 3)] == [0, 5, 9]
    assert {found.at(k).computed for k in (1, 2, 3, 4, 6, 7, 8)} == {(1, 2, 3)}
    assert [k for k in range(11) if found.can_resume_at(k)] == [0, 5, 9, 10]


def test_nothing_is_left_out_where_all_frames_move_or_every_frame_is_wanted() -> None:
    assert schedule().at(3) is None
    assert schedule([0.2, 1, 1]).at(3) is None
    assert schedule([0, 1, 1], every=1).at(3) is None
    assert schedule([[0, 1, 1], [1, 0, 1]]).at(3) is None  # a frame moves if it does so in any sample
    assert schedule([[0, 1, 1], [0, 0, 1]]).at(3).computed == (1, 2)
    with pytest.raises(ValueError, match="refresh_every=0 is below 1"):
        schedule(every=0)


def test_a_wave_computes_its_active_window_and_what_has_just_finished() -> None:
    table = wave_sigmas(8, 4, delay=2)
    found = schedule(table=table, every=100)
    moves = table[1:] != table[:-1]
    for k in range(1, len(moves) - 1):
        active = moves[k].nonzero().flatten().tolist()
        finished = (moves[k - 1] & ~moves[k]).nonzero().flatten().tolist()
        assert found.at(k).computed == tuple(sorted((*finished, *active)))
        assert sorted((*found.at(k - 1).kept, *found.at(k).computed)) == list(range(8))
        assert len(found.at(k).computed) <= 3
    assert found.at(0).computed == found.at(len(moves) - 1).computed == tuple(range(8))


# ---- one forward pass ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_transformer: Callable[..., Any]) -> PusaWanTransformer3DModel:
    return PusaWanTransformer3DModel.from_wan(tiny_transformer())


def inputs(batch: int = 2, height: int = 4, width: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 16, FRAMES, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, 48, generator=generator),
        "timestep": torch.rand(batch, FRAMES, generator=generator) * 1000,
    }


@torch.no_grad()
def forward(model: Any, given: dict[str, Tensor], frames: FrameStore | None = None) -> Tensor:
    return model(**given, frames=frames, return_dict=False)[0]


@pytest.mark.parametrize("height", [4, 2])
@pytest.mark.parametrize("still", [(0,), (1, 3), (0, 1, 2, 3)])
def test_stored_frames_of_the_same_inputs_give_the_moving_ones_the_same_velocity(
    model: PusaWanTransformer3DModel, still: tuple[int, ...], height: int
) -> None:
    given = inputs(height=height, width=6 if height == 4 else 2)  # 6 tokens a frame, or one
    whole = forward(model, given)
    store = FrameStore()
    assert store.begin(StepFrames(tuple(range(FRAMES)), still), "transformer", 0, FRAMES)
    torch.testing.assert_close(forward(model, given, store), whole, rtol=0, atol=0 if height == 4 else 1e-6)
    moving = [frame for frame in range(FRAMES) if frame not in still]
    for step in (1, 2):
        assert store.begin(StepFrames(tuple(moving), still), "transformer", step, FRAMES)
        some = forward(model, given, store)
        torch.testing.assert_close(some[:, :, moving], whole[:, :, moving], rtol=0, atol=1e-5)
        assert not some[:, :, list(still)].any()


def test_frames_come_and_go_between_steps(model: PusaWanTransformer3DModel) -> None:
    given, store = inputs(), FrameStore()
    whole = forward(model, given)
    steps = [(0, 1, 2, 3, 4), (1, 2, 4), (0, 1, 4), (0, 2, 3), (3,), (0, 1, 2, 4)]
    for step, computed in enumerate(steps):
        kept = () if step + 1 == len(steps) else tuple(f for f in range(FRAMES) if f not in steps[step + 1])
        assert store.begin(StepFrames(computed, kept), "transformer", step, FRAMES)
        assert store.computed == computed
        some = forward(model, given, store)[:, :, list(computed)]
        torch.testing.assert_close(some, whole[:, :, list(computed)], rtol=0, atol=1e-5)
        assert store.num_bytes == 2 * len(kept) * model.config.num_layers * 2 * TOKENS * 96 * 4  # keys and values
    assert not store.num_bytes


@pytest.mark.parametrize("other", [("transformer", 2), ("transformer_2", 1)])
def test_a_store_that_is_not_of_the_step_before_computes_every_frame(
    model: PusaWanTransformer3DModel, other: tuple[str, int]
) -> None:
    given, store = inputs(), FrameStore()
    store.begin(StepFrames((0, 1, 2, 3, 4), (0,)), "transformer", 0, FRAMES)
    forward(model, given, store)
    store.begin(StepFrames((1, 2, 3, 4), (0,)), *other, FRAMES)
    assert store.computed == (0, 1, 2, 3, 4)
    assert torch.equal(forward(model, given, store), forward(model, given))


def test_a_step_of_all_frames_that_stores_none_needs_no_store() -> None:
    assert not FrameStore().begin(StepFrames((0, 1), ()), "transformer", 0, 2)


def test_models_that_cannot_leave_frames_out_say_why(tiny_transformer: Callable[..., Any]) -> None:
    model = PusaWanTransformer3DModel.from_wan(tiny_transformer())
    assert model.frame_obstacle == ""
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert model.frame_obstacle == "a step cache is enabled"
    model.disable_cache()
    model.set_attention_backend("native")
    assert model.frame_obstacle == ""
    model.blocks[0].attn1.set_processor(WanAttnProcessor())
    store = FrameStore()
    store.begin(StepFrames((0, 1, 2, 3, 4), (0,)), "transformer", 0, FRAMES)
    with pytest.raises(ValueError, match="every latent frame of this model must be computed: self-attention is of Wan"):
        forward(model, inputs(), store)


# ---- whole calls -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: Callable[..., PusaPipeline]) -> PusaPipeline:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kept(*indices: int) -> list[PusaCondition]:
    latents = torch.randn(16, len(indices), 4, 6, generator=torch.Generator().manual_seed(1))
    return [PusaCondition(latents=latents, latent_index=list(indices))]


def call(pipe: PusaPipeline, prompt: Any = "a cat", **changes: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, **{"generator": generator, "output_type": "latent", **CLIP, **changes}).frames


@pytest.fixture
def rows(pipe: PusaPipeline) -> Iterator[list[int]]:
    """List the latent frames that enter the last block's feed-forward, by forward pass."""
    found: list[int] = []
    hook = pipe.transformer.blocks[-1].ffn.register_forward_pre_hook(
        lambda module, args: found.append(args[0].shape[1] // TOKENS)
    )
    yield found
    hook.remove()


def relative_error(some: Tensor, whole: Tensor) -> float:
    return float((some - whole).abs().max() / (whole.max() - whole.min()))


TASKS = {"image": (0,), "extension": (0, 1, 2), "completion": (0, 2, 4)}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_frames_that_are_left_out_change_the_video_little(
    pipe: PusaPipeline, rows: list[int], task: str, guidance: float
) -> None:
    asked = {"conditions": kept(*TASKS[task]), "guidance_scale": guidance}
    whole = call(pipe, **asked)
    assert set(rows) == {FRAMES}
    rows.clear()
    some = call(pipe, refresh_every=REFRESH_EVERY, **asked)
    moving = FRAMES - len(TASKS[task])
    by_step = [FRAMES, moving, moving, moving, moving, FRAMES, moving, moving, moving, FRAMES]
    assert rows == [count for count in by_step for _ in range(2 if guidance > 1 else 1)]
    assert torch.equal(some[:, :, list(TASKS[task])], whole[:, :, list(TASKS[task])])
    assert 0 < relative_error(some, whole) < 0.01
    assert torch.equal(call(pipe, refresh_every=1, **asked), whole)
    assert pipe.passes.stores.num_bytes == 0


def test_a_wave_computes_the_active_window_only(pipe: PusaPipeline, rows: list[int]) -> None:
    table = wave_sigmas(FRAMES, 4, delay=2)
    asked = {"frame_sigmas": table, "num_inference_steps": None, "guidance_scale": 1.0}
    whole = call(pipe, **asked)
    rows.clear()
    some = call(pipe, refresh_every=len(table), **asked)
    assert rows[0] == rows[-1] == FRAMES
    assert rows[1:-1] == [1, 2, 2, 3, 2, 3, 2, 3, 2, 2]  # of 5: those that move, and one that has just finished
    assert relative_error(some, whole) < 0.01


def test_prompts_of_a_batch_may_keep_different_frames(pipe: PusaPipeline, rows: list[int]) -> None:
    lists = [kept(0, 1), kept(1, 2)]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    asked: dict[str, Any] = {"conditions": lists, "generator": generators}
    some = call(pipe, ["a cat", "a dog"], refresh_every=5, **asked)
    assert set(rows) == {FRAMES, FRAMES - 1}  # frame 1 stays in both
    for generator, seed in zip(generators, (0, 1), strict=True):
        generator.manual_seed(seed)
    whole = call(pipe, ["a cat", "a dog"], **asked)
    assert 0 < relative_error(some, whole) < 0.01


@pytest.mark.parametrize("reached", [5, 9])
def test_a_run_resumes_to_the_bit_where_every_frame_is_computed(pipe: PusaPipeline, reached: int) -> None:
    seen: dict[int, Tensor] = {}

    def remember(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if pipe.frame_schedule.can_resume_at(step + 1):
            seen[step + 1] = tensors["latents"]
        return {}

    asked = {"conditions": kept(0, 3), "refresh_every": 5}
    whole = call(pipe, callback_on_step_end=remember, **asked)
    assert list(seen) == [5, 9, 10]
    assert torch.equal(call(pipe, latents=seen[reached], start_step=reached, **asked), whole)


def test_a_second_order_solver_works_too(tiny_pipeline: Callable[..., PusaPipeline]) -> None:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PusaFlowMatchEulerScheduler(solver_order=2)
    wave = {"frame_sigmas": wave_sigmas(FRAMES, 4, delay=2), "num_inference_steps": None}
    for asked in ({"conditions": kept(0, 1)}, wave):
        assert 0 < relative_error(call(pipe, refresh_every=5, **asked), call(pipe, **asked)) < 0.01


def test_each_expert_begins_with_every_frame(tiny_pipeline: Callable[..., PusaPipeline]) -> None:
    pipe = tiny_pipeline(experts=2)
    pipe.set_progress_bar_config(disable=True)
    asked = {"conditions": kept(0, 1)}
    whole, some = call(pipe, **asked), call(pipe, refresh_every=5, **asked)
    assert 0 < relative_error(some, whole) < 0.01


def test_with_a_step_cache_every_frame_is_computed(pipe: PusaPipeline, rows: list[int]) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    try:
        call(pipe, conditions=kept(0, 1), refresh_every=5)
    finally:
        pipe.transformer.disable_cache()
    assert set(rows) == {FRAMES}


def test_the_memory_is_freed_when_a_call_fails(pipe: PusaPipeline) -> None:
    held: list[int] = []

    def fail(_: Any, step: int, __: Any, ___: Any) -> dict[str, Any]:
        held.append(pipe.passes.stores.num_bytes)
        if step == 2:
            raise RuntimeError("no more")
        return {}

    with pytest.raises(RuntimeError, match="no more") as error:
        call(pipe, conditions=kept(0, 1), refresh_every=5, callback_on_step_end=fail)
    assert held == [2 * 2 * 2 * 2 * TOKENS * 96 * 4] * 3  # passes, keys and values, frames, blocks
    assert pipe.passes.stores.num_bytes == 0
    gc.collect()
    big = [x for x in gc.get_objects() if type(x) is Tensor and x.shape == (1, 2 * TOKENS, 3, 32)]
    assert error.value is not None
    assert not big
