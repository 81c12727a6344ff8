"""Fidelity to the user's clips: layouts, measures, prompts, and the gate on the embedded model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from paths import ROOT

from pusa import zoo
from pusa.cli.root import main
from pusa.evaluation.fidelity.baselines import cross_fade, still
from pusa.evaluation.fidelity.bounds import read_bounds, violations
from pusa.evaluation.fidelity.measures import MEASURES, measure
from pusa.evaluation.fidelity.suite import FidelitySettings, prepare, read_real, score_items, tables_of
from pusa.evaluation.fidelity.tasks import TASKS, Layout, TaskName, lay_out, request_of
from pusa.evaluation.runs import Item
from pusa.media import VideoWriter
from pusa.request import GenerationRequest, ResolvedRequest

BOUNDS = Path(__file__).parent / "fidelity_bounds.json"
EXAMPLES = ROOT / "src" / "pusa" / "server" / "studio" / "examples"
CLIP, PROMPT = "bus", "a bus slides to the right in the desert"
FRAMES = 9  # three latent frames


def resolved(model: str = "tiny", frames: int | None = None) -> ResolvedRequest:
    conditions = [{"kind": "video", "file": "clip.mp4"}]
    request = GenerationRequest(
        model=model, prompt="a cat", seed=0, task="extend", conditions=conditions, frames=frames
    )
    return request.resolved(zoo.defaults_of(model))


def moving(frames: int = 17, side: int = 32) -> np.ndarray:
    """A bright square that moves by a pixel in each frame over a gradient."""
    axis = np.linspace(40, 160, side).astype(np.uint8)
    video = np.tile(axis[None, :, None, None], (frames, 1, side, 3))
    for number in range(frames):
        video[number, 8:16, number : number + 8] = (220, 90, 60)
    return video


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_layouts_of_81_frames_are_those_of_the_paper() -> None:
    request = resolved("wan2.1-14b")
    layouts = {task: lay_out(task, request) for task in TASKS}
    assert (layouts["i2v"].given, layouts["i2v"].joints) == ((0,), (1,))
    assert (layouts["start-end"].given, layouts["start-end"].middles) == ((0, 80), (40,))
    assert layouts["start-end"].joints == (1, 77)  # the last latent frame shows frames 77 to 80
    assert layouts["keyframes"].given == (0, 40, 80)
    assert layouts["completion"].given == (*range(9), *range(69, 81))  # figure 11: the first 9 and the last 12 frames
    assert layouts["completion"].joints == (9, 69)
    transition = layouts["transition"]
    assert (transition.frames, transition.joints) == (81, (13, 65))
    extension = layouts["extension"]
    assert (extension.frames, extension.joints, extension.extensions) == (13 + 3 * 68, (13,), (81, 149))
    assert all(Layout.from_json(json.loads(json.dumps(one.as_json()))) == one for one in layouts.values())


@pytest.mark.parametrize("task", TASKS)
def test_requests_of_layouts_resolve_to_their_lengths(task: TaskName) -> None:
    base, layout = resolved(), lay_out(task, resolved())
    fields = {"model": "tiny", "prompt": "a cat", "seed": 0, "window": base.window, "fps": base.fps}
    request = request_of(layout, fields, "inputs", noise=[0.2, 0.5]).resolved(zoo.defaults_of("tiny"))
    assert request.frames == layout.request_frames
    noise = [value for condition in request.conditions for value in condition.noise]
    if task in ("i2v", "start-end", "keyframes"):
        assert noise == [0.2, 0.5, 0.5][: len(noise)]
    if task in ("transition", "extension"):
        assert set(noise) == {0.0}  # the file shows these frames beside the new ones
        assert layout.files[0].last + 1 == request.overlap


def test_clips_too_short_for_a_task_are_told_the_least_length() -> None:
    with pytest.raises(ValueError, match="give at least 9"):
        lay_out("start-end", resolved(frames=5))


# ---- measures --------------------------------------------------------------------------------------------------------


def start_end() -> Layout:
    return lay_out("start-end", resolved(frames=17))


def test_a_clip_is_equal_to_itself_and_what_needs_no_model_is_not() -> None:
    real, layout = moving(), start_end()
    same = measure(real, real, layout)
    assert same["given_psnr_db"] == same["held_out_psnr_db"] == 80
    assert same["middle_ssim"] == pytest.approx(1)
    held, faded = (measure(make(real, layout.given, 17), real, layout) for make in (still, cross_fade))
    assert held["given_psnr_db"] == faded["given_psnr_db"] == 80
    assert held["repeated"] > 0.9 > same["repeated"]
    assert held["motion"] < faded["motion"] < same["motion"]
    assert held["held_out_psnr_db"] < faded["held_out_psnr_db"] < 40


def test_measures_see_a_cut_a_shift_of_colours_and_a_wrong_given_frame() -> None:
    real, layout = moving(), lay_out("i2v", resolved(frames=17))
    good = measure(real, real, layout)
    cut = real.copy()
    cut[1:] = np.roll(cut[1:], 9, axis=1)
    bad = measure(cut, real, layout)
    assert bad["seam"] > 2 * good["seam"]
    assert bad["jump"] > 2 * good["jump"]
    redder = real.copy()
    redder[8:, ..., 0] = np.minimum(redder[8:, ..., 0], 225) + 30
    assert measure(redder, real, layout)["colour_drift"] > good["colour_drift"] + 5
    wrong = real.copy()
    wrong[0] = 255 - wrong[0]
    assert measure(wrong, real, layout)["given_psnr_db"] < 20
    with pytest.raises(ValueError, match="the video has 16 frames of 32x32; its task makes 17 of 32x32"):
        measure(real[:16], real, layout)


# ---- clips and other people's videos ---------------------------------------------------------------------------------


def write(path: Path, frames: np.ndarray) -> None:
    with VideoWriter(path, width=frames.shape[2], height=frames.shape[1], fps=16) as writer:
        writer.write(frames)


def test_videos_of_another_program_are_measured(tmp_path: Path) -> None:
    clips, videos = tmp_path / "clips", tmp_path / "videos"
    clips.mkdir()
    videos.mkdir()
    for name, frames in (("one", 17), ("two", 17), ("short", 9), ("silent", 17)):
        write(clips / f"{name}.mp4", moving(frames, 64))
        if name != "silent":
            (clips / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "prompts.csv").write_text("file,prompt\none.mp4,from the table\n")
    words = ["eval", "fidelity", str(clips), "-o", str(tmp_path / "out"), "--model", "tiny", "--size", "64x64"]
    words += ["--frames", "17", "--prompts", str(tmp_path / "prompts.csv"), "--tasks", "i2v,start-end"]
    listed = CliRunner().invoke(main, [*words, "--prepare", "--json"])
    assert listed.exit_code == 0, listed.output
    items = [json.loads(line) for line in listed.stdout.splitlines()]
    assert {item["name"] for item in items if item["labels"]["task"] == "i2v"} == {"one-i2v", "two-i2v"}
    assert [item["request"]["prompt"] for item in items[:1]] == ["from the table"]
    assert "short.mp4 has 9 frames at 16 fps, 17 are needed" in listed.stderr
    assert "silent.mp4 has no caption" in listed.stderr

    for name in ("one", "two"):  # the one is perfect, the other a still picture
        frames = moving(17, 64) if name == "one" else np.repeat(moving(1, 64), 17, axis=0)
        for task in ("i2v", "start-end"):
            write(videos / f"{name}-{task}.mp4", frames)
    measuring = [*words, "--videos", str(videos), "--json"]
    whole = (videos / "one-i2v.mp4").read_bytes()
    write(videos / "one-i2v.mp4", moving(5, 64))
    result = CliRunner().invoke(main, measuring)
    assert result.exit_code == 2
    assert f"{videos / 'one-i2v.mp4'}: the video has 5 frames of 64x64; its task makes 17" in result.stderr
    (videos / "one-i2v.mp4").write_bytes(whole)
    result = CliRunner().invoke(main, measuring)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    values = {name: clip["values"] for name, clip in report["clips"].items()}
    assert values["one-i2v"]["held_out_psnr_db"] > 35 > values["two-i2v"]["held_out_psnr_db"]
    assert values["two-i2v"]["repeated"] == 1.0
    figure = report["tables"]["start-end"]["made"]["motion"]
    assert figure["n"] == 2
    assert 0.3 < figure["value"] < 0.7  # the mean of 1 and 0, divided by the clips' own
    assert report["tables"]["start-end"]["real clips"]["motion"]["value"] == 1
    assert {"cross-fade", "still frame"} <= set(report["tables"]["start-end"])
    assert (tmp_path / "out" / "report.html").read_text().count("<img") == 2

    result = CliRunner().invoke(main, [*words, "--videos", str(clips)])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"pusa: {clips} has none of 6 videos, such as two-start-end.mp4"
    result = CliRunner().invoke(main, ["eval", "fidelity", str(clips / "silent.mp4"), "--model", "tiny"])
    assert result.exit_code == 2
    assert "or give --prompt" in result.stderr


def test_clips_of_several_lengths_share_a_folder_and_keep_their_own(tmp_path: Path) -> None:
    clips, inputs = tmp_path / "clips", tmp_path / "inputs"
    clips.mkdir()
    write(clips / "one.mp4", moving(33, 32))

    def items(overlap: int) -> list[Item]:
        request = {"model": "tiny", "width": 32, "height": 32, "frames": 13, "overlap": overlap}
        settings = FidelitySettings(clips, prompt="a cat", request=request, tasks=("extension",), extensions=2)
        return prepare(settings, inputs).items

    long, short = items(5), items(9)  # 5 + 2 * 8 frames, and 9 + 2 * 4
    assert [len(read_real(some[-1])) for some in (long, short)] == [21, 17]
    assert len(list(inputs.iterdir())) == 1
    moved = inputs.rename(tmp_path / "moved")
    request = long[-1].request.model_dump()
    request["conditions"][0]["file"] = request["conditions"][0]["file"].replace(str(inputs), str(moved))
    item = replace(long[-1], request=GenerationRequest(**request))
    assert len(read_real(item)) == 21  # it follows the condition
    next(moved.glob("*/real-0021.mp4")).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"real-0021\.mp4 .*: remove .*, and the same command writes it again"):
        read_real(item)


# ---- the gate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the clips that are shipped with the studio, with its prompt."""
    if "mini" not in zoo.ZOO:
        pytest.skip("the weights of the embedded model are not here")
    folder = tmp_path_factory.mktemp("clips")
    shutil.copy(EXAMPLES / f"{CLIP}.mp4", folder)
    (folder / f"{CLIP}.txt").write_text(PROMPT)
    return folder


def test_the_embedded_model_stays_within_its_bounds(clips: Path, tmp_path: Path) -> None:
    words = ["eval", "fidelity", str(clips), "-o", str(tmp_path / "run"), "--tasks", "i2v,start-end", "--noise", "0"]
    words += ["--steps", "2", "--frames", str(FRAMES), "--bounds", str(BOUNDS), "--json"]

    def run() -> Result:
        return CliRunner().invoke(main, words)

    result = run()
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["violations"], report["missing"], len(report["clips"])) == ([], {}, 3)

    strict = tmp_path / "strict.json"
    strict.write_text('{"i2v": {"given_psnr_db": {"min": 70}}, "extension": {"seam": {"max": 3}}}')
    words[words.index(str(BOUNDS))] = str(strict)
    result = run()  # resumed: nothing is made twice, and values are read from the folder
    assert {**json.loads(result.stdout.splitlines()[-1]), "violations": []} == report
    records = [json.loads(path.read_text()) for path in (tmp_path / "run" / "records").iterdir()]
    assert [record["attempts"] for record in records] == [1] * 3
    assert result.exit_code == 1
    assert "i2v given_psnr_db is" in result.stderr
    assert "extension seam was not measured" in result.stderr


@pytest.mark.parametrize("fault", ["the given frame is ignored", "the VAE makes all brighter"])
def test_regressions_leave_the_bounds(fault: str, clips: Path, tmp_path: Path, mini: Any) -> None:
    noise = 1.0 if fault == "the given frame is ignored" else 0.0
    settings = FidelitySettings(clips, request={"steps": 2, "frames": FRAMES}, tasks=("i2v",), noise=(noise,))
    (item,) = [item for item in prepare(settings, tmp_path / "inputs").items if item.labels["task"] == "i2v"]
    video = tmp_path / "video.mp4"
    offset = 0.3 if fault == "the VAE makes all brighter" else 0.0
    hook = mini.vae.decoder.register_forward_hook(lambda module, inputs, output: output + offset)
    from pusa.generate import generate

    try:
        for _ in generate(item.request, video, pipeline=mini):
            pass
    finally:
        hook.remove()
    figures = {task: table["made"] for task, table in tables_of(score_items([item], lambda one: video)).items()}
    bounds = {"i2v": read_bounds(BOUNDS, MEASURES, TASKS)["i2v"]}
    assert any("given_psnr_db" in line for line in violations(figures, bounds)), figures


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "write"),
        ('{"t2v": {}}', "'t2v' is none of vae, i2v"),
        ('{"i2v": {"psnr": {"min": 1}}}', "'psnr' is none of given_psnr_db"),
        ('{"i2v": {"seam": {"above": 1}}}', 'give "min", "max" or both'),
        ('{"i2v": {"seam": {"max": "2"}}}', "a limit that is no number"),
        ('{"i2v": {"seam": {"max": NaN}}}', "a limit that is no number"),
        ('{"i2v": {"seam": {"max": 1, "min": 2}}}', "a min above its max"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bounds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_bounds(path, MEASURES, TASKS)
