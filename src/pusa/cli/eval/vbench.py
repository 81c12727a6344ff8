"""Define `pusa eval vbench`: VBench-I2V, from the suite's prompts to its totals."""

import json
from pathlib import Path
from typing import Any

import click

from pusa.cli.eval.options import (
    RunOptions,
    make_run,
    run_folder,
    run_options,
    setting_options,
    take_run_options,
    take_settings,
)
from pusa.cli.groups import Command, Group, json_option


@click.group(
    "vbench",
    cls=Group,
    lazy={
        "report": "pusa.cli.eval.vbench_score:report",
        "score": "pusa.cli.eval.vbench_score:score",
        "setup": "pusa.cli.eval.vbench_score:setup",
    },
)
def vbench() -> None:
    """Measure an image-to-video model on VBench-I2V.

    \b
    pusa eval vbench prepare run --suite VBench --no-camera --model wan2.1-14b
    pusa eval vbench generate run
    pusa eval vbench score run --suite VBench --environment scorer
    pusa eval vbench total run
    """


def parse_dimensions(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Read names of dimensions that are written with commas."""
    if text is None:
        return None
    from pusa.evaluation.vbench.totals import check_dimensions

    names = tuple(name.strip() for name in text.split(","))
    try:
        check_dimensions(names)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return names


def _first_frame_noise(noise: list[float] | None) -> float:
    if noise is not None and len(noise) != 1:
        raise click.UsageError(f"--noise has {len(noise)} numbers: give one, for the first frame")
    return noise[0] if noise else 0.0


@vbench.command(cls=Command)
@run_folder
@click.option(
    "--suite",
    metavar="PATH",
    type=click.Path(path_type=Path),
    required=True,
    help="A checkout of VBench with its images, or its folder vbench2_beta_i2v.",
)
@click.option(
    "--no-camera",
    is_flag=True,
    help="Leave camera motion out: 68 % of the videos and 2.4 % of the total. Begin with this.",
)
@click.option(
    "--dimensions",
    metavar="NAMES",
    callback=parse_dimensions,
    help="Make the videos of these dimensions only, such as i2v_subject,dynamic_degree. [default: all nine]",
)
@click.option(
    "--ratio",
    metavar="1-1|8-5|7-4|16-9",
    help="Folder of cropped images; scores compare with these. [default: the nearest to the size]",
)
@click.option(
    "--per-prompt",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    help="Videos of each prompt; the suite scores 5.",
)
@click.option(
    "--prompts",
    "count",
    type=click.IntRange(min=1),
    help="Prompts of each kind at most: 50 are 250 videos of subjects, 250 of backgrounds and 250 of camera motion. "
    "[default: all]",
)
@setting_options
@json_option
def prepare(
    folder: Path,
    suite: Path,
    no_camera: bool,
    dimensions: tuple[str, ...] | None,
    ratio: str | None,
    per_prompt: int,
    count: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the list of videos to make to FOLDER: each with its prompt, image and seed.

    The first frame is kept clean (--noise 0) and the files are written at CRF 10; what else is not given is the
    model's. Of Wan2.1-14B with Pusa's LoRA these are the paper's settings: 10 steps, alpha 1.4, guidance 3, shift 5.
    """
    from pusa.evaluation.vbench.description import describe, describe_lines
    from pusa.evaluation.vbench.items import prepare as prepare_run
    from pusa.evaluation.vbench.items import request_with
    from pusa.evaluation.vbench.suite import CAMERA, read_suite
    from pusa.evaluation.vbench.totals import DIMENSIONS

    settings, _ = take_settings(options, RunOptions())
    chosen = [name for name in dimensions or DIMENSIONS if not (no_camera and name == CAMERA)]
    run = prepare_run(
        folder,
        read_suite(suite),
        request_with(settings.fields),
        dimensions=chosen,
        ratio=ratio,
        per_prompt=per_prompt,
        count=count,
        noise=_first_frame_noise(settings.noise),
        seed=settings.seed,
    )
    facts = describe(run)
    click.echo(json.dumps(facts) if as_json else "\n".join(describe_lines(facts)))


@vbench.command(cls=Command)
@run_folder
@run_options
@json_option
def generate(folder: Path, as_json: bool, **options: Any) -> None:
    """Make the videos of FOLDER that are missing.

    Stopped, killed or spread over machines that share FOLDER, the same command goes on with what is missing.
    """
    from pusa.evaluation.runs import RunFolder
    from pusa.evaluation.vbench.items import SUITE

    make_run(RunFolder.open(folder, SUITE), take_run_options(options), as_json=as_json)


@vbench.command(cls=Command)
@click.argument("results", metavar="RESULTS...", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def total(results: tuple[Path, ...], as_json: bool) -> None:
    """Compute the totals from RESULTS: files of VBench, folders of them (that of a run), or {dimension: score} as JSON.

    Dimensions that are missing are named, and the totals are given as the range that they leave.
    """
    from pusa.evaluation.vbench.description import totals_as_json, totals_lines
    from pusa.evaluation.vbench.results import read_scores
    from pusa.evaluation.vbench.totals import total_of

    scores = read_scores(results)
    totals = total_of(scores)
    if stale := [name for path in results for name in _stale_dimensions(path)]:
        click.echo(f"videos have changed since {', '.join(stale)} was scored: pusa eval vbench score tells", err=True)
    if as_json:
        click.echo(json.dumps(totals_as_json(scores, totals) | {"stale": stale}))
    else:
        click.echo("\n".join(totals_lines(scores, totals)))


def _stale_dimensions(path: Path) -> list[str]:
    """List the dimensions of a run whose videos are not those that were scored; none for what is no run."""
    if not (path / "run.json").is_file():
        return []

    from pusa.evaluation.runs import RunFolder
    from pusa.evaluation.vbench.items import SUITE
    from pusa.evaluation.vbench.scored import read_scored
    from pusa.evaluation.vbench.totals import DIMENSIONS

    run = RunFolder.open(path, SUITE)
    found = {name: read_scored(run, name) for name in DIMENSIONS}
    return [name for name, scored in found.items() if scored is not None and not scored.is_current]
