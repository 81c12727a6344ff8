"""The step cache skips blocks where moving frames change little, and leaves a run resumable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa import PusaCondition, PusaPipeline, media
from pusa.acceleration import compilation, step_cache
from pusa.generate import generate
from pusa.request import GenerationRequest

SKIP_ALL = 1e9


@pytest.fixture
def pipe(tiny_pipeline: Any) -> PusaPipeline:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: PusaPipeline, **values: Any) -> Tensor:
    given: dict[str, Any] = {
        "prompt": "a duck",
        "height": 32,
        "width": 48,
        "num_frames": 17,
        "num_inference_steps": 10,
        "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    return pipe(**{**given, **values}).frames


def count_blocks(pipe: PusaPipeline, number: int) -> list[int]:
    """Count the runs of a block's attention, in a list of one number."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    pipe.transformer.blocks[number].attn1.register_forward_pre_hook(add)
    return count


def test_blocks_run_every_fourth_step_and_in_the_last_and_all_of_them_without_a_cache(pipe: PusaPipeline) -> None:
    full = call(pipe)
    first, second = count_blocks(pipe, 0), count_blocks(pipe, 1)
    step_cache.enable(pipe, threshold=SKIP_ALL)
    cached = call(pipe)
    assert (first[0], second[0]) == (2 * 10, 2 * 4)  # steps 0, 4, 8 and 9, with and without the prompt
    assert not torch.equal(cached, full)
    assert torch.equal(call(pipe), cached)  # nothing is left of the call before
    step_cache.enable(pipe, threshold=1e-9)
    assert torch.equal(call(pipe), full)
    step_cache.disable(pipe)
    second[0] = 0
    assert torch.equal(call(pipe), full)
    assert second[0] == 2 * 10
    with pytest.raises(ValueError, match="step_cache='tea' is none of none, first_block"):
        step_cache.enable(pipe, "tea")  # type: ignore[arg-type]


def test_kept_frames_do_not_count(pipe: PusaPipeline) -> None:
    """One of 16 frames moves, by much: the mean over all tokens would be small."""
    step_cache.enable(pipe, threshold=0.2)
    second = count_blocks(pipe, 1)
    model: Any = pipe.transformer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 16, 4, 4, generator=generator)
    text = torch.randn(1, 8, model.config.text_dim, generator=generator)

    def step(index: int, latents: Tensor, timestep: float) -> int:
        second[0] = 0
        timesteps = torch.zeros(1, 16)
        timesteps[:, -1] = timestep
        with torch.no_grad(), model.cache_context("cond", step_index=index, num_inference_steps=10):
            model(hidden_states=latents, timestep=timesteps, encoder_hidden_states=text, return_dict=False)
        return second[0]

    moved = x.clone()
    moved[:, :, -1] = torch.randn(x[:, :, -1].shape, generator=generator)
    assert step(0, x, 900) == 1
    assert step(1, x, 899.999) == 0  # hardly anything changes
    assert step(2, moved, 500) == 1  # the one frame that moves is another one


@pytest.mark.parametrize("experts", [1, 2])
def test_a_call_that_goes_on_after_a_fourth_step_ends_equal_to_the_bit(tiny_pipeline: Any, experts: int) -> None:
    pipe = tiny_pipeline(experts=experts)
    pipe.set_progress_bar_config(disable=True)
    step_cache.enable(pipe, threshold=SKIP_ALL)
    seen: dict[int, Tensor] = {}

    def keep(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        seen[step + 1] = tensors["latents"].clone()
        return {}

    conditions = [PusaCondition(latents=torch.randn(16, 1, 4, 6, generator=torch.Generator().manual_seed(1)))]
    whole = call(pipe, conditions=conditions, callback_on_step_end=keep)
    for steps_done in (4, 8, 9, 10):
        assert step_cache.is_resumable("first_block", steps_done, 10)
        again = call(pipe, conditions=conditions, latents=seen[steps_done], start_step=steps_done)
        assert torch.equal(again, whole)
    assert step_cache.is_resumable("first_block", 8)
    assert not any(step_cache.is_resumable("first_block", steps_done, 10) for steps_done in (5, 6, 7))
    assert not step_cache.is_resumable("first_block", 6)
    assert [step_cache.resumable_every("first_block", every) for every in (1, 4, 6)] == [4, 4, 8]
    assert step_cache.resumable_every("none", 3) == 3


def test_a_run_is_resumed_to_the_bit_and_the_next_request_has_no_cache(tmp_path: Path) -> None:
    small = {"model": "tiny", "prompt": "a cat", "width": 32, "height": 32, "frames": 5, "steps": 10, "seed": 0}
    request = GenerationRequest(**small, step_cache="first_block")
    checkpoint, done = tmp_path / "checkpoint", [0]

    def run(name: str, request: GenerationRequest, **options: Any) -> Any:
        for event in generate(request, tmp_path / name, **options):
            done[0] = event.step if event.kind == "step" else done[0]
        return media.read_video(tmp_path / name) if (tmp_path / name).exists() else None

    whole = run("whole.mp4", request)
    done[0] = 0
    assert run("stopped.mp4", request, stop=lambda: done[0] >= 6, checkpoint=checkpoint, checkpoint_every=1) is None
    assert checkpoint.exists()
    assert (run("resumed.mp4", request, checkpoint=checkpoint) == whole).all()
    plain = run("plain.mp4", GenerationRequest(**small))
    assert (plain != whole).any()


def test_compiled_blocks_give_the_same_under_a_cache_by_one_graph(pipe: PusaPipeline) -> None:
    graphs = []

    def run_as_is(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    step_cache.enable(pipe, threshold=SKIP_ALL)
    cached = call(pipe)
    with pytest.raises(ValueError, match="a step cache is enabled: compile the blocks before it"):
        compilation.compile_blocks(pipe, backend=run_as_is)
    step_cache.disable(pipe)
    full = call(pipe)
    compilation.compile_blocks(pipe, backend=run_as_is)
    for _ in range(2):  # as for two requests to a server
        step_cache.enable(pipe, threshold=SKIP_ALL)
        torch.testing.assert_close(call(pipe), cached)
        step_cache.disable(pipe)
        torch.testing.assert_close(call(pipe), full)
    assert len(graphs) == 1
    compilation.remove(pipe)
    pipe.transformer.compile_repeated_blocks(backend=run_as_is)
    with pytest.raises(ValueError, match="compiled with their hooks"):
        step_cache.enable(pipe)
