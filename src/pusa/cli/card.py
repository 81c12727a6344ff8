"""`pusa train card`: the model card of a run."""

import click

from pusa.cli.groups import Command


@click.command(cls=Command)
@click.argument("run", metavar="RUN", type=click.Path())
def card(run: str) -> None:
    """Write the model card of the run in folder RUN.

    README.md and curves.png, made from the run's own files: what was trained, on what, how the losses fell, samples,
    how to use it, and its limits.
    """
    from pusa.training.model_card import write_card

    click.echo(str(write_card(run)))
