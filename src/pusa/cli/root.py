"""Define `pusa` and the commands that make, repeat and describe videos.

Nothing heavy is imported before a command runs, so that help and shell completion answer at once.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from pusa import __version__
from pusa.acceleration.decisions import LoadOptions
from pusa.cli.groups import Group, Session, json_option
from pusa.cli.options import (
    build_conditions,
    build_request,
    condition,
    find_file,
    image_options,
    load_options,
    mark_options,
    metadata_option,
    noise_option,
    output_path,
    parse_noise,
    request_options,
    take_load_options,
    take_mark_options,
    video_options,
)
from pusa.cli.ranks import RanksCommand, is_follower, join_ranks, ranks_options
from pusa.cli.run import MissingModelError, Start, Stopped, run
from pusa.fields import ProblemsError
from pusa.libraries import quiet_libraries
from pusa.provenance.options import MarkOptions
from pusa.request import GenerationRequest, Metadata, check_abilities, explain, is_wave

FAILED, BAD_INPUT, MISSING_MODEL, INTERRUPTED = 1, 2, 3, 130
EXIT_CODES = (
    "Exit codes: 0 done, 1 the run failed, 2 wrong usage or input, 3 the model is missing, 130 stopped by Ctrl-C."
)


class _Main(Group):
    """Group all commands, and report an error in one line on stderr and by the exit code.

    With ``--debug`` the traceback precedes it; with ``--json`` the error is also a line on stdout.
    """

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        session = Session(as_json="--json" in (sys.argv[1:] if args is None else args))  # for errors of usage, too
        quiet_libraries()
        try:
            with warnings.catch_warnings(action="ignore"):  # libraries' advice to programmers
                result = super().main(args, "pusa", **{**extra, "standalone_mode": False, "obj": session})
        except Exception as error:
            code, message = _outcome(error)
            if is_follower() and code == BAD_INPUT:  # rank 0 tells
                sys.exit(code)
            if session.debug:
                traceback.print_exc()
            if session.as_json:
                click.echo(json.dumps({"kind": "error", "message": message, "exit_code": code}, ensure_ascii=False))
            for line in message.splitlines():
                click.echo(f"pusa: {line}", err=True)
            if code == INTERRUPTED and args is None:
                _exit_at_once(code)
            sys.exit(code)
        sys.exit(result if isinstance(result, int) else 0)


def _exit_at_once(code: int) -> None:
    """End the process without Python's shutdown, in which torch aborts if it is in a step."""
    sys.stdout.flush()
    if "pusa.media" in sys.modules:
        sys.modules["pusa.media"].discard_unfinished()
    os._exit(code)


def _outcome(error: Exception) -> tuple[int, str]:
    """Return the exit code and the message for an error."""
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "pusa"
        return BAD_INPUT, f"{_line(error.format_message()).rstrip('.')} (see {command} --help)"
    if isinstance(error, click.Abort | Stopped):
        return INTERRUPTED, str(error) or "stopped, nothing was written"
    if isinstance(error, ValidationError):
        return BAD_INPUT, explain(error)
    if isinstance(error, ProblemsError):
        return BAD_INPUT, str(error)
    if isinstance(error, MissingModelError):
        return MISSING_MODEL, _line(error)
    if isinstance(error, ValueError | FileNotFoundError):
        return BAD_INPUT, _line(error)
    return FAILED, _line(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {_line(error)}"


def _line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason was given: run it again with --debug")


@click.group(
    "pusa",
    cls=_Main,
    lazy={
        "check": "pusa.cli.check:check",
        "data": "pusa.cli.data:data",
        "eval": "pusa.cli.eval:evaluation",
        "final": "pusa.cli.replay:final",
        "jobs": "pusa.cli.serve:jobs",
        "lora": "pusa.cli.lora:lora",
        "mini": "pusa.cli.mini:mini",
        "models": "pusa.cli.models:models",
        "plan": "pusa.cli.plan:plan",
        "provenance": "pusa.cli.provenance:provenance",
        "replay": "pusa.cli.replay:replay",
        "serve": "pusa.cli.serve:serve",
        "studio": "pusa.cli.studio:studio",
        "train": "pusa.cli.train:train",
        "worker": "pusa.cli.serve:worker",
    },
    epilog=EXIT_CODES,
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


output_option = click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(),
    help="Video to write. [default: a new name in this folder, made from the prompt]",
)
model_option = click.option(
    "--model", metavar="MODEL", help="Where the model is, if it was a folder: the file holds its name only."
)
_prompt = click.option("--prompt", default="", help="What the video shows.")


def run_request(
    request: GenerationRequest,
    output: str | None,
    *,
    marks: MarkOptions,
    load: LoadOptions,
    as_json: bool,
    name: str | None = None,
    carried: dict[str, bytes] | None = None,
    made_with: dict[str, Any] | None = None,
) -> None:
    path = output_path(output, name or request.prompt)
    for spec in request.conditions:
        if path.exists() and Path(spec.file).exists() and path.samefile(spec.file):
            raise ValueError(f"-o {str(path)!r} is the {spec.kind} that is read: give the new video another name")
    if path.exists():
        click.echo(f"{path} will be replaced", err=True)

    from pusa.cli.files import find_files
    from pusa.cli.info import check_model
    from pusa.zoo import defaults_of

    request, load = find_files(request, load)
    check_model(request.model)
    check_abilities(request, defaults_of(request.model))  # before libraries are loaded
    options: dict[str, Any] = {"carried": carried, "marks": marks, "load": load}
    options |= {"made_with": made_with} if made_with else {}
    if is_wave(request.schedule) and path.suffix in (".mp4", ".webp", ".gif"):
        options["growing"] = path.with_name(f"{path.stem}.part.mp4")
    with join_ranks(request, load) as ranks:  # before the libraries: the other ranks load them at the same time
        from pusa.generate import generate

        options |= {"ranks": ranks, "device": ranks.device.type} if ranks else {}
        show_run(lambda stop: generate(request, path, stop=stop, **options), as_json)


def _given_prompt(prompt: str | None, options: dict[str, Any]) -> str:
    """Return the argument, which ``--prompts`` replace, and which a model may not need. Raises UsageError."""
    if prompt is None and not options.get("prompts") and _reads_text(options.get("model")):
        raise click.UsageError("Missing argument 'PROMPT'.", click.get_current_context())
    return prompt or ""


def _reads_text(model: str | None) -> bool:
    from pusa import zoo

    return zoo.defaults_of(model or GenerationRequest.model_fields["model"].default).has_text


def show_run(start: Start, as_json: bool) -> None:
    try:
        run(start, as_json=as_json)
    except FileNotFoundError as error:  # the files of the request exist, so it is the model's
        raise MissingModelError(str(error)) from error


@main.command(cls=RanksCommand, epilog=EXIT_CODES)
@click.argument("prompt", required=False)
@image_options
@video_options
@noise_option
@request_options()
@ranks_options
@mark_options
@load_options
@output_option
@json_option
def generate(
    prompt: str | None,
    image: str | None,
    keyframes: tuple[str, ...],
    video: str | None,
    positions: str | None,
    noise: str | None,
    fit: str,
    encode: str,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a video from PROMPT, and from images and video at their places.

    \b
    From words:        pusa generate "a balloon rises in the sky"
    From an image:     pusa generate "a cat spins" --image cat.png
    Start and end:     pusa generate "a cat slides to the right" --image left.png --keyframe right.png@last
    Complete a video:  pusa generate "a cat spins" --video in.mp4 --positions "0,1,2,3" --noise "0,0.3,0.4,0.5"
    Tell a story:      pusa generate --frames 97 --prompts "0s: a rocket stands still" --prompts "3s: a rocket rises"
    """
    prompt = _given_prompt(prompt, options)
    marks, load = take_mark_options(options), take_load_options(options)
    conditions = build_conditions(
        image=image,
        keyframes=keyframes,
        videos=[video] if video else [],
        positions=positions,
        noise=noise,
        fit=fit,
        encode=encode,
    )
    request = build_request("generate", prompt=prompt, conditions=conditions, **options)
    run_request(request, output, marks=marks, load=load, as_json=as_json)


@main.command(cls=RanksCommand, epilog=EXIT_CODES)
@click.argument("video", metavar="VIDEO", type=click.Path())
@_prompt
@noise_option
@request_options()
@ranks_options
@mark_options
@load_options
@output_option
@json_option
def extend(video: str, prompt: str, noise: str | None, output: str | None, as_json: bool, **options: Any) -> None:
    """Continue VIDEO after its end."""
    marks, load = take_mark_options(options), take_load_options(options)
    conditions = [condition("video", video, noise=parse_noise(noise))]
    request = build_request("extend", prompt=prompt, conditions=conditions, **options)
    run_request(request, output, marks=marks, load=load, as_json=as_json, name=prompt or f"{Path(video).stem} extended")


@main.command(cls=RanksCommand, epilog=EXIT_CODES)
@click.argument("first", metavar="FIRST", type=click.Path())
@click.argument("second", metavar="SECOND", type=click.Path())
@_prompt
@noise_option
@request_options()
@ranks_options
@mark_options
@load_options
@output_option
@json_option
def transition(
    first: str, second: str, prompt: str, noise: str | None, output: str | None, as_json: bool, **options: Any
) -> None:
    """Make the video between the end of FIRST and the beginning of SECOND."""
    marks, load = take_mark_options(options), take_load_options(options)
    conditions = [condition("video", file, noise=parse_noise(noise)) for file in (first, second)]
    request = build_request("transition", prompt=prompt, conditions=conditions, **options)
    run_request(
        request,
        output,
        marks=marks,
        load=load,
        as_json=as_json,
        name=prompt or f"{Path(first).stem} to {Path(second).stem}",
    )


@main.command(cls=RanksCommand, epilog=EXIT_CODES)
@click.argument("prompt", required=False)
@image_options
@noise_option
@request_options()
@ranks_options
@mark_options
@load_options
@output_option
@json_option
def loop(
    prompt: str | None,
    image: str | None,
    keyframes: tuple[str, ...],
    noise: str | None,
    fit: str,
    encode: str,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a video from PROMPT whose end runs into its beginning."""
    prompt = _given_prompt(prompt, options)
    marks, load = take_mark_options(options), take_load_options(options)
    conditions = build_conditions(image=image, keyframes=keyframes, noise=noise, fit=fit, encode=encode)
    request = build_request("loop", prompt=prompt, conditions=conditions, **options)
    run_request(request, output, marks=marks, load=load, as_json=as_json)


@main.command(epilog=EXIT_CODES)
@click.argument("latents", metavar="LATENTS", type=click.Path())
@model_option
@metadata_option("that of LATENTS")
@mark_options
@load_options
@output_option
@json_option
def decode(
    latents: str, model: str | None, metadata: Metadata | None, output: str | None, as_json: bool, **options: Any
) -> None:
    """Make the video of LATENTS, a .safetensors file that a run has saved before decoding."""
    if is_follower():
        return  # decoding is not divided: rank 0 of torchrun does it
    file = find_file(latents, "file")
    path = output_path(output, file.stem.removesuffix(".latents"))

    from pusa.generate import decode as decode_latents

    marks, load = take_mark_options(options), take_load_options(options)
    if model is not None:
        from pusa.cli.files import find_files

        request, load = find_files(GenerationRequest(model=model, prompt=file.stem), load)
        model = request.model
    given: dict[str, Any] = {"model": model, "metadata": metadata, "marks": marks, "load": load}
    show_run(lambda stop: decode_latents(file, path, stop=stop, **given), as_json)


@main.command()
@click.argument("file", metavar="FILE", type=click.Path())
@json_option
def info(file: str, as_json: bool) -> None:
    """Describe FILE: a video and how it was made, a LoRA, a checkpoint, saved latents or a model's folder."""
    from pusa.cli.info import describe

    print_facts(describe(file), as_json)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts by their names, one a line, or as a line of JSON."""
    if as_json:
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
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
