"""Define the options that commands share which make the videos of a measurement, and make them with progress."""

import errno
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from pusa.acceleration.decisions import LoadOptions
from pusa.cli.files import find_files
from pusa.cli.options import build_request, load_options, noise_option, parse_noise, request_options, take_load_options
from pusa.cli.run import Stopped, run
from pusa.events import Done, Events, Note, Report, as_events
from pusa.fsutil import is_full
from pusa.request import GenerationRequest, check_abilities

if TYPE_CHECKING:
    from pusa.evaluation.runs import Item, RunFolder, Summary

C = TypeVar("C", bound=Callable[..., Any])

_NO_SETTINGS = ("conditions", "prompts", "draft", "window", "overlap", "metadata", "preset", "seed")
_JOBS = 4  # of a server at a time
_RUN = ("processes", "shard", "server", "key", "ray", "attempts", "retry_failed")


class _Shard(click.ParamType):
    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Read I/N."""
        number, _, count = str(value).partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            self.fail(f"{value!r} is no shard: write I/N with I in 1..N, such as 1/4")
        return int(number), int(count)


_RUN_OPTIONS = [
    click.option(
        "--processes",
        type=click.IntRange(1, 64),
        help="Processes of this machine that make videos side by side, each with a card of its own; with --server jobs "
        "at a time, with --ray actors. [default: 1; with --server 4; with --ray one for each card of the cluster]",
    ),
    click.option(
        "--shard",
        type=_Shard(),
        metavar="I/N",
        help="Make only the I-th of N parts, for machines without a common folder. [default: all; machines with one "
        "run the same command]",
    ),
    click.option("--server", metavar="URL", help="Make the videos as jobs of a `pusa serve`, which must run there."),
    click.option("--key", metavar="KEY", envvar="PUSA_API_KEY", help="API key of the server. [default: PUSA_API_KEY]"),
    click.option("--ray", metavar="ADDRESS", help="Make the videos on the nodes of a Ray cluster: auto, or HOST:PORT."),
    click.option(
        "--attempts",
        type=click.IntRange(1, 100),
        default=3,
        show_default=True,
        help="How often a video is tried before it is left out.",
    ),
    click.option("--retry-failed", is_flag=True, help="Try again what has been left out."),
]


run_folder = click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False))


def run_options(command: C) -> C:
    """Add the options about where videos are made, and `load_options`; `take_run_options` reads them."""
    command = load_options(command)
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class RunOptions:
    """Hold the values of `run_options`.

    Attributes:
        processes: None: the user has not asked for a number.
        shard: (I, N), I from 1 on; None: all.
        server, key, ray: where videos are made; None: here.
    """

    processes: int | None = None
    shard: tuple[int, int] | None = None
    server: str | None = None
    key: str | None = None
    ray: str | None = None
    attempts: int = 3
    retry_failed: bool = False
    load: LoadOptions = field(default_factory=LoadOptions)

    @property
    def is_local(self) -> bool:
        """Tell if this machine makes the videos."""
        return self.server is None and self.ray is None


def take_run_options(options: dict[str, Any]) -> RunOptions:
    """Remove the values of `run_options` from `options`, and check them.

    Raises UsageError for options that exclude each other, FileNotFoundError for a file that is missing.
    """
    values = {name: options.pop(name) for name in _RUN}
    load = take_load_options(options)
    context = click.get_current_context(silent=True)
    if values["server"] is None and context and context.get_parameter_source("key") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--key is that of a server: add --server URL")
    if values["server"] is not None and values["ray"] is not None:
        raise click.UsageError("--server and --ray: give one of them")
    if values["server"] is not None and load != LoadOptions():
        raise click.UsageError("--server: the server decides how its model is loaded; leave the options about it out")
    return RunOptions(**values, load=load)


@dataclass(frozen=True)
class Settings:
    """Hold the values of `setting_options`.

    Attributes:
        fields: of a `GenerationRequest`, only those that the user has set.
        noise: noise multipliers of conditions; None: the preset's.
        seed: that the seeds of all items are derived from, with `pusa.evaluation.runs.seed_of`.
    """

    fields: dict[str, Any]
    noise: list[float] | None
    seed: int


def setting_options(command: C) -> C:
    """Add the options about the model and how it samples; `take_settings` reads them."""
    seed = click.option(
        "--seed",
        type=click.IntRange(0, 2**31 - 1),
        default=0,
        show_default=True,
        help="The seeds of all videos are derived from it, and recorded.",
    )
    return request_options(*_NO_SETTINGS)(noise_option(seed(command)))


def take_settings(options: dict[str, Any], run: RunOptions) -> tuple[Settings, RunOptions]:
    """Remove the values of `setting_options` from `options`, and check them.

    Returns:
        The settings, and the run's options with the files that a single file or ComfyUI's folder stands for.

    Raises:
        ValueError, FileNotFoundError: a value is out of range, or the model has no such ability.
        MissingModelError: there is no such model.
    """
    from pusa.cli.info import check_model
    from pusa.zoo import defaults_of

    noise, seed = parse_noise(options.pop("noise")), options.pop("seed")
    names = [name for name in GenerationRequest.model_fields if name in options and name not in _NO_SETTINGS]
    given = {name: options.pop(name) for name in names}
    request = build_request("generate", prompt="a video", size=options.pop("size"), **given)  # the items have their own
    if run.is_local:
        request, load = find_files(request, run.load)
        check_model(request.model)
        defaults = defaults_of(request.model)
        if defaults.has_text:
            check_abilities(request, defaults)
        run = replace(run, load=load)
    fields = {name: getattr(request, name) for name in request.model_fields_set if name not in ("task", "prompt")}
    return Settings(fields, noise, seed), run


def make_run(
    folder: "RunFolder", options: RunOptions, *, as_json: bool, items: "Sequence[Item] | None" = None
) -> "Summary":
    """Make the missing videos of a run as the user asks for, with progress on stderr.

    Args:
        as_json: write events as lines of JSON to stdout.
        items: make only these of the run's.

    Raises:
        Stopped: Ctrl-C ended it; what is made is kept.
        RuntimeError: videos have failed as often as they are tried, or the first ones all failed; the disk is full, or
            the folder cannot be written.
    """
    found: list[Summary] = []

    def start(stop: Callable[[], bool]) -> Events:
        def should_stop() -> bool:
            return stop() or is_terminated()

        return as_events(lambda report: found.append(_make(folder, options, should_stop, report, items)))

    try:
        if options.retry_failed:
            folder.forget_failures()
        with _stop_on_termination() as is_terminated:
            run(start, as_json=as_json)
    except (Stopped, RuntimeError) as error:
        if not (isinstance(error, Stopped) or (found and found[0].is_stopped)):
            raise
        made = f"{found[0].made} of {found[0].total} videos are made" if found else "what is made is kept"
        raise Stopped(f"stopped; {made}, and the same command goes on") from None
    except OSError as error:
        if is_full(error):
            cause = f"the disk of {folder.folder} is full: make room"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            cause = f"{error.filename or folder.folder} cannot be written ({error.strerror}): allow it"
        else:
            raise
        raise RuntimeError(f"{cause}, then the same command goes on") from error
    summary = found[0]
    if summary.failed:
        first = summary.failed[0]
        raise RuntimeError(
            f"{len(summary.failed)} of {summary.total} videos could not be made (such as {first.name!r}: "
            f"{first.error}); the errors are in {folder.folder / 'failures'}, and --retry-failed tries them again"
        )
    return summary


@contextmanager
def _stop_on_termination() -> Iterator[Callable[[], bool]]:
    """Set a flag on SIGTERM, which batch systems send before they take a machine away."""
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: terminated.set())
    try:
        yield terminated.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _make(
    folder: "RunFolder",
    options: RunOptions,
    stop: Callable[[], bool],
    report: Report,
    items: "Sequence[Item] | None",
) -> "Summary":
    from pusa.evaluation.runs import LocalMaker, make_in_processes, make_videos
    from pusa.evaluation.runs.processes import cards

    shared: dict[str, Any] = {"stop": stop, "report": report, "items": items, "shard": options.shard}
    shared["attempts"] = options.attempts
    if options.server is not None:
        from pusa.evaluation.runs.server import server_makers

        jobs = options.processes or _JOBS
        summary = make_videos(folder, server_makers(options.server, options.key, folder, jobs, report=report), **shared)
    elif options.ray is not None:
        from pusa.evaluation.runs.ray import ray_makers

        with ray_makers(options.ray, folder, options.processes, load=options.load) as makers:
            summary = make_videos(folder, makers, **shared)
    elif (options.processes or 1) > 1:
        summary = make_in_processes(folder.folder, options.processes or 1, maker=LocalMaker(options.load), **shared)
    else:
        if options.processes is None and (count := len(cards())) > 1:
            report(Note(f"one of {count} cards is used: --processes {count} uses all of them"))
        summary = make_videos(folder, LocalMaker(options.load, report=report), **shared)
    if not summary.is_stopped:
        report(Note(f"{summary.made} of {summary.total} videos are made"))
        report(Done({"videos": folder.videos}))
    return summary
