"""Several ranks on the command line: `--gpus`, torchrun, Ctrl-C, and a rank that is killed in the middle.

On CPU processes. Rank 0 alone writes, and whatever ends it ends all others.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from command_line import pusa

from pusa.models.wan import PusaWanTransformer3DModel

SMALL = ("--model", "tiny", "--ranks-on", "cpu", "--frames", "5", "--seed", "0")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def start(*words: str) -> subprocess.Popen[str]:
    """Start Python with these arguments in a group of processes of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def generate(output: str, *words: str) -> tuple[str, ...]:
    return "-m", "pusa", "generate", "a red apple", *SMALL, "-o", output, *words


def make_alone(output: Path, seed: str) -> bytes:
    """Make the video in this process."""
    done = pusa(*generate(str(output), "--steps", "2", "--seed", seed)[2:])
    assert done.exit_code == 0, done.output
    return output.read_bytes()


def start_long_run() -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a run on two ranks and wait until it has denoised a step; return it and the processes of other ranks."""
    process = start(*generate("x.mp4", "--gpus", "2", "--steps", "200", "--json"))
    assert process.stdout
    line = next((line for line in process.stdout if '"denoise"' in line and '"step"' in line), "")
    assert line, process.communicate()
    return process, psutil.Process(process.pid).children(recursive=True)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


# ---- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("model", ["mini", "wan2.1-14b"])
def test_gpus_that_are_not_there_are_an_error_with_a_way_out(model: str, tmp_path: Path) -> None:
    done = pusa("generate", "a red apple", "--model", model, "--gpus", 2)
    assert done.exit_code == 2
    assert done.output == "pusa: --gpus 2: this machine has no GPU that PyTorch can use: leave --gpus out\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["0", "two", "1.5", "-1"])
def test_gpus_are_a_whole_number_from_1(value: str) -> None:
    done = pusa("generate", "a red apple", "--gpus", value)
    assert done.exit_code == 2
    assert f"'--gpus': '{value}' is no whole number from 1: give one, or leave --gpus out" in done.output


def test_ranks_of_torchrun_leave_decoding_to_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert pusa("decode", "not-here.safetensors").exit_code == 0
    monkeypatch.setenv("RANK", "0")
    assert pusa("decode", "not-here.safetensors").exit_code != 0


# ---- torchrun --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_runs_of_torchrun_at_once_leave_the_whole_video_of_one(tmp_path: Path) -> None:
    runs = [start(*TORCHRUN, *generate("x.mp4", "--steps", "2", "--seed", seed)) for seed in "12"]
    for process in runs:
        output, log = process.communicate(timeout=300)
        assert (process.returncode, output) == (0, "x.mp4\n"), log  # one rank reports
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does: another number rounds in another way
    try:
        videos = [make_alone(tmp_path / f"{seed}.mp4", seed) for seed in "12"]
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "x.mp4").read_bytes() in videos
    assert {file.name for file in tmp_path.iterdir()} == {"1.mp4", "2.mp4", "x.mp4"}


# ---- runs that end early ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks_and_leaves_no_file(tmp_path: Path) -> None:
    process, others = start_long_run()
    os.killpg(process.pid, signal.SIGINT)  # reaches every process of a terminal
    _, log = process.communicate(timeout=60)
    assert process.returncode == 130, log
    assert "stopped, nothing was written" in log
    assert others
    wait_until_gone(others)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_command_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rank 0 in this process, which has imported the libraries."""
    forward, others, began = PusaWanTransformer3DModel.forward, [], 0.0

    def kill_the_other(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal began
        if not others:
            others.extend(child for child in psutil.Process().children() if "--rank=1" in child.cmdline())
            began = time.monotonic()
            others[0].kill()
        return forward(self, *args, **options)

    monkeypatch.setattr(PusaWanTransformer3DModel, "forward", kill_the_other)
    done = pusa(*generate("x.mp4", "--gpus", "2", "--steps", "200")[2:])
    assert time.monotonic() - began < 30
    assert done.exit_code == 1
    assert "pusa: rank 1 of 2 has ended during denoise: killed by SIGKILL" in done.output
    wait_until_gone(others)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_no_rank_outlives_rank_0(tmp_path: Path) -> None:
    process, others = start_long_run()
    process.kill()
    process.communicate()
    wait_until_gone(others)
    assert not (tmp_path / "x.mp4").exists()
