"""Several processes train what one trains, sharded (FSDP2) or sharing a clip's tokens (Ulysses), and resume to the bit.

On two CPU processes with gloo. All cases of one number of processes run in one start of them.
"""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from components import make_transformer
from gloo import all_gather_of_any_size, fork_warm
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from training_samples import make_config, write_dataset

from pusa.training.checkpoint import checkpoints
from pusa.training.reports import read_metrics
from pusa.training.trainer import train

pytestmark = pytest.mark.slow  # each process imports torch, diffusers and transformers
WORLD = 2
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 2,
    "global_batch": 4,
    "ema_decay": 0.9,
    "checkpoint": {"every_steps": 3},
    "report": {"held_out_every": 3, "tracker": "none"},
}
CASES: dict[str, dict[str, Any]] = {
    "averaged": {},
    "sharded": {"parallel": {"fsdp": True}, "model": {"gradient_checkpointing": True}},
    "sharded full": {"parallel": {"fsdp": True}, "method": {"kind": "full"}, "optimizer": {"lr": 1e-4}},
    "shared tokens": {"parallel": {"context_parallel": 2}},
    "shared tokens and sharded": {"parallel": {"context_parallel": 2, "fsdp": True}},
    "shared tokens full": {
        "parallel": {"context_parallel": 2},
        "method": {"kind": "full"},
        "optimizer": {"lr": 1e-4},
    },
}


def transformer() -> Any:
    return make_transformer(num_attention_heads=4, attention_head_dim=24)


def run(folder: Path, name: str, *, resume: bool = False, on_validate: Any = None, **changes: Any) -> Path:
    settings = {**SETTINGS, **changes}
    config = make_config(folder / "clips", folder / name.replace(" ", "-"), **settings)
    return train(config, transformer=transformer(), resume=resume, on_validate=on_validate)


def share_of_weights(shares: list[float]) -> Callable[[int, Any], None]:
    def look(step: int, model: Any) -> None:
        weight = model.blocks[0].attn1.to_q.base_layer.weight
        shares.append(weight.to_local().numel() / weight.numel() if isinstance(weight, DTensor) else 1.0)

    return look


def in_each_process(rank: int, folder: Path, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: WORLD  # diffusers counts accelerators, of which a CPU build has none
    dist.all_gather_before, dist.all_gather = dist.all_gather, all_gather_of_any_size  # type: ignore[attr-defined]
    shares: list[float] = []
    for name, changes in CASES.items():
        report = {**SETTINGS["report"], "validate_every": 6}
        run(folder, name, **changes, report=report, on_validate=share_of_weights(shares) if name == "sharded" else None)
    half = {**CASES["sharded"], "steps": 3}
    run(folder, "resumed", **half)
    run(folder, "resumed", resume=True, **CASES["sharded"])
    run(folder, "on one later", **half)
    run(folder, "on two later", resume=True, **CASES["sharded"])
    if rank == 0:
        (folder / "shares.json").write_text(json.dumps(shares))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs: those of two processes, and beside them the same of one, in ``alone``."""
    folder = tmp_path_factory.mktemp("runs")
    write_dataset(folder / "clips", clips=9)
    run(folder, "alone")
    run(folder, "alone full", **{k: v for k, v in CASES["sharded full"].items() if k != "parallel"})
    run(folder, "on two later", steps=3)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork_warm(in_each_process, (folder, port), WORLD)
    return folder


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder) if "loss" in entry]


def held_out(folder: Path) -> list[float]:
    return [entry["held_out_loss"] for entry in read_metrics(folder) if "held_out_loss" in entry]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(checkpoints(folder)[6] / "weights-00001.safetensors")


def worst_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert ours.keys() == expected.keys()
    return max(float((ours[name] - e).abs().max() / e.abs().max()) for name, e in expected.items())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_trains(runs: Path, name: str) -> None:
    alone = runs / ("alone-full" if name.endswith("full") else "alone")
    found = runs / name.replace(" ", "-")
    torch.testing.assert_close(losses(found), losses(alone), rtol=2e-5, atol=0)
    torch.testing.assert_close(held_out(found), held_out(alone), rtol=2e-5, atol=0)
    # Adam divides by gradients that are near 0, so that rounding (1e-7) is 1.0e-3 of a matrix after six steps; the
    # losses above are what tells.
    assert worst_difference(weights(found), weights(alone)) <= 3e-3
    for entry, expected in zip(read_metrics(found), read_metrics(alone), strict=True):
        for kind in ("error_by_level", "error_by_frame", "held_out_error_by_frame"):
            assert entry.get(kind, {}) == pytest.approx(expected.get(kind, {}), rel=1e-4)


def test_weights_are_really_shared_out(runs: Path) -> None:
    assert json.loads((runs / "shares.json").read_text()) == [1 / WORLD]


def test_a_sharded_run_goes_on_to_the_same_bits(runs: Path) -> None:
    whole, resumed = runs / "sharded", runs / "resumed"
    assert losses(resumed) == losses(whole)
    assert worst_difference(weights(resumed), weights(whole)) == 0
    adapters = [load_file(run / "adapter.safetensors") for run in (resumed, whole)]
    assert worst_difference(*adapters) == 0


def test_another_number_of_processes_goes_on_and_says_what_it_is_worth(
    runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.testing.assert_close(losses(runs / "on-two-later"), losses(runs / "alone"), rtol=2e-5, atol=0)
    run(runs, "on one later", resume=True)
    torch.testing.assert_close(losses(runs / "on-one-later"), losses(runs / "alone"), rtol=2e-5, atol=0)
    assert (
        "the run goes on, but not to the same bits as if it had not been stopped: processes was 2 and is 1; "
        "fsdp was True and is False"
    ) in caplog.text
