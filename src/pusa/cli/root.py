"""The command line, `pusa`.

Nothing heavy is imported before a command runs, so that help and shell completion answer at once.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from pusa import __version__
from pusa.cli.data import data
from pusa.cli.eval import evaluation
from pusa.cli.mini import mini
from pusa.cli.options import (
    build_conditions,
    build_request,
    condition,
    find_file,
    image_options,
    noise_option,
    output_path,
    parse_numbers,
    request_options,
    video_options,
    with_files_found,
)
from pusa.cli.run import MissingModelError, Start, Stopped, run
from pusa.cli.serve import serve, worker
from pusa.cli.studio import studio
from pusa.cli.train import train
from pusa.request import GenerationRequest, explain

FAILED, BAD_INPUT, MISSING_MODEL, INTERRUPTED = 1, 2, 3, 130
_EXIT_CODES = (
    "Exit codes: 0 done, 1 the run failed, 2 wrong usage or input, 3 the model is missing, 130 stopped by Ctrl-C."
)


@dataclass
class _Session:
    debug: bool = False
    as_json: bool = False


def _remember(name: str) -> Any:
    def callback(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.find_root().obj, name, True)

    return callback


class _Command(click.Command):
    """A command with --debug."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_remember("debug"),
        help="Show where an error comes from.",
    )


class _Group(click.Group):
    """Whatever goes wrong ends with one line on stderr and an exit code; --debug adds the traceback."""

    command_class = _Command
    group_class = type  # groups inside are of this class, too

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        session = _Session(as_json="--json" in (sys.argv[1:] if args is None else args))  # errors of usage, too
        try:
            with warnings.catch_warnings(action="ignore"):  # libraries' advice to programmers
                result = super().main(args, "pusa", **{**extra, "standalone_mode": False, "obj": session})
        except Exception as error:
            code, message = _outcome(error)
            if session.debug:
                traceback.print_exc()
            if session.as_json:
                click.echo(json.dumps({"kind": "error", "message": message, "exit_code": code}, ensure_ascii=False))
            for line in message.splitlines():
                click.echo(f"pusa: {line}", err=True)
            if (
                code == INTERRUPTED and args is None
            ):  # as a program: at once, as torch aborts when it is shut down in a step
                sys.stdout.flush()
                if "pusa.media" in sys.modules:
                    sys.modules["pusa.media"].discard_unfinished()
                os._exit(code)
            sys.exit(code)
        sys.exit(result if isinstance(result, int) else 0)


def _outcome(error: Exception) -> tuple[int, str]:
    """The exit code and the words for an error."""
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "pusa"
        return BAD_INPUT, f"{_line(error.format_message()).rstrip('.')} (see {command} --help)"
    if isinstance(error, click.Abort | Stopped):
        return INTERRUPTED, str(error) or "stopped, nothing was written"
    if isinstance(error, ValidationError):
        return BAD_INPUT, explain(error)
    if isinstance(error, MissingModelError):
        return MISSING_MODEL, _line(error)
    if isinstance(error, ValueError | FileNotFoundError):
        return BAD_INPUT, _line(error)
    return FAILED, _line(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {_line(error)}"


def _line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason was given: run it again with --debug")


@click.group(
    "pusa",
    cls=_Group,
    epilog=_EXIT_CODES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, message="pusa %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Make videos from words, images and pieces of video.

    Try:  pusa generate "a balloon rises in the sky" -o balloon.mp4
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


_output = click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(),
    help="Video to write. [default: a new name in this folder, made from the prompt]",
)
_json = click.option(
    "--json", is_flag=True, expose_value=False, callback=_remember("as_json"), help="Write lines of JSON, for scripts."
)
_prompt = click.option("--prompt", default="", help="What the video shows.")


def _run(
    request: GenerationRequest, output: str | None, *, name: str | None = None, carried: dict[str, bytes] | None = None
) -> None:
    path = output_path(output, name or request.prompt)
    for spec in request.conditions:
        if path.exists() and Path(spec.file).exists() and path.samefile(spec.file):
            raise ValueError(f"-o {str(path)!r} is the {spec.kind} that is read: give the new video another name")
    if path.exists():
        click.echo(f"{path} will be replaced", err=True)

    from pusa.cli.info import check_model

    check_model(request.model)

    from pusa.generate import generate

    _show(lambda stop: generate(request, path, stop=stop, carried=carried))


def _complete_models(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from pusa.zoo import ZOO

    return [name for name in ZOO if name.startswith(incomplete)]


def _show(start: Start) -> None:
    session: _Session = click.get_current_context().find_root().obj
    try:
        run(start, as_json=session.as_json)
    except FileNotFoundError as error:  # images and videos were looked for before
        raise MissingModelError(str(error)) from error


@main.command(epilog=_EXIT_CODES)
@click.argument("prompt")
@image_options
@video_options
@noise_option
@request_options()
@_output
@_json
def generate(
    prompt: str,
    image: str | None,
    keyframes: tuple[str, ...],
    video: str | None,
    positions: str | None,
    noise: str | None,
    fit: str,
    encode: str,
    output: str | None,
    **options: Any,
) -> None:
    """Make a video from PROMPT, and from images and video at their places.

    \b
    From words:        pusa generate "a balloon rises in the sky"
    From an image:     pusa generate "a cat spins" --image cat.png
    Start and end:     pusa generate "a cat slides to the right" --image left.png --keyframe right.png@last
    Complete a video:  pusa generate "a cat spins" --video in.mp4 --positions "0,1,2,3" --noise "0,0.3,0.4,0.5"
    """
    conditions = build_conditions(
        image=image,
        keyframes=keyframes,
        videos=[video] if video else [],
        positions=positions,
        noise=noise,
        fit=fit,
        encode=encode,
    )
    _run(build_request("generate", prompt=prompt, conditions=conditions, **options), output)


@main.command(epilog=_EXIT_CODES)
@click.argument("video", metavar="VIDEO", type=click.Path())
@_prompt
@noise_option
@request_options()
@_output
@_json
def extend(video: str, prompt: str, noise: str | None, output: str | None, **options: Any) -> None:
    """Continue VIDEO after its end."""
    conditions = [condition("video", video, noise=parse_numbers(noise))]
    request = build_request("extend", prompt=prompt, conditions=conditions, **options)
    _run(request, output, name=prompt or f"{Path(video).stem} extended")


@main.command(epilog=_EXIT_CODES)
@click.argument("first", metavar="FIRST", type=click.Path())
@click.argument("second", metavar="SECOND", type=click.Path())
@_prompt
@noise_option
@request_options()
@_output
@_json
def transition(first: str, second: str, prompt: str, noise: str | None, output: str | None, **options: Any) -> None:
    """Make what lies between the end of the video FIRST and the beginning of the video SECOND."""
    conditions = [condition("video", file, noise=parse_numbers(noise)) for file in (first, second)]
    request = build_request("transition", prompt=prompt, conditions=conditions, **options)
    _run(request, output, name=prompt or f"{Path(first).stem} to {Path(second).stem}")


@main.command(epilog=_EXIT_CODES)
@click.argument("prompt")
@image_options
@noise_option
@request_options()
@_output
@_json
def loop(
    prompt: str,
    image: str | None,
    keyframes: tuple[str, ...],
    noise: str | None,
    fit: str,
    encode: str,
    output: str | None,
    **options: Any,
) -> None:
    """Make a video from PROMPT whose end runs into its beginning."""
    conditions = build_conditions(image=image, keyframes=keyframes, noise=noise, fit=fit, encode=encode)
    _run(build_request("loop", prompt=prompt, conditions=conditions, **options), output)


@main.command(epilog=_EXIT_CODES)
@click.argument("video", metavar="VIDEO", type=click.Path())
@_output
@_json
def replay(video: str, output: str | None) -> None:
    """Make VIDEO again from the request that is stored inside it.

    What it was made from is inside, too, if it is small; else it has to be where it was, or beside VIDEO.
    """
    from pusa.media import read_metadata

    file = Path(video) if Path(video).is_dir() else find_file(video, "video")
    metadata = read_metadata(file)

    from pusa.generate import read_request

    request, carried = read_request(metadata)
    request = with_files_found(request, carried, beside=file.parent)
    _run(request, output, name=f"{file.stem} again", carried=carried)


@main.command(epilog=_EXIT_CODES)
@click.argument("latents", metavar="LATENTS", type=click.Path())
@_output
@_json
def decode(latents: str, output: str | None) -> None:
    """Make the video of LATENTS, a .safetensors file that a run has saved before decoding."""
    file = find_file(latents, "file")
    path = output_path(output, file.stem.removesuffix(".latents"))

    from pusa.generate import decode as decode_latents

    _show(lambda stop: decode_latents(file, path, stop=stop))


@main.command()
@click.argument("file", metavar="FILE", type=click.Path())
@_json
def info(file: str) -> None:
    """Say what FILE is: a video and how it was made, a LoRA, a checkpoint or saved latents."""
    from pusa.cli.info import describe

    _print_facts(describe(file))


def _print_facts(facts: dict[str, Any]) -> None:
    if click.get_current_context().find_root().obj.as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(facts)))


def _lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from _lines(value, indent + "  ")
        elif value not in (None, "", []):
            yield f"{indent}{name:<{width}}  {_flat(value)}"


def _flat(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@main.group(invoke_without_command=True)
@_json
@click.pass_context
def models(ctx: click.Context) -> None:
    """List the models, their sizes and how they would run on this machine."""
    if ctx.invoked_subcommand is None:
        from pusa.cli.info import list_models

        _print_facts(list_models())


@models.command()
@click.argument("name", metavar="NAME", shell_complete=_complete_models)
@click.option(
    "--words",
    is_flag=True,
    help="List the words that a small model knows; prompts are made of them: a duck slides to the right under the sea, "
    "the camera zooms in.",
)
@_json
def show(name: str, words: bool) -> None:
    """Say all that is known of the model NAME, a folder that holds one too."""
    from pusa.cli.info import describe_model, words_as_text, words_of_model

    if not words:
        _print_facts(describe_model(name))
    elif click.get_current_context().find_root().obj.as_json:
        click.echo(json.dumps(words_of_model(name), ensure_ascii=False))
    else:
        click.echo(words_as_text(words_of_model(name)))


def _add_group(group: click.Group) -> None:
    """A group from a file of its own, whose commands get what those of this file have."""
    for command in (group, *group.commands.values()):
        command.params.append(_debug_option())
    main.add_command(group)


def _add_command(command: click.Command) -> None:
    """The same for a single command."""
    command.params.append(_debug_option())
    main.add_command(command)


_add_command(serve)
_add_command(studio)
_add_command(worker)
_add_group(data)
_add_group(evaluation)
_add_group(mini)
_add_group(train)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes `pusa` in a shell.

    \b
    bash:  pusa completion bash >> ~/.bashrc
    zsh:   pusa completion zsh >> ~/.zshrc
    fish:  pusa completion fish > ~/.config/fish/completions/pusa.fish
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(main, {}, "pusa", "_PUSA_COMPLETE").source())
