"""Find the command lines of a page, and parse them without running what they start."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.exceptions import NoArgsIsHelpError
from paths import ROOT

SHELLS = ("", "bash", "sh", "shell", "console")
PROGRAMS = ("pusa", "python", "python3", "torchrun", "accelerate", "make", "docker")


class CommandError(Exception):
    """A command that could not run as it is written."""


# --- finding


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return the language (may be empty) and the text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)


def logical_lines(block: str) -> list[str]:
    """Join continued lines, and lines inside quotes, of a piece of shell."""
    lines, line = [], ""
    for part in block.splitlines():
        line += part
        if line.endswith("\\"):
            line = line[:-1]
        elif _is_open(line):
            line += "\n"
        else:
            lines.append(line)
            line = ""
    return [*lines, line] if line else lines


def _is_open(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def commands_in(line: str) -> list[list[str]]:
    """Return the words of each command of a shell line that starts one of `PROGRAMS`, or a script of the shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&()")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|;&()"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for command in found for words in _without_prefix(command)]


def _without_prefix(words: list[str]) -> list[list[str]]:
    """Drop variables, launchers and redirections; look into ``bash -c`` and ``$(...)``."""
    inner = [c for word in words for text in re.findall(r"\$\((.*)\)", word, re.S) for c in commands_in(text)]
    words = [word for word in words if word not in ("exec", "srun", "sudo", "$")]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:2] == ["bash", "-c"]:
        return inner + commands_in(words[2])
    if redirection := next((k for k, word in enumerate(words) if word in (">", ">>", "<")), None):
        words = words[:redirection]
    return [*inner, words] if words and (words[0] in PROGRAMS or words[0].endswith(".sh")) else inner


def commands_of(text: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield the place (``block`` or ``prose``), the words and the folder of each command of a page.

    Prose may name a command without its arguments.
    """
    for language, block in code_blocks(text):
        folder = "."
        for line in logical_lines(block) if language in SHELLS else []:
            if line.startswith("cd "):
                folder = line.split()[1]
            for words in commands_in(line):
                yield "block", words, folder
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for code in re.findall(r"`([^`]+)`", prose):
        for words in commands_in(" ".join(code.split())) if not _is_open(code) else []:
            yield "prose", words, "."


def options_of(command: str) -> set[str]:
    """Return the options of a command of `pusa`, such as ``--host``."""
    from pusa.cli import main

    found = main.get_command(click.Context(main), command)
    assert found is not None, f"there is no pusa {command}"
    return {name for parameter in found.get_params(click.Context(found)) for name in parameter.opts}


# --- parsing


class _Parsed(BaseException):
    """Stop a program once its arguments have been parsed; no handler of the program catches it."""


def check_command(words: Sequence[str], *, folder: str = ".", whole: bool = True) -> None:
    """Parse one command as the program that it starts would.

    Args:
        folder: where it runs, below the repository's root.
        whole: if false, arguments may be missing, as where prose names a command.

    Raises:
        CommandError: an unknown program, file, command, option or value.
    """
    program, *arguments = [word for word in words if whole or word != "..."]
    if program == "pusa":
        _check_pusa(arguments, whole)
    elif program in ("python", "python3"):
        _check_python(arguments, whole)
    elif program in ("torchrun", "accelerate"):
        _check_launcher(program, arguments, whole)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
        if unknown := [target for target in arguments if target not in targets]:
            raise CommandError(f"the Makefile has no target {unknown[0]}")
    elif program == "docker":
        _check_docker(arguments, ROOT / folder)
    elif not (ROOT / program).is_file():
        raise CommandError(f"there is no {program}")


def _check_pusa(arguments: list[str], whole: bool) -> None:
    from pusa.cli import main
    from pusa.cli.groups import Session

    leaves: list[click.Context] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click.Command, "invoke", lambda self, ctx: leaves.append(ctx))
        patch.setattr(click.Path, "convert", lambda self, value, param, ctx: value)  # files need not exist
        try:
            click.Group.main(main, arguments, "pusa", standalone_mode=False, obj=Session())
            if whole and leaves:  # none after --help
                _check_training(leaves[-1])
        except (click.MissingParameter, NoArgsIsHelpError) as error:
            if whole:
                raise CommandError(error.format_message()) from error
        except click.ClickException as error:
            if whole or not error.format_message().endswith("requires an argument."):
                raise CommandError(error.format_message()) from error
        except (ValueError, FileNotFoundError) as error:
            raise CommandError(str(error)) from error


def _check_training(ctx: click.Context) -> None:
    """Load the configuration of `pusa train`; the folder of a run need not exist."""
    from pusa.training.config import load_config

    if "changes" in ctx.params and not ctx.params["config"].startswith("runs/"):
        load_config(ctx.params["config"], [*ctx.params["changes"], *ctx.params["more_changes"]])


def _check_python(arguments: list[str], whole: bool) -> None:
    if not arguments:
        raise CommandError("python needs something to run")
    if arguments[0] == "-c":
        try:
            compile(arguments[1], "python -c", "exec")
        except SyntaxError as error:
            raise CommandError(str(error)) from error
    elif arguments[0] == "-m":
        _check_module(arguments[1], arguments[2:], whole)
    else:
        script = ROOT / arguments[0]
        if not script.is_file():
            raise CommandError(f"there is no {arguments[0]}")
        _check_program(script, arguments[1:], whole)


def _check_module(name: str, arguments: list[str], whole: bool) -> None:
    if name == "pusa":
        return _check_pusa(arguments, whole)
    source = ROOT / "src" / f"{name.replace('.', '/')}.py"
    if not source.is_file():
        raise CommandError(f"there is no module {name}")
    return _check_program(source, arguments, whole)


def _check_program(source: Path, arguments: list[str], whole: bool) -> None:
    """Run a program up to the end of its parsing of arguments."""
    text = source.read_text()
    if 'if __name__ == "__main__":' not in text:
        raise CommandError(f"{source.name} is no program")
    if "parse_args(" not in text and not re.search(r"^ *from pusa\S* import .*\bmain\b", text, re.MULTILINE):
        if arguments:
            raise CommandError(f"{source.name} takes no arguments")
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parse(self, args, namespace)
        raise _Parsed

    def fail(self: argparse.ArgumentParser, message: str) -> None:
        if whole or "are required" not in message:
            raise CommandError(message)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(argparse.ArgumentParser, "error", fail)
        patch.setattr(sys, "argv", [str(source), *arguments])
        patch.syspath_prepend(str(source.parent))
        try:
            runpy.run_path(str(source), run_name="__main__")
        except _Parsed:
            return
    raise CommandError(f"{source.name} has not parsed its arguments")


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    def fail(message: str) -> None:
        raise CommandError(message)

    parser.error = fail  # type: ignore[assignment, method-assign]
    return parser.parse_args(arguments)


def _check_launcher(program: str, arguments: list[str], whole: bool) -> None:
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = _parse(get_args_parser(), arguments)
    else:
        from accelerate.commands.launch import launch_command_parser

        if arguments[:1] != ["launch"]:
            raise CommandError("accelerate starts programs with launch")
        options = _parse(launch_command_parser(), arguments[1:])
    module = ["-m"] if options.module else []
    _check_python([*module, options.training_script, *options.training_script_args], whole)


def _check_docker(arguments: list[str], folder: Path) -> None:
    parser = argparse.ArgumentParser("docker compose")
    parser.add_argument("-f", "--file", action="append", default=[])
    up = parser.add_subparsers(parser_class=argparse.ArgumentParser, required=True).add_parser("up")
    up.add_argument("--build", action="store_true")
    up.add_argument("--detach", action="store_true")
    if arguments[:1] == ["pull"] and len(arguments) == 2:
        return
    if arguments[:1] != ["compose"]:
        raise CommandError("docker is used with compose, and to pull one image")
    options, unknown = parser.parse_known_args(arguments[1:])
    missing = [name for name in options.file or ["compose.yaml"] if not (folder / name).is_file()]
    if unknown or missing:
        raise CommandError(f"docker compose: unknown {unknown}, missing files {missing}")
