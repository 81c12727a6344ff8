"""Run `pusa train`: from a configuration to an adapter, alone or under a launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import pusa
from safetensors import safe_open
from safetensors.torch import load_file
from training_samples import write_dataset

from pusa.training.checkpoint import checkpoints
from pusa.training.reports import read_metrics

TINY = [
    "steps=4",
    "batch_size=2",
    "model.source=tiny",
    "model.dtype=fp32",
    "model.gradient_checkpointing=false",
    "method.rank=4",
    "method.alpha=4",
    "data.held_out_share=0.25",
    "optimizer.lr=0.01",
    "report.tracker=none",
    "report.log_every=1",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, with a dataset in ``clips``."""
    return write_dataset(tmp_path / "clips").parent


def settings(*more: str) -> list[str]:
    return [part for change in (*TINY, "data.folders=clips", *more) for part in ("--set", change)]


def test_a_run_prints_its_folder_and_leaves_an_adapter(folder: Path) -> None:
    result = pusa(
        "train", "mini-vta", *settings("name=first", "global_batch=null", "batch_frames=null", "data.lengths=[]")
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == "runs/first\n"
    with safe_open(folder / "runs" / "first" / "adapter.safetensors", framework="pt") as file:
        assert file.metadata()["steps"] == "4"
    assert pusa("train", "runs/first", "--resume", "steps=6").exit_code == 0  # changes without --set, too
    assert read_metrics(folder / "runs" / "first")[-1]["step"] == 6
    again = pusa("train", "runs/first")
    assert again.exit_code == 2
    assert "pusa: runs/first holds a run already: go on with --resume" in again.stderr


def test_other_data_take_a_flag(folder: Path) -> None:
    more = ("name=first", "global_batch=null", "batch_frames=null", "data.lengths=[]", "steps=2")
    assert pusa("train", "mini-vta", *settings(*more)).exit_code == 0
    write_dataset(folder / "others", clips=9)
    others = ("train", "runs/first", "--resume", "data.folders=others", "steps=3")
    refused = pusa(*others)
    assert refused.exit_code == 2
    assert "--other-data" in refused.stderr
    assert pusa(*others, "--other-data").exit_code == 0
    assert "goes with --resume" in pusa("train", "runs/first", "--other-data").stderr


def test_a_configuration_can_be_printed_changed_and_used(folder: Path) -> None:
    (folder / "own.toml").write_text(pusa("train", "configs", "wan2.1-1.3b-vta").stdout)
    result = pusa("train", "own.toml", *settings("name=own", "steps=1", "global_batch=null"))
    assert result.exit_code == 0, result.output
    stored = json.loads((folder / "runs" / "own" / "config.json").read_text())
    assert (stored["steps"], stored["optimizer"]["lr"], stored["schedule"]["warmup_steps"]) == (1, 0.01, 20)


def test_ready_configurations_are_listed_with_what_they_are() -> None:
    lines = pusa("train", "configs").stdout.splitlines()
    wan = ["wan2.1-1.3b-vta", "wan2.1-14b-vta", "wan2.2-a14b-vta", "wan2.2-ti2v-5b-vta"]
    assert [line.split()[0] for line in lines] == ["fvdm", "mini-vta", "pusa-v0.5", *wan]
    assert "Pusa V1.0 as released" in lines[4]


def test_export_writes_the_layout_of_its_option(folder: Path) -> None:
    pusa("train", "mini-vta", *settings("name=run", "data.lengths=[]"))
    result = pusa("train", "export", "runs/run", "-o", "out/pusa.safetensors", "--layout", "original", "--scale", "1.4")
    assert result.exit_code == 0, result.output
    assert result.stdout == "out/pusa.safetensors\n"
    with safe_open(folder / "out" / "pusa.safetensors", framework="pt") as file:
        assert "blocks.0.self_attn.q.lora_A.default.weight" in file.keys()  # noqa: SIM118
        assert file.metadata()["scale"] == "1.4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "estimate", "mini-vta", "optimizer.lr=fast"], "optimizer.lr='fast' is not a number"),
        (["train", "mini-vta"], "data.folders is empty: name a folder that `pusa data prepare` has made"),
        (["train", "mini-vta", "data.folders=nowhere"], "nowhere holds no dataset (dataset.json is missing)"),
        (
            ["train", "nothing"],
            "there is no configuration 'nothing': give a .toml file, the folder of a run, or one of",
        ),
        (["train", "configs", "nothing"], "no configuration is called 'nothing': there are fvdm, mini-vta"),
        (["train", "export", "nothing", "-o", "x.safetensors"], "there is no configuration 'nothing'"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    result = pusa(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"pusa: {message}")
    assert result.stderr.count("\n") == 1


def test_every_problem_has_a_line(folder: Path) -> None:
    result = pusa("train", "mini-vta", "data.folders=nowhere", "optimizer.lr=1e9", "start_from=nofile.pt")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["pusa:"] * 3
    for part in ("at most 1", "nowhere holds no dataset", "start_from=nofile.pt: there is no such file"):
        assert any(part in line for line in lines)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from pusa.cli import main\ntry: main(['train', '--help'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert all(name in done.stdout for name in ("configs", "estimate", "export", "run"))


# ---- as processes of their own -------------------------------------------------------------------------------------


def start(*command: str, cwd: Path, **more: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def wait_for(process: subprocess.Popen[str], is_there: Any) -> None:
    deadline = time.monotonic() + 300
    while not is_there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_there(), process.communicate()


def outcome(folder: Path) -> tuple[list[Any], dict[str, bytes]]:
    losses = [(entry["step"], entry["loss"]) for entry in read_metrics(folder) if "loss" in entry]
    tensors = load_file(folder / "adapter.safetensors")
    return losses, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SIGKILL: nothing can be saved or tidied up."""
    changes = settings("steps=40", "checkpoint.every_steps=5", "data.lengths=[2, 3]", "ema_decay=0.9", "batch_size=1")
    killed, whole = folder / "runs" / "killed", folder / "runs" / "whole"
    process = start("pusa", "train", "mini-vta", *changes, "name=killed", cwd=folder)
    wait_for(process, lambda: max(checkpoints(killed), default=0) >= 10)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = max(checkpoints(killed))
    assert 10 <= reached < 40
    assert not (killed / "adapter.safetensors").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed one had: another number rounds in another way
    try:
        resumed = pusa("train", "mini-vta", *changes, "name=killed", "--resume")
        uninterrupted = pusa("train", "mini-vta", *changes, "name=whole")
    finally:
        torch.set_num_threads(threads)
    assert resumed.exit_code == 0, resumed.output
    assert f"going on after step {reached}" in caplog.text
    assert uninterrupted.exit_code == 0, uninterrupted.output
    assert outcome(killed) == outcome(whole)


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_a_checkpoint(folder: Path) -> None:
    process = start("pusa", "train", "mini-vta", *settings("steps=100000", "name=long"), cwd=folder)
    run = folder / "runs" / "long"
    wait_for(process, lambda: len(read_metrics(run)) >= 3)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=300)
    (reached,) = checkpoints(run)
    assert process.returncode == 130
    assert f"pusa: stopped after step {reached}, whose state is written: go on with --resume" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            "-m",
        ],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"],
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_launchers_of_several_processes(folder: Path, launcher: list[str]) -> None:
    process = start(*launcher, "pusa", "train", "mini-vta", *settings("name=two"), cwd=folder)
    output, log = process.communicate(timeout=600)
    assert process.returncode == 0, log
    assert output == "runs/two\n"
    facts = json.loads((folder / "runs" / "two" / "run.json").read_text())
    assert facts["layout"]["processes"] == 2
    assert facts["clips_per_step"] == 4
