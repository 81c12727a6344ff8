"""A plan says where weights are read to, and reading them there makes the same video as moving them later."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_samples import comfyui, make_pairs, same, weights, write
from plan_samples import make_plan

from pusa import PusaPipeline, media
from pusa.acceleration import apply
from pusa.acceleration.decisions import Parallel, PartPlan, Plan, Wish
from pusa.acceleration.placement import can_apply, devices_to_load, parts_read_as_fp8
from pusa.acceleration.quantization import storage_of
from pusa.generate import generate, load_pipeline
from pusa.models import tiny
from pusa.request import GenerationRequest

META = torch.device("meta")
UNUSED = dict.fromkeys(("text_encoder", "tokenizer"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PusaPipeline(**tiny.components()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def lora(tmp_path: Path) -> str:
    return str(write(tmp_path / "lora.safetensors", comfyui(make_pairs(tiny.components()["transformer"]))))


def read(folder: Path, plan: Plan, device: str = "cpu") -> PusaPipeline:
    places = devices_to_load(plan, device)
    return PusaPipeline.from_pretrained(
        folder, dtype=torch.float32, device=places, as_fp8=parts_read_as_fp8(plan), **UNUSED
    )


def test_what_stays_whole_on_the_card_is_read_to_it() -> None:
    everything = {"text_encoder", "transformer", "transformer_2", "vae"}
    assert devices_to_load(make_plan("none"), "meta") == dict.fromkeys(everything, META)
    assert devices_to_load(make_plan("none", "fp8"), "meta").keys() == everything
    assert devices_to_load(make_plan("none", "int8"), "meta").keys() == {"text_encoder", "vae"}
    assert devices_to_load(make_plan("none", "fp8", wish="fastest"), "meta").keys() == {"text_encoder", "vae"}
    for offload in ("model", "blocks", "leaves", "disk"):
        assert devices_to_load(make_plan(offload), "meta") == {}
    visiting = make_plan("none", text_encoder=PartPlan("float32", "float32", "cuda", when="prompt"))
    assert "text_encoder" not in devices_to_load(visiting, "meta")
    shared = Plan("tiny", "balanced", make_plan("none").parts, parallel=Parallel(guidance=2, shard=True))
    assert devices_to_load(shared, "meta").keys() == {"text_encoder", "vae"}


@pytest.mark.parametrize("storage", ["float32", "fp8"])
def test_what_was_read_to_the_card_never_leaves_it(folder: Path, storage: Any) -> None:
    plan = make_plan("none", storage)
    pipe = read(folder, plan, "meta")
    for _ in range(2):
        apply(pipe, plan, device="meta")  # "meta" raises where weights are moved away from it
        for part in (pipe.transformer, pipe.vae):
            assert {value.device for value in part.parameters()} == {META}
    assert storage_of(pipe.transformer) == storage
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        apply(pipe, make_plan("model", storage), device="cpu")


@pytest.mark.parametrize("offload", ["none", "blocks"])
def test_loras_are_merged_into_weights_read_as_fp8_and_taken_out_again(folder: Path, lora: str, offload: Any) -> None:
    merged, beside = make_plan(offload, "fp8", merge=True), make_plan("none", "fp8")
    early, late = read(folder, merged), PusaPipeline.from_pretrained(folder, dtype=torch.float32, **UNUSED)
    for pipe in (early, late):
        pipe.load_pusa(lora, alpha=1.4)
        apply(pipe, merged, device="cpu")
    assert storage_of(early.transformer) == "fp8"
    assert same(weights(early.transformer), weights(late.transformer))
    assert can_apply(early, beside)
    apply(early, beside, device="cpu")
    untouched = read(folder, beside)
    untouched.load_pusa(lora, alpha=1.4)
    assert same(weights(early.transformer), weights(untouched.transformer))


@pytest.mark.parametrize("merge", [True, False])
def test_a_video_is_the_same_however_its_weights_were_read(
    tmp_path: Path, folder: Path, lora: str, merge: bool
) -> None:
    small: dict[str, Any] = {"prompt": "a cat", "width": 32, "height": 32, "frames": 5, "seed": 0, "steps": 2}
    encoder = PartPlan("float32", "float32", "cpu")

    def run(wish: Wish, output: Path) -> np.ndarray:
        plan = make_plan("none", "fp8", merge=merge, wish=wish, text_encoder=encoder)
        request = GenerationRequest(model=str(folder), lora=[lora], alpha=1.4, **small)
        list(generate(request, output, plans=[plan], device="cpu"))
        load_pipeline("tiny")  # lets the model go
        return media.read_video(output)

    whole = run("fastest", tmp_path / "a.mp4")  # read whole and cast afterwards: a CPU multiplies in no 8 bits
    assert np.array_equal(run("balanced", tmp_path / "b.mp4"), whole)
