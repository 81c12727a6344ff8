"""The denoising loop never waits for its device, and offloading moves each part once per stage, previews included."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from meta_accelerator import ACCELERATOR, Moves, Waits
from PIL import Image
from plan_samples import make_plan
from torch import Tensor

from pusa import GenerationRequest, PusaCondition, PusaFlowMatchEulerScheduler, PusaPipeline, loading, media, zoo
from pusa.acceleration import apply
from pusa.acceleration.decisions import LoadOptions
from pusa.events import Event
from pusa.generate import generate
from pusa.generate.residents import resident_of
from pusa.models.vae import decode_chunks, decode_video
from pusa.scheduler import wave_sigmas

SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9}
STEPS = 4

TinyPipeline = Callable[..., PusaPipeline]


@pytest.fixture
def pipe(tiny_pipeline: TinyPipeline) -> PusaPipeline:
    return tiny_pipeline().to("meta")


def call(pipe: PusaPipeline, **options: Any) -> Tensor:
    texts = {"prompt_embeds": noise(1, 16, 48), "negative_prompt_embeds": noise(1, 16, 48)}
    defaults = {**texts, "num_inference_steps": STEPS, "output_type": "latent", **SIZE}
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**defaults, "generator": generator, **options}).frames


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def keep_denoised(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"latents": tensors["latents"] + 0 * tensors["denoised"]}


# ---- nothing waits -------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "text to video": dict,
    "without guidance": lambda: {"guidance_scale": 1.0},
    "two videos of two prompts": lambda: {
        "prompt_embeds": noise(2, 16, 48),
        "negative_prompt_embeds": noise(2, 16, 48),
        "num_videos_per_prompt": 2,
    },
    "a kept frame": lambda: {"conditions": [PusaCondition(latents=noise(16, 1, 4, 6), latent_index=0)]},
    "a kept frame that is left out": lambda: {
        "conditions": [PusaCondition(latents=noise(16, 1, 4, 6), latent_index=0)],
        "refresh_every": 5,
    },
    "frames with noise of their own": lambda: {
        "conditions": [
            PusaCondition(latents=noise(16, 2, 4, 6), latent_index=[0, 2], noise_multiplier=[0.0, 0.3]),
        ]
    },
    "from latents": lambda: {"latents": noise(1, 16, 3, 4, 6), "start_step": 2},
    "a wave": lambda: {"frame_sigmas": wave_sigmas(3, STEPS), "refresh_every": 5},
    "a callback": lambda: {
        "callback_on_step_end": keep_denoised,
        "callback_on_step_end_tensor_inputs": ["latents", "denoised"],
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_the_loop_never_waits_for_its_device(pipe: PusaPipeline, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = CALLS[name]()
    forwards = count_forwards(options)
    waits = Waits(pipe, forwards, monkeypatch)
    latents = call(pipe, **options)
    assert latents.is_meta
    assert latents.shape[1:] == (16, 3, 4, 6)
    assert (waits.steps, waits.in_loop) == (forwards, 0)
    assert waits.outside <= 6  # what comes in, and once at the end


def count_forwards(options: dict[str, Any]) -> int:
    table = options.get("frame_sigmas")
    steps = STEPS - options.get("start_step", 0) if table is None else len(table) - 1
    return steps * (1 if options.get("guidance_scale") == 1 else 2)


@pytest.mark.parametrize("experts", [1, 2])
def test_nor_with_a_solver_that_remembers_or_with_two_experts(
    tiny_pipeline: TinyPipeline, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline(experts=experts).to("meta")
    pipe.scheduler = PusaFlowMatchEulerScheduler(shift=5.0, solver_order=2)
    waits = Waits(pipe, 2 * STEPS, monkeypatch)
    assert call(pipe, conditions=[PusaCondition(latents=noise(16, 1, 4, 6), latent_index=0)]).is_meta
    assert (waits.steps, waits.in_loop) == (2 * STEPS, 0)


def test_nor_does_the_vae(pipe: PusaPipeline) -> None:
    z = noise(1, 16, 3, 4, 6).to("meta")
    for chunks in (list(pipe.decode_stream(z)), list(decode_chunks(pipe.vae, z.split(2, dim=2), park=None))):
        assert [chunk.shape for chunk in chunks] == [(1, 3, n, 32, 48) for n in (1, 4, 4)]
        assert all(chunk.is_meta for chunk in chunks)
    assert pipe.encode_frames(torch.zeros(1, 3, 5, 32, 48)).shape == (1, 16, 2, 4, 6)


@pytest.mark.parametrize("fault", ["reads a value", "copies to the CPU", "mixes devices"])
def test_what_waits_or_mixes_devices_in_the_loop_raises(
    pipe: PusaPipeline, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_step(_: Any, step: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        latents = tensors["latents"]
        if step == 1:
            match fault:
                case "reads a value":
                    latents.mean().item()
                case "copies to the CPU":
                    latents.cpu()
                case "mixes devices":
                    return {"latents": latents + noise(*latents.shape)}
        return {}

    waits = Waits(pipe, 2 * STEPS, monkeypatch)
    with pytest.raises((RuntimeError, NotImplementedError)):
        call(pipe, callback_on_step_end=after_step)
    assert waits.steps == 4


def test_a_whole_run_denoises_without_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = PusaPipeline.from_pretrained("tiny", text_encoder=None).to("meta")  # prompts are encoded on the CPU
    pipe.set_progress_bar_config(disable=True)
    waits = Waits(pipe, 2 * STEPS, monkeypatch)
    request = GenerationRequest(model="tiny", prompt="a cat", steps=STEPS, guidance=3.0)
    seen: list[Event] = []
    with pytest.raises(NotImplementedError, match="meta tensor"):  # the finished latents are the first to be copied
        seen.extend(generate(request, tmp_path / "out.mp4", pipeline=pipe))
    assert [event.step for event in seen if event.kind == "step" and event.stage == "denoise"] == [1, 2, 3, 4]
    assert waits.in_loop == 0


# ---- parts move once per stage -------------------------------------------------------------------------------------

OFFLOADS: dict[str, Callable[[PusaPipeline], None]] = {
    "a plan": lambda pipe: apply(pipe, make_plan("model"), device=ACCELERATOR),
    "diffusers": lambda pipe: pipe.enable_model_cpu_offload(device=ACCELERATOR),
}
CLIP: dict[str, Any] = {"prompt": "a cat", "seed": 0, "width": 48, "height": 32, "frames": 9, "steps": 3}


def make(pipe: PusaPipeline | None, output: Path, model: str = "tiny", **options: Any) -> list[Event]:
    given = {key: options.pop(key) for key in ("plans", "device") if key in options}
    request = GenerationRequest(model=model, **{**CLIP, **options})
    return list(generate(request, output, pipeline=pipe, preview_every=1, **given))


def count_previews(events: list[Event]) -> int:
    return len([event for event in events if event.kind == "preview"])


def turns(*names: str) -> list[tuple[str, str]]:
    """The moves of parts that compute one after another; the last one stays."""
    return [(name, way) for name in names for way in ("in", "out")][:-1]


@pytest.fixture
def whole() -> PusaPipeline:
    pipe = PusaPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the VAE's previews are fitted once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSA_CACHE", str(cache_folder))


@pytest.mark.parametrize("kind", OFFLOADS)
def test_each_part_moves_once_per_stage_with_a_preview_at_every_step(
    whole: PusaPipeline, tmp_path: Path, kind: str
) -> None:
    make(whole, tmp_path / "plain.mp4")
    moves = Moves(whole.components)
    OFFLOADS[kind](whole)
    assert count_previews(make(whole, tmp_path / "out.mp4")) == 3
    assert moves.log == turns("text_encoder", "transformer", "vae")
    assert np.array_equal(media.read_video(tmp_path / "out.mp4"), media.read_video(tmp_path / "plain.mp4"))


def test_generate_by_a_plan_moves_each_part_once_per_stage(tmp_path: Path) -> None:
    plans = [make_plan("model")]
    request = GenerationRequest(model="tiny", **CLIP).resolved(zoo.defaults_of("tiny"))
    resident = resident_of(request, LoadOptions(), device=str(ACCELERATOR), is_planned=True)
    moves = Moves(resident.prepare(request, plans, lambda event: None).components)
    assert moves.log == []
    runs = {"plans": plans, "device": str(ACCELERATOR)}
    make(None, tmp_path / "first.mp4", steps=1, **runs)  # may fit the previews
    moves.log.clear()
    assert count_previews(make(None, tmp_path / "second.mp4", **runs)) == 3
    assert moves.log == [("vae", "out"), *turns("text_encoder", "transformer", "vae")]


def test_an_encoder_that_is_loaded_for_a_prompt_moves_once_and_while_no_other_part_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUSA_CACHE", str(tmp_path / "cache"))
    PusaPipeline.from_pretrained("tiny").save_pretrained(tmp_path / "model")
    request = GenerationRequest(model=str(tmp_path / "model"), **CLIP)
    plans = [make_plan("model")]
    resolved = request.resolved(zoo.defaults_of(request.model))
    resident = resident_of(resolved, LoadOptions(), device=str(ACCELERATOR), is_planned=True)
    pipe = resident.prepare(resolved, plans, lambda event: None)
    moves, load = Moves(pipe.components), loading.load_text_encoder

    def watched(*args: Any, **options: Any) -> Any:
        encoder = load(*args, **options)
        moves.watch("text_encoder", encoder)
        return encoder

    monkeypatch.setattr(loading, "load_text_encoder", watched)
    runs = {"model": request.model, "plans": plans, "device": str(ACCELERATOR)}
    with closing(generate(request, tmp_path / "out.mp4", plans=plans, device=str(ACCELERATOR))) as events:
        next(event for event in events if event.kind == "step" and event.stage == "denoise")
    expected = turns("text_encoder", "transformer")
    assert moves.log == expected
    make(None, tmp_path / "out.mp4", steps=1, prompt="a dog", **runs)
    expected += [("transformer", "out"), *turns("text_encoder", "vae", "transformer", "vae")]
    assert moves.log == expected
    make(None, tmp_path / "out.mp4", steps=1, **runs)  # both prompts are cached
    expected += [("vae", "out"), *turns("transformer", "vae")]
    assert moves.log == expected


def test_keyframes_and_two_experts_move_each_part_once_per_stage(tiny_pipeline: TinyPipeline) -> None:
    pipe = tiny_pipeline(experts=2)
    moves = Moves(pipe.components)
    apply(pipe, make_plan("model"), device=ACCELERATOR)
    ends = [PusaCondition(image=Image.new("RGB", (48, 32)), latent_index=index) for index in (0, "last")]
    options = {"conditions": ends, "num_inference_steps": STEPS, "output_type": "pt", **SIZE}
    pipe("a cat", generator=torch.Generator().manual_seed(0), **options)
    assert moves.log == turns("vae", "text_encoder", "transformer", "transformer_2", "vae")


def test_the_first_run_of_a_vae_fits_its_previews_before_the_transformer_is_there(
    whole: PusaPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUSA_CACHE", str(tmp_path / "cache"))
    moves = Moves(whole.components)
    OFFLOADS["a plan"](whole)
    make(whole, tmp_path / "out.mp4", steps=1)
    assert moves.log == turns("text_encoder", "vae", "transformer", "vae")


def test_windows_of_a_long_video_move_each_part_once_each(whole: PusaPipeline, tmp_path: Path) -> None:
    make(whole, tmp_path / "first.mp4", steps=1)
    moves = Moves(whole.components)
    OFFLOADS["a plan"](whole)
    events = make(whole, tmp_path / "out.mp4", steps=2, frames=29, window=17, overlap=5)
    windows = [event.step for event in events if event.kind == "step"][-1] // 2
    assert windows > 1
    assert moves.log == turns("text_encoder", *["transformer", "vae"] * windows)


@pytest.mark.parametrize("kind", OFFLOADS)
def test_a_vae_that_ran_at_every_step_would_be_counted(whole: PusaPipeline, kind: str) -> None:
    moves = Moves(whole.components)
    OFFLOADS[kind](whole)

    def after_step(pipe: PusaPipeline, _: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        decode_video(pipe.vae, tensors["denoised"][:, :, :1])
        return {}

    call(whole, callback_on_step_end=after_step, callback_on_step_end_tensor_inputs=["denoised"])
    assert moves.of("transformer") == ["in", "out"] * STEPS


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_makes_the_same_video_and_previews_leave_the_vae_in_ram(
    whole: PusaPipeline, tmp_path: Path, kind: str
) -> None:
    make(whole, tmp_path / "plain.mp4", steps=2)
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    for part in (whole.transformer, whole.vae):
        part.enable_group_offload(ACCELERATOR, offload_type=kind, **groups)
    order: list[str] = []
    whole.vae.decoder.register_forward_pre_hook(lambda *_: order.append("vae"))
    whole.transformer.register_forward_pre_hook(lambda *_: order.append("transformer"))
    events = make(whole, tmp_path / "out.mp4", steps=2)
    assert len([event for event in events if event.kind == "preview"]) == 2
    assert order[:4] == ["transformer"] * 4
    assert set(order[4:]) == {"vae"}
    assert np.array_equal(media.read_video(tmp_path / "out.mp4"), media.read_video(tmp_path / "plain.mp4"))
