"""A checkpoint of FVDM or Latte is read once, without running code, and becomes a folder in diffusers layout."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pusa.models.fvdm import tiny
from pusa.models.fvdm.checkpoint import config_from_shapes, convert_checkpoint, load_checkpoint, read_checkpoint
from pusa.models.fvdm.transformer import SIZES, FVDMTransformer3DModel, config_of
from pusa.models.tensors import UnsafeFileError


@pytest.fixture(scope="module")
def model() -> FVDMTransformer3DModel:
    return tiny.components(num_classes=3)["transformer"]


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def latte_name(name: str) -> str:
    """Number the blocks as Latte does: spatial and temporal in turn."""
    for offset, kind in enumerate(("blocks_spatial", "blocks_temp")):
        if match := re.fullmatch(rf"{kind}\.(\d+)\.(.+)", name):
            return f"blocks.{2 * int(match[1]) + offset}.{match[2]}"
    return name


def wrong(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in state.items()}


def layouts(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "FVDM, average": {"ema": state, "model": wrong(state), "opt": {"state": {}, "param_groups": []}},
        "FVDM, no average": {"model": state},
        "weights alone": state,
        "wrapped": {"ema": {f"module._orig_mod.{name}": value for name, value in state.items()}},
        "compiled": {"ema": {f"_orig_mod.{name}": value for name, value in state.items()}},
        "Latte": {"ema": {latte_name(name): value for name, value in state.items()}},
    }


@pytest.mark.parametrize("layout", layouts({}))
def test_every_layout_becomes_the_same_folder(model: FVDMTransformer3DModel, layout: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "0250000.pt", layouts(model.state_dict())[layout])
    folder = convert_checkpoint(path, tmp_path / "models" / "fvdm", num_heads=3)
    assert folder == tmp_path / "models" / "fvdm"
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert [entry.name for entry in folder.parent.iterdir()] == ["fvdm"]
    loaded = FVDMTransformer3DModel.from_pretrained(folder)
    public = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert {name: loaded.config[name] for name in public} == public
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="exists already: give a new folder"):
        convert_checkpoint(path, folder, num_heads=3)


def test_safetensors_and_recorded_weights_load(golden: Path, golden_tensors: Callable) -> None:
    path = golden / "fvdm" / "weights_unconditional.safetensors"
    loaded = load_checkpoint(path, num_heads=3)
    assert loaded.config.num_classes is None
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    recorded = golden_tensors("fvdm/forward_all_unequal")
    with torch.no_grad():
        ours = loaded(recorded["x"].transpose(1, 2), recorded["t"]).sample.transpose(1, 2)
    torch.testing.assert_close(ours, recorded["output_unconditional"], rtol=0, atol=1.5e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 16, "num_classes": 101},
        {"num_frames": 24, "num_classes": None, "learn_sigma": False, "input_size": 64, "in_channels": 16},
    ],
    ids=["ucf101", "other"],
)
def test_the_configuration_follows_from_the_shapes(size: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        expected = FVDMTransformer3DModel(**config_of(f"{size}/2", **options))
    config = config_from_shapes({name: tuple(value.shape) for name, value in expected.state_dict().items()})
    assert config == {name: value for name, value in expected.config.items() if name in config}


def test_what_no_shape_tells_must_be_given() -> None:
    network = FVDMTransformer3DModel(**{**tiny.TRANSFORMER, "input_size": (4, 10)})
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"depth 4 and width 48 are no size of FVDM's .*: give num_heads"):
        config_from_shapes(shapes)
    with pytest.raises(
        ValueError, match="pos_embed has 10 places, and 6 x 6 latents in patches of 2 have 9: give inpu"
    ):
        config_from_shapes(shapes, num_heads=3)
    with pytest.raises(ValueError, match="pos_embed has 10 places, and 8 x 8"):
        config_from_shapes(shapes, num_heads=3, input_size=(8, 8))
    assert config_from_shapes(shapes, num_heads=3, input_size=(4, 10))["input_size"] == (4, 10)
    shapes["final_layer.linear.weight"] = (12, 48)
    with pytest.raises(ValueError, match="4 channels in and 3 out"):
        config_from_shapes(shapes, num_heads=3, input_size=(4, 10))


class Planted:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('the checkpoint ran code')",)


@pytest.mark.parametrize("extra", [Planted(), argparse.Namespace(model="LatteVIDEO-XL/2")], ids=["code", "arguments"])
def test_a_pickle_with_more_than_tensors_is_not_loaded(
    model: FVDMTransformer3DModel, extra: Any, tmp_path: Path
) -> None:
    path = saved(tmp_path / "c.pt", {"ema": model.state_dict(), "args": extra})
    with pytest.raises(UnsafeFileError, match=r"more than tensors.*save the weights alone"):
        convert_checkpoint(path, tmp_path / "out", num_heads=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "holds no state dict"),
        ({"ema": {}}, "holds no state dict"),
        ([torch.zeros(1)], "holds no state dict"),
        (
            {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(2, 2)},
            "no checkpoint of FVDM or Latte: it begins with",
        ),
        (
            {"x_embedder.proj.weight": torch.zeros(2, 2), "text_embedding_projection.1.weight": torch.zeros(1)},
            "with text",
        ),
    ],
)
def test_other_contents_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_checkpoint(saved(tmp_path / "c.pt", content))


def test_wrong_shapes_and_missing_tensors_are_named(model: FVDMTransformer3DModel, tmp_path: Path) -> None:
    state = model.state_dict()
    shortened = state | {"t_embedder.mlp.0.weight": torch.zeros(48, 128)}
    with pytest.raises(ValueError, match=r"t_embedder.mlp.0.weight has shape \(48, 128\) and not \(48, 256\)"):
        load_checkpoint(saved(tmp_path / "a.pt", shortened), num_heads=3)
    del state["blocks_temp.1.attn.proj.bias"]
    with pytest.raises(ValueError, match=r"blocks_temp.1.attn.proj.bias has shape none.*\(1 tensors differ\)"):
        load_checkpoint(saved(tmp_path / "b.pt", state), num_heads=3)


def test_damaged_and_missing_files_are_named(model: FVDMTransformer3DModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt is no file"):
        load_checkpoint(tmp_path / "none.pt")
    whole = saved(tmp_path / "whole.pt", model.state_dict()).read_bytes()
    save_file(dict(model.state_dict()), tmp_path / "whole.safetensors")
    cut = {"a.pt": whole[: len(whole) // 2], "b.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:1000]}
    for name, content in cut.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            load_checkpoint(tmp_path / name)
    (tmp_path / "c.pt").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="no PyTorch file"):
        load_checkpoint(tmp_path / "c.pt")
