"""`pusa eval vbench prepare` writes what is to be made, with recorded seeds, and what is made is checked."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import pusa
from vbench_samples import BACKGROUND, CAMERA_WORDS, SUBJECTS, make_suite

from pusa.evaluation.runs import RunFolder, seed_of
from pusa.evaluation.vbench.items import check_videos
from pusa.media import VideoWriter

TINY = ("--model", "tiny", "--steps", "2", "--frames", "5")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return make_suite(tmp_path / "VBench")


def prepare(folder: Path, suite: Path, *options: object) -> list[str]:
    shown = pusa("eval", "vbench", "prepare", folder, "--suite", suite, *TINY, *options)
    assert shown.exit_code == 0, shown.output
    return shown.stdout.splitlines()


def test_every_video_has_its_prompt_image_and_recorded_seed(tmp_path: Path, suite: Path) -> None:
    lines = prepare(tmp_path / "run", suite, "--seed", "7")
    run = RunFolder.open(tmp_path / "run", "vbench")

    prompts = [*SUBJECTS, BACKGROUND, *(f"{BACKGROUND}, {words}" for words in CAMERA_WORDS)]
    assert [item.name for item in run.items] == [f"{prompt}-{index}" for prompt in prompts for index in range(5)]
    assert len({item.request.seed for item in run.items}) == len(run.items)
    boat = run.items[7]
    assert boat.request.seed == seed_of(7, "a blue boat sails", 2)
    assert boat.labels == {
        "prompt": "a blue boat sails",
        "index": 2,
        "dimensions": [
            "subject_consistency",
            "motion_smoothness",
            "dynamic_degree",
            "aesthetic_quality",
            "imaging_quality",
            "i2v_subject",
        ],
        "image": "boat.png",
    }
    (image,) = boat.request.conditions
    assert Path(image.file) == suite / "vbench2_beta_i2v" / "data" / "crop" / "8-5" / "boat.png"
    assert image.noise == [0.0]  # a clean first frame, as in the paper, and not the preset's 0.2
    request = boat.request
    assert (request.width, request.height, request.frames, request.fps, request.crf) == (96, 64, 5, 16.0, 10)
    assert lines[0] == "30 videos of 6 prompts by tiny, 0 made"
    assert lines[-2] == (
        "not as in the paper: steps 2, not 10; frames 5, not 81; the first frame is computed at every fifth step "
        "(--exact)"
    )
    assert lines[-1] == "15 of the 30 videos are for camera motion, 2.4% of the total: begin with --no-camera"


def test_without_camera_the_rest_of_the_weight_is_told(tmp_path: Path, suite: Path) -> None:
    lines = prepare(tmp_path / "run", suite, "--no-camera", "--per-prompt", "2", "--ratio", "16-9", "--noise", "0.2")

    assert lines[0] == "6 videos of 3 prompts by tiny, 0 made"
    assert "  i2v_subject                 4 videos   23.8% of the total" in lines
    assert "  imaging_quality             6 videos    9.1% of the total" in lines
    assert lines[-5:] == [
        "without camera_motion: 97.6% of the total's weight, which is then known within 1.19 points",
        "images 16-9: for 96x64 (1.500) 84.4% of each is kept; 8-5 (1.600) is nearer",
        "16 fps: dynamic degree takes one frame in 2 by the rate in the file (in 2 at 16 fps, in 3 at 25), so that "
        "--fps alone changes its score",
        "not as in the paper: steps 2, not 10; frames 5, not 81; noise 0.2, not 0",
        "a part of the suite: its scores are noisier, and compare with runs of the same part only",
    ]


def test_the_same_command_opens_the_run_and_another_is_refused(tmp_path: Path, suite: Path) -> None:
    options = ("--dimensions", "i2v_background,dynamic_degree", "--prompts", "1", "--json")
    facts = json.loads(prepare(tmp_path / "run", suite, *options)[0])

    assert facts["dimensions"]["i2v_background"] == facts["dimensions"]["dynamic_degree"] == 5
    assert facts["videos"] == 10
    assert prepare(tmp_path / "run", suite, *options) == [json.dumps(facts)]
    other = pusa("eval", "vbench", "prepare", tmp_path / "run", "--suite", suite, *TINY, *options, "--guidance", "2")
    assert other.exit_code == 2
    assert "request.guidance is not set there and 2.0 here" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dimensions", "motion"], "'motion' is no dimension of VBench-I2V that counts"),
        (["--dimensions", "camera_motion", "--no-camera"], "no dimensions: give at least one of"),
        (["--ratio", "wide"], "'wide' is no ratio: give 1-1, 8-5, 7-4, 16-9"),
        (["--ratio", "7-4"], "crop/7-4 is missing: its script vbench2_beta_i2v/download_data.sh fetches them"),
        (["--noise", "0,0.3"], "--noise has 2 numbers: give one, for the first frame"),
        (["--noise", "1.5"], "noise=1.5 is outside 0..1"),
        (["--steps", "0"], "steps"),
    ],
)
def test_wrong_input_is_refused_before_any_work(tmp_path: Path, suite: Path, options: list[str], message: str) -> None:
    shown = pusa("eval", "vbench", "prepare", tmp_path / "run", "--suite", suite, *TINY, *options)

    assert shown.exit_code == 2
    assert message in shown.stderr
    assert not (tmp_path / "run").exists()


def test_what_would_spoil_scores_is_found(tmp_path: Path, suite: Path) -> None:
    prepare(tmp_path / "run", suite, "--dimensions", "i2v_background")
    run = RunFolder.open(tmp_path / "run", "vbench")
    frames = np.zeros((5, 64, 96, 3), np.uint8)
    for number, item in enumerate(run.items[:4]):
        part = tmp_path / "part.mp4"
        with VideoWriter(part, width=96, height=64, fps=24 if number == 3 else 16) as writer:
            writer.write(frames[: 4 if number == 2 else 5])
        run.commit(item, part, seconds=1.0, worker="test:1")
    run.video_of(run.items[1]).write_bytes(b"no video")
    (run.videos / "notes.txt").write_text("not a video")

    problems = {found.name: found.problem for found in check_videos(run)}

    assert set(problems) == {f"{BACKGROUND}-{index}" for index in (1, 2, 3, 4)} | {"notes.txt"}
    assert problems[f"{BACKGROUND}-1"].startswith("it does not open: ")
    assert problems[f"{BACKGROUND}-2"] == "it has 4 frames and not 5"
    assert problems[f"{BACKGROUND}-3"] == "it has 24 fps and not 16"
    assert problems[f"{BACKGROUND}-4"] == "it is missing"
    assert problems["notes.txt"] == "it is no video of the run: move it elsewhere"
