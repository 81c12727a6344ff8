"""Every rank makes the same call of a pipeline and gets the video of rank 0, whatever noise it drew itself.

On two CPU processes with gloo. All cases run in one start of them.
"""

from functools import cache
from typing import Any

import pytest
import torch
from components import make_text_encoder, make_tokenizer, make_transformer, make_vae
from gloo import run_in_processes
from torch import Tensor

from pusa.acceleration import step_cache
from pusa.acceleration.decisions import Parallel
from pusa.acceleration.parallel import check_heads, choose, disable, enable
from pusa.conditions import PusaCondition
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler, wave_sigmas

WORLD = 2
WAYS = {
    "guidance": Parallel(guidance=2),
    "ulysses": Parallel(ulysses=2),
    "weights divided": Parallel(guidance=2, shard=True),
}


def make_pipe(experts: int = 1) -> PusaPipeline:
    parts: dict[str, Any] = {"transformer": make_transformer()}
    if experts == 2:
        parts |= {"transformer_2": make_transformer(seed=1), "boundary_ratio": 0.875}
    pipe = PusaPipeline(make_tokenizer(), make_text_encoder(), make_vae(), PusaFlowMatchEulerScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: PusaPipeline, seed: int = 0, **more: Any) -> Tensor:
    options: dict[str, Any] = {
        "prompt": "a cat",
        "height": 32,
        "width": 48,
        "num_frames": 17,
        "num_inference_steps": 3,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipe(**{**options, **more}).frames


CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "condition": {"conditions": [PusaCondition(latents=torch.ones(16, 2, 4, 6), latent_index=1, noise_multiplier=0.3)]},
    "wave": {"num_inference_steps": None, "frame_sigmas": wave_sigmas(5, 3, delay=1)},
    "adapter scale": {"attention_kwargs": {"scale": 0.5}},
    "guidance in the second step alone": {"num_inference_steps": 4, "guidance_start": 0.25, "guidance_stop": 0.5},
}
LEFT_OUT: dict[str, Any] = {  # ranks that share the tokens compute every frame
    "conditions": [PusaCondition(latents=torch.ones(16, 2, 4, 6), latent_index=[0, 3])],
    "num_inference_steps": 7,
    "refresh_every": 5,
}
ALL_CASES = {**CASES, "frames left out": LEFT_OUT}


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@cache
def alone(experts: int, case: str) -> Tensor:
    return call(make_pipe(experts), **ALL_CASES[case])


def compare(parallel: Parallel, experts: int, rank: int) -> dict[str, float]:
    pipe = make_pipe(experts)
    enable(pipe, parallel)
    cases = list(CASES) if experts == 1 else ["text"]
    if parallel.ulysses == 1:
        cases.append("frames left out")
    return {name: worst(call(pipe, seed=rank, **ALL_CASES[name]), alone(experts, name)) for name in cases}


def cached(rank: int) -> float:
    """Share the passes of guidance, each of which has a step cache of its own."""
    alone, pipe = make_pipe(), make_pipe()
    for one in (alone, pipe):
        step_cache.enable(one, threshold=1e9)
    enable(pipe, WAYS["guidance"])
    options = {"num_inference_steps": 6, "guidance_stop": 0.5}
    return worst(call(pipe, seed=rank, **options), call(alone, **options))


def steps_until_stopped(rank: int) -> list[int]:
    """Steps that this rank has seen when rank 0 interrupts the call after the second."""
    pipe, steps = make_pipe(), []
    enable(pipe, WAYS["guidance"])

    def callback(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = rank == 0 and step == 1
        return tensors

    call(pipe, num_inference_steps=5, callback_on_step_end=callback)
    call(pipe)  # the ranks are in order
    return steps


def refusals() -> dict[str, str]:
    pipe, found = make_pipe(), {}
    for name, parallel in {"ranks": Parallel(ulysses=4), "ring": Parallel(ring=2)}.items():
        with pytest.raises(ValueError) as refused:
            enable(pipe, parallel)
        found[name] = str(refused.value)
    enable(pipe, WAYS["weights divided"])
    with pytest.raises(ValueError) as refused:
        disable(pipe)
    return found | {"weights": str(refused.value)}


def in_each_process(rank: int) -> dict[str, Any]:
    return {
        **{f"{name}, {n}": compare(parallel, n, rank) for name, parallel in WAYS.items() for n in (1, 2)},
        "step cache": {"guidance for half of the steps": cached(rank)},
        "stopped": steps_until_stopped(rank),
        "refusals": refusals(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run the processes once for all tests and return the findings of each."""
    return run_in_processes(in_each_process, WORLD, tmp_path_factory.mktemp("processes"))


@pytest.mark.slow
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(("way", "most"), [("guidance", 0.0), ("weights divided", 0.0), ("ulysses", 1e-5)])
def test_every_rank_gets_the_video_of_one_process(
    found: list[dict[str, Any]], way: str, most: float, experts: int
) -> None:
    for each in found:
        assert max(each[f"{way}, {experts}"].values()) <= most, each


@pytest.mark.slow
def test_each_pass_has_a_step_cache_of_its_own(found: list[dict[str, Any]]) -> None:
    assert [each["step cache"]["guidance for half of the steps"] for each in found] == [0.0, 0.0]


@pytest.mark.slow
def test_rank_0_stops_all_between_the_same_two_steps(found: list[dict[str, Any]]) -> None:
    assert [each["stopped"] for each in found] == [[0, 1], [0, 1]]


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["refusals"] == {
            "ranks": "guidance=1 x ulysses=4 x ring=1 needs 4 ranks, and there are 2: start as many, or choose(ranks, "
            "...)",
            "ring": "ring=2 needs GPUs: attention on the CPU does not return its log-sum-exp",
            "weights": "the weights of this pipeline are divided among ranks: load it again",
        }


@pytest.mark.parametrize(
    ("ranks", "guided", "expected"),
    [(1, True, (1, 1)), (2, True, (2, 1)), (2, False, (1, 2)), (3, True, (1, 3)), (4, True, (2, 2)), (8, True, (2, 4))],
)
def test_the_passes_of_guidance_are_divided_first(ranks: int, guided: bool, expected: tuple[int, int]) -> None:
    chosen = choose(ranks, guided=guided, heads=40)
    assert (chosen.guidance, chosen.ulysses) == expected
    assert chosen.ranks == ranks


@pytest.mark.parametrize(("heads", "ranks"), [(40, 8), (40, 3), (12, 4), (12, 1), (3, 2)])
def test_heads_that_pad_to_less_than_a_share_are_divided(heads: int, ranks: int) -> None:
    check_heads(heads, ranks)


def test_heads_that_do_not_divide_are_refused_with_the_numbers_that_do() -> None:
    with pytest.raises(ValueError, match=r"^ulysses=8: 12 attention heads do not divide .*: 1, 2, 3, 4, 6 do$"):
        check_heads(12, 8)
    with pytest.raises(ValueError, match=r"^ulysses=4: 3 attention heads do not divide .*: 1, 2, 3 do$"):
        check_heads(3, 4)


def test_sharing_needs_a_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group on each of them first"):
        enable(make_pipe(), Parallel(guidance=2))
