"""A run goes on from an adapter: Pusa's own layout, the embedded model's, or another run's export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_samples import make_config, write_dataset

from pusa import zoo
from pusa.lora import load_pusa
from pusa.lora.layouts import read_lora, write_lora
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.training.config import TrainConfig, load_config
from pusa.training.distributed import connect_processes
from pusa.training.export import export_run
from pusa.training.model import load_transformer, prepare
from pusa.training.trainer import train


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def first(clips: Path, tmp_path_factory: pytest.TempPathFactory, tiny_transformer: Callable[..., Any]) -> Path:
    """A finished run, whose adapter is not zero."""
    config = make_config(clips, tmp_path_factory.mktemp("runs") / "first", steps=4)
    return train(config, transformer=tiny_transformer())


@torch.no_grad()
def velocity(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(1, 16, 3, 4, 6, generator=generator), torch.randn(1, 8, 48, generator=generator)
    return PusaWanTransformer3DModel.from_wan(model).eval()(
        x, torch.tensor([[0.0, 300.0, 900.0]]), text, return_dict=False
    )[0]


def begun(model: Any, config: TrainConfig) -> Any:
    return prepare(model, config, connect_processes(1), [(16, 3, 4, 6)])[0]


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfyui", "run"])
def test_a_run_begins_where_the_adapter_ends(
    first: Path, tiny_transformer: Callable[..., Any], tmp_path: Path, layout: Any
) -> None:
    source = first
    if layout != "run":
        [source] = export_run(first, tmp_path / "exported.safetensors", layout=layout)
    expected = tiny_transformer()
    load_pusa(expected, source, alpha=1.0)
    config = make_config(None, tmp_path / "run", start_from=str(source), method={"rank": 6, "alpha": 3.0})
    torch.testing.assert_close(velocity(begun(tiny_transformer(), config)), velocity(expected), rtol=0, atol=2e-5)
    full = make_config(None, tmp_path / "full", start_from=str(source), method={"kind": "full"})
    torch.testing.assert_close(velocity(begun(tiny_transformer(), full)), velocity(expected), rtol=0, atol=2e-5)
    assert (velocity(expected) - velocity(tiny_transformer())).abs().max() > 1e-2


def test_pusa_s_own_pickle_is_taken_as_it_is(first: Path, tiny_transformer: Callable[..., Any], tmp_path: Path) -> None:
    [exported] = export_run(first, tmp_path / "exported.safetensors", layout="original")
    from safetensors.torch import load_file

    torch.save(load_file(exported), tmp_path / "pusa_v1.pt")
    expected = tiny_transformer()
    load_pusa(expected, exported, alpha=1.0)
    config = make_config(None, tmp_path / "run", start_from=str(tmp_path / "pusa_v1.pt"))
    torch.testing.assert_close(velocity(begun(tiny_transformer(), config)), velocity(expected), rtol=0, atol=2e-5)


@pytest.mark.skipif("mini" not in zoo.ZOO, reason="the package lacks its weights")
def test_the_embedded_model_s_adapter_is_named_by_its_model(tmp_path: Path) -> None:
    config = load_config("mini-vta", {"start_from": "mini", "model.dtype": "fp32", "output": str(tmp_path / "run")})
    model = begun(load_transformer(config, "transformer"), config)
    assert zoo.ZOO["mini"].lora is not None
    pairs = read_lora(zoo.ZOO["mini"].lora.fetch()["transformer"]).pairs
    for name, (a, b) in pairs.items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.lora_B["pusa"].weight @ layer.lora_A["pusa"].weight, b.float() @ a.float())


def test_training_goes_on_from_it_and_a_resume_needs_it_no_more(
    clips: Path, first: Path, tiny_transformer: Callable[..., Any], tmp_path: Path
) -> None:
    [source] = export_run(first, tmp_path / "exported.safetensors")
    config = make_config(clips, tmp_path / "run", start_from=str(source), steps=2, optimizer={"lr": 1e-4})
    folder = train(config, transformer=tiny_transformer())
    before, after = read_lora(source).pairs, read_lora(folder / "adapter.safetensors").pairs
    moved = max(float((after[n][1] @ after[n][0] - b @ a).norm() / (b @ a).norm()) for n, (a, b) in before.items())
    assert 0 < moved < 0.1  # near it, but not the same
    source.unlink()
    again = make_config(clips, tmp_path / "run", start_from=str(source), steps=3)
    train(again, transformer=tiny_transformer(), resume=True)


def test_an_adapter_that_the_run_cannot_hold_is_refused(
    first: Path, tiny_transformer: Callable[..., Any], tmp_path: Path
) -> None:
    source = str(first)

    def refusal(start_from: str, **method: Any) -> str:
        config = make_config(None, tmp_path / "run", start_from=start_from, method=method)
        with pytest.raises((ValueError, FileNotFoundError)) as refused:
            begun(tiny_transformer(), config)
        return str(refused.value)

    assert "has rank 4, more than method.rank=2: set method.rank=4 and method.alpha=8" in refusal(source, rank=2)
    assert "layers that this run does not train" in refusal(source, targets=["to_q"])
    assert "no adapter of this model is known" in refusal("wan2.1-1.3b")
    assert "nowhere" in refusal("nowhere.safetensors")
    pairs = read_lora(first / "adapter.safetensors").pairs
    bias = {"proj_out.bias": torch.zeros_like(tiny_transformer().proj_out.bias)}
    write_lora(tmp_path / "bias.safetensors", pairs, bias, layout="comfyui", metadata={})
    assert "changes 1 parameters (such as proj_out.bias)" in refusal(str(tmp_path / "bias.safetensors"))
    with pytest.raises(ValueError, match=r"start_from=nowhere/x/y: there is no such file"):
        load_config("mini-vta", {"start_from": "nowhere/x/y", "data.folders": ["nowhere"]}, needs_files=True)
