"""Weights rounded to fp8 as they are read are those of a model that is read in full, merged and then cast."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from lora_samples import comfyui, make_pairs, pipe, run, same, weights, write
from model_folders import write_original, write_transformer
from safetensors.torch import save_file
from single_file_samples import HEADS, matrices, scaled, transformer_tensors
from torch import Tensor

from pusa import PusaPipeline
from pusa.lora import load_pusa, merge_lora, set_alpha, unmerge_lora
from pusa.lora.adapters import state_of
from pusa.models import original, tiny
from pusa.models.fp8 import STORAGE, store_as_fp8
from pusa.models.single_file.loading import load_single_file
from pusa.models.streaming import WeightsChangedError
from pusa.models.wan import PusaWanTransformer3DModel

BF16 = torch.bfloat16


def diffusers_folder(folder: Path) -> Path:
    PusaPipeline(**tiny.components()).save_pretrained(folder)
    return folder


def original_folder(folder: Path) -> Path:
    return write_original(folder, tiny.components())


@pytest.fixture(params=["diffusers", "original", "file", "scaled file"])
def load(tmp_path: Path, request: Any) -> Any:
    """Load one transformer, whole or as fp8, from one layout."""
    if request.param in ("diffusers", "original"):
        write_folder = {"diffusers": diffusers_folder, "original": original_folder}[request.param]
        folder = write_folder(tmp_path / "model")
        unused = dict.fromkeys(("text_encoder", "tokenizer", "vae"))

        def from_folder(*as_fp8: str, **options: Any) -> Any:
            loaded = PusaPipeline.from_pretrained(folder, dtype=BF16, as_fp8=as_fp8, **unused, **options)
            return loaded.transformer

        return from_folder
    tensors = transformer_tensors()
    stored = scaled(tensors, matrices(tensors))[0] if request.param == "scaled file" else tensors
    save_file(stored, tmp_path / "wan.safetensors")

    def from_file(*as_fp8: str, **options: Any) -> Any:
        path = tmp_path / "wan.safetensors"
        return load_single_file(path, config=HEADS, torch_dtype=BF16, as_fp8=as_fp8, **options)["transformer"]

    return from_file


@pytest.fixture
def lora(tmp_path: Path, load: Any) -> Path:
    return write(tmp_path / "lora.safetensors", comfyui(make_pairs(load())))


def cast(model: PusaWanTransformer3DModel) -> PusaWanTransformer3DModel:
    store_as_fp8(model, BF16)
    return model


def merged(model: PusaWanTransformer3DModel, lora: Path, alpha: float = 1.4) -> PusaWanTransformer3DModel:
    load_pusa(pipe(model), lora, alpha=alpha)
    merge_lora(pipe(model))
    return model


def assert_same(model: PusaWanTransformer3DModel, expected: PusaWanTransformer3DModel) -> None:
    assert same(weights(model), weights(expected))
    assert {name: value.dtype for name, value in model.named_parameters()} == {
        name: value.dtype for name, value in expected.named_parameters()
    }
    assert torch.equal(run(model), run(expected))


def test_the_weights_are_those_of_the_whole_model_cast_afterwards(load: Any) -> None:
    model = load("transformer")
    assert sum(value.dtype == STORAGE for value in model.parameters()) >= 20
    assert_same(model, cast(load()))


def test_adapters_beside_them_are_those_beside_weights_cast_afterwards(load: Any, lora: Path) -> None:
    model, expected = load("transformer"), load()
    for one in (model, expected):
        load_pusa(pipe(one), lora)
    assert_same(model, cast(expected))


def test_merged_into_them_is_merged_first_and_then_cast(load: Any, lora: Path) -> None:
    model = merged(load("transformer"), lora)
    assert not any(isinstance(value.value, Tensor) for value in state_of(model).untouched.values())  # no second copy
    assert_same(model, cast(merged(load(), lora)))
    set_alpha(pipe(model), 0.5)
    assert_same(model, cast(merged(load(), lora, alpha=0.5)))
    unmerge_lora(pipe(model))
    assert same(weights(model), weights(cast(load())))


def test_a_changed_file_is_an_error_and_changes_nothing(tmp_path: Path, load: Any, lora: Path) -> None:
    model = load("transformer")
    load_pusa(pipe(model), lora)
    before = weights(model)
    for path in {source.path for source in model._pusa_weights.values()}:
        os.utime(path, ns=(0, 0))
    with pytest.raises(WeightsChangedError, match="has changed since the model was loaded from it"):
        merge_lora(pipe(model))
    assert same(weights(model), before)


def test_weights_changed_in_memory_are_merged_as_they_are(load: Any, lora: Path) -> None:
    changed = "blocks.0.attn2.to_v.weight"
    model = load("transformer")
    with torch.no_grad():
        model.get_parameter(changed).copy_(torch.ones(1))
    before = weights(model)
    merged(model, lora)
    assert [name for name, value in state_of(model).untouched.items() if isinstance(value.value, Tensor)] == [changed]
    unmerge_lora(pipe(model))
    assert same(weights(model), before)


def test_they_go_to_a_device_as_they_are_read(load: Any) -> None:
    for as_fp8 in ((), ("transformer",)):
        model = load(*as_fp8, device={"transformer": "meta"})
        assert {value.device.type for value in [*model.parameters(), *model.buffers()]} == {"meta"}


# ---- memory ----------------------------------------------------------------------------------------------------------

MIDDLE: dict[str, Any] = {**tiny.TRANSFORMER, "num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096}

PEAK = """
import re, sys, threading, time
from pathlib import Path
import torch
from pusa.lora import load_pusa, merge_lora
from pusa.models import original
from pusa.models.wan import PusaWanTransformer3DModel
from lora_samples import pipe

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(0.002)

import gguf, peft, torchao  # which the first LoRA imports
before = most = anonymous()
threading.Thread(target=watch, daemon=True).start()
model = original.load_transformer(Path(sys.argv[1]), torch.bfloat16, as_fp8=True)
model = PusaWanTransformer3DModel.from_wan(model)
load_pusa(pipe(model), sys.argv[2])
merge_lora(pipe(model))
print(most - before, sum(value.nbytes for value in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_fp8_and_a_tensor_and_never_the_whole_model(tmp_path: Path) -> None:
    model = WanTransformer3DModel(**{**MIDDLE, "num_layers": 9}).to(BF16)  # 151M weights
    pairs = make_pairs(model, rank=8)
    lora = write(tmp_path / "lora.safetensors", comfyui({name: pairs[name] for name in pairs if "blocks.8." in name}))
    write_transformer(tmp_path / "wan", original.transformer_to_original(model.state_dict()), shards=2, num_heads=8)
    del model, pairs
    output = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "wan"), str(lora)],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1] / "support"),
            "MALLOC_TRIM_THRESHOLD_": "100000",  # freed memory goes back at once: what malloc keeps depends on the CPU
        },
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    ).stdout
    peak, size = map(int, output.split())
    assert size < peak < 1.5 * size  # 1.3 with the fp32 copies of one weight; of the whole model in bf16 above 2
