"""Define `pusa eval frechet`: compare two sets of videos."""

import json
from pathlib import Path

import click

from pusa.cli.groups import Command, json_option


@click.command(cls=Command)
@click.argument("real", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("made", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--frames", type=click.IntRange(2), default=16, show_default=True, help="Of each video, from its start.")
@click.option(
    "--detector",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The I3D network as TorchScript (i3d_torchscript.pt), for FVD. It is a program: take it from where you trust. "
    "[default: simple features, and no FVD]",
)
@json_option
def frechet(real: Path, made: Path, frames: int, detector: Path | None, as_json: bool) -> None:
    """Compute the Frechet distance of the videos in the folders REAL and MADE: 0 for equal sets.

    With the I3D detector it is FVD. Few videos make it larger: compare only distances of equally many.
    """
    from dataclasses import asdict

    from pusa.evaluation.frechet import compare

    found = compare(real, made, frames=frames, detector=detector)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    sets = f"{found.real_clips} and {found.made_clips} videos of {found.frames} frames"
    click.echo(f"{found.name}: {found.distance:.4g} ({sets})")
