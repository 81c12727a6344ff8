"""Commands that make videos share options, progress and the way out; `pusa eval estimate` and `pusa eval check`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from command_line import pusa
from run_samples import GreyMaker, make_run, write_grey

from pusa.acceleration.machine import described_machine
from pusa.cli.eval.options import (
    RunOptions,
    Settings,
    run_options,
    setting_options,
    take_run_options,
    take_settings,
)
from pusa.cli.eval.options import make_run as make_folder
from pusa.evaluation.runs import Item, RunFolder, make_videos
from pusa.evaluation.runs.cut import Cut
from pusa.evaluation.runs.estimate import estimate
from pusa.request import GenerationRequest


def taken(*arguments: str) -> tuple[Settings, RunOptions]:
    """Run a command with the shared options; return what it takes of them."""
    found: list[Any] = []

    @click.command()
    @setting_options
    @run_options
    def command(**options: Any) -> None:
        found.extend(take_settings(options, take_run_options(options)))
        assert not options

    command.main(list(arguments), standalone_mode=False)
    return found[0], found[1]


def test_only_what_the_user_sets_is_a_setting() -> None:
    settings, run = taken(
        "--steps", "4", "--size", "96x64", "--noise", "0,0.3", "--shard", "2/3", "--memory", "smallest"
    )
    assert settings == Settings({"steps": 4, "width": 96, "height": 64}, [0.0, 0.3], 0)
    assert (run.shard, run.processes, run.load.memory) == ((2, 3), None, "smallest")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "0/3"], "no shard"),
        (["--server", "http://a", "--ray", "auto"], "give one of them"),
        (["--key", "secret"], "add --server"),
        (["--server", "http://a", "--memory", "smallest"], "the server decides"),
        (["--steps", "0"], "steps"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises((click.UsageError, ValueError), match=message):
        taken(*arguments)


def h100(count: int) -> Any:
    return described_machine(gpu_gb=80, capability=(9, 0), ram_gb=1024, count=count)


def wan(number: int, **settings: Any) -> Item:
    size = {"width": 832, "height": 480, "frames": 81, "steps": 10, "guidance": 5.0}
    return Item(str(number), GenerationRequest(prompt="a cat", model="wan2.1-14b", seed=number, **{**size, **settings}))


def test_an_estimate_follows_steps_guidance_cards_and_price() -> None:
    one = estimate([wan(0)], h100(1), price=3.0)
    assert 40 < one.seconds_per_video < 90  # published: 5 s for each of 10 steps, and some for the rest
    assert one.cost == pytest.approx(one.card_hours * 3)
    assert 1e6 < one.disk_bytes < 5e6
    fine, short = wan(0, crf=11), replace(wan(0), cut=Cut(27))
    assert estimate([fine], h100(1)).disk_bytes == pytest.approx(2 * one.disk_bytes)
    assert estimate([short], h100(1)).disk_bytes == pytest.approx(2**1.5 * one.disk_bytes / 3)  # encoded at CRF 8
    many = estimate([wan(number) for number in range(1775)], h100(8))
    assert many.card_hours == pytest.approx(1775 * one.card_hours)
    assert many.hours == pytest.approx(many.card_hours / 8)
    assert many.cost is None
    fast = estimate([wan(0, steps=4, guidance=1.0)], h100(1))
    assert fast.seconds_per_video == pytest.approx(one.seconds_per_video / 5)
    small = estimate([wan(0)], described_machine(gpu_gb=4, capability=(8, 9), ram_gb=16, disk_gb=1))
    assert "wan2.1-14b needs" in small.problem


def test_videos_that_are_made_are_what_the_others_are_measured_by(tmp_path: Path) -> None:
    run = make_run(tmp_path, 5)
    make_videos(run, GreyMaker(), items=run.items[:3])
    found = estimate(run, h100(2))
    seconds = sorted(record.seconds for item in run.items[:3] if (record := run.record_of(item)))
    assert (found.videos, found.missing, found.measured) == (5, 2, 2)
    assert found.seconds_per_video == pytest.approx(seconds[1])
    sizes = sorted(run.video_of(item).stat().st_size for item in run.items[:3])
    assert found.disk_bytes == 2 * sizes[1]


def test_the_commands_tell_what_is_missing_and_what_is_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 2)
    machine = ["--gpu-gb", "24", "--price", "2", "--json"]
    (line,) = pusa("eval", "estimate", run.folder, *machine).stdout.splitlines()
    assert (json.loads(line)["missing"], json.loads(line)["price"]) == (2, 2.0)
    make_videos(run, GreyMaker())
    assert "all 2 videos are made" in pusa("eval", "estimate", run.folder, "--gpu-gb", "24").stdout
    assert "all 2 videos are whole" in pusa("eval", "check", run.folder).stdout
    write_grey(run.items[0], run.video_of(run.items[0]), frames=9)
    wrong = pusa("eval", "check", run.folder)
    assert wrong.exit_code == 1
    assert "clip 0: it has 9 frames and not 5" in wrong.stdout
    assert pusa("eval", "check", tmp_path).exit_code == 2


def test_a_run_that_is_made_says_where_its_videos_are(tmp_path: Path) -> None:
    """With nothing left to make no model is loaded; failures are the last word."""
    run = make_run(tmp_path / "run", 2)
    make_videos(run, GreyMaker())
    done = made(run.folder)
    assert done.exit_code == 0
    assert done.stdout.strip().endswith("videos")
    run.video_of(run.items[0]).unlink()
    for _ in range(3):
        run.fail(run.items[0], "the picture is broken")
    failed = made(run.folder)
    assert isinstance(failed.exception, RuntimeError)
    assert "1 of 2 videos could not be made (such as 'clip 0': the picture is broken)" in str(failed.exception)


def made(folder: Path) -> Result:
    """Run a command that makes the videos of a folder."""

    @click.command()
    @run_options
    def command(**options: Any) -> None:
        make_folder(RunFolder.open(folder), take_run_options(options), as_json=False)

    return CliRunner().invoke(command, [])
