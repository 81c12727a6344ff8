"""Several processes give what one gives: Ulysses context parallelism and FSDP2, on two CPU processes with gloo."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from components import make_transformer
from diffusers import ContextParallelConfig
from gloo import all_gather_of_any_size, run_in_processes
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pusa.models.wan import PusaWanTransformer3DModel

pytestmark = pytest.mark.slow  # each process imports torch, diffusers and transformers
WORLD = 2
FRAMES = 5


def make_model() -> PusaWanTransformer3DModel:
    return PusaWanTransformer3DModel.from_wan(make_transformer(num_attention_heads=4, attention_head_dim=24))


def inputs(height: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 16, FRAMES, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 48, generator=generator),
    }


def timesteps(tokens: int) -> dict[str, Tensor]:
    """For two videos: one per sample, per frame (some equal, some 0), and per token (all different)."""
    return {
        "sample": torch.tensor([900.0, 20.0]),
        "frame": torch.tensor([[0.0, 937.5, 300.0, 937.5, 12.25], [1000.0, 0.0, 1000.0, 700.0, 1000.0]]),
        "token": torch.rand(2, tokens, generator=torch.Generator().manual_seed(1)) * 1000,
    }


@torch.no_grad()
def velocities(model: torch.nn.Module, height: int, width: int) -> dict[str, Tensor]:
    x = inputs(height, width)
    tokens = FRAMES * height * width // 4
    found = {}
    for name, timestep in timesteps(tokens).items():
        found[f"{name}/tuple"] = model(timestep=timestep, return_dict=False, **x)[0]
        found[f"{name}/dataclass"] = model(timestep=timestep, return_dict=True, **x).sample
    return found


def loss_and_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    output = model(timestep=timesteps(60)["frame"], return_dict=False, **inputs(6, 8))[0]
    loss = output.square().mean()
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def worst_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == expected.keys()
    return {name: float((ours[name] - e).abs().max() / e.abs().max()) for name, e in expected.items()}


def context_parallel(height: int, width: int, **config: Any) -> dict[str, float]:
    expected = velocities(make_model(), height, width)
    model = make_model()
    rows: list[int] = []  # tokens that reach the second block of this process
    model.blocks[1].register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[1]))
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD, **config))
    found = worst_difference(velocities(model, height, width), expected)
    return found | {"tokens here": float(rows[0])}


def sharded() -> dict[str, Any]:
    expected = loss_and_gradients(make_model())
    model = make_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        differences = worst_difference(loss_and_gradients(model), expected)
    weight = model.blocks[0].ffn.net[2].weight
    return {
        "share": weight.to_local().numel() / weight.numel(),
        "differences": differences,
        "warnings": [str(warning.message) for warning in caught if "view" in str(warning.message)],
    }


def promotion_after_sharding() -> str:
    stock = make_transformer(num_layers=1)
    fully_shard(stock)
    with pytest.raises(TypeError) as refused:
        PusaWanTransformer3DModel.from_wan(stock)
    return str(refused.value)


def in_each_process(rank: int) -> dict[str, Any]:
    torch.accelerator.device_count = lambda: WORLD  # diffusers counts accelerators, of which a CPU build has none
    dist.all_gather = all_gather_of_any_size  # type: ignore[assignment]
    return {
        "ulysses": context_parallel(6, 8),  # 5 frames of 12 tokens: each process ends in the middle of a frame
        "ulysses anything": context_parallel(6, 6, ulysses_anything=True),  # 45 tokens: 23 and 22
        "sharded": sharded(),
        "promotion after sharding": promotion_after_sharding(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run the processes once for all tests and return the findings of each."""
    return run_in_processes(in_each_process, WORLD, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize(("name", "tokens"), [("ulysses", [30, 30]), ("ulysses anything", [23, 22])])
def test_ulysses_gives_the_same_video_whatever_the_timesteps(
    found: list[dict[str, Any]], name: str, tokens: list[int]
) -> None:
    assert [each[name].pop("tokens here") for each in found] == tokens  # the work is really shared
    for each in found:
        assert each[name].keys() == {
            f"{timestep}/{output}" for timestep in ("sample", "frame", "token") for output in ("tuple", "dataclass")
        }
        assert max(each[name].values()) <= 1e-5, each[name]


def test_sharded_training_has_the_same_loss_and_gradients(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["sharded"]["share"] == 1 / WORLD
        assert max(each["sharded"]["differences"].values()) <= 1e-5, each["sharded"]["differences"]


def test_sharding_has_no_complaint_about_views(found: list[dict[str, Any]]) -> None:
    """A block that returned a view would lose its gradient hooks, and FSDP2 says so."""
    assert [each["sharded"]["warnings"] for each in found] == [[], []]


def test_promotion_comes_before_sharding(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "not FSDPWanTransformer3DModel: promote before sharding" in each["promotion after sharding"]
