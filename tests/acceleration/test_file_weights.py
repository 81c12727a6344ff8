"""A plan knows from headers how a file stores its weights, and what they take in memory if they stay so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from single_file_samples import HEADS, declaration, matrices, scaled, transformer_tensors, write, write_gguf
from sparse_models import text_encoder_shapes, transformer_shapes, write_sparse

from pusa import added_models, load_single_file
from pusa.acceleration.decisions import Card, LoadOptions, Machine
from pusa.acceleration.file_weights import read_files
from pusa.acceleration.planning import plan

GB = 10**9
KINDS = {"Q8_0": "gguf", "fp8": "fp8", "int8": "int8", "full": "bfloat16"}


def written(folder: Path, kind: str) -> Path:
    tensors = transformer_tensors(ffn_dim=256)
    layers = matrices(tensors)
    if kind == "full":
        return write(folder / "wan.safetensors", tensors)
    if kind == "Q8_0":
        return write_gguf(folder / "wan.gguf", tensors, {f"{name}.weight": kind for name in layers})[0]
    stored, _ = scaled(
        tensors, layers, spelling="weight_scale", dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn
    )
    if kind == "int8":
        stored |= {f"{name}.comfy_quant": declaration("int8_tensorwise") for name in layers}
    return write(folder / "wan.safetensors", stored)


def bytes_of(model: Any) -> int:
    """Bytes of a model's parameters, as they are stored."""
    total = 0
    for parameter in model.parameters():
        inner = [getattr(parameter, name) for name in ("qdata", "scale") if hasattr(parameter, name)]
        total += sum(tensor.nbytes for tensor in inner or [parameter])
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_tells_storage_and_size(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("gguf")
    path = written(tmp_path, kind)
    options = read_files(LoadOptions(transformer=path), {})
    assert options.file_storage == {"transformer": KINDS[kind]}
    kept = load_single_file(path, config=HEADS, torch_dtype=torch.bfloat16, keep_quantized=True)["transformer"]
    assert options.file_bytes["transformer"] == pytest.approx(bytes_of(kept), rel=0.05)
    path.unlink()
    path.with_suffix(".other").touch()
    assert read_files(LoadOptions(transformer=path), {}).file_storage == {}
    assert read_files(LoadOptions(transformer=path.with_suffix(".other")), {}).file_storage == {}


def test_what_the_options_say_goes_first(tmp_path: Path) -> None:
    path = written(tmp_path, "fp8")
    known = LoadOptions(transformer=path, file_storage={"transformer": "int8"}, file_bytes={"transformer": 7})
    assert read_files(known, {}) == known
    assert read_files(known, {}).file_storage == {"transformer": "int8"}
    assert read_files(LoadOptions(), {"transformer": path}).file_storage == {"transformer": "fp8"}
    assert read_files(LoadOptions(), {}) == LoadOptions()


def test_an_all_in_one_file_tells_all_its_parts(golden: Path) -> None:
    path = golden / "singlefiles/all_in_one_checkpoint.safetensors"
    assert set(read_files(LoadOptions(transformer=path), {}).file_storage) == {"transformer", "text_encoder", "vae"}


def test_models_that_were_added_and_comfyuis_folder_are_planned_as_their_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUSA_HOME", str(tmp_path / "home"))
    models = tmp_path / "ComfyUI/models"
    transformer = write_sparse(models / "diffusion_models/t.safetensors", transformer_shapes("wan2.1-14b"), "F8_E4M3")
    write_sparse(models / "text_encoders/umt5.safetensors", text_encoder_shapes(), "F8_E4M3")
    machine = Machine((Card(24 * GB, capability=(8, 9)),), ram_bytes=48 * GB, disk_bytes=100 * GB)
    found = plan(str(tmp_path / "ComfyUI"), machine=machine)
    parts = found.parts
    assert [parts[name].storage for name in ("transformer", "text_encoder", "vae")] == ["fp8", "fp8", "bfloat16"]
    assert [parts[name].kept for name in ("transformer", "text_encoder", "vae")] == [True, True, False]
    added_models.write(added_models.AddedModel("mine", "wan2.1-14b", {"transformer": transformer}))
    added = plan("mine", machine=machine).parts
    assert (added["transformer"], added["text_encoder"].storage) == (parts["transformer"], "bfloat16")
    full = plan("mine", machine=machine, options=LoadOptions(quantize="none")).parts["transformer"]
    assert (full.storage, full.kept) == ("bfloat16", False)
