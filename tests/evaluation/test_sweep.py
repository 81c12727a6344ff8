"""Sweeps: grids, one job over all points, what fails, what is published, and the suites that can be swept."""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from physics_iq_samples import make_download
from run_samples import GreyMaker, make_items
from vbench_samples import make_suite

from pusa.acceleration.decisions import LoadOptions
from pusa.cli.root import main
from pusa.evaluation.metrics import Figure
from pusa.evaluation.runs import Item, RunFolder, make_videos
from pusa.evaluation.runs.checks import resolve
from pusa.evaluation.sweep.grid import Point, check_points, in_order_of_weights, make_points, parse_axis
from pusa.evaluation.sweep.job import Sweep
from pusa.evaluation.sweep.ready import READY
from pusa.evaluation.sweep.report import table_of, write_report
from pusa.evaluation.sweep.suites import PhysicsIqSuite, PointSettings, VBenchSuite
from pusa.evaluation.vbench.scoring import Scorer
from pusa.media import VideoWriter


@dataclass
class GreySuite:
    """Make two grey videos at each point; the score is the number of steps. Steps of 7 cannot be prepared."""

    name: str = "grey"
    scored: list[int] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"videos": 2}

    def prepare(self, folder: Path, settings: PointSettings) -> RunFolder:
        if settings.fields["steps"] == 7:
            raise ValueError("7 is no number of steps")
        return RunFolder.create(folder, self.name, dict(settings.fields), make_items(2))

    def score(self, run: RunFolder) -> dict[str, Figure]:
        self.scored.append(run.settings["steps"])
        return {"task/steps": {"value": float(run.settings["steps"]), "n": 2, "error": 0.1}}


def sweep_of(folder: Path, *steps: int, guidance: float = 3.0) -> Sweep:
    points = make_points([("steps", steps)])
    return Sweep(folder, GreySuite(), {"guidance": guidance}, None, 0, points)


# ---- grids -----------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_ordered_by_what_must_be_loaded() -> None:
    axes = [parse_axis("alpha=1,1.4"), parse_axis("quantize=none,int8"), parse_axis("noise=0.2,0.5;0.3")]
    points = make_points(axes)
    assert len(points) == 8
    assert points[0].name == "alpha=1,quantize=none,noise=0.2+0.5"
    assert (points[0].fields, points[0].noise) == ({"alpha": 1.0}, (0.2, 0.5))
    assert points[2].load(LoadOptions(memory="smallest")) == LoadOptions(memory="smallest", quantize="int8")
    loads = [point.values["quantize"] for point in in_order_of_weights(points)]
    assert loads == ["none"] * 4 + ["int8"] * 4  # alpha and noise load nothing
    check_points(points, {"model": "mini"})
    paths = [Point({"lora": [f"/{folder}/" + 100 * "a" + ".pt"]}).name for folder in ("one", "two")]
    assert len(set(paths)) == 2
    assert not any("/" in path for path in paths)
    assert Point({"size": "64x32"}).fields == {"width": 64, "height": 32}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stairs=4", "write NAME=VALUE,VALUE with a NAME of"),
        ("steps=4,,5", "an empty value"),
        ("steps=4,4", "has 4 twice"),
        ("noise=a", "a"),
    ],
)
def test_axes_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_axis(text)


@pytest.mark.parametrize("axis", ["steps=4,900", "schedule=even,sideways", "noise=0.5,1.5", "quantize=int3"])
def test_values_out_of_range_are_refused_before_any_work(axis: str) -> None:
    with pytest.raises(ValueError):
        check_points(make_points([parse_axis(axis)]), {})


# ---- the job ---------------------------------------------------------------------------------------------------------


def test_points_are_one_job_that_goes_on_and_grows(tmp_path: Path) -> None:
    makers: list[GreyMaker] = []

    def make(run: RunFolder, load: LoadOptions) -> None:
        def fail(item: Item) -> None:
            if run.settings["steps"] == 5 and item.name == "clip 1":
                raise RuntimeError("the picture is broken")

        makers.append(GreyMaker(fail))
        if make_videos(run, makers[-1], attempts=1).failed:
            raise RuntimeError("1 of 2 videos could not be made")

    results = sweep_of(tmp_path, 4, 7, 5, 10).run(make)
    figures = {result.name: result.figures.get("task/steps", {}).get("value") for result in results}
    assert figures == {"steps=4": 4.0, "steps=7": None, "steps=5": 5.0, "steps=10": 10.0}
    assert [result.error for result in results] == [
        None,
        "7 is no number of steps",
        "1 of 2 videos could not be made",
        None,
    ]
    assert [(result.made, result.videos) for result in results] == [(2, 2), (0, 0), (1, 2), (2, 2)]
    assert len(json.loads((tmp_path / "results.json").read_text())["points"]) == 4

    made = len(makers)
    again = sweep_of(tmp_path, 4, 10, 20).run(make)  # another point; the others are there
    assert [maker.made for maker in makers[made:]] == [["clip 0", "clip 1"]]
    assert [result.figures["task/steps"]["value"] for result in again] == [4, 10, 20]
    with pytest.raises(ValueError, match=r"other settings \(settings.request.guidance is 3.0 there and 5.0 here\)"):
        sweep_of(tmp_path, 4, guidance=5.0).run(make)


def test_a_report_has_published_figures_beside_ours(tmp_path: Path) -> None:
    def make(run: RunFolder, load: LoadOptions) -> None:
        make_videos(run, GreyMaker())

    sweep = sweep_of(tmp_path, 2, 10)
    results = sweep.run(make)
    for result, total in zip(results, (79.92, 87.69), strict=True):
        result.published = {"task/steps": total}
    files = write_report(results, tmp_path, "steps.", "the paper, table 4b")
    assert {file.name for file in files} == {"sweep-results.json", "sweep.csv", "sweep.md", "task.svg"}
    text = (tmp_path / "sweep.md").read_text()
    assert "| steps | videos | s/video | steps | steps, published |" in text
    assert "| 10.00 ± 0.10 | 87.69 |" in text
    assert "Published: the paper, table 4b." in text
    assert "published" in (tmp_path / "plots" / "task.svg").read_text()
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [(row["value"], row["published"]) for row in rows] == [("2.0", "79.92"), ("10.0", "87.69")]


# ---- ready sweeps and suites -----------------------------------------------------------------------------------------


def test_ready_sweeps_are_valid_and_have_the_papers_figures() -> None:
    for ready in READY.values():
        check_points(ready.points, ready.base)
    totals = {point.name: point.published["total"] for point in READY["paper-steps"].points}
    assert totals == {"steps=2": 79.92, "steps=5": 86.03, "steps=10": 87.69, "steps=20": 87.84}
    alphas = [point.published["dynamic_degree"] for point in READY["paper-alpha"].points]
    assert alphas == [60.73, 66.40, 41.20, 32.40]
    assert READY["paper-models"].points[1].fields == {"model": "wan2.2-a14b", "alpha": 1.5, "alpha_2": 1.4}
    listed = CliRunner().invoke(main, ["eval", "sweep", "--list"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in READY)


class FlatMaker:
    """Write grey videos of the size, the rate and the length that items ask for."""

    def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
        wanted, frames = resolve(item.request), resolve(item.request).frames
        with VideoWriter(output, width=wanted.width, height=wanted.height, fps=wanted.fps) as writer:
            writer.write(np.full((frames, wanted.height, wanted.width, 3), 128, np.uint8))


def make_flat(run: RunFolder, load: LoadOptions) -> None:
    assert make_videos(run, FlatMaker(), attempts=1).failed == ()


SCORER = """
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
names = sorted(path.name for path in __import__("pathlib").Path(given["--videos"]).iterdir())
videos = [{"video_path": name, "video_results": 0.9} for name in names]
open(given["--out"], "w").write(json.dumps({given["--dimension"]: [0.9, videos]}))
"""


def test_vbench_is_swept_with_a_scorer(tmp_path: Path) -> None:
    (tmp_path / "scorer.py").write_text(SCORER)
    suite = VBenchSuite(
        make_suite(tmp_path / "VBench"),
        ("i2v_subject",),
        per_prompt=1,
        scorer=Scorer.from_command(f"{sys.executable} {tmp_path / 'scorer.py'}"),
    )
    base = {"model": "tiny", "frames": 5}
    points = [Point({"steps": 10}, READY["paper-steps"].points[2].published)]
    (result,) = Sweep(tmp_path / "sweep", suite, base, None, 0, points).run(make_flat)
    assert (result.error, result.made) == (None, 2)
    assert result.figures["i2v_subject"] == {"value": 90.0, "n": 2}
    total = result.figures["total"]
    assert total["low"] < total["value"] < total["high"]  # the other dimensions may be anything
    table = dict(zip(*table_of([result], ["i2v_subject", "total"]), strict=True))
    assert (table["i2v subject"], table["i2v subject, published"], table["total, published"]) == (
        "90.00",
        "97.78",
        "87.69",
    )

    unscored = replace(suite, scorer=None)
    (result,) = Sweep(tmp_path / "unscored", unscored, base, None, 0, points).run(make_flat)
    assert result.error is not None
    assert "pusa eval vbench score" in result.error


def test_physics_iq_is_swept(tmp_path: Path) -> None:
    suite = PhysicsIqSuite(make_download(tmp_path / "data", fps=2), partial=True)
    base = {"model": "tiny", "fps": 2.0, "width": 96, "height": 64}
    (result,) = Sweep(tmp_path / "sweep", suite, base, None, 0, [Point({"steps": 10})]).run(make_flat)
    assert (result.error, result.made) == (None, 3)
    assert result.figures["physics_iq"]["n"] == 3
    assert result.figures["physics_iq"]["value"] < 100
    assert result.figures["mse"]["value"] > 0


def test_the_command_sweeps_fidelity(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    with VideoWriter(tmp_path / "clips" / "one.mp4", width=32, height=32, fps=16) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8))
    words = ["eval", "sweep", str(tmp_path / "sweep"), "--clips", str(tmp_path / "clips"), "--prompt", "a cat"]
    words += ["--model", "tiny", "--size", "32x32", "--frames", "9", "--tasks", "i2v", "--vary", "steps=1,2"]
    prepared = CliRunner().invoke(main, [*words, "--prepare", "--json"])
    assert json.loads(prepared.stdout)["missing"] == 4, prepared.output
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "| 1 | 2/2 |" in result.stdout
    assert "| 2 | 2/2 |" in result.stdout
    assert (tmp_path / "sweep" / "plots" / "i2v.svg").is_file()
    assert (tmp_path / "sweep" / "points" / "steps=2" / "report.html").is_file()
    assert len(list((tmp_path / "sweep" / "inputs").iterdir())) == 1  # shared by the points
    for more, message in (
        (["--ready", "paper-steps"], "give the grid by --vary, or a --ready sweep"),
        (["--vary", "memory=smallest", "--server", "http://127.0.0.1:9"], "the server decides how its model is loaded"),
    ):
        refused = CliRunner().invoke(main, [*words, *more])
        assert (refused.exit_code, message in refused.output) == (2, True), refused.output
    unknown = CliRunner().invoke(main, [*words, "--vary", "model=tiny,tinny"])
    assert (unknown.exit_code, "did you mean 'tiny'" in unknown.output) == (3, True)


def test_a_sweep_of_nothing_writes_nothing_and_tells_what_is_left_out(tmp_path: Path) -> None:
    clips, folder = tmp_path / "clips", tmp_path / "sweep"
    clips.mkdir()
    words = ["eval", "sweep", str(folder), "--clips", str(clips), "--prompt", "a cat", "--model", "tiny"]
    words += ["--size", "32x32", "--frames", "9", "--tasks", "i2v", "--vary", "steps=1,2", "--prepare"]
    refused = CliRunner().invoke(main, words)
    assert (refused.exit_code, folder.exists()) == (2, False)
    for name, frames in (("one", 9), ("short", 5)):
        with VideoWriter(clips / f"{name}.mp4", width=32, height=32, fps=16) as writer:
            writer.write(np.zeros((frames, 32, 32, 3), np.uint8))
    accepted = CliRunner().invoke(main, words)
    assert accepted.exit_code == 0, accepted.output
    assert accepted.stderr.count("left out: short.mp4 has 5 frames") == 1  # not once for each point

    moved = clips.rename(tmp_path / "moved")  # clips are known by their content
    words[words.index(str(clips))] = str(moved)
    assert CliRunner().invoke(main, words).exit_code == 0
    (moved / "one.mp4").unlink()
    other = CliRunner().invoke(main, words)
    assert (other.exit_code, "holds a sweep with other settings (suite.clips.one" in other.output) == (2, True)
    words[2] = str(folder / "points" / "steps=1")
    inside = CliRunner().invoke(main, words)
    assert (inside.exit_code, "holds a run of an evaluation and no sweep" in inside.output) == (2, True)
