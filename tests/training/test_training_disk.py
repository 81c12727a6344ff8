"""The disk that checkpoints take: counted, checked before the first step, and reported when it fills up."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import pusa
from safetensors import SafetensorError
from training_samples import make_config, write_dataset

from pusa.resources import ResourcesError
from pusa.training import checkpoint, disk
from pusa.training.checkpoint import checkpoints
from pusa.training.disk import disk_need
from pusa.training.trainer import train


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema_decay": 0.9}, {"optimizer": {"name": "muon"}}, {"method": {"kind": "full"}}],
    ids=["lora", "average", "muon", "full"],
)
def test_the_count_is_what_a_run_leaves(
    clips: Path, tiny_transformer: Callable[..., Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = make_config(clips, tmp_path / "run", steps=4, checkpoint={"every_steps": 1, "keep_last": 2}, **changes)
    folder = train(config, transformer=tiny_transformer())
    trained = json.loads((folder / "run.json").read_text())["trained_parameters"]
    need = disk_need(config, trained)
    assert need.checkpoints == 3  # two are kept, and the next one is written before the older is deleted
    one = size(folder / "checkpoints" / "step-00000004")
    # Muon leaves AdamW the matrices outside the blocks, and headers and counters come on top
    assert need.checkpoint * 0.98 < one < need.checkpoint * 1.02 + 100_000
    result = folder / "model" if config.method.kind == "full" else folder / "adapter.safetensors"
    written = size(result) if result.is_dir() else result.stat().st_size
    assert need.result * 0.98 < written < need.result * 1.02 + 50_000


def test_the_number_of_checkpoints_follows_the_rule(tmp_path: Path) -> None:
    def count(steps: int | None = 100, **rule: Any) -> int:
        changes: dict[str, Any] = {"steps": steps} if steps else {"seconds": 60.0}
        return disk_need(make_config(None, tmp_path, checkpoint=rule, **changes), 1).checkpoints

    assert count(every_steps=None) == 1  # that of the end
    assert count(every_steps=100) == 1
    assert count(every_steps=10) == 3
    assert count(every_steps=10, keep_last=50) == 10
    assert count(every_steps=10, keep_every=25) == 5  # 50 and 100 are multiples of both
    assert count(None, every_steps=None, every_seconds=1.0, keep_last=4) == 5


def test_the_estimate_says_what_checkpoints_take() -> None:
    result = pusa("train", "estimate", "wan2.1-14b-vta", "--gpu", "h200", "--count", "8", "--json")
    report = json.loads(result.stdout)
    trained = report["trained_parameters"]
    assert report["disk_bytes"] == {
        "checkpoint": 12 * trained,
        "checkpoints": 3,
        "result": 4 * trained,
        "total": 40 * trained,
    }
    text = pusa("train", "estimate", "wan2.1-14b-vta", "--gpu", "h200", "--count", "8").stdout
    [line] = [line for line in text.splitlines() if line.startswith("disk")]
    assert "3 checkpoints of" in line
    assert "one of them being written" in line


def test_too_little_disk_is_an_error_before_the_first_step(
    clips: Path, tiny_transformer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_disk_bytes", lambda folder: 1_000_000)
    config = make_config(clips, tmp_path / "run", method={"kind": "full"})
    with pytest.raises(ResourcesError, match=r"need \d+ MB of disk .* and 1 MB are free: .*output=FOLDER"):
        train(config, transformer=tiny_transformer())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_disk_that_fills_up_costs_no_earlier_checkpoint(
    clips: Path,
    tiny_transformer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    write, written = checkpoint.save_file, []

    def save_until_full(tensors: Any, path: Path) -> None:
        written.append(path)
        if "step-00000004" in str(path) and path.name.startswith("optimizer"):
            path.write_bytes(b"half")
            raise error
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_until_full)
    config = make_config(clips, tmp_path / "run", checkpoint={"every_steps": 2})
    with pytest.raises(ResourcesError) as refused:
        train(config, transformer=tiny_transformer())
    for part in ("the disk is full: the checkpoint of step 4 in", str(tmp_path / "run"), "needs", "--resume"):
        assert part in str(refused.value)
    assert list(checkpoints(tmp_path / "run")) == [2]
    assert not list((tmp_path / "run").rglob("*.part"))
    monkeypatch.undo()
    train(config, transformer=tiny_transformer(), resume=True)
    assert list(checkpoints(tmp_path / "run"))[-1] == 6
