"""Compiled blocks make the same video, with one graph for all tasks, steps, guidance and alphas, and no break in it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import comfyui, make_pairs, write
from meta_accelerator import Waits
from plan_samples import make_plan
from torch import Tensor
from torch._dynamo.utils import counters

from pusa import PusaCondition
from pusa.acceleration import attention, compilation, offload
from pusa.acceleration.decisions import LoadOptions, Parallel, PartPlan
from pusa.acceleration.placement import apply, remove
from pusa.acceleration.planning import with_kernels
from pusa.models.vae import decode_chunks

Make = Callable[..., Any]


class Graphs:
    """Count the graphs that are made, and run them as they are."""

    count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    counters.clear()
    yield Graphs()
    assert not counters["graph_break"]
    torch._dynamo.reset()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def frames(pipe: Any, height: int = 32, width: int = 48, num_frames: int = 9, **options: Any) -> Tensor:
    texts = {"prompt_embeds": noise(1, 16, 48), "negative_prompt_embeds": noise(1, 16, 48)}
    size = {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**texts, **size, "generator": generator, "output_type": "latent", **options}).frames


def kept(indices: list[int], noise_multiplier: float = 0.0) -> dict[str, Any]:
    latents = noise(16, len(indices), 4, 6)
    return {"conditions": [PusaCondition(latents=latents, latent_index=indices, noise_multiplier=noise_multiplier)]}


CALLS: list[dict[str, Any]] = [
    {},  # text to video
    kept([0]),
    kept([0, 2], 0.3),
    kept([0, 1]),  # extension
    {"num_inference_steps": 5},
    {"guidance_scale": 1.0},
    {"height": 48, "width": 32},
]


def test_one_graph_serves_all_tasks_and_a_new_size_makes_at_most_one_more(tiny_pipeline: Make, graphs: Graphs) -> None:
    pipe = tiny_pipeline()
    plain = [frames(pipe, **call) for call in CALLS]
    assert compilation.compile_blocks(pipe, backend=graphs) == len(pipe.transformer.blocks)
    for call, expected in zip(CALLS, plain, strict=True):
        assert torch.equal(frames(pipe, **call), expected)
    assert graphs.count == 1
    for height, width in ((32, 64), (64, 64)):
        before = graphs.count
        frames(pipe, height, width)
        assert graphs.count <= before + 1
    compilation.remove(pipe)
    assert not compilation.is_compiled(pipe)
    count = graphs.count
    frames(pipe, num_frames=17)
    assert graphs.count == count


def test_steps_that_leave_out_still_frames_have_a_graph_to_store_them_and_one_to_use_them(
    tiny_pipeline: Make, graphs: Graphs
) -> None:
    pipe = tiny_pipeline()
    calls: list[dict[str, Any]] = [{**kept([0]), "refresh_every": 5, "num_inference_steps": n} for n in (6, 8)]
    plain = [frames(pipe, **call) for call in calls]
    compilation.compile_blocks(pipe, backend=graphs)
    frames(pipe)
    for call, expected in zip(calls, plain, strict=True):
        assert torch.equal(frames(pipe, **call), expected)
    assert graphs.count == 3


@pytest.mark.parametrize(("merged", "most"), [(True, 1), (False, 2)])
def test_alphas_need_no_graphs_of_their_own(
    tiny_pipeline: Make, graphs: Graphs, tmp_path: Path, merged: bool, most: int
) -> None:
    pipe = tiny_pipeline()
    pipe.load_pusa(write(tmp_path / "lora.safetensors", comfyui(make_pairs(pipe.transformer))), alpha=1.4)
    alphas = (1.4, 1.0, 0.3, 1.4)
    plain = []
    if merged:
        pipe.merge_lora()
    for alpha in alphas:
        pipe.set_alpha(alpha)
        plain.append(frames(pipe))
    compilation.compile_blocks(pipe, backend=graphs)
    for alpha, expected in zip(alphas, plain, strict=True):
        pipe.set_alpha(alpha)
        torch.testing.assert_close(frames(pipe), expected, rtol=0, atol=1e-5)
    assert graphs.count <= most


def test_the_compiled_loop_never_waits_for_its_device(
    tiny_pipeline: Make, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline().to("meta")
    compilation.compile_blocks(pipe, backend=graphs)
    waits = Waits(pipe, 4, monkeypatch)
    assert frames(pipe, **kept([0])).is_meta
    assert (waits.steps, waits.in_loop, graphs.count) == (4, 0, 1)


@pytest.mark.parametrize("kind", ["blocks", "model"])
def test_hooks_that_move_weights_stay_outside_of_what_is_compiled(
    tiny_pipeline: Make, graphs: Graphs, kind: Any
) -> None:
    pipe = tiny_pipeline()
    before = frames(pipe)
    compilation.compile_blocks(pipe, backend=graphs)
    if kind == "blocks":
        offload.stream(pipe.transformer, "blocks", torch.device("cpu"))
    else:
        offload.take_turns([(pipe.transformer, torch.device("cpu"))])
    assert torch.equal(frames(pipe), before)
    assert graphs.count == 1
    compilation.remove(pipe)  # under the hooks
    frames(pipe, height=48, width=64)
    assert graphs.count == 1


def test_the_decoder_has_one_graph_for_all_latent_frames_but_the_first_two(tiny_pipeline: Make, graphs: Graphs) -> None:
    vae, z = tiny_pipeline().vae, noise(1, 16, 6, 4, 6)
    plain = torch.cat(list(decode_chunks(vae, z)), dim=2)
    compilation.compile_decoder(vae, backend=graphs)
    for pieces in (z, z.split(3, dim=2)):
        assert torch.equal(torch.cat(list(decode_chunks(vae, pieces)), dim=2), plain)
    assert graphs.count == 1


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_compiles_where_it_can_and_says_why_it_cannot() -> None:
    always, on_cards = LoadOptions(compile="always"), LoadOptions(compile="auto")
    plan = with_kernels(make_plan(), on_cards, (8, 9), has_loras=True)
    assert plan.compile
    assert plan.compile_decoder
    assert plan.merge
    assert any(note.startswith("compiled: the first step") for note in plan.notes)
    assert plan.summary.endswith("merged, compiled")
    assert not with_kernels(make_plan(), on_cards, None, has_loras=True).compile
    assert not with_kernels(make_plan(), LoadOptions(), (9, 0), has_loras=True).compile
    shared = replace(make_plan(), parallel=Parallel(ulysses=2))
    for obstructed, reason in (
        (make_plan("leaves"), "its layers are streamed one by one"),
        (make_plan(storage="fp8"), "its weights are fp8"),
        (shared, "cards share"),
    ):
        plan = with_kernels(obstructed, always, (8, 9), has_loras=False)
        assert not plan.compile
        assert any(note.startswith(f"not compiled, as {reason}") for note in plan.notes)


def test_a_plan_is_carried_out_and_undone(tiny_pipeline: Make) -> None:
    pipe = tiny_pipeline()
    before = frames(pipe)
    vae = PartPlan("float32", "float32", "cpu", tiles=True)
    apply(pipe, replace(make_plan("blocks", vae=vae), compile=True, attention="native_math"), device="cpu")
    assert compilation.is_compiled(pipe)
    assert attention.current(pipe.transformer) == "_native_math"
    remove(pipe)
    assert attention.current(pipe.transformer) is None
    assert not compilation.is_compiled(pipe)
    assert torch.equal(frames(pipe), before)


def test_a_machine_without_a_compiler_says_so() -> None:
    assert "there is no C++ compiler" in compilation.missing_tool("cpu", lambda name: None)
