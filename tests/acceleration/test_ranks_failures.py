"""A rank that ends or hangs ends the run with its name, and no file is left.

On CPU ranks with gloo. The test is rank 0, and every test starts its own.
"""

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rank_samples import INPUTS, run, start
from server_samples import wait_until

from pusa.acceleration.decisions import LoadOptions
from pusa.acceleration.ranks import RankError
from pusa.generate import generate, load_pipeline
from pusa.request import GenerationRequest

pytestmark = pytest.mark.slow  # each rank imports torch, diffusers and transformers


def find_follower() -> psutil.Process:
    """Find rank 1 among the processes of this one: `multiprocessing` may have left one of its own."""

    def find() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if "--rank=1" in child.cmdline()]

    (process,) = wait_until(find)  # a process that was just started has no command line for a moment
    return process


@pytest.mark.parametrize("stage", ["load", "encode", "denoise", "decode"])
def test_a_killed_rank_ends_the_run_with_its_name_and_no_file(stage: str, files: Path) -> None:
    request = GenerationRequest(model="tiny", prompt="a cat", seed=0, steps=30, frames=33)
    with start(2) as ranks:
        follower = find_follower()

        def kill(*_: Any) -> None:
            if stage == "encode":
                follower.kill()

        def consume() -> None:
            for event in generate(request, files / "x.mp4", ranks=ranks):
                if getattr(event, "stage", "") == stage and follower.is_running():
                    follower.kill()

        hook = load_pipeline("tiny", load=LoadOptions(gpus=2)).text_encoder.register_forward_pre_hook(kill)
        with pytest.raises(RankError) as caught:
            consume()
        hook.remove()
    assert "rank 1 of 2 " in str(caught.value)
    assert "SIGKILL" in str(caught.value)
    assert caught.value.rank == 1
    assert {file.name for file in files.iterdir()} == INPUTS


def test_a_rank_that_hangs_is_named_and_killed(files: Path) -> None:
    request = GenerationRequest(model="tiny", prompt="a cat", seed=0, steps=30)
    began = 0.0
    with start(2, silence_seconds=2.0) as ranks:
        follower = find_follower()

        def consume() -> None:
            nonlocal began
            for event in generate(request, files / "x.mp4", ranks=ranks):
                if event.kind == "step" and follower.status() != psutil.STATUS_STOPPED:
                    follower.send_signal(signal.SIGSTOP)
                    began = time.monotonic()

        with pytest.raises(RankError, match=r"rank 1 of 2 hangs during denoise: no sign of life for 2 s"):
            consume()
        assert time.monotonic() - began < 10
    assert not (files / "x.mp4").exists()
    assert not follower.is_running()


def test_a_rank_that_cannot_load_tells_why(files: Path) -> None:
    with (
        pytest.raises(RankError, match=r"rank 1 of 2 has ended during load: exit code 1 \(.*no_such_module"),
        start(2, module="no_such_module") as ranks,
    ):
        run(files, "x", ranks)
