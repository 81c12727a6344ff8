"""Define `pusa eval`: measure how good a model is. One file per kind of measurement."""

import click

from pusa.cli.groups import Group


@click.group(
    "eval",
    cls=Group,
    lazy={
        "check": "pusa.cli.eval.runs:check",
        "estimate": "pusa.cli.eval.runs:estimate",
        "fidelity": "pusa.cli.eval.fidelity:fidelity",
        "frechet": "pusa.cli.eval.frechet:frechet",
        "mini": "pusa.cli.eval.mini:mini",
        "paper": "pusa.cli.eval.mini:paper",
        "physics-iq": "pusa.cli.eval.physics_iq:physics_iq",
        "sweep": "pusa.cli.eval.sweep:sweep",
        "vbench": "pusa.cli.eval.vbench:vbench",
    },
)
def evaluation() -> None:
    """Measure how good a model is."""
