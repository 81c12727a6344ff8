"""VBench-I2V from the list of prompts to the total: with two workers, one of them killed, as without.

The model has random weights, and a stand-in scores its videos.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vbench_scorer
from click.testing import Result
from command_line import pusa
from vbench_samples import make_suite

from pusa.evaluation.runs import RunFolder
from pusa.evaluation.vbench.totals import DIMENSIONS
from pusa.fsutil import sha256_of

PREPARE = ("--model", "tiny", "--steps", "1", "--frames", "5", "--per-prompt", "2")
WAIT_SECONDS = 300.0


def prepared(folder: Path, suite: Path) -> RunFolder:
    shown = pusa("eval", "vbench", "prepare", folder, "--suite", suite, *PREPARE)
    assert shown.exit_code == 0, shown.output
    return RunFolder.open(folder, "vbench")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def records(run: RunFolder) -> list[Path]:
    return list((run.folder / "records").glob("*.json"))


def stop_amid_a_video(worker: subprocess.Popen[bytes], run: RunFolder) -> None:
    """Stop a worker that has made a video, and has claimed another."""
    wait_until(lambda: len(records(run)) > 0)
    while True:
        worker.send_signal(signal.SIGSTOP)
        if list(run.claims.glob("*.lock")):
            return
        worker.send_signal(signal.SIGCONT)
        time.sleep(0.01)


def kill_later(worker: subprocess.Popen[bytes], run: RunFolder) -> None:
    """Kill a stopped worker once another one has made a video."""
    made = len(records(run))
    wait_until(lambda: len(records(run)) > made)
    worker.kill()
    worker.wait()


def contents(run: RunFolder) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in run.videos.iterdir()}


def scored(run: RunFolder, suite: Path) -> Result:
    """Score a run by the stand-in for the suite's code."""
    scorer = shlex.join([sys.executable, vbench_scorer.__file__])
    return pusa("eval", "vbench", "score", run.folder, "--suite", suite, "--scorer", scorer)


def total(run: RunFolder) -> dict[str, Any]:
    return json.loads(pusa("eval", "vbench", "total", run.folder, "--json").stdout)


@pytest.mark.slow
def test_two_workers_with_one_killed_give_what_one_gives(tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "VBench")
    whole, run = prepared(tmp_path / "whole", suite), prepared(tmp_path / "run", suite)
    assert pusa("eval", "vbench", "generate", whole.folder).exit_code == 0

    command = [sys.executable, "-m", "pusa", "eval", "vbench", "generate", str(run.folder)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as worker:
        try:
            stop_amid_a_video(worker, run)
            killer = threading.Thread(target=kill_later, args=(worker, run))
            killer.start()
            finished = pusa("eval", "vbench", "generate", run.folder)
            killer.join()
        finally:
            worker.kill()

    assert finished.exit_code == 0, finished.output
    assert worker.returncode == -signal.SIGKILL
    assert contents(run) == contents(whole)
    assert len({record.worker for record in map(run.record_of, run.items) if record}) == 2
    assert all(b" crf=10.0 " in path.read_bytes() for path in run.videos.iterdir())  # x264 writes its settings

    first, *others = run.items
    run.video_of(first).write_bytes(b"damaged")
    refused = scored(run, suite)
    assert refused.exit_code == 2
    assert f"1 of 12 videos cannot be scored: {first.name}: it does not open" in refused.stderr
    times = {item.name: run.video_of(item).stat().st_mtime_ns for item in others}
    assert pusa("eval", "vbench", "generate", run.folder).exit_code == 0
    assert contents(run) == contents(whole)
    assert {item.name: run.video_of(item).stat().st_mtime_ns for item in others} == times  # nothing is made twice

    assert scored(run, suite).exit_code == scored(whole, suite).exit_code == 0
    totals = total(run)
    assert totals == total(whole)
    assert totals["missing"] == totals["stale"] == []
    assert totals["total"][0] == totals["total"][1] > 0
    another = Path(shutil.copy(run.video_of(others[0]), tmp_path))
    run.commit(first, another, seconds=1.0, worker="test:1")
    assert total(run)["stale"] == [name for name in DIMENSIONS if name in first.labels["dimensions"]]
