"""A command that works for long says so, where no progress bar can be drawn."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pusa.cli import run as showing
from pusa.events import Done, Events, Planned, Stage, Step


def work(stop: Callable[[], bool]) -> Events:
    yield Stage("load the VAE")
    time.sleep(0.5)
    yield Step(3, 12, 65.0, "encode clips")
    time.sleep(0.5)
    yield Step(3100, 28600, 12.0, "load")
    time.sleep(0.5)
    yield Done({"dataset": Path("clips")})


def test_a_line_is_written_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(showing, "SILENCE_SECONDS", 0.2)
    showing.run(work, as_json=False)
    written = capsys.readouterr()
    assert written.out == "clips\n"
    assert "load the VAE ...\n" in written.err
    assert "encode clips 3/12, 1 min 5 s left\n" in written.err
    assert "load 3.1 of 28.6 GB, 12 s left\n" in written.err


def test_a_short_one_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    showing.run(work, as_json=False)
    assert capsys.readouterr().err == ""


def test_how_the_model_runs_is_said_where_there_was_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    def planned(stop: Callable[[], bool]) -> Events:
        yield Planned("mini: transformer on the CPU in float32")
        yield Planned("14B: transformer on the GPU in fp8", ("transformer: 34 GB do not fit",))
        yield Done({"video": Path("a.mp4")})

    showing.run(planned, as_json=False)
    assert capsys.readouterr().err == "14B: transformer on the GPU in fp8\n  transformer: 34 GB do not fit\n"
    showing.run(planned, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"kind": "planned", "summary": "mini: transformer on the CPU in float32"}
    assert lines[1]["reasons"] == ["transformer: 34 GB do not fit"]
