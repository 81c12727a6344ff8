"""Define `pusa eval sweep`: repeat an evaluation over a grid of settings, as one job."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pusa.cli.eval.fidelity import clip_options, take_clip_options
from pusa.cli.eval.options import RunOptions, make_run, run_options, setting_options, take_run_options, take_settings
from pusa.cli.groups import Command, json_option
from pusa.cli.run import Stopped
from pusa.resources import readable_time

if TYPE_CHECKING:
    from pusa.acceleration.decisions import LoadOptions
    from pusa.evaluation.runs import RunFolder
    from pusa.evaluation.sweep.grid import Point
    from pusa.evaluation.sweep.job import Result
    from pusa.evaluation.sweep.suites import Suite

SUITES = ("fidelity", "vbench", "physics-iq")


def _list_ready(context: click.Context, _: click.Parameter, value: bool) -> None:
    if not value:
        return
    from pusa.evaluation.sweep.ready import READY

    for name, ready in READY.items():
        points = "; ".join(point.name for point in ready.points)
        click.echo(f"{name}: {ready.help}\n  {points}" + (f"\n  published: {ready.source}" if ready.source else ""))
    context.exit()


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--suite", type=click.Choice(SUITES), default="fidelity", show_default=True, help="What is measured.")
@click.option(
    "--vary",
    "axes",
    multiple=True,
    metavar="NAME=VALUES",
    help="An axis of the grid: steps=4,10,30; with ; between values that have commas: noise=0.2,0.5;0.3,0.7. Any "
    "setting of a request, noise, size, memory, quantize, attention. [may be repeated]",
)
@click.option("--ready", metavar="NAME", help="A ready sweep, such as paper-steps; --list lists them.")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_ready,
    help="List the ready sweeps, and end.",
)
@click.option(
    "--clips", type=click.Path(path_type=Path, exists=True), help="For fidelity: a folder or a table of the clips."
)
@clip_options
@click.option(
    "--checkout",
    type=click.Path(path_type=Path, exists=True),
    help="For vbench: a checkout of VBench with its images.",
)
@click.option(
    "--environment",
    type=click.Path(path_type=Path, file_okay=False),
    help="For vbench: what `pusa eval vbench setup` has made, to score each point. [default: scores are only read]",
)
@click.option("--scorer", metavar="COMMAND", help="For vbench: a program in place of the suite's code.")
@click.option("--weights", type=click.Path(path_type=Path, file_okay=False), help="For vbench: the scorer's models.")
@click.option("--no-camera", is_flag=True, help="For vbench: leave camera motion out, 68 % of the videos.")
@click.option("--per-prompt", type=click.IntRange(1, 100), default=5, show_default=True, help="For vbench.")
@click.option("--prompts-per-kind", type=click.IntRange(1), help="For vbench: 50 make 750 videos. [default: all]")
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, file_okay=False), help="For physics-iq: its download."
)
@click.option(
    "--conditioning",
    type=click.Choice(("image", "video")),
    default="image",
    show_default=True,
    help="For physics-iq: what the model continues.",
)
@click.option("--partial", is_flag=True, help="For physics-iq: take the scenes whose files are there.")
@click.option("--prepare", is_flag=True, help="List the videos of all points in FOLDER, estimate them, and end.")
@setting_options
@run_options
@json_option
def sweep(
    folder: Path,
    suite: str,
    axes: tuple[str, ...],
    ready: str | None,
    prepare: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a model at every point of a grid, and write a table and plots to FOLDER.

    Points that need the same weights follow each other, so that the model is loaded once for them; alpha, steps and the
    like change at once. A point that fails does not stop the others. Stop it when you like: the same command goes on,
    and more points can be added to the same FOLDER.

    \b
    pusa eval sweep FOLDER --clips clips --vary steps=4,10,30 --vary alpha=1.0,1.4
    pusa eval sweep FOLDER --clips clips --ready paper-noise
    """
    clip_values = take_clip_options(options)
    given = {name: options.pop(name) for name in _SUITE_OPTIONS}
    settings, run = take_settings(options, take_run_options(options))
    if bool(axes) == bool(ready):
        raise click.UsageError("give the grid by --vary, or a --ready sweep")

    from pusa.evaluation.sweep import grid
    from pusa.evaluation.sweep.job import Sweep
    from pusa.evaluation.sweep.report import as_markdown, write_report

    base, source = dict(settings.fields), ""
    if ready is None:
        points = grid.make_points([grid.parse_axis(text) for text in axes])
    else:
        chosen = _ready(ready)
        points, source, base = list(chosen.points), chosen.source, {**chosen.base, **base}
    grid.check_points(points, base)
    _check_places(points, run)
    noise = None if settings.noise is None else tuple(settings.noise)
    job = Sweep(folder, _suite(suite, folder, given, clip_values), base, noise, settings.seed, points, run.load)

    if prepare:
        _show_estimate(job.prepare(), run.load, as_json)
        return

    def make(point_run: "RunFolder", load: "LoadOptions") -> None:
        click.echo(f"{point_run.folder.name}: {len(point_run.missing())} videos", err=True)
        make_run(point_run, replace(run, load=load), as_json=as_json)

    def show(result: "Result", done: int, total: int) -> None:
        click.echo(f"{done} of {total} points: {result.name}" + (f": {result.error}" if result.error else ""), err=True)

    try:
        results = job.run(make, show)
    except KeyboardInterrupt as error:  # while scoring
        raise Stopped("stopped; the same command goes on") from error
    about = f"{suite}, {ready or ' x '.join(axes)}, model {base.get('model', 'mini')}, seed {settings.seed}."
    files = write_report(results, folder, about, source if suite == "vbench" else "")
    if as_json:
        click.echo(json.dumps({"about": about, "points": [vars(result) for result in results]}, ensure_ascii=False))
    else:
        click.echo(as_markdown(results, about), nl=False)
        click.echo("written: " + ", ".join(str(file) for file in files), err=True)
    if all(result.error and not result.figures for result in results):
        raise RuntimeError(f"no point has figures: {results[0].error}")


_VBENCH_OPTIONS = ("checkout", "environment", "scorer", "weights", "no_camera", "per_prompt", "prompts_per_kind")
_SUITE_OPTIONS = ("clips", *_VBENCH_OPTIONS, "data", "conditioning", "partial")


def _show_estimate(runs: "list[RunFolder]", load: "LoadOptions", as_json: bool) -> None:
    """Write what the missing videos of all points take on this machine."""
    from pusa.acceleration.machine import machine
    from pusa.evaluation.runs.estimate import estimate

    found = estimate([item for run in runs for item in run.missing()], machine(), load=load)
    facts = {"points": [str(run.folder) for run in runs], **found.as_json()}
    if as_json:
        click.echo(json.dumps(facts))
        return
    what = f"does not run here: {found.problem}" if found.problem else f"{readable_time(3600 * found.hours)} here"
    click.echo(f"{len(runs)} points, {found.missing} videos to make: {what}")
    click.echo(f"on another machine: pusa eval estimate {runs[0].folder} --gpu-gb 80", err=True)


def _say_left_out(note: str) -> None:
    click.echo(f"left out: {note}", err=True)


def _check_places(points: "Sequence[Point]", run: RunOptions) -> None:
    """Check that models are there, and that a server is not asked to load them otherwise, before any work."""
    from pusa.cli.info import check_model

    for point in points:
        if run.server is not None and point.load(run.load) != run.load:
            raise click.UsageError(f"--server: the server decides how its model is loaded; vary no {point.name}")
        if run.is_local and "model" in point.fields:
            check_model(point.fields["model"])


def _ready(name: str) -> Any:
    from pusa.evaluation.sweep.ready import READY

    if name not in READY:
        raise click.UsageError(f"--ready {name!r} is none of {', '.join(READY)}")
    return READY[name]


def _suite(name: str, folder: Path, given: dict[str, Any], clip_values: dict[str, Any]) -> "Suite":
    """Set up a suite from the options that are for it."""
    from pusa.evaluation.sweep.suites import FidelitySuite, PhysicsIqSuite, VBenchSuite

    needed = {"fidelity": "clips", "vbench": "checkout", "physics-iq": "data"}[name]
    if given[needed] is None:
        raise click.UsageError(f"--suite {name} needs --{needed}")
    if name == "fidelity":
        from pusa.evaluation.fidelity.suite import FidelitySettings

        return FidelitySuite(FidelitySettings(given["clips"], **clip_values), folder / "inputs", note=_say_left_out)
    if name == "physics-iq":
        return PhysicsIqSuite(given["data"], given["conditioning"], given["partial"])
    from pusa.evaluation.vbench.environment import default_weights_folder
    from pusa.evaluation.vbench.scoring import Scorer
    from pusa.evaluation.vbench.totals import DIMENSIONS

    environment, command = given["environment"], given["scorer"]
    if environment and command:
        raise click.UsageError("give --environment or --scorer, not both")
    scorer = Scorer.from_command(command) if command else Scorer.in_environment(environment) if environment else None
    dimensions = tuple(name for name in DIMENSIONS if not (given["no_camera"] and name == "camera_motion"))
    return VBenchSuite(
        given["checkout"],
        dimensions,
        per_prompt=given["per_prompt"],
        count=given["prompts_per_kind"],
        scorer=scorer,
        weights=given["weights"] or default_weights_folder(),
    )
