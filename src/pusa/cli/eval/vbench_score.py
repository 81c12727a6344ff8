"""Define `pusa eval vbench setup`, `score` and `report`: from the videos of VBench-I2V to a page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pusa.cli.eval.options import run_folder
from pusa.cli.eval.vbench import parse_dimensions
from pusa.cli.groups import Command, json_option
from pusa.cli.run import Stopped, run
from pusa.events import Done, Events, Note, Report, as_events

if TYPE_CHECKING:
    from pusa.evaluation.vbench.environment import EnvironmentCheck, Weights
    from pusa.evaluation.vbench.scoring import ScoringSummary

_suite = click.option(
    "--suite",
    metavar="PATH",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="A checkout of VBench.",
)
_weights = click.option(
    "--weights",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the scorer's models are. [default: VBENCH_CACHE_DIR, or ~/.cache/vbench]",
)


@click.command(cls=Command)
@click.argument("environment", metavar="ENVIRONMENT", type=click.Path(path_type=Path, file_okay=False))
@_suite
@_weights
@click.option("--python", metavar="PATH", help="A Python 3.10 or 3.11. [default: one that is here, or that uv fetches]")
@json_option
def setup(environment: Path, suite: Path, weights: Path | None, python: str | None, as_json: bool) -> None:
    """Make the scorer's own environment in the folder ENVIRONMENT, and tell what it can score.

    It takes 6 GB with CUDA. What is installed already is checked only. Weights are looked for and never fetched: what
    is missing is listed with where it comes from.
    """
    from pusa.evaluation.vbench.environment import (
        check_environment,
        check_suite,
        default_weights_folder,
        make_environment,
        missing_weights,
    )

    check_suite(suite)
    try:
        make_environment(environment, python=python, say=lambda line: click.echo(line, err=True))
        click.echo("importing the code of each dimension", err=True)
        found = check_environment(environment, suite)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; the same command goes on in {environment}") from None
    place = weights or default_weights_folder()
    missing = missing_weights(place)
    if as_json:
        click.echo(json.dumps(_setup_json(environment, place, found, missing)))
    else:
        _show_setup(environment, place, found, missing)
    if not found.ready:
        raise RuntimeError(f"the code of no dimension can be imported in {environment}")


def _setup_json(
    environment: Path, place: Path, found: "EnvironmentCheck", missing: "list[Weights]"
) -> dict[str, object]:
    return {
        "environment": str(environment),
        "python": found.python,
        "cuda": found.has_cuda,
        "versions": found.versions,
        "errors": found.errors,
        "weights": str(place),
        "missing_weights": [
            {"path": str(place / weights.path), "source": weights.source, "dimensions": list(weights.dimensions)}
            for weights in missing
        ],
    }


def _show_setup(environment: Path, place: Path, found: "EnvironmentCheck", missing: "list[Weights]") -> None:
    from pusa.evaluation.vbench.environment import describe_missing

    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in found.versions.items())
    click.echo(f"Python {found.python}{'' if found.has_cuda else ', no CUDA'}: {packages}")
    for name, error in found.errors.items():
        lacks = [weights for weights in missing if name in weights.dimensions]
        state = error or (f"{len(lacks)} of its weights missing" if lacks else "ready")
        click.echo(f"  {name:<23} {state}")
    for line in describe_missing(place, missing):
        click.echo(line)


@click.command(cls=Command)
@run_folder
@_suite
@click.option(
    "--environment",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="What `pusa eval vbench setup` has made.",
)
@_weights
@click.option(
    "--dimensions",
    metavar="NAMES",
    callback=parse_dimensions,
    help="Score these, such as i2v_subject,dynamic_degree. [default: all that FOLDER has videos for]",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 9),
    help="Dimensions at a time, each with a card of its own. [default: one for each card, or one]",
)
@click.option(
    "--scorer",
    metavar="COMMAND",
    help="A program in place of the suite's code, called with the same arguments as evaluation/vbench/driver.py.",
)
@click.option("--again", is_flag=True, help="Score anew what is scored.")
@json_option
def score(
    folder: Path,
    suite: Path,
    environment: Path | None,
    weights: Path | None,
    dimensions: tuple[str, ...] | None,
    processes: int | None,
    scorer: str | None,
    again: bool,
    as_json: bool,
) -> None:
    """Score the videos of FOLDER with VBench's own code, a process for each dimension.

    Every video is checked first. Dimensions that are scored are kept while their videos stay the same, so that the
    same command goes on after a stop; machines that share FOLDER may run it side by side. A dimension that fails shows
    the end of its log, and the others go on.
    """
    from pusa.evaluation.runs import RunFolder
    from pusa.evaluation.vbench import scoring
    from pusa.evaluation.vbench.environment import default_weights_folder
    from pusa.evaluation.vbench.items import SUITE

    if (environment is None) == (scorer is None):
        raise click.UsageError("give --environment, or --scorer in its place")
    program = scoring.Scorer.from_command(scorer) if scorer else scoring.Scorer.in_environment(environment or Path())
    opened = RunFolder.open(folder, SUITE)
    found: list[ScoringSummary] = []

    def start(stop: Callable[[], bool]) -> Events:
        def work(report: Report) -> None:
            summary = scoring.score(
                opened,
                program,
                suite=suite,
                weights=weights or default_weights_folder(),
                dimensions=dimensions,
                processes=processes,
                again=again,
                stop=stop,
                report=report,
            )
            found.append(summary)
            if not stop():
                report(Note(_outcome(summary)))
                report(Done({"scores": opened.folder / "scores"}))

        return as_events(work)

    try:
        run(start, as_json=as_json)
    except Stopped:
        raise Stopped(f"stopped; {_outcome(found[0]) if found else 'nothing is scored'}") from None
    if failed := found[0].failed:
        raise RuntimeError(f"{', '.join(failed)} could not be scored; the logs are in {opened.folder / 'scores'}")


def _outcome(summary: "ScoringSummary") -> str:
    counts = {
        "scored": len(summary.done),
        "scored before": len(summary.kept),
        "at work elsewhere": len(summary.elsewhere),
        "failed": len(summary.failed),
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing is scored"


@click.command(cls=Command)
@run_folder
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page; a file .json is written beside it. [default: FOLDER/report.html]",
)
@click.option(
    "--clips",
    type=click.IntRange(0, 20),
    default=3,
    show_default=True,
    help="Of the best and of the worst ones of each dimension that are shown.",
)
@json_option
def report(folder: Path, out: Path | None, clips: int, as_json: bool) -> None:
    """Write the scores of FOLDER as a page that needs no other file, and as JSON.

    It has the totals with what they leave open, a radar and a table beside published models, the settings, and the
    best and worst clips of each dimension.
    """
    from pusa.evaluation.runs import RunFolder
    from pusa.evaluation.vbench.items import SUITE
    from pusa.evaluation.vbench.report import collect, write_report

    opened: RunFolder = RunFolder.open(folder, SUITE)
    facts = collect(opened, clips=clips)
    page = write_report(opened, facts, out or folder / "report.html")
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    click.echo(str(page))
