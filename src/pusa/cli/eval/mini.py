"""Define `pusa eval mini` and `pusa eval paper`: measure a model of the small world, and the paper's claims on it."""

import json
import logging
import os
import sys
from pathlib import Path

import click

from pusa.cli.eval.names import Names
from pusa.cli.groups import Command, json_option
from pusa.cli.run import Stopped
from pusa.numerals import parse_whole

PARTS = ("probes", "vae", "t2v", "i2v", "start-end", "keyframes", "extension", "transition", "loop")


def _picture_cache() -> Path:
    return Path(os.environ.get("PUSA_CACHE", "~/.cache/pusa")).expanduser() / "pictures"


def _steps(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(parse_whole(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(1 <= number <= 200 for number in numbers):
        raise click.BadParameter(f"{text!r}: write numbers of steps in 1..200, as in 4,10,30")
    return numbers


@click.command(cls=Command)
@click.option("--model", default="mini", show_default=True, help="The embedded model, or a folder its recipe has made.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the pictures of its world are, or are fetched to. [default: pictures in PUSA_CACHE or ~/.cache/pusa]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="eval-mini",
    show_default=True,
    help="Folder for the report, contact sheets and the trained probes.",
)
@click.option(
    "--clips",
    type=click.IntRange(2, 2000),
    help="Clips per setting in text-to-video; the other parts take a share. [default: 32, about 12 minutes on two "
    "cores]",
)
@click.option(
    "--steps", default="4,10,30", show_default=True, callback=_steps, help="Denoising steps to try text-to-video at."
)
@click.option(
    "--part", "parts", type=Names(PARTS), metavar="NAMES", help=f"Do only these: {', '.join(PARTS)}. [default: all]"
)
@click.option(
    "--photos",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="A photograph, or a folder of them, that no model was trained on. [may be repeated; default: those inside "
    "scikit-image and scikit-learn]",
)
@json_option
def mini(
    model: str,
    cache: Path | None,
    out: Path,
    clips: int | None,
    steps: tuple[int, ...],
    parts: tuple[str, ...] | None,
    photos: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Measure a model of the small world against the world's own clips, whose truth is known.

    Trains small classifiers first (a minute or two; they are kept), then makes clips of every task and prints tables:
    each figure beside what real clips reach and what guessing would. Tables, JSON and contact sheets go to the folder.
    Stop it when you like: parts that are done are kept, and --part does the others.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    from pusa.mini.evaluation import evaluate as experiment
    from pusa.mini.evaluation.photographs import PhotographWorld, installed_photographs, list_photographs
    from pusa.mini.evaluation.report import as_markdown
    from pusa.mini.evaluation.setup import load_evaluator

    cache = cache or _picture_cache()
    files = list_photographs(photos) if photos else installed_photographs()
    if photos and not files:
        raise click.UsageError(f"--photos: no JPEG, PNG or WebP file is in {', '.join(map(str, photos))}")
    evaluator = load_evaluator(model, cache, out)
    photographs = PhotographWorld(files, motion_frames=evaluator.world.motion_frames) if files else None
    if photographs is None:
        click.echo("no photographs: install scikit-image and scikit-learn, or give --photos", err=True)
    try:
        report = experiment.evaluate(
            evaluator,
            out,
            parts=parts or tuple(experiment.PARTS),
            clips=clips or experiment.CLIPS,
            steps=steps,
            photographs=photographs,
        )
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped; the parts that are done are in {out}: --part does the others") from error
    click.echo(json.dumps(report, ensure_ascii=False) if as_json else as_markdown(report), nl=as_json)


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
    "--seed",
    "seeds",
    type=click.IntRange(0, 2**31),
    multiple=True,
    default=(0,),
    show_default="0",
    help="Of the trainings. Several, --seed 0 --seed 1 --seed 2, are judged together. [may be repeated]",
)
@click.option(
    "--model",
    help="Fill FOLDER from this model (mini, or a folder its recipe has made) in place of `pusa mini train`: its base "
    "and VAE, and clips drawn anew.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --model: where the pictures of its world are, or are fetched to. [default: pictures in PUSA_CACHE or "
    "~/.cache/pusa]",
)
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
    seeds: tuple[int, ...],
    model: str | None,
    cache: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Try the claims of Pusa's paper on the base model that `pusa mini train` has made in FOLDER, or on --model mini.

    Trains five adapters that differ in nothing but how times are drawn, measures them and their sampling, and says
    where this small world agrees with the paper. Stop it when you like: the same command goes on where it was.
    """
    from pusa.mini.paper import run as experiment
    from pusa.mini.paper.report import as_text

    if cache is not None and model is None:
        raise click.UsageError("--cache goes with --model")
    try:
        if model is not None:
            from pusa.mini.paper.package import fill_from_model, load_world

            pictures = cache or _picture_cache()
            fill_from_model(
                model, work, lambda frames: load_world(pictures, frames), say=lambda line: click.echo(line, err=True)
            )
        report = experiment.run_seeds(
            work,
            out,
            seeds=seeds,
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
