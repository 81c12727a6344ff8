"""`pusa models convert`: any layout becomes a diffusers folder in 16 bits, exactly, whole or not at all."""

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import write_original
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pusa import PusaPipeline
from pusa.conversion import convert
from pusa.events import Done, Step
from pusa.models import tiny
from pusa.models.files import WrongArchitectureError
from pusa.resources import ResourcesError

PARTS = ("transformer", "transformer_2", "text_encoder", "vae")
IN_16_BITS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@pytest.fixture
def diffusers_folder(tmp_path: Path) -> Path:
    second = tiny.components(seed=5)["transformer"]
    PusaPipeline(**tiny.components(), transformer_2=second, boundary_ratio=0.875).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def original_folder(tmp_path: Path) -> Path:
    return write_original(tmp_path / "wan", tiny.components())


def states(pipe: PusaPipeline) -> dict[str, dict[str, torch.Tensor]]:
    return {part: dict(model.state_dict()) for part in PARTS if (model := getattr(pipe, part)) is not None}


def check_equal(pipe: PusaPipeline, other: PusaPipeline) -> None:
    left, right = states(pipe), states(other)
    assert left.keys() == right.keys()
    for part in left:
        assert left[part].keys() == right[part].keys()
        for name, value in left[part].items():
            assert value.dtype == right[part][name].dtype
            assert torch.equal(value, right[part][name])


@pytest.mark.parametrize("layout", ["diffusers_folder", "original_folder"])
@pytest.mark.parametrize("dtype", IN_16_BITS)
def test_loading_what_was_converted_is_exactly_loading_the_source(
    tmp_path: Path, layout: str, dtype: torch.dtype, request: Any
) -> None:
    source, folder = request.getfixturevalue(layout), tmp_path / "new" / "converted"
    events = list(convert(source, folder, dtype=IN_16_BITS[dtype], shard_bytes=200_000))
    assert events[-1] == Done({"model": folder})
    wanted = {"default": dtype, "vae": torch.float32}
    expected = PusaPipeline.from_pretrained(source, dtype=wanted)
    converted = PusaPipeline.from_pretrained(folder, dtype=wanted)
    check_equal(converted, expected)
    assert converted.config.boundary_ratio == expected.config.boundary_ratio
    assert converted.scheduler.config.shift == expected.scheduler.config.shift
    assert converted.tokenizer("a duck").input_ids == expected.tokenizer("a duck").input_ids
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["converted"]

    index = json.loads((folder / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = {folder / "transformer" / name for name in index["weight_map"].values()}
    assert len(shards) > 2
    found = {}
    for path in shards:
        with safe_open(path, "pt") as file:
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) <= 200_000  # noqa: SIM118
            found |= {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert found["blocks.0.attn1.to_q.weight"] == dtype
    assert found["blocks.0.scale_shift_table"] == torch.float32


def test_plain_diffusers_reads_the_folder_too(tmp_path: Path, original_folder: Path) -> None:
    from diffusers import WanPipeline

    list(convert(original_folder, tmp_path / "converted"))
    dtype = {"default": torch.bfloat16, "vae": torch.float32}
    stock = WanPipeline.from_pretrained(tmp_path / "converted", torch_dtype=dtype)
    ours = PusaPipeline.from_pretrained(original_folder, dtype=dtype)
    assert torch.equal(stock.transformer.blocks[1].ffn.net[2].weight, ours.transformer.blocks[1].ffn.net[2].weight)
    assert torch.equal(stock.text_encoder.shared.weight, ours.text_encoder.shared.weight)


def test_the_package_s_own_model_keeps_its_defaults_and_its_lora(tmp_path: Path) -> None:
    list(convert("mini", tmp_path / "mini16"))
    assert PusaPipeline.from_pretrained(tmp_path / "mini16").defaults == PusaPipeline.from_pretrained("mini").defaults
    assert (tmp_path / "mini16/pusa.json").is_file()


def test_the_embedding_under_its_other_name_is_written_under_the_first(tmp_path: Path, diffusers_folder: Path) -> None:
    path = diffusers_folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    expected = tensors.pop("shared.weight")
    save_file(tensors | {"encoder.embed_tokens.weight": expected, "lm_head.weight": torch.zeros(2)}, path)
    list(convert(diffusers_folder, tmp_path / "converted"))
    written = load_file(tmp_path / "converted/text_encoder/model.safetensors")
    assert torch.equal(written["shared.weight"], expected.bfloat16())
    assert "lm_head.weight" not in written
    assert "encoder.embed_tokens.weight" not in written


def test_nothing_is_left_of_a_conversion_that_is_stopped_or_fails(
    tmp_path: Path, diffusers_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())
    weights = iter(range(50))
    events = list(convert(diffusers_folder, tmp_path / "new", stop=lambda: next(weights) == 40))
    assert not any(isinstance(event, Done) for event in events)
    assert next(weights) == 41
    assert sorted(tmp_path.iterdir()) == before

    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1000))
    with pytest.raises(ResourcesError, match=r"converted model needs \d MB of disk, and .* has 0 MB"):
        list(convert(diffusers_folder, tmp_path / "new"))
    assert sorted(tmp_path.iterdir()) == before


def test_bad_sources_and_targets_are_refused(tmp_path: Path, diffusers_folder: Path) -> None:
    with pytest.raises(ValueError, match="model exists already: give a new folder"):
        list(convert(diffusers_folder, diffusers_folder))
    with pytest.raises(ValueError, match=r"config\.json is a file, and .* would be in it: give another folder"):
        list(convert(diffusers_folder, diffusers_folder / "vae" / "config.json" / "new"))
    with pytest.raises(ValueError, match="'tiny' has no files"):
        list(convert("tiny", tmp_path / "new"))
    with pytest.raises(ValueError, match="dtype='float32' is not one of bfloat16, float16"):
        list(convert(diffusers_folder, tmp_path / "new", dtype="float32"))
    config = diffusers_folder / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "x"}}))
    with pytest.raises(ValueError, match="transformer is quantised, or of another library"):
        list(convert(diffusers_folder, tmp_path / "new"))
    (diffusers_folder / "vae/config.json").write_text('{"_class_name": "AutoencoderKLWan", "z_dim": 48}')
    with pytest.raises(WrongArchitectureError, match="vae is not exactly its checkpoint"):
        list(convert(diffusers_folder, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_progress_counts_the_bytes_of_all_parts() -> None:
    from pusa.events import BytesProgress
    from pusa.models.streaming import LoadCounter

    told: list[Any] = []
    times = iter((0.0, 0.1, 1.0, 3.0))
    progress = BytesProgress(told.append, "convert", clock=lambda: next(times))
    counter = LoadCounter(progress, 4_000_000_000)
    for _ in range(4):
        counter.add(1_000_000_000)
    assert told == [Step(3000, 4000, 0.5, "convert"), Step(4000, 4000, 0.0, "convert")]
