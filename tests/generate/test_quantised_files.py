"""Single files in fewer bits stay so where the plan says it, and make the video that full weights make."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_samples import comfyui, make_pairs
from lora_samples import run as run_model
from lora_samples import write as write_lora
from media_samples import psnr
from memory_faults import run_out_of_memory
from plan_samples import make_plan
from single_file_samples import declaration, matrices, scaled, write, write_gguf

from pusa import PusaPipeline, PusaWanTransformer3DModel, media, zoo
from pusa.acceleration.decisions import LoadOptions, Offload, PartPlan, Plan, Storage
from pusa.acceleration.quantization import storage_of
from pusa.generate import generate, load_pipeline
from pusa.generate.residents import resident_of
from pusa.models import original, tiny
from pusa.models.sources.file_parts import load_parts
from pusa.request import GenerationRequest

pytest.importorskip("torchao")
pytest.importorskip("gguf")

PLAN = partial(PartPlan, "float32")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder whose text encoder is loaded for new prompts only, and an empty prompt cache."""
    monkeypatch.setenv("PUSA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    PusaPipeline.from_pretrained("tiny").save_pretrained(folder)
    return folder


def transformer_file(folder: Path, kind: str) -> Path:
    """Write a transformer of the model's shape whose blocks are quantised."""
    tensors = original.transformer_to_original(tiny.components(seed=3)["transformer"].state_dict())
    layers = matrices(tensors)
    if kind == "gguf":
        return write_gguf(folder / "wan.gguf", tensors, {f"{name}.weight": "Q8_0" for name in layers})[0]
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    stored, _ = scaled(tensors, layers, spelling="weight_scale", dtype=dtype, by_row=True)
    if kind == "int8":
        stored |= {f"{name}.comfy_quant": declaration("int8_tensorwise") for name in layers}
    return write(folder / "wan.safetensors", stored)


def full_plan(**others: PartPlan) -> Plan:
    return make_plan(**{"text_encoder": PLAN("float32", "cpu", when="prompt"), **others})


def kept_plan(storage: Storage, offload: Offload = "none", **others: PartPlan) -> Plan:
    return full_plan(**{"transformer": PLAN(storage, "cuda", offload, kept=True), **others})


def run(
    output: Path, model: Path, plans: Sequence[Plan], load: LoadOptions, made_with: Any = None, **asked: Any
) -> list[str]:
    """Make a video; return the notes."""
    small: dict[str, Any] = {"prompt": "a cat", "width": 32, "height": 32, "frames": 5, "seed": 0, "steps": 3}
    request = GenerationRequest(model=str(model), **{**small, **asked})
    events = list(generate(request, output, plans=plans, load=load, device="cpu", made_with=made_with))
    return [event.message for event in events if event.kind == "note"]


def frames_of(path: Path) -> np.ndarray:
    return media.read_video(path)


def weights_in(path: Path) -> dict[str, Any]:
    return (media.read_metadata(path) or {})["weights"]


def pipeline(model: Path, load: LoadOptions, **asked: Any) -> Any:
    """The pipeline that the last run has used."""
    request = GenerationRequest(model=str(model), prompt="a cat", seed=0, **asked)
    return resident_of(request.resolved(zoo.defaults_of(str(model))), load, device="cpu", is_planned=True).pipe


@pytest.mark.parametrize("storage", ["gguf", "fp8", "int8"])
def test_a_kept_file_makes_the_video_of_full_weights_wherever_it_is(
    tmp_path: Path, model: Path, storage: Storage
) -> None:
    load = LoadOptions(transformer=transformer_file(tmp_path, storage))
    run(tmp_path / "full.mp4", model, [full_plan()], load)
    assert storage_of(pipeline(model, load).transformer) == "float32"
    full = frames_of(tmp_path / "full.mp4")
    offloads: tuple[Offload, ...] = ("none", "model", "blocks", "leaves", *(("disk",) if storage == "gguf" else ()))
    for offload in offloads:
        run(tmp_path / f"{offload}.mp4", model, [kept_plan(storage, offload)], load)
        assert storage_of(pipeline(model, load).transformer) == storage
        assert psnr(frames_of(tmp_path / f"{offload}.mp4"), full) > 45, offload
    run(tmp_path / "own.mp4", model, [full_plan()], LoadOptions())
    assert psnr(frames_of(tmp_path / "own.mp4"), full) < 40  # of the model's own transformer


def test_fp8_cannot_be_kept_on_disk(tmp_path: Path, model: Path) -> None:
    load = LoadOptions(transformer=transformer_file(tmp_path, "fp8"))
    with pytest.raises(ValueError, match="the transformer cannot be kept on disk as fp8: keep it in RAM"):
        run(tmp_path / "out.mp4", model, [kept_plan("fp8", "disk")], load)


@pytest.mark.parametrize("storage", ["gguf", "fp8", "int8"])
def test_alpha_stays_live_on_kept_weights(tmp_path: Path, model: Path, storage: Storage) -> None:
    load = LoadOptions(transformer=transformer_file(tmp_path, storage))
    pairs = make_pairs(tiny.components()["transformer"])
    lora = [str(write_lora(tmp_path / "style.safetensors", comfyui(pairs)))]
    videos = {}
    for name, plan, alpha in (
        ("full", full_plan(), 2.0),
        ("kept", kept_plan(storage, "blocks"), 2.0),
        ("weaker", kept_plan(storage, "blocks"), 1.0),
        ("again", kept_plan(storage, "blocks"), 2.0),
    ):
        notes = run(tmp_path / f"{name}.mp4", model, [plan], load, lora=lora, alpha=alpha)
        assert not any("loaded again" in note for note in notes)
        videos[name] = frames_of(tmp_path / f"{name}.mp4")
    assert psnr(videos["kept"], videos["full"]) > 45
    assert psnr(videos["weaker"], videos["full"]) < 40
    assert np.array_equal(videos["again"], videos["kept"])


def test_a_video_says_if_its_file_was_kept_and_replay_notes_a_change(tmp_path: Path, model: Path) -> None:
    load = LoadOptions(transformer=transformer_file(tmp_path, "fp8"))
    run(tmp_path / "kept.mp4", model, [kept_plan("fp8")], load)
    made_with = weights_in(tmp_path / "kept.mp4")
    assert made_with["parts"]["transformer"]["kept"] == "fp8"
    assert "storage" not in made_with["model"]  # nothing was rounded again
    assert not any(
        "wan.safetensors" in note for note in run(tmp_path / "a.mp4", model, [kept_plan("fp8")], load, made_with)
    )
    notes = run(tmp_path / "full.mp4", model, [full_plan()], load, made_with)
    assert [note for note in notes if "this video was made" in note] == [
        "this video was made with wan.safetensors as fp8 and is made as full weights now: small differences are likely"
    ]


def test_where_full_weights_do_not_fit_the_file_is_read_again_as_it_is(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = LoadOptions(transformer=transformer_file(tmp_path, "gguf"))
    plans = [full_plan(), kept_plan("gguf"), kept_plan("gguf", "blocks")]
    run(tmp_path / "full.mp4", model, plans, load)
    load_pipeline("tiny")
    forwards = run_out_of_memory(monkeypatch, PusaWanTransformer3DModel, "forward", call=2)
    notes = run(tmp_path / "out.mp4", model, plans, load)
    assert len(forwards) > 2
    assert "out of memory in step 1 of 3: a smaller plan takes over" in notes
    assert storage_of(pipeline(model, load).transformer) == "gguf"
    assert psnr(frames_of(tmp_path / "out.mp4"), frames_of(tmp_path / "full.mp4")) > 45


def test_the_golden_files_are_kept_too(golden: Path) -> None:
    files = {"transformer": golden / "singlefiles/transformer_Q8_0.gguf"}
    config = {"transformer": {"num_attention_heads": 3}}
    outputs = []
    for keep, storage in ((["transformer"], "gguf"), ([], "float32")):
        loaded = load_parts(files, dtype=torch.float32, config=config, keep_quantized=keep)["transformer"]
        assert storage_of(loaded) == storage
        outputs.append(run_model(loaded))
    assert (outputs[0] - outputs[1]).abs().max() <= 2e-6 * outputs[1].abs().max()


# ---- text encoders ---------------------------------------------------------------------------------------------------


def text_encoder_file(folder: Path, kind: str) -> Path:
    """Write a text encoder of the model's shape and other weights than its own."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        encoder = type(tiny.text_encoder())(tiny.text_encoder().config)
    state = {name: value for name, value in encoder.state_dict().items() if "embed_tokens" not in name}
    layers = [name for name in matrices(state, ".layer.") if "relative" not in name]
    if kind == "gguf":
        types = {f"{name}.weight": "Q8_0" for name in layers if state[f"{name}.weight"].shape[1] % 32 == 0}
        return write_gguf(folder / "umt5.gguf", state, types, architecture="pig")[0]
    return write(folder / "umt5.safetensors", scaled(state, layers)[0])


@pytest.mark.parametrize("storage", ["gguf", "fp8"])
@pytest.mark.parametrize("how", [("none", "stay"), ("leaves", "prompt")])
def test_new_prompts_are_encoded_by_the_text_encoders_file(
    tmp_path: Path, model: Path, storage: Storage, how: tuple[Any, Any]
) -> None:
    run(tmp_path / "own.mp4", model, [full_plan()], LoadOptions())
    cached = embeddings(tmp_path)
    load = LoadOptions(text_encoder=text_encoder_file(tmp_path, storage))
    part = PLAN(storage, "cpu", how[0], how[1], kept=True)
    run(tmp_path / "kept.mp4", model, [full_plan(text_encoder=part)], load)
    others = embeddings(tmp_path) - cached
    assert len(others) == len(cached) == 2  # the prompt and the negative one, under keys of their own
    own, kept = frames_of(tmp_path / "own.mp4"), frames_of(tmp_path / "kept.mp4")
    assert not np.array_equal(own, kept)
    for path in others:
        path.unlink()
    run(tmp_path / "full.mp4", model, [full_plan()], load)
    assert embeddings(tmp_path) == cached | others
    assert psnr(kept, frames_of(tmp_path / "full.mp4")) > 45


def embeddings(folder: Path) -> set[Path]:
    return set((folder / "cache").rglob("*.safetensors"))


def test_every_part_is_stored_as_the_plan_says(tmp_path: Path, model: Path) -> None:
    load = LoadOptions(transformer=transformer_file(tmp_path, "gguf"), text_encoder=text_encoder_file(tmp_path, "fp8"))
    plan = kept_plan("gguf", text_encoder=replace(PLAN("fp8", "cpu", when="stay"), kept=True))
    run(tmp_path / "out.mp4", model, [plan], load)
    pipe = pipeline(model, load)
    assert storage_of(pipe.kept_text_encoder[1]) == "fp8"
    assert storage_of(pipe.transformer) == "gguf"
    assert storage_of(pipe.vae) == "float32"
