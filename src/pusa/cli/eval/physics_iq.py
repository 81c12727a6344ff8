"""Define `pusa eval physics-iq`: prepare, estimate, generate and score a run of the benchmark."""

import json
from collections.abc import Callable
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
from pusa.cli.run import Stopped, run
from pusa.events import Done, Events, as_events

_DATA = click.Path(path_type=Path, file_okay=False)
_descriptions = click.option(
    "--descriptions",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The benchmark's table of prompts. [default: descriptions.csv in the folder of --data or beside it]",
)


@click.group("physics-iq", cls=Group, lazy={"estimate": "pusa.cli.eval.runs:estimate"})
def physics_iq() -> None:
    """Measure how well a model continues filmed experiments (Physics-IQ, 198 scenes).

    Its download is needed, in the layout of its script. Nothing else is: no judge model.
    """


@physics_iq.command(cls=Command)
@run_folder
@click.option("--data", type=_DATA, required=True, help="Folder of the benchmark's download.")
@click.option(
    "--conditioning",
    type=click.Choice(("image", "video")),
    default="image",
    show_default=True,
    help="What the model continues: the switch frame, or the end of the 3 seconds before it.",
)
@_descriptions
@click.option("--partial", is_flag=True, help="Take the scenes whose files are there, where others are missing.")
@click.option("--window", type=click.INT, help="Frames made at once; longer videos are chained. [default: the model's]")
@click.option(
    "--overlap",
    type=click.INT,
    help="With --conditioning video: the last frames that are continued. [default: the model's, 13 for Wan]",
)
@setting_options
@json_option
def prepare(
    folder: Path,
    data: Path,
    conditioning: str,
    descriptions: Path | None,
    partial: bool,
    window: int | None,
    overlap: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """List in FOLDER the videos to make: a request for each scene, with its seed.

    The model makes 5 seconds at --fps (8, 16, 24 or 30 are in the download). Given frames are kept as they are, unless
    --noise says how far the model may depart from them; with --conditioning video one number for each latent frame.
    """
    from pusa.evaluation.physics_iq.dataset import Dataset
    from pusa.evaluation.physics_iq.items import prepare as prepare_run

    settings, _ = take_settings(options, RunOptions())
    if "frames" in settings.fields:
        raise click.UsageError("--frames: the benchmark compares 5 seconds, and --fps sets how many frames they have")
    if overlap is not None and conditioning == "image":
        raise click.UsageError("--overlap: one picture is continued; add --conditioning video")
    fields = settings.fields | {"window": window, "overlap": overlap, "seed": settings.seed}
    made = prepare_run(
        folder,
        Dataset.open(data, descriptions),
        "image" if conditioning == "image" else "video",
        fields,
        noise=settings.noise or (0.0,),
        partial=partial,
    )
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "videos": len(made.items), "settings": made.settings}))
    else:
        click.echo(f"{len(made.items)} videos to make: pusa eval physics-iq generate {folder}")


@physics_iq.command(cls=Command)
@run_folder
@run_options
@json_option
def generate(folder: Path, as_json: bool, **options: Any) -> None:
    """Make the videos of FOLDER that are missing; stop it when you like, and the same command goes on.

    FOLDER/videos holds what is scored: 5 seconds under the benchmark's names, which its own evaluator reads, too. With
    --conditioning video they begin after the frames that were given.
    """
    from pusa.evaluation.physics_iq.items import SUITE
    from pusa.evaluation.runs import RunFolder

    run_settings = take_run_options(options)
    make_run(RunFolder.open(folder, SUITE), run_settings, as_json=as_json)


@physics_iq.command(cls=Command)
@run_folder
@click.option("--data", type=_DATA, help="Folder of the benchmark's download. [default: that of prepare]")
@_descriptions
@click.option("--partial", is_flag=True, help="Score the videos that are made, where others are missing.")
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="That share the scenes.")
@json_option
def score(
    folder: Path, data: Path | None, descriptions: Path | None, partial: bool, processes: int, as_json: bool
) -> None:
    """Compare the videos of FOLDER with both takes of their scenes, and write the report.

    Writes report.html, report.md, scores.json, a sheet of the worst scenes, and metrics.csv for the benchmark's
    calculate_iq_score.py. Scores are kept: stop it when you like, and the same command goes on.
    """
    from pusa.evaluation.physics_iq.dataset import Dataset
    from pusa.evaluation.physics_iq.items import SUITE
    from pusa.evaluation.physics_iq.measure import score_run
    from pusa.evaluation.physics_iq.report import headline, write_report
    from pusa.evaluation.runs import RunFolder

    made = RunFolder.open(folder, SUITE)
    dataset = Dataset.open(data or Path(made.settings["data"]), descriptions)
    lines: list[str] = []

    def start(stop: Callable[[], bool]) -> Events:
        def work(report: Any) -> None:
            scored = score_run(made, dataset, partial_run=partial, processes=processes, stop=stop, report=report)
            if not stop():
                lines.append(headline(write_report(made, dataset, scored)))
                report(Done({"report": folder / "report.html"}))

        return as_events(work)

    try:
        run(start, as_json=as_json)
    except Stopped:
        raise Stopped("stopped; what is scored is kept, and the same command goes on") from None
    if not as_json:
        click.echo(lines[0], err=True)
