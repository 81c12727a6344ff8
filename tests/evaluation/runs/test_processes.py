"""Several processes of one machine: one that dies, the parent's death, cards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import SUPPORT
from run_samples import DyingMaker, GreyMaker, make_run

from pusa.evaluation.runs import Item, LocalMaker, RunFolder, make_in_processes, make_videos
from pusa.evaluation.runs.processes import environments
from pusa.events import Event, Note
from pusa.request import GenerationRequest


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def contents(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.videos.iterdir()}


def test_a_process_that_is_killed_in_the_middle_costs_nothing(tmp_path: Path) -> None:
    """The videos are those of an uninterrupted run, byte for byte, and no item is made twice."""
    make_videos(whole := make_run(tmp_path / "whole", 6), GreyMaker())
    run = make_run(tmp_path / "run", 6)
    (tmp_path / "deaths").mkdir()
    (tmp_path / "deaths" / "first").touch()
    events: list[Event] = []
    summary = make_in_processes(
        run.folder, 2, maker=DyingMaker(tmp_path / "deaths", "clip 1"), lease_seconds=600, report=events.append
    )
    assert (summary.made, summary.made_here, summary.failed) == (6, 6, ())
    assert contents(run) == contents(whole)
    assert not list(run.parts.iterdir())
    assert not list(run.claims.iterdir())
    notes = [event.message for event in events if isinstance(event, Note)]
    assert any("killed by SIGKILL" in note for note in notes)
    attempts = {record.name: record.attempts for item in run.items if (record := run.record_of(item))}
    assert attempts == {f"clip {number}": 2 if number == 1 else 1 for number in range(6)}


def test_an_item_that_kills_every_process_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    (tmp_path / "deaths").mkdir()
    for number in range(9):
        (tmp_path / "deaths" / str(number)).touch()
    summary = make_in_processes(run.folder, 1, maker=DyingMaker(tmp_path / "deaths", "clip 0"), attempts=2)
    assert summary.made == 2
    assert [(failure.name, failure.attempts) for failure in summary.failed] == [("clip 0", 2)]


def test_each_process_has_a_card_or_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environments(2, ["4", "6", "7"], 64) == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "6"}]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environments(2, [], 5) == [{"OMP_NUM_THREADS": "2"}] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user's own
    assert environments(2, [], 5) == [{}] * 2
    with pytest.raises(ValueError, match="--processes 3: this machine has 2 cards"):
        environments(3, ["0", "1"], 64)


_PARENT = """
import sys
from pathlib import Path
from run_samples import SlowMaker
from pusa.evaluation.runs import make_in_processes
make_in_processes(Path(sys.argv[1]), 2, maker=SlowMaker(0.3))
"""


def test_processes_end_with_their_parent_and_the_run_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, 8)
    with subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)]) as parent:
        deadline = time.monotonic() + 60
        while not list(run.videos.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(parent.pid, signal.SIGKILL)
    while list(run.claims.glob("*.lock")) and time.monotonic() < deadline:
        time.sleep(0.05)
    made = len(run.items) - len(run.missing())
    assert 0 < made < 8
    assert not list(run.claims.iterdir())
    summary = make_videos(run, GreyMaker())
    assert (summary.made, summary.made_here) == (8, 8 - made)


_WORKER = """
import sys
from pathlib import Path
from pusa.evaluation.runs import LocalMaker, RunFolder, make_videos
make_videos(RunFolder.open(Path(sys.argv[1])), LocalMaker())
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_of_a_model_ends_with_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # another number rounds in another way
    items = [
        Item(
            f"clip {number}",
            GenerationRequest(model="tiny", prompt="a cat", seed=number, frames=9, width=64, height=64, steps=6),
        )
        for number in range(4)
    ]
    runs = [RunFolder.create(tmp_path / name, "sample", {}, items) for name in ("whole", "killed")]
    whole, killed = runs
    command = [sys.executable, "-c", _WORKER]
    with subprocess.Popen([*command, str(killed.folder)]) as worker:
        deadline = time.monotonic() + 300
        while not (list(killed.videos.iterdir()) and list(killed.parts.iterdir())):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(worker.pid, signal.SIGKILL)  # in the middle of the second one or later
    assert killed.missing()
    assert list(killed.claims.glob("*.lock"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in runs:
            make_videos(run, LocalMaker())
    finally:
        torch.set_num_threads(threads)
    assert contents(killed) == contents(whole)
    assert len(contents(whole)) == 4
    assert not killed.problems(decode=True)
