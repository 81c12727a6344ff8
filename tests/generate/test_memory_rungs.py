"""Where memory runs out, the next smaller plan takes over from the last step, and the video is the same."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d
from lora_samples import comfyui, make_pairs, write
from media_samples import psnr
from memory_faults import run_out_of_memory
from PIL import Image
from plan_samples import make_plan
from transformers import UMT5EncoderModel

import pusa.acceleration
from pusa import PusaWanTransformer3DModel, media, zoo
from pusa.acceleration.decisions import Card, LoadOptions, Machine, PartPlan, Plan
from pusa.events import Event
from pusa.generate import decode, generate, load_latents, load_pipeline
from pusa.generate.residents import choose_plans, plan_as_loaded
from pusa.models import tiny
from pusa.models.vae import DecodeMemoryError
from pusa.request import GenerationRequest

STEPS = 3
SMALL: dict[str, Any] = {"model": "tiny", "prompt": "a cat", "width": 32, "height": 32, "frames": 5, "seed": 0}
EXACT = (make_plan("none"), make_plan("model"), make_plan("blocks"))


def run(
    output: Path, plans: Sequence[Plan] | None = EXACT, load: LoadOptions | None = None, **asked: Any
) -> list[Event]:
    request = GenerationRequest(**{**SMALL, "steps": STEPS, **asked})
    return list(generate(request, output, plans=plans, load=load, device="cpu"))


def frames_of(path: Path) -> np.ndarray:
    return media.read_video(path)


def summaries(events: list[Event]) -> list[str]:
    return [event.summary for event in events if event.kind == "planned"]


def messages(events: list[Event]) -> list[str]:
    return [event.message for event in events if event.kind == "note"]


@pytest.fixture(autouse=True)
def _no_model_is_loaded() -> None:
    load_pipeline("tiny")  # lets the model of `run`, and the plans that failed for it, go


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    return {"kind": "image", "file": str(file), "positions": [0], "noise": [0.2]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., np.ndarray]:
    """``whole(**asked)``: frames of an undisturbed run, which is made once; no model is loaded afterwards."""
    made: dict[str, np.ndarray] = {}

    def make(**asked: Any) -> np.ndarray:
        if (key := str(asked)) not in made:
            output = tmp_path_factory.mktemp("whole") / "whole.mp4"
            run(output, **asked)
            made[key] = frames_of(output)
            load_pipeline("tiny")
        return made[key]

    return make


# ---- the same video ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "call", "where"),
    [
        (AutoencoderKLWan, "to", 1, "out of memory while the model was loaded"),
        (UMT5EncoderModel, "forward", 1, "out of memory in step 1 of 3"),
        (AutoencoderKLWan, "encode", 1, "out of memory in step 1 of 3"),
        # two forwards a step, for guidance
        *((PusaWanTransformer3DModel, "forward", n, f"out of memory in step {(n + 1) // 2} of 3") for n in range(1, 7)),
        (WanDecoder3d, "forward", 1, "out of memory in decoding"),
        (WanDecoder3d, "forward", 2, "out of memory in decoding"),
    ],
)
def test_wherever_memory_runs_out_the_video_is_the_same(
    tmp_path: Path,
    picture: dict[str, Any],
    whole: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    call: int,
    where: str,
) -> None:
    expected = whole(conditions=[picture])
    calls = run_out_of_memory(monkeypatch, owner, name, call=call)
    forwards = run_out_of_memory(monkeypatch, PusaWanTransformer3DModel, "forward", call=0)
    events = run(tmp_path / "out.mp4", conditions=[picture])
    assert np.array_equal(frames_of(tmp_path / "out.mp4"), expected)
    assert [e.step for e in events if e.kind == "step" and e.stage == "denoise"] == [1, 2, 3]
    assert [text for text in messages(events) if "memory" in text] == [f"{where}: a smaller plan takes over"]
    one, two = EXACT[0].summary, EXACT[1].summary
    assert summaries(events) == ([two] if name == "to" else [one, two])
    repeated = (2 - call % 2) if owner is PusaWanTransformer3DModel else 0  # of one step, not of those before it
    assert len(forwards) == 2 * STEPS + repeated
    assert len(calls) >= call
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4"]


@pytest.mark.parametrize(
    ("owner", "call"),
    [
        (PusaWanTransformer3DModel, 2 * STEPS + 1),  # the first step of the second window
        (PusaWanTransformer3DModel, 2 * STEPS + 4),
        (WanDecoder3d, 2),
        (WanDecoder3d, 6),  # of the second window, which continues what the decoder kept of the first
    ],
)
def test_later_windows_too(
    tmp_path: Path, whole: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch, owner: type, call: int
) -> None:
    long = {"frames": 33, "window": 17, "overlap": 5}
    expected = whole(**long)
    run_out_of_memory(monkeypatch, owner, "forward", call=call)
    events = run(tmp_path / "out.mp4", **long)
    assert np.array_equal(frames_of(tmp_path / "out.mp4"), expected)
    assert summaries(events) == [EXACT[0].summary, EXACT[1].summary]
    steps = [e.step for e in events if e.kind == "step" and e.stage == "denoise"]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(("call", "again"), [(2, 2), (5, 5), (6, 1), (7, 1)])
def test_where_frames_are_left_out_a_run_goes_on_from_a_step_that_computes_all(
    tmp_path: Path,
    picture: dict[str, Any],
    whole: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    again: int,
) -> None:
    asked = {"conditions": [{**picture, "noise": [0.0]}], "steps": 7, "guidance": 1.0, "frames": 9}
    expected = whole(**asked)
    assert not np.array_equal(whole(exact=True, **asked), expected)
    forwards = run_out_of_memory(monkeypatch, PusaWanTransformer3DModel, "forward", call=call)
    events = run(tmp_path / "out.mp4", **asked)
    assert np.array_equal(frames_of(tmp_path / "out.mp4"), expected)
    assert [e.step for e in events if e.kind == "step" and e.stage == "denoise"] == [1, 2, 3, 4, 5, 6, 7]
    assert len(forwards) == 7 + again


def test_several_plans_may_be_too_large(
    tmp_path: Path, whole: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole()
    run_out_of_memory(monkeypatch, PusaWanTransformer3DModel, "forward", call=3, last=4)
    events = run(tmp_path / "out.mp4")
    assert np.array_equal(frames_of(tmp_path / "out.mp4"), expected)
    assert summaries(events) == [plan.summary for plan in EXACT]


def test_the_cpu_s_allocator_counts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = PusaWanTransformer3DModel.forward, 0

    def short(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            return torch.empty(1 << 60)
        return forward(self, *args, **options)

    monkeypatch.setattr(PusaWanTransformer3DModel, "forward", short)
    assert messages(run(tmp_path / "out.mp4")) == ["out of memory in step 2 of 3: a smaller plan takes over"]


def test_a_vae_that_is_planned_in_tiles_decodes_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = make_plan(vae=PartPlan("float32", "float32", "cuda", tiles=True))
    size = {"width": 384, "height": 32, "steps": 1}  # 48 latent pixels in two tiles
    decoded = run_out_of_memory(monkeypatch, WanDecoder3d, "forward", call=0)
    run(tmp_path / "whole.mp4", **size)
    assert len(decoded) == 2  # latent frames
    run(tmp_path / "tiles.mp4", [tiles], **size)
    assert len(decoded) == 2 + 2 * 2
    assert psnr(frames_of(tmp_path / "tiles.mp4"), frames_of(tmp_path / "whole.mp4")) > 25


# ---- no plan is left -----------------------------------------------------------------------------------------------


def test_without_a_smaller_plan_the_error_says_where_and_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_of_memory(monkeypatch, PusaWanTransformer3DModel, "forward", call=3, last=99)
    message = r"out of memory in step 2 of 3, at 32 x 32 and 5 frames at once: ask for a smaller size, fewer frames"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        run(tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []


def test_without_a_smaller_plan_the_latents_of_a_failed_decoding_are_kept(
    tmp_path: Path, whole: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole()
    with monkeypatch.context() as patch:
        run_out_of_memory(patch, WanDecoder3d, "forward", call=1, last=99)
        with pytest.raises(DecodeMemoryError, match=r"pusa decode .*out\.latents\.safetensors"):
            run(tmp_path / "out.mp4")
    saved = tmp_path / "out.latents.safetensors"
    assert load_latents(saved)[0].shape[2] == 2
    run_out_of_memory(monkeypatch, WanDecoder3d, "forward", call=2)
    events = list(decode(saved, tmp_path / "out.mp4", plans=EXACT, device="cpu"))
    assert np.array_equal(frames_of(tmp_path / "out.mp4"), expected)
    assert messages(events) == ["out of memory in decoding: a smaller plan takes over"]


def test_loading_that_never_fits_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out_of_memory(monkeypatch, AutoencoderKLWan, "to", call=1, last=99)
    with pytest.raises(torch.OutOfMemoryError, match=r"while the model was loaded \(out of memory\): close other"):
        run(tmp_path / "out.mp4")


# ---- the next request ----------------------------------------------------------------------------------------------


def test_a_plan_that_failed_is_not_tried_again_for_as_large_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        run_out_of_memory(patch, PusaWanTransformer3DModel, "forward", call=3)
        run(tmp_path / "a.mp4", frames=9)
    assert summaries(run(tmp_path / "b.mp4", frames=9)) == [EXACT[1].summary]
    assert summaries(run(tmp_path / "c.mp4", frames=13)) == [EXACT[1].summary]
    assert summaries(run(tmp_path / "d.mp4", frames=5)) == [EXACT[0].summary]


def test_a_plan_in_fewer_bits_takes_over_and_exact_weights_come_back(
    tmp_path: Path, whole: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = (EXACT[0], make_plan("none", "fp8"))
    expected, small = whole(), whole(width=16)
    with monkeypatch.context() as patch:
        run_out_of_memory(patch, PusaWanTransformer3DModel, "forward", call=5)
        events = run(tmp_path / "out.mp4", plans)
    assert summaries(events)[-1] == "tiny: transformer on the GPU in fp8"
    out = frames_of(tmp_path / "out.mp4")
    assert not np.array_equal(out, expected)
    assert psnr(out, expected) > 30
    run(tmp_path / "small again.mp4", plans, width=16)  # the exact plan fits this one: the model is read again
    assert np.array_equal(frames_of(tmp_path / "small again.mp4"), small)


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_another_alpha_is_merged_anew_into_fewer_bits(tmp_path: Path, storage: Any) -> None:
    lora = str(write(tmp_path / "lora.safetensors", comfyui(make_pairs(tiny.components()["transformer"]))))
    plans = [make_plan("none", storage, merge=True)]
    run(tmp_path / "b.mp4", plans, lora=[lora], alpha=0.5)
    load_pipeline("tiny")
    first = run(tmp_path / "a.mp4", plans, lora=[lora], alpha=1.4)
    again = run(tmp_path / "a again.mp4", plans, lora=[lora], alpha=1.4)
    other = run(tmp_path / "b again.mp4", plans, lora=[lora], alpha=0.5)
    assert not any("loaded again" in message for message in [*messages(first), *messages(again)])
    is_loaded_again = any("the model is loaded again for another alpha" in message for message in messages(other))
    assert is_loaded_again == (storage == "int8")
    assert np.array_equal(frames_of(tmp_path / "a again.mp4"), frames_of(tmp_path / "a.mp4"))
    assert np.array_equal(frames_of(tmp_path / "b again.mp4"), frames_of(tmp_path / "b.mp4"))
    assert not np.array_equal(frames_of(tmp_path / "a.mp4"), frames_of(tmp_path / "b.mp4"))


def test_replay_says_if_weights_were_rounded_in_another_way(tmp_path: Path) -> None:
    run(tmp_path / "a.mp4", None, LoadOptions(quantize="int8"))
    weights = (media.read_metadata(tmp_path / "a.mp4") or {})["weights"]
    assert weights["model"]["storage"] == "int8"
    request = GenerationRequest(**SMALL, steps=STEPS)
    said = [
        messages(list(generate(request, tmp_path / "b.mp4", made_with=weights, load=LoadOptions(quantize=quantize))))
        for quantize in ("auto", "int8")
    ]
    assert said == [
        [
            "this video was made with --quantize int8, and its weights are rounded in another way now: give it for "
            "equal frames"
        ],
        [],
    ]


def test_the_planner_hears_of_the_loras_and_of_one_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.components()["transformer"]
    files = [str(write(tmp_path / f"{r}.safetensors", comfyui(make_pairs(model, rank=r)))) for r in (4, 3)]
    heard: dict[str, Any] = {}
    planner = ModuleType("pusa.acceleration.planning")
    planner.plans = lambda model, **asked: heard.update(asked, model=model) or list(EXACT)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, planner.__name__, planner)
    monkeypatch.setattr(pusa.acceleration, "planning", planner, raising=False)
    request = GenerationRequest(**{**SMALL, "frames": 33, "window": 17, "lora": files, "guidance": 1.0})
    machine, options = Machine((Card(10**10),)), LoadOptions("smallest")
    assert choose_plans(request.resolved(zoo.defaults_of("tiny")), options, machine) == list(EXACT)
    assert heard == {
        "model": "tiny",
        "size": (32, 32, 17),
        "machine": machine,
        "options": options,
        "guidance": 1.0,
        "lora_ranks": {"transformer": 7},
        "still_frames": 2,  # the overlap of its windows
    }


# ---- the CPU -------------------------------------------------------------------------------------------------------


def test_on_a_cpu_the_model_runs_as_it_was_loaded_unless_fewer_bits_are_asked_for(tmp_path: Path) -> None:
    default = run(tmp_path / "a.mp4", None)
    assert summaries(default) == ["tiny: transformer on the CPU in float32"]
    asked = run(tmp_path / "b.mp4", None, LoadOptions(quantize="int8"))
    (planned,) = (event for event in asked if event.kind == "planned")
    assert planned.summary == "tiny: transformer on the CPU in int8"
    assert planned.reasons == ("transformer: its weights are stored as int8, as asked for",)
    run(tmp_path / "c.mp4", None)
    a, b, c = (frames_of(tmp_path / f"{name}.mp4") for name in "abc")
    assert np.array_equal(a, c)
    assert not np.array_equal(a, b)


def test_the_plan_as_loaded_tells_the_dtype_of_each_part(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline(experts=2)
    pipe.vae.to(torch.bfloat16)
    plan = plan_as_loaded(pipe, "tiny", LoadOptions(quantize="fp8"))
    assert {name: part.storage for name, part in plan.parts.items()} == {
        "text_encoder": "float32",
        "transformer": "fp8",
        "transformer_2": "fp8",
        "vae": "bfloat16",
    }


@pytest.mark.parametrize(("quantize", "bound"), [("int8", 34.0), ("fp8", 32.0)])
def test_fewer_bits_change_the_embedded_model_a_little(
    tmp_path: Path, mini: Any, whole: Callable[..., np.ndarray], quantize: Any, bound: float
) -> None:
    asked = {"model": "mini", "prompt": "a red apple", "width": None, "height": None, "frames": 9}
    exact = whole(plans=None, **asked)
    run(tmp_path / "less.mp4", None, LoadOptions(quantize=quantize), **asked)
    less = frames_of(tmp_path / "less.mp4")
    assert not np.array_equal(exact, less)
    assert psnr(exact, less) > bound
