"""A Physics-IQ run from the download to the report, on the embedded model and a tiny download."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import physics_iq_samples as samples
import pytest
from click.testing import CliRunner

from pusa import media
from pusa.cli import main
from pusa.cli.eval.physics_iq import physics_iq
from pusa.evaluation.physics_iq.dataset import Dataset
from pusa.evaluation.physics_iq.items import prepare
from pusa.evaluation.physics_iq.measure import score_run
from pusa.evaluation.runs import Item, RunFolder, make_videos
from pusa.evaluation.runs.cut import Cut, cut_video

FPS = 2  # 10 frames are 5 seconds


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.make_download(tmp_path_factory.mktemp("physics-iq"), fps=FPS)


class TakeMaker:
    """Write take 1 itself, with as many frames more as the model would make."""

    def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
        view, request = int(item.labels["number"]) - 1, item.request
        before = samples.BEFORE_SECONDS * FPS if request.task == "extend" else 0
        count = (request.frames or 0) - (request.overlap or 0)
        frames = np.stack(list(samples.frames(0, view, 1, FPS, before + count, samples.BEFORE_SECONDS - before / FPS)))
        with media.VideoWriter(output, width=samples.WIDTH, height=samples.HEIGHT, fps=FPS) as writer:
            writer.write(frames)


def test_items_say_what_is_given_and_what_is_kept(download: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(download)
    image = prepare(tmp_path / "image", dataset, "image", {"fps": FPS, "seed": 5}, partial=True)
    item = image.items[1]
    assert item.name == "0002_perspective-center_trimmed-ball-falls"  # as the benchmark's evaluator wants it
    assert item.request.task == "generate"
    assert item.request.frames == 13
    assert item.cut == Cut(10)
    (given,) = item.request.conditions
    assert Path(given.file).name == "0002_switch-frames_anyFPS_perspective-center_trimmed-ball-falls.jpg"
    assert (given.noise, given.fit) == ([0.0], "stretch")
    assert len({one.request.seed for one in image.items}) == 3
    assert item.labels == {
        "number": "0002", "view": "center", "scenario": "ball-falls", "category": "Solid Mechanics",
    }  # fmt: skip

    finer = prepare(tmp_path / "finer", dataset, "image", {"fps": FPS, "crf": 4}, partial=True)
    assert [one.items[0].cut for one in (finer, image)] == [Cut(10, crf=4), Cut(10, crf=8)]

    settings = {"fps": FPS, "overlap": 5, "window": 9}
    video = prepare(tmp_path / "video", dataset, "video", settings, noise=(0.0, 0.3), partial=True)
    request = video.items[0].request
    assert (request.task, request.overlap, request.frames, request.window) == ("extend", 5, 17, 9)
    assert video.items[0].cut == Cut(10, before_end=12)
    assert request.conditions[0].noise == [0.0, 0.3]
    with pytest.raises(ValueError, match=r"other settings \(conditioning is \"video\" there and \"image\" here\)"):
        prepare(tmp_path / "video", dataset, "image", {"fps": FPS}, partial=True)
    with pytest.raises(ValueError, match="overlap=13: a model may see 3 s, which are 6 frames at 2 fps"):
        prepare(tmp_path / "other", dataset, "video", {"fps": FPS}, partial=True)
    with pytest.raises(ValueError, match=r"fps=12\.5: Physics-IQ compares 5 s at a whole number"):
        prepare(tmp_path / "other", dataset, "image", {"fps": 12.5}, partial=True)


def test_a_partial_download_says_what_is_missing(download: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(download, data)
    next(data.rglob("0005_testing-videos*")).unlink()
    next(data.rglob("0002_switch-frames*")).unlink()
    with pytest.raises(FileNotFoundError) as error:
        Dataset.open(data).complete_scenes("image", FPS)
    assert "196 of 198 scenes are not complete" in str(error.value)
    assert "switch frame 0002, testing video 0005 (take 2)" in str(error.value)
    assert "--partial goes on with the 2 that are" in str(error.value)
    assert [scene.number for scene in Dataset.open(data).complete_scenes("image", FPS, partial=True)] == [
        "0001",
        "0003",
    ]
    with pytest.raises(FileNotFoundError, match=r"no Physics-IQ download: .* give --data the folder"):
        Dataset.open(tmp_path)
    table = data / "descriptions.csv"
    short = table.read_bytes() + b"0009_perspective-left_take-1_cut.mp4\n"
    for damaged in (b"", b"\x00\xff\xfe", b"a,b\n1,2\n", short):
        (tmp_path / "damaged.csv").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.csv is no table of Physics-IQ: it "):
            Dataset.open(data, tmp_path / "damaged.csv")
    table.unlink()
    with pytest.raises(FileNotFoundError, match="name it with --descriptions"):
        Dataset.open(data)


@pytest.mark.parametrize("conditioning", ["image", "video"])
def test_a_run_that_makes_take_1_scores_100(conditioning: str, download: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(download)
    size = {"width": samples.WIDTH, "height": samples.HEIGHT, "fps": FPS}
    kind = "image" if conditioning == "image" else "video"
    run = prepare(tmp_path, dataset, kind, size | ({"overlap": 5} if kind == "video" else {}), partial=True)
    make_videos(run, TakeMaker(), items=run.items[:2])
    for name in ("0001_perspective-left_trimmed-ball-falls", "0002_perspective-center_trimmed-ball-falls"):
        info = media.probe_video(run.videos / f"{name}.mp4")
        assert (info.frames, info.fps, info.seconds) == (10, FPS, 5.0)  # the evaluator wants exactly 5 seconds
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 videos .* are not made: make them first, or score .* --partial"
    ):
        score_run(run, dataset)
    runner = CliRunner()
    result = runner.invoke(physics_iq, ["score", str(tmp_path), "--partial", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    summary = json.loads((tmp_path / "scores.json").read_text())
    assert summary["score"]["physics_iq"] == 100
    assert summary["scenes"] == 2
    assert not summary["complete"]
    assert summary["score"]["take_1"]["spatial_iou"] > 0.95
    assert set(summary["categories"]) == {"Solid Mechanics"}
    assert set(summary["views"]) == {"center", "left"}
    assert "| **mini** | " in (tmp_path / "report.md").read_text()
    assert "2 of 198 scenes" in (tmp_path / "report.html").read_text()
    assert media.probe_image(tmp_path / "worst.jpg").height > 100


def test_scores_are_kept_until_the_video_is_another(download: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(download)
    run = prepare(
        tmp_path, dataset, "image", {"width": samples.WIDTH, "height": samples.HEIGHT, "fps": FPS}, partial=True
    )
    make_videos(run, TakeMaker())
    steps: list[object] = []
    first = score_run(run, dataset, report=steps.append)
    assert len(steps) == 3
    assert score_run(run, dataset, report=steps.append) == first
    assert len(steps) == 3
    samples.write_generated(run.video_of(run.items[0]), 0, FPS)
    with pytest.raises(FileNotFoundError, match="1 of 3 videos"):
        score_run(run, dataset)
    make_videos(run, TakeMaker())
    (run.folder / "scores" / f"{run.items[1].id}.json").unlink()
    assert score_run(run, dataset, report=steps.append) == first
    assert len(steps) == 4


def test_damaged_scores_are_computed_again(download: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(download)
    size = {"width": samples.WIDTH, "height": samples.HEIGHT, "fps": FPS}
    run = prepare(tmp_path, dataset, "image", size, partial=True)
    make_videos(run, TakeMaker(), items=run.items[:1])
    (first,) = score_run(run, dataset, partial_run=True)
    (kept,) = (tmp_path / "scores").iterdir()
    whole = json.loads(kept.read_text())
    no_number = whole["scores"] | {"take_1": whole["scores"]["take_1"] | {"mse": [None]}}
    for text in ('{"scores"', *(json.dumps(whole | {"scores": damaged}) for damaged in (None, [1], no_number))):
        kept.write_text(text)
        assert score_run(run, dataset, partial_run=True) == [first]
        assert json.loads(kept.read_text()) == whole


@pytest.mark.parametrize("processes", [1, 2])
def test_a_scene_that_cannot_be_read_costs_no_other(processes: int, download: Path, tmp_path: Path) -> None:
    data = tmp_path / "data ä"
    shutil.copytree(download, data)
    size = {"width": samples.WIDTH, "height": samples.HEIGHT, "fps": FPS}
    run = prepare(tmp_path / "run", Dataset.open(data), "image", size, partial=True)
    make_videos(run, TakeMaker())
    (damaged,) = data.rglob("0001_testing-videos*")
    damaged.write_bytes(damaged.read_bytes()[:200])
    result = CliRunner().invoke(main, ["eval", "physics-iq", "score", str(run.folder), "--processes", str(processes)])
    assert result.exit_code == 2
    assert "1 of 3 scenes could not be scored, such as 0001_perspective-left_trimmed-ball-falls: " in result.stderr
    assert "is cut short (200 of" in result.stderr
    assert {path.stem for path in (run.folder / "scores").iterdir()} == {item.id for item in run.items[1:]}


@pytest.mark.parametrize("conditioning", ["image", "video"])
def test_the_embedded_model_goes_the_whole_way(conditioning: str, download: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    settings = ["--fps", str(FPS), "--size", "64x48", "--steps", "1", "--guidance", "1", "--partial"]
    settings += ["--overlap", "5", "--window", "13"] if conditioning == "video" else []
    runner = CliRunner()
    command = ["prepare", folder, "--data", str(download), "--conditioning", conditioning, *settings]
    assert "3 videos to make" in runner.invoke(physics_iq, command, catch_exceptions=False).output
    run = RunFolder.open(Path(folder))
    for command in (["generate", folder, "--json"], ["score", folder, "--json"]):
        assert runner.invoke(physics_iq, command, catch_exceptions=False).exit_code == 0
    assert not run.missing()
    assert not run.problems()
    first = media.read_video(run.video_of(run.items[0]))
    assert first.shape == (10, 48, 64, 3)
    summary = json.loads((Path(folder) / "scores.json").read_text())
    assert summary["scenes"] == 3
    assert 0 <= summary["score"]["physics_iq"] < 100


def test_a_cut_keeps_its_frames_and_the_request(tmp_path: Path) -> None:
    levels = np.arange(0, 240, 20, dtype=np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (12, 32, 32, 3)).copy()
    path = tmp_path / "clip.mp4"
    with media.VideoWriter(path, width=32, height=32, fps=4, metadata={"pusa": "1", "request": {}}) as writer:
        writer.write(frames)
    cut_video(path, Cut(3, before_end=5))
    kept = media.read_video(path)[:, 0, 0, 0]
    np.testing.assert_allclose(kept, levels[7:10], atol=2)
    assert media.read_metadata(path) == {"pusa": "1", "request": {}}
    assert [one.name for one in tmp_path.iterdir()] == ["clip.mp4"]
    cut_video(path, Cut(3, crf=0))
    np.testing.assert_array_equal(media.read_video(path)[:, 0, 0, 0], kept)  # nothing is lost
    with pytest.raises(ValueError, match="3 frames: too few for 5 from frame 0 on"):
        cut_video(path, Cut(5))
