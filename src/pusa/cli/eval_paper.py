"""`pusa eval paper`: the paper's claims on the small base model."""

import json
from pathlib import Path

import click

from pusa.cli.groups import Command, json_option
from pusa.cli.run import Stopped


@click.command(cls=Command)
@click.argument("work", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="For results. [default: FOLDER/paper]")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=12.0,
    show_default=True,
    help="What the first run plans for; what does not fit into it is left to the next call.",
)
@click.option("--processes", type=click.IntRange(1, 16), help="That share the work. [default: 1 with a GPU, else 2]")
@click.option("--steps", type=int, help="Of each training, a multiple of 4. [default: as many as fit into the time]")
@click.option("--clips", type=int, help="Per point, a multiple of 4. [default: as many as fit]")
@click.option(
    "--page",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A Markdown file with a place for results, into which they are written too.",
)
@json_option
def paper(
    work: Path,
    out: Path | None,
    minutes: float,
    processes: int | None,
    steps: int | None,
    clips: int | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Try the claims of Pusa's paper on the base model that `pusa mini train` has made in FOLDER.

    Trains five adapters that differ in nothing but how times are drawn, measures them and their sampling, and says
    where this small world agrees with the paper. Stop it when you like: the same command goes on where it was.
    """
    from pusa.mini.paper import run as experiment
    from pusa.mini.paper.report import as_text

    try:
        report = experiment.run(
            work,
            out,
            minutes=minutes,
            processes=processes,
            steps=steps,
            clips=clips,
            page=page,
            say=lambda line: click.echo(line, err=True),
        )
    except KeyboardInterrupt as error:
        raise Stopped("stopped; what is done is kept, and the same command goes on with it") from error
    click.echo(json.dumps(report) if as_json else as_text(report))
