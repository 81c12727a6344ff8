"""Define `pusa eval estimate` and `pusa eval check`: what a run will take, and whether its videos are whole."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pusa.cli.eval.options import run_folder
from pusa.cli.groups import Command, json_option
from pusa.cli.options import load_options, take_load_options
from pusa.cli.plan import machine_options, take_machine
from pusa.resources import readable, readable_time

if TYPE_CHECKING:
    from pusa.evaluation.runs.estimate import Estimate


@click.command(cls=Command)
@run_folder
@machine_options
@click.option("--price", type=click.FloatRange(0), help="Of one card for an hour, in any currency.")
@load_options
@json_option
def estimate(folder: Path, price: float | None, as_json: bool, **options: Any) -> None:
    """Estimate the hours, the money and the disk that the missing videos of the run in FOLDER take.

    On this machine, or on the one that --gpu-gb and the like describe; each card makes videos of its own. Figures are
    predictions of `pusa plan`, until the run has some videos of each kind: then theirs count.

    \b
    On eight H100:   pusa eval estimate FOLDER --gpu-gb 80 --capability 9.0 --count 8 --ram-gb 1024 --price 3
    """
    from pusa.evaluation.runs import RunFolder
    from pusa.evaluation.runs.estimate import estimate as estimate_run

    load, machine = take_load_options(options), take_machine(options)
    found = estimate_run(RunFolder.open(folder), machine, load=load, price=price)
    click.echo(json.dumps(found.as_json()) if as_json else "\n".join(_lines(found)))


def _lines(found: "Estimate") -> list[str]:
    if found.problem:
        return [f"does not run: {found.problem}"]
    if not found.missing:
        return [f"all {found.videos} videos are made"]
    basis = f"measured for {found.measured} of them" if found.measured else "predicted"
    price = "" if found.cost is None else f", {found.cost:,.2f} at {found.price:g} an hour"
    cards = "" if found.cards == 1 else f" on {found.cards} cards"
    return [
        f"{found.missing} of {found.videos} videos are to be made",
        *found.plans,
        f"  {readable_time(found.seconds_per_video)} for a video ({basis})",
        f"  {found.card_hours:,.1f} card hours{price}",
        f"  {readable_time(3600 * found.hours)}{cards}",
        f"  {readable(found.disk_bytes)} of disk, roughly",
    ]


@click.command(cls=Command)
@run_folder
@click.option("--decode", is_flag=True, help="Read every frame, too.")
@json_option
def check(folder: Path, decode: bool, as_json: bool) -> None:
    """Check every video of the run in FOLDER: it opens, is the one that was made, has its frames, fps and size.

    Videos that are missing or damaged are made again by the command that makes the run.
    """
    from pusa.evaluation.runs import RunFolder

    run = RunFolder.open(folder)
    problems = run.problems(decode=decode)
    if as_json:
        click.echo(json.dumps([{"name": one.name, "problem": one.problem} for one in problems], ensure_ascii=False))
    else:
        for one in problems:
            click.echo(f"{one.name}: {one.problem}")
    if problems:
        raise RuntimeError(f"{len(problems)} of {len(run.items)} videos are missing or not what was asked for")
    if not as_json:
        click.echo(f"all {len(run.items)} videos are whole")
