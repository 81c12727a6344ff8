"""Define `pusa eval fidelity`: measure a model on the user's own clips, without any download."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pusa.cli.eval.names import Names
from pusa.cli.eval.options import make_run, run_options, setting_options, take_run_options, take_settings
from pusa.cli.groups import Command, json_option
from pusa.cli.run import Stopped

if TYPE_CHECKING:
    from pusa.evaluation.fidelity.suite import Scored
    from pusa.evaluation.runs.items import Item

TASKS = ("i2v", "start-end", "keyframes", "completion", "transition", "extension")


_CLIP_OPTIONS = [
    click.option(
        "--prompts",
        type=click.Path(path_type=Path, dir_okay=False),
        help="A CSV, JSON or JSONL table of files and prompts. [default: a .txt file beside each video]",
    ),
    click.option("--prompt", help="Prompt of the clips that have none; it may be empty. [default: they are left out]"),
    click.option("--most-clips", type=click.IntRange(1), help="Take only the first clips by name. [default: all]"),
    click.option(
        "--tasks",
        type=Names(TASKS),
        default=",".join(TASKS),
        metavar="NAMES",
        help=f"Measure only these: {', '.join(TASKS)}. [default: all]",
    ),
    click.option(
        "--count",
        type=click.IntRange(1, 100),
        default=1,
        show_default=True,
        help="Videos of each clip and task, each with a seed of its own.",
    ),
    click.option(
        "--extensions",
        type=click.IntRange(1, 100),
        default=3,
        show_default=True,
        help="Windows that are chained in the task extension.",
    ),
    click.option(
        "--encode",
        type=click.Choice(("single", "repeat")),
        help="How a picture after the first frame is encoded. [default: the model's]",
    ),
]


_CLIP_NAMES = ("prompts", "prompt", "most_clips", "tasks", "count", "extensions", "encode")


def clip_options(command: Any) -> Any:
    """Add the options about clips and tasks; `take_clip_options` reads them."""
    for option in reversed(_CLIP_OPTIONS):
        command = option(command)
    return command


def take_clip_options(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the values of `clip_options` from `options`, for `FidelitySettings`; before `take_settings`."""
    return {name: options.pop(name) for name in _CLIP_NAMES}


@click.command(cls=Command)
@click.argument("clips", type=click.Path(path_type=Path, exists=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="eval-fidelity",
    show_default=True,
    help="Folder of the run: videos, values, the report.",
)
@clip_options
@click.option(
    "--bounds",
    type=click.Path(path_type=Path, dir_okay=False),
    help='A JSON file of bounds, such as {"i2v": {"given_psnr_db": {"min": 25}}}; the exit status is 1 when a figure '
    "leaves them.",
)
@click.option(
    "--videos",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Make nothing; measure the videos of another program in this folder, CLIP-TASK.mp4 as --prepare names them.",
)
@click.option(
    "--prepare",
    "only_prepare",
    is_flag=True,
    help="Write the inputs, list the videos to make, and end; `pusa eval estimate` tells what they take.",
)
@setting_options
@run_options
@json_option
def fidelity(
    clips: Path,
    output: Path,
    bounds: Path | None,
    videos: Path | None,
    only_prepare: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how faithful a model is to the videos in CLIPS: a folder with a .txt file beside each, or a table.

    Each clip is cut to the model's size, rate and length. The model gets parts of it (the first frame, keyframes, both
    ends, the beginning) and makes the rest, which is compared with the clip: PSNR and SSIM of given and of held-out
    frames, seams, jumps, motion, repeated frames, drift of colours. Beside each figure is what the clip itself reaches,
    the clip through the VAE, and what needs no model. Nothing is downloaded but the model.

    Stop it when you like: the same command goes on.
    """
    clip_values = take_clip_options(options)
    settings, run = take_settings(options, take_run_options(options))

    from pusa.evaluation.fidelity import report as reports
    from pusa.evaluation.fidelity.bounds import read_bounds, violations
    from pusa.evaluation.fidelity.measures import MEASURES
    from pusa.evaluation.fidelity.suite import SUITE, FidelitySettings, prepare
    from pusa.evaluation.fidelity.tasks import TASKS as ALL_TASKS
    from pusa.evaluation.runs import RunFolder

    noise = None if settings.noise is None else tuple(settings.noise)
    chosen = FidelitySettings(clips, request=settings.fields, noise=noise, seed=settings.seed, **clip_values)
    limits = None if bounds is None else read_bounds(bounds, MEASURES, ALL_TASKS)
    prepared = prepare(chosen, output / "inputs")
    for note in prepared.notes:
        click.echo(f"left out: {note}", err=True)
    if only_prepare:
        RunFolder.create(output, SUITE, prepared.settings, prepared.items)
        for item in prepared.items:
            click.echo(json.dumps(item.as_json(), ensure_ascii=False) if as_json else f"{item.name}.mp4")
        return
    if videos is not None:
        found = _measure_foreign(prepared.items, videos, output)
    else:
        found = _make_and_measure(prepared.settings, prepared.items, run, output, as_json)
    if not found.scored:
        raise RuntimeError(f"no video was made: {found.error}")
    report = reports.make_report(prepared.settings, found.scored, found.missing)
    if limits is not None:
        report.violations = violations(report.made, limits)
    page = reports.write_report(report, found.scored, output)
    if as_json:
        click.echo(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        click.echo(reports.as_markdown(report), nl=False)
        click.echo(f"page: {page}", err=True)
    for line in report.violations or []:
        click.echo(f"out of bounds: {line}", err=True)
    if found.error is not None:
        raise RuntimeError(found.error)
    if report.violations or (limits is not None and found.missing):
        raise click.exceptions.Exit(1)


@dataclass
class _Found:
    """Hold what has been measured, what is missing with the reason, and why videos failed."""

    scored: "list[Scored]"
    missing: dict[str, str]
    error: str | None = None


def _make_and_measure(
    settings: Mapping[str, Any], items: "Sequence[Item]", run: Any, output: Path, as_json: bool
) -> _Found:
    from pusa.evaluation.fidelity.suite import SUITE, score
    from pusa.evaluation.runs import RunFolder

    folder = RunFolder.create(output, SUITE, settings, items)
    error = None
    try:
        make_run(folder, run, as_json=as_json)
    except RuntimeError as failed:  # the other videos are measured all the same
        error = str(failed)
    errors = {failure.name: failure.error for failure in folder.failures()}
    missing = {item.name: errors.get(item.name, "") for item in folder.missing()}
    try:
        return _Found(score(folder), missing, error)
    except KeyboardInterrupt as stopped:
        raise Stopped("stopped; what is measured is kept, and the same command goes on") from stopped


def _measure_foreign(items: "Sequence[Item]", videos: Path, output: Path) -> _Found:
    from pusa.evaluation.fidelity.suite import score_items

    files = {item.name: videos / f"{item.name}.mp4" for item in items}
    there = {name: file for name, file in files.items() if file.is_file()}
    if not there:
        raise FileNotFoundError(f"{videos} has none of {len(items)} videos, such as {items[-1].name}.mp4")
    missing = {item.name: "" for item in items if item.name not in there and item.labels["task"] != "vae"}
    return _Found(score_items(items, lambda item: there.get(item.name), output / "foreign-scores"), missing)
