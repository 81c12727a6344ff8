"""Fast mode: few steps with the model's 4-step LoRA, by one word, from loading to the file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import comfyui, make_pairs, write

from pusa import media, zoo
from pusa.acceleration.needs import own_lora_ranks, shapes_of
from pusa.defaults import FastSettings
from pusa.generate import decode, generate, save_latents
from pusa.models import tiny
from pusa.request import GenerationRequest
from pusa.scheduler import PusaFlowMatchEulerScheduler

SMALL = {"model": "tiny", "prompt": "a cat", "width": 32, "height": 32, "frames": 5, "seed": 0}


def run(output: Path, **values: Any) -> list[str]:
    """Make a video; return the messages of its notes."""
    request = GenerationRequest(**{**SMALL, **values})
    return [event.message for event in generate(request, output) if event.kind == "note"]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "fast.safetensors", comfyui(make_pairs(tiny.components()["transformer"], seed=1)))


@pytest.fixture
def distilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the tiny model a 4-step LoRA: `distilled(file)`."""

    def give(file: Path | None) -> None:
        fast_lora = file and zoo.LoraSource(str(file.parent), {"transformer": file.name}, rank=4)
        defaults = replace(zoo.ZOO["tiny"].defaults, fast=FastSettings(steps=2))
        monkeypatch.setitem(zoo.ZOO, "tiny", replace(zoo.ZOO["tiny"], defaults=defaults, fast_lora=fast_lora))

    return give


def test_the_lora_is_loaded_when_it_is_asked_for_and_acts_for_these_requests_alone(
    tmp_path: Path, distilled: Callable[..., None], lora: Path
) -> None:
    distilled(lora)
    same = {"steps": 2, "guidance": 1.0, "shift": 5.0}
    assert run(tmp_path / "plain.mp4", **same) == []
    notes = run(tmp_path / "fast.mp4", fast=True)
    assert notes == [
        "the model is loaded again, with its 4-step LoRA",
        "4-step LoRA fast.safetensors: strength 1 on transformer",
    ]
    assert run(tmp_path / "again.mp4", **same) == []  # the LoRA stays, without effect
    assert run(tmp_path / "beside.mp4", lora=[str(lora)], alpha=1.0, **same) != []
    plain, fast, again, beside = (
        media.read_video(tmp_path / f"{name}.mp4") for name in ("plain", "fast", "again", "beside")
    )
    assert (plain == again).all()
    assert (fast == beside).all()  # what the LoRA does by itself
    assert (fast != plain).any()
    stored = media.read_metadata(tmp_path / "fast.mp4")
    assert [file["file"] for file in stored["weights"]["lora"]] == ["fast.safetensors"]
    assert (stored["request"]["fast"], stored["request"]["steps"], stored["request"]["guidance"]) == (True, 2, 1.0)


def test_loras_of_the_request_replace_it_and_a_missing_one_is_named(
    tmp_path: Path, distilled: Callable[..., None], lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distilled(lora)
    notes = run(tmp_path / "o.mp4", fast=True, lora=[str(lora)])
    assert notes[-1].startswith("the LoRAs of the request replace the model's 4-step LoRA, too")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    absent = zoo.LoraSource("nobody/nothing", {"transformer": "fast4.safetensors"}, rank=4)
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(zoo.ZOO["tiny"], fast_lora=absent))
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing/fast4\.safetensors.*--lora FILE"):
        run(tmp_path / "p.mp4", fast=True)


def test_the_published_models_walk_down_the_timesteps_that_their_loras_were_distilled_at() -> None:
    for name in ("wan2.1-14b", "wan2.2-a14b"):
        request = GenerationRequest(model=name, prompt="x", fast=True, seed=0).resolved(zoo.defaults_of(name))
        assert (request.steps, request.guidance) == (4, 1.0)
        scheduler = PusaFlowMatchEulerScheduler(shift=request.shift)
        scheduler.set_timesteps(request.steps)
        assert torch.allclose(scheduler.timesteps, torch.tensor([1000, 937.5001, 833.3333, 625]), atol=0.01)
    with pytest.raises(ValueError, match=r"wan2.1-1.3b has no fast mode.*--steps 4 --guidance 1.*--lora FILE"):
        GenerationRequest(model="wan2.1-1.3b", prompt="x", fast=True).resolved(zoo.defaults_of("wan2.1-1.3b"))


def test_a_plan_counts_its_bytes() -> None:
    model = zoo.get("wan2.2-a14b")
    assert own_lora_ranks(model, fast=True) == {"transformer": 576, "transformer_2": 576}
    shapes = shapes_of(model, own_lora_ranks(model, fast=True))
    assert shapes.lora_bytes("transformer") * 64 // 576 == pytest.approx(0.61e9, rel=0.05)  # half its file's, in fp32


def test_saved_latents_are_decoded_without_it(
    tmp_path: Path, distilled: Callable[..., None], lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distilled(lora)
    request = GenerationRequest(**SMALL, fast=True).resolved(zoo.defaults_of("tiny"))
    saved = tmp_path / "z.latents.safetensors"
    save_latents(saved, torch.zeros(1, 16, 2, 4, 4), {"request": request.model_dump(mode="json")})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    absent = zoo.LoraSource("nobody/nothing", {"transformer": "fast4.safetensors"}, rank=4)
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(zoo.ZOO["tiny"], fast_lora=absent))
    assert list(decode(saved, tmp_path / "z.mp4"))[-1].kind == "done"
