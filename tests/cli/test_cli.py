"""Test the command line: parsing, output and exit codes."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
from command_line import imports_of, pusa
from PIL import Image

from pusa.cli import main
from pusa.cli.options import build_conditions, build_request, output_path, parse_keyframe
from pusa.cli.run import Stopped, run, time_left
from pusa.events import Done, Event, Note, Stage, Step
from pusa.request import GenerationRequest, Position, field_specs


def shell(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from pusa.cli import main; main()", *args], capture_output=True, text=True, cwd=cwd
    )


class Engine(ModuleType):
    """Stand for `pusa.generate`: remember what it is asked for, report three steps and write a file."""

    def __init__(self) -> None:
        super().__init__("pusa.generate")
        self.asked: list[tuple[GenerationRequest, Path]] = []
        self.at_step: Callable[[int], object] = lambda step: None
        self.closed = 0

    def generate(
        self,
        request: GenerationRequest,
        output: Path,
        *,
        stop: Callable[[], bool],
        carried: object = None,
        marks: object = None,
        load: object = None,
    ) -> Iterator[Event]:
        self.asked.append((request, output))
        half = output.with_suffix(".half")
        try:
            yield Note("width 830 becomes 832")
            yield Stage("denoise", 3)
            half.write_bytes(b"")
            for step in (1, 2, 3):
                self.at_step(step)
                if stop():
                    return
                yield Step(step, 3, 2.0 * (3 - step))
            half.rename(output)
            yield Done({"video": output})
        finally:
            half.unlink(missing_ok=True)
            self.closed += 1


@pytest.fixture
def engine(monkeypatch) -> Engine:
    engine = Engine()
    monkeypatch.setitem(sys.modules, "pusa.generate", engine)
    return engine


# --- answers at once


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["--version"], ["completion", "zsh"]])
def test_help_needs_no_torch_and_no_model(args):
    assert not imports_of(args) & {"torch", "diffusers", "transformers", "av", "numpy"}


def test_import_pusa_loads_no_torch_and_lists_its_names():
    code = (
        "import sys, pusa\n"
        "assert set(pusa.__all__) <= set(dir(pusa)) and pusa.__version__\n"
        "pusa.GenerationRequest\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_public_names_are_there():
    import pusa

    names = set(pusa.__all__) - {"__version__"}
    assert {getattr(pusa, name).__name__ for name in names} == names
    with pytest.raises(AttributeError, match="module 'pusa' has no attribute 'Pipeline'"):
        pusa.Pipeline  # noqa: B018


def test_help_names_every_field_with_its_range_and_default():
    out = " ".join(pusa("generate", "--help").stdout.split())
    for field in field_specs(GenerationRequest):
        if field.name not in ("task", "prompt", "width", "height"):
            flag = "--negative" if field.name == "negative_prompt" else "--" + field.name.replace("_", "-")
            assert f" {flag} " in out, flag
            assert field.help in out
            assert field.range in out
    assert "[1..200; default: the model's]" in out
    assert "130 stopped by Ctrl-C" in out


def commands_below(group: click.Group) -> Iterator[click.Command]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        yield command
        if isinstance(command, click.Group):
            yield from commands_below(command)


def test_every_command_has_debug_and_json_is_one_option():
    json_options = set()
    for command in commands_below(main):
        options = {flag: option for option in command.params for flag in option.opts}
        assert "--debug" in options, command.name
        if "--json" in options:
            json_options.add((options["--json"].name, options["--json"].help))
    assert json_options == {("as_json", "Write lines of JSON, for scripts.")}


def test_json_before_the_name_of_a_command_counts_for_it():
    shown = pusa("models", "--json", "show", "wan2.1-14b")
    assert json.loads(shown.stdout) == json.loads(pusa("models", "show", "wan2.1-14b", "--json").stdout)


def test_without_a_command_there_is_help():
    result = pusa()
    assert result.exit_code == 0
    assert "Commands:" in result.stdout


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(name):
    result = pusa("completion", name)
    assert result.exit_code == 0
    assert "_PUSA_COMPLETE" in result.stdout


# --- from words to a request


def test_every_option_of_the_contract_reaches_the_request(engine, picture):
    args = ["--image", picture, "--noise", "0.3", "--negative", "blur", "--model", "tiny", "--lora", "a.safetensors"]
    args += ["--alpha", "1.4", "--steps", "10", "--guidance", "3", "--size", "832x480", "--frames", "81", "--seed", "0"]
    result = pusa("generate", "a fox", *args, "-o", "fox.mp4")
    assert result.exit_code == 0, result.stderr
    [(request, output)] = engine.asked
    assert output == Path("fox.mp4")
    values = request.model_dump(exclude={"conditions"}, exclude_defaults=True)
    assert values == {
        **{
            "prompt": "a fox",
            "negative_prompt": "blur",
            "model": "tiny",
            "lora": ["a.safetensors"],
        },
        **{"alpha": 1.4, "steps": 10, "guidance": 3.0, "width": 832, "height": 480, "frames": 81, "seed": 0},
    }
    [condition] = request.conditions
    assert (condition.kind, condition.file, condition.noise) == ("image", "cat.png", [0.3])
    assert condition.positions == [Position("latent", 0)]


def test_a_keyframe_without_noise_takes_the_common_one(engine, picture):
    keyframes = ["--keyframe", "cat.png@1.5s:0.4", "--keyframe", "cat.png@last"]
    assert pusa("generate", "x", "--model", "tiny", "--image", picture, *keyframes, "--noise", "0.1").exit_code == 0
    conditions = engine.asked[0][0].conditions
    assert [(str(c.positions[0]), c.noise) for c in conditions] == [("0", [0.1]), ("1.5s", [0.4]), ("last", [0.1])]


def test_a_video_keeps_its_latent_frames_at_their_places(engine, tmp_path):
    (tmp_path / "in.mp4").write_bytes(b"video")
    lists = ["--positions", "0,1,2,3", "--noise", "0,0.3,0.4,0.5"]
    assert pusa("generate", "x", "--model", "tiny", "--video", "in.mp4", *lists).exit_code == 0
    [condition] = engine.asked[0][0].conditions
    assert (condition.kind, condition.noise) == ("video", [0.0, 0.3, 0.4, 0.5])
    assert [p.value for p in condition.positions] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "file", "position", "noise"),
    [
        ("cat.png@0", "cat.png", "0", None),
        ("cat.png@last:0.2", "cat.png", "last", [0.2]),
        (r"C:\pictures\cat.png@-1:1", r"C:\pictures\cat.png", "last", [1.0]),
        (r"C:\me@home\a:b.png@80f", r"C:\me@home\a:b.png", "80f", None),
        ("me@home.png@1.5s:0.3", "me@home.png", "1.5s", [0.3]),
        ("@@3", "@", "3", None),
    ],
)
def test_a_keyframe_is_file_at_position_and_noise(text, file, position, noise):
    got_file, got_position, got_noise = parse_keyframe(text)
    assert (got_file, str(got_position), got_noise) == (file, position, noise)


@pytest.mark.parametrize(
    "text", ["cat.png", "@3", "me@home.png", "cat.png@", "cat.png@3:", "cat.png@3:x", "cat.png@3:0.1:0.2"]
)
def test_any_other_keyframe_is_explained(text):
    with pytest.raises(ValueError, match=r"is not understood .*; write FILE@POSITION\[:NOISE\]"):
        parse_keyframe(text)


def test_an_image_may_have_any_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a@b:c.png")
    [condition] = build_conditions(image="a@b:c.png")
    assert condition["file"] == "a@b:c.png"


@pytest.mark.parametrize("command", ["extend", "transition", "loop"])
def test_each_task_has_its_command(engine, tmp_path, command):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"video")
    words = {"extend": ["a.mp4", "--prompt", "x"], "transition": ["a.mp4", "b.mp4", "--prompt", "x"], "loop": ["x"]}
    result = pusa(command, *words[command], "--model", "tiny", "-o", "out.mp4")
    assert (result.exit_code, result.stdout) == (0, "out.mp4\n")
    request = engine.asked[0][0]
    assert (request.task, request.prompt) == (command, "x")
    assert len(request.conditions) == {"extend": 1, "transition": 2, "loop": 0}[command]


# --- where it goes


def test_a_name_is_made_from_the_prompt_and_never_taken_twice(engine):
    names = [pusa("generate", "A fox, in the SNOW!", "--model", "tiny").stdout for _ in range(3)]
    assert names == ["a-fox-in-the-snow.mp4\n", "a-fox-in-the-snow-2.mp4\n", "a-fox-in-the-snow-3.mp4\n"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("狐狸", "狐狸.mp4"), ("../../etc/x", "etc-x.mp4"), ("!?", "video.mp4"), ("a" * 99, "a" * 40 + ".mp4")],
)
def test_a_made_name_stays_in_the_folder(prompt, name):
    assert output_path(None, prompt) == Path(name)


def test_standard_output_takes_no_video() -> None:
    with pytest.raises(ValueError, match="a video needs a name"):
        output_path("-", "a fox")


def test_an_existing_output_is_replaced_with_a_note(engine, tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"old")
    result = pusa("generate", "x", "--model", "tiny", "-o", "out.mp4")
    assert "out.mp4 will be replaced" in result.stderr
    assert (tmp_path / "out.mp4").read_bytes() == b""


def test_a_video_is_never_written_over_itself(engine, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"video")
    result = pusa("extend", "a.mp4", "--prompt", "x", "--model", "tiny", "-o", "./a.mp4")
    assert result.exit_code == 2
    assert "is the video that is read" in result.stderr
    assert engine.asked == []


def test_only_the_path_goes_to_stdout(engine):
    result = pusa("generate", "x", "--model", "tiny", "-o", "out.mp4")
    assert result.stdout == "out.mp4\n"
    assert result.stderr == "width 830 becomes 832\n"


def test_json_is_one_event_per_line(engine):
    result = pusa("generate", "x", "--model", "tiny", "-o", "out.mp4", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [e["kind"] for e in events] == ["note", "stage", "step", "step", "step", "done"]
    assert events[2] == {"kind": "step", "stage": "denoise", "step": 1, "steps": 3, "seconds_left": 4.0}
    assert events[-1]["path"] == "out.mp4"


def test_the_bar_shows_steps_and_time_left_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(lambda stop: Engine().generate(GenerationRequest(prompt="x"), Path("x.mp4"), stop=stop), as_json=False)
    assert "denoise" in terminal.getvalue()
    assert "2/3, 2 s left" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, ""), (0.2, ", 0 s left"), (200, ", 3 min 20 s left"), (7300, ", 2 h 1 min left")]
)
def test_time_left_is_in_words(seconds, words):
    assert time_left(seconds) == words


# --- how it ends


def test_ctrl_c_stops_after_the_step_and_leaves_nothing(engine, tmp_path, capfd):
    before = signal.getsignal(signal.SIGINT)  # ignored in the background of a shell
    engine.at_step = lambda step: step == 2 and os.kill(os.getpid(), signal.SIGINT)
    result = pusa("generate", "x", "--model", "tiny", "-o", "out.mp4")
    assert result.exit_code == 130
    assert "stopped, nothing was written" in result.stderr
    assert "stopping after this step (Ctrl-C again to stop at once)" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once_and_leaves_nothing(engine, tmp_path):
    def twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C did not stop the step")

    engine.at_step = twice
    result = pusa("generate", "x", "--model", "tiny", "-o", "out.mp4")
    assert result.exit_code == 130
    assert engine.closed == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_file_is_a_failure():
    def empty(stop: Callable[[], bool]) -> Iterator[Event]:
        yield Stage("load")

    with pytest.raises(RuntimeError, match="ended without a file"):
        run(empty, as_json=True)


def test_a_stopped_run_is_not_a_failure():
    def stopped(stop: Callable[[], bool]) -> Iterator[Event]:
        os.kill(os.getpid(), signal.SIGINT)
        yield Stage("load")
        assert stop()

    with pytest.raises(Stopped):
        run(stopped, as_json=True)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("out of memory: close something\nTried to allocate"), 1, "out of memory: close something"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (RuntimeError(), 1, "no reason was given: run it again with --debug"),
        (ValueError("latent_index=21: this video has 21 latent frames (0..20)"), 2, "latent_index=21: this video has"),
        (FileNotFoundError("no such folder"), 3, "no such folder"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(engine, tmp_path, error, code, message):
    def fail(step: int) -> None:
        raise error

    engine.at_step = fail
    result = pusa("generate", "x", "--model", "tiny", "-o", "out.mp4")
    assert result.exit_code == code
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"pusa: {message}")
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" in pusa("generate", "x", "--model", "tiny", "-o", "out.mp4", "--debug").stderr


def test_a_failure_is_an_event_too(engine):
    engine.at_step = lambda step: 1 / 0
    result = pusa("generate", "x", "--model", "tiny", "--json")
    last = json.loads(result.stdout.splitlines()[-1])
    assert last == {"kind": "error", "message": "ZeroDivisionError: division by zero", "exit_code": 1}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x", "--steps", "1000000"], "steps=1000000 is outside 1..200"),
        (["x", "--alpha", "1e9"], "alpha=1000000000.0 is outside 0.1..5"),
        (["x", "--guidance", "nan"], "guidance=nan is not a number"),
        (["x", "--seed", "-1"], "seed=-1 is outside 0..9223372036854775807"),
        (["x", "--frames", "0"], "frames=0 is outside 1..4801"),
        (["x", "--size", "100000x480"], "width=100000 is outside 16..2048"),
        (["x", "--size", "832"], "--size '832' is not understood: write WIDTHxHEIGHT in pixels, such as 832x480"),
        (
            ["x", "--steps", "ten"],
            "Invalid value for '--steps': 'ten' is not a valid integer (see pusa generate --help)",
        ),
        (["x", "--stpes", "3"], "No such option '--stpes'"),
        ([""], "the prompt is empty"),
        ([], "Missing argument 'PROMPT' (see pusa generate --help)"),
        (["x", "--schedule", "wave:0"], "schedule='wave:0' is not understood: write even, wave or wave:DELAY"),
        (["--prompts", "0s: a", "--prompts", "b"], "prompt 2 of prompts has no time and others have"),
        (["--prompts", "@nope.txt"], "--prompts '@nope.txt' cannot be read: No such file or directory"),
        (["--prompts", f"@{os.devnull}"], "is an empty file: write a line for each prompt"),
        (["x", "--image", "nope.png"], "image 'nope.png' does not exist: check the name and the folder"),
        (["x", "--image", "."], "image '.' is not a file"),
        (["x", "--keyframe", "cat.png"], "--keyframe 'cat.png' is not understood (no @POSITION after the file)"),
        (["x", "--keyframe", "cat.png@0:7"], "condition 1: noise=7.0 is outside 0..1"),
        (["x", "--image", "cat.png", "--noise", "0.1,x"], "--noise '0.1,x' is not understood"),
        (["x", "--image", "cat.png", "--noise", "0.1,0.2"], "--noise '0.1,0.2' has 2 numbers and no video"),
        (["x", "--noise", "0.1"], "--noise '0.1' is for an image or a video"),
        (["x", "--positions", "0,1"], "--positions '0,1' are those of a video"),
        (["x", "--video", "cat.png", "--positions", "0,,1"], "position '' is not understood"),
        (
            ["x", "--video", "cat.png", "--positions", "0,1,2", "--noise", "0,1"],
            "condition 1: 2 noise multipliers for 3 positions",
        ),
        (["x", "-o", "nope/out.mp4"], "nope: no such folder"),
        (["x", "-o", "out.avi"], "out.avi: give .mp4, .gif, .webp, .png, a folder or folder/%04d.png"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(engine, picture, tmp_path, args, message):
    result = pusa("generate", "--model", "tiny", *args)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("pusa: ")
    assert message in line
    assert result.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["cat.png"]
    assert engine.asked == []


def test_a_model_that_is_not_there_is_exit_code_3(engine):
    for args in (["generate", "x", "--model", "wan2.1-41b"], ["models", "show", "wan2.1-41b"]):
        result = pusa(*args)
        assert result.exit_code == 3
        assert "did you mean 'wan2.1-14b'?" in result.stderr


def test_as_a_program_it_ends_the_same_way(tmp_path):
    result = shell("generate", "x", "--steps", "0", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "pusa: steps=0 is outside 1..200\n")
    result = shell("frobnicate", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_server_of_an_unknown_model_does_not_start(command, tmp_path):
    result = pusa(command, "--model", "minni", "--data", str(tmp_path / "data"))
    assert result.exit_code == 3
    assert result.stderr.startswith("pusa: no model is called 'minni': did you mean 'mini'?")
    assert not (tmp_path / "data").exists()


def test_prompts_may_be_the_lines_of_a_file(tmp_path):
    (tmp_path / "story.txt").write_text("0s: a cat stands\n\n2s: a cat spins\n", encoding="utf-8-sig")
    request = build_request("generate", size=None, prompt="", prompts=(f"@{tmp_path / 'story.txt'}",))
    assert request.prompts == ["0s: a cat stands", "2s: a cat spins"]
    assert request.prompt == "a cat stands"
