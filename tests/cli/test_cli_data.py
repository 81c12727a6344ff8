"""Run `pusa data`: from options to a dataset and its inspection page."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import imports_of, pusa
from paths import SHARED
from PIL import Image

from pusa.events import Done, Event
from pusa.media import VideoWriter, iter_video

CLIPS = 12


def shared(name: str) -> Path | None:
    """A recorded file beside the repository, if it is there (see conftest)."""
    folder = SHARED
    path = folder / "inputs" / name
    return path if path.is_file() else None


def footage() -> Iterator[np.ndarray]:
    """Frames uint8 [H, W, 3]: of a real video if it is here, else drawn."""
    video = shared("input_video.mp4")
    if video is not None:
        yield from iter_video(video, fit=(160, 90), max_frames=8 * CLIPS + 20)
        return
    y, x = np.mgrid[:90, :160]
    for number in range(8 * CLIPS + 20):
        waves = 128 + 100 * np.sin((x + 3 * number) / 17) * np.cos((y - number) / 11)
        yield np.stack([waves, 255 - waves, (x + y + number) % 256], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen clips of one second, with captions, and a file that is none."""
    folder = tmp_path_factory.mktemp("data") / "videos"
    folder.mkdir()
    frames = np.stack(list(footage()))
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    for number in range(CLIPS):
        with VideoWriter(folder / f"wave{number:02d}.mp4", width=width, height=height, fps=24) as writer:
            writer.write(frames[8 * number : 8 * number + 20, :height, :width])
        (folder / f"wave{number:02d}.txt").write_text(f"a piggy bank surfs a wave, part {number}")
    (folder / "notes.mp4").write_text("not a video at all")
    (folder / "notes.txt").write_text("nothing")
    return folder


def test_a_dozen_clips_become_a_dataset_and_a_page(videos, tmp_path, monkeypatch):
    result = pusa(
        "data", "prepare", videos, "clips", "--model", "tiny", "--size", "48x32", "--frames", 5, "--frames", 9
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == "clips\n"
    assert "12 clips of 7 s (48x32x9: 12); left out: 1 file, see clips/skipped.jsonl" in result.stderr
    assert len(Path("clips/clips.jsonl").read_text().splitlines()) == CLIPS
    assert "is text, not a video" in Path("clips/skipped.jsonl").read_text()

    result = pusa("data", "inspect", "clips", "-o", "look.html", "--clips", 4)
    assert result.exit_code == 0, result.output
    assert result.stdout == "look.html\nlook.png\n"
    assert "piggy" in Path("look.html").read_text()
    assert Image.open("look.png").width > 500

    assert pusa("data", "inspect", "clips", "--clips", 0).stdout == "clips/inspect.html\n"


def test_synthesize_makes_a_dataset_in_parts(tmp_path, monkeypatch):
    Path("prompts.txt").write_text("a fox\nwaves\n")
    options = ["--model", "tiny", "--size", "48x32", "--frames", 5, "--steps", 2, "--count", 3]
    for part in ("1/2", "2/2"):
        result = pusa("data", "synthesize", "prompts.txt", "made", *options, "--part", part)
        assert result.exit_code == 0, result.output
    lines = [line for path in Path("made").glob("*/clips.jsonl") for line in path.read_text().splitlines()]
    assert sorted(json.loads(line)["source"] for line in lines) == [
        "prompt 1, seed 0",
        "prompt 1, seed 2",
        "prompt 2, seed 1",
    ]
    assert pusa("data", "inspect", "made", "--clips", 0).exit_code == 0


def test_scripts_get_lines_of_json(videos, tmp_path):
    options = ["--model", "tiny", "--size", "48x32", "--frames", 5, "--workers", 0, "--json"]
    result = pusa("data", "prepare", videos / "wave00.mp4", tmp_path / "clips", *options)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert events[-1] == {"kind": "done", "path": str(tmp_path / "clips")}
    steps = [event for event in events if event["kind"] == "step"]
    assert {event["stage"] for event in steps} == {"look into files", "encode captions", "encode clips"}
    assert all("seconds_left" in event for event in steps)


# --- what reaches the work


@pytest.fixture
def asked(monkeypatch) -> dict[str, Any]:
    """Stands for the work: remembers what it is asked for."""
    seen: dict[str, Any] = {}

    def start(*args: Any, stop: Callable[[], bool], **options: Any) -> Iterator[Event]:
        seen.update(options, args=args)
        yield Done({"dataset": Path("out")})

    monkeypatch.setattr("pusa.data.prepare.prepare", start)
    monkeypatch.setattr("pusa.data.synthesize.synthesize", start)
    return seen


def test_every_option_of_prepare_reaches_it(asked, tmp_path):
    args = ["--size", "832x480", "--size", "480x832", "--frames", 81, "--frames", 49, "--fps", 24, "--workers", 3]
    args += ["--clips-per-video", "all", "--stride-seconds", 2.5, "--captions", "c.json", "--caption", "a", "--dtype"]
    result = pusa("data", "prepare", "owner/videos", "out", "--model", "wan2.1-14b", *args, "fp32")
    assert result.exit_code == 0, result.output
    source, output, settings = asked["args"]
    assert (source, output) == ("owner/videos", Path("out"))
    assert (settings.sizes, settings.frames, settings.fps) == (((832, 480), (480, 832)), (81, 49), 24)
    assert (settings.clips_per_video, settings.stride_seconds, str(settings.dtype)) == (None, 2.5, "torch.float32")
    assert (asked["captions"], asked["caption"], asked["workers"]) == (Path("c.json"), "a", 3)


def test_every_option_of_synthesize_reaches_it(asked, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    args = ["--count", 9, "--part", "2/4", "--size", "832x480", "--frames", 81, "--fps", 16, "--steps", 30]
    args += ["--guidance", 4, "--shift", 3, "--negative", "blur", "--seed", 5]
    result = pusa("data", "synthesize", tmp_path / "p.txt", "out", "--model", "wan2.1-1.3b", *args)
    assert result.exit_code == 0, result.output
    prompts, _, settings = asked["args"]
    assert (prompts, asked["count"], asked["part"]) == (["a", "b"], 9, (2, 4))
    assert (settings.size, settings.frames, settings.steps, settings.seed) == ((832, 480), 81, 30, 5)
    assert (settings.guidance, settings.shift, settings.negative_prompt) == (4, 3, "blur")


# --- what goes wrong


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["prepare", "nowhere", "out", "--model", "tiny"], 2, "nowhere does not exist"),
        (["prepare", ".", "out", "--model", "tiny"], 2, "holds no videos or pictures"),
        (["prepare", ".", "out"], 2, "Missing option '--model'"),
        (["prepare", ".", "out", "--model", "wan9"], 3, "no model is called 'wan9'"),
        (["prepare", ".", "out", "--model", "tiny", "--size", "48"], 2, "--size '48' is not understood"),
        (["prepare", ".", "out", "--model", "tiny", "--size", "50x32"], 2, "multiples of 16; give 48x32"),
        (["prepare", ".", "out", "--model", "tiny", "--frames", "80"], 2, "give 81"),
        (["prepare", ".", "out", "--model", "tiny", "--clips-per-video", "some"], 2, "neither a number from 1 on nor"),
        (["synthesize", "none.txt", "out", "--model", "tiny"], 2, "none.txt does not exist"),
        (["synthesize", "none.txt", "out", "--model", "tiny", "--part", "5/4"], 2, "--part '5/4' is not understood"),
        (["inspect", "nowhere"], 2, "nowhere holds no dataset"),
        (["inspect", ".", "-o", "look.txt"], 2, "give a name that ends in .html"),
    ],
)
def test_errors_say_what_to_do(tmp_path, monkeypatch, args, code, message):
    result = pusa("data", *args)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_stop_says_that_the_work_is_kept(monkeypatch, tmp_path):
    def interrupted(*_: Any, stop: Callable[[], bool], **__: Any) -> Iterator[Event]:
        signal.raise_signal(signal.SIGINT)
        assert stop()
        yield from ()

    monkeypatch.setattr("pusa.data.prepare.prepare", interrupted)
    result = pusa("data", "prepare", tmp_path, "out", "--model", "tiny")
    assert result.exit_code == 130
    assert "what is done is kept, and the same command goes on with it" in result.stderr


@pytest.mark.parametrize("args", [["data", "--help"], ["data", "prepare", "--help"], ["data", "inspect", "--help"]])
def test_help_needs_no_torch(args):
    assert not imports_of(args) & {"torch", "diffusers", "av", "numpy", "jinja2"}


def test_every_command_takes_debug():
    result = pusa("data", "prepare", "nowhere", "out", "--model", "tiny", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
