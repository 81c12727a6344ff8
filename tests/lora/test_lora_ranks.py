"""`pusa lora reduce`: a lower rank from the file alone, as `export_lora` makes it with the model, with its error."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import pusa
from lora_samples import comfyui, make_pairs, official_pickle, pipe, with_differences, write
from safetensors.torch import load_file

from pusa.lora import export_lora, load_pusa
from pusa.lora.ranks import reduce_file


@pytest.fixture
def file(tmp_path: Path, transformer: Any) -> Path:
    tensors, _ = with_differences(transformer, make_pairs(transformer, rank=8))
    return write(tmp_path / "lora.safetensors", tensors)


def test_a_file_alone_gives_what_the_export_with_its_model_gives(tmp_path: Path, transformer: Any, file: Path) -> None:
    report = reduce_file(file, tmp_path / "small.safetensors", 5)
    load_pusa(pipe(transformer), file)
    expected = export_lora(pipe(transformer), tmp_path / "expected.safetensors", rank=5)
    assert (report.rank, report.layers) == (expected.rank, expected.layers) == (5, 26)
    assert report.relative_error == pytest.approx(expected.relative_error)
    assert 0 < report.relative_error < report.worst_error
    small, other = load_file(report.paths[0]), load_file(expected.paths[0])
    assert small.keys() == other.keys()
    assert all(small[key].equal(other[key]) for key in small)


def test_the_command_prints_the_error(tmp_path: Path, transformer: Any) -> None:
    source = official_pickle(tmp_path, make_pairs(transformer, rank=4))
    target = tmp_path / "small.safetensors"
    result = pusa("lora", "reduce", source, target, "--rank", 2, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["rank"], facts["layers"]) == (2, 20)
    assert 0 < float(facts["relative error"]) < 1
    assert load_pusa(pipe(transformer), target) == 20
    whole = pusa("lora", "reduce", source, tmp_path / "whole.safetensors")
    assert "relative error  0.00e+00" in whole.stdout  # rank 4 is below the default


def test_bad_arguments_are_refused(tmp_path: Path, transformer: Any, file: Path) -> None:
    with pytest.raises(ValueError, match="rank=0 is below 1"):
        reduce_file(file, tmp_path / "small.safetensors", 0)
    with pytest.raises(ValueError, match=r"small\.pt must end in \.safetensors"):
        reduce_file(file, tmp_path / "small.pt", 2)
    with pytest.raises(ValueError, match="is the file that is read"):
        reduce_file(file, file, 2)
    with pytest.raises(ValueError, match=r"nowhere is no folder"):
        reduce_file(file, tmp_path / "nowhere" / "small.safetensors", 2)
    pairs = comfyui(make_pairs(transformer, rank=2))
    both = pairs | {key.replace("diffusion_model.", "transformer_2."): value for key, value in pairs.items()}
    with pytest.raises(ValueError, match=r"both experts of Wan2\.2: split it"):
        reduce_file(write(tmp_path / "both.safetensors", both), tmp_path / "small.safetensors", 2)
    odd = write(tmp_path / "odd.safetensors", pairs | {"something": pairs[next(iter(pairs))]})
    with pytest.raises(ValueError, match=r"1 keys of odd\.safetensors belong to no known LoRA layout"):
        reduce_file(odd, tmp_path / "small.safetensors", 2)
    assert not (tmp_path / "small.safetensors").exists()
