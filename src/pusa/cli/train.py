"""Run `pusa train`: adapt a text-to-video model to one time per latent frame and export the adapter."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from pusa.cli.estimate import estimate
from pusa.cli.groups import Group
from pusa.cli.run import Stopped

_LAYOUTS = ("comfyui", "diffusers", "original")


class _TrainGroup(Group):
    """A group whose first command may be left out: ``pusa train CONFIG`` is ``pusa train run CONFIG``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, args if args[0] in self.list_commands(ctx) else ["run", *args])


@click.group(
    cls=_TrainGroup,
    invoke_without_command=True,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.pass_context
def train(ctx: click.Context) -> None:
    """Adapt a text-to-video model so that each latent frame has a time of its own (VTA).

    \b
    What it takes:    pusa train estimate wan2.1-14b-vta --gpu h200 --count 8
    On one machine:   pusa train mini-vta --set data.folders=clips
    On eight cards:   accelerate launch --num_processes 8 -m pusa train wan2.1-14b-vta --set data.folders=clips
    Go on:            pusa train runs/mini-vta --resume
    Give it out:      pusa train export runs/mini-vta -o pusa.safetensors

    `pusa train CONFIG` is short for `pusa train run CONFIG`.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


train.add_command(estimate)


@train.command()
@click.argument("config", metavar="CONFIG")
@click.argument("changes", metavar="[SECTION.FIELD=VALUE]...", nargs=-1)
@click.option(
    "--set",
    "more_changes",
    metavar="SECTION.FIELD=VALUE",
    multiple=True,
    help="Change a field of the configuration: optimizer.lr=1e-4, data.folders=clips, seconds=600. [may be repeated]",
)
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint; begin if it has none.")
def run(config: str, changes: tuple[str, ...], more_changes: tuple[str, ...], resume: bool) -> None:
    """Train as CONFIG says: the name of a ready configuration, a .toml file, or the folder of a run.

    The same command alone, under `accelerate launch -m` and under `torchrun -m`. Ctrl-C and SIGTERM end the run after
    the step, with a checkpoint; a run that was killed goes on with --resume.
    """
    from pusa.training.config import load_config

    train_config = load_config(config, [*changes, *more_changes])
    _show_log()

    from pusa.training.trainer import TrainingStoppedError, train

    options: dict[str, Any] = {}
    if train_config.report.validate_every is not None and train_config.data.folders:
        from pusa.data.dataset import LatentDataset
        from pusa.training.reports.validation import Validator

        options["dataset"] = dataset = LatentDataset(train_config.data.folders)
        options["on_validate"] = Validator(train_config, dataset)
    try:
        folder = train(train_config, resume=resume, **options)
    except TrainingStoppedError as error:
        raise Stopped(str(error)) from error
    except KeyboardInterrupt as error:
        raise Stopped("stopped at once: go on from the last checkpoint with --resume") from error
    if _is_main_process():
        click.echo(str(folder))

    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@train.command()
@click.argument("name", metavar="NAME", required=False)
def configs(name: str | None) -> None:
    """List the ready configurations; print the one called NAME, to be changed in a file of your own."""
    from pusa.training.config import ready_configs

    ready = ready_configs()
    if name is not None:
        if name not in ready:
            raise ValueError(f"no configuration is called {name!r}: there are {', '.join(ready)}")
        click.echo(ready[name].read_text(), nl=False)
        return
    width = max(map(len, ready))
    for config_name, path in ready.items():
        click.echo(f"{config_name:<{width}}  {path.read_text().splitlines()[0].removeprefix('# ')}")


@train.command()
@click.argument("run", metavar="RUN", type=click.Path())
@click.option("-o", "--output", required=True, metavar="FILE", type=click.Path(), help="NAME.safetensors to write.")
@click.option(
    "--layout",
    type=click.Choice(_LAYOUTS),
    default="comfyui",
    show_default=True,
    help="original: as pusa_v1.pt. comfyui: for ComfyUI, read by diffusers too.",
)
@click.option(
    "--scale", type=float, default=1.0, show_default=True, help="1.4 makes strength 1 what alpha 1.4 is without it."
)
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of the matrices."
)
@click.option("--step", type=click.IntRange(1), help="Of a checkpoint that is there. [default: the finished run's]")
def export(run: str, output: str, layout: Any, scale: float, dtype: str, step: int | None) -> None:
    """Write the adapter of the run in folder RUN in another layout."""
    import torch

    from pusa.training.export import export_run

    narrow = torch.bfloat16 if dtype == "bf16" else None
    for path in export_run(Path(run), Path(output), layout=layout, scale=scale, dtype=narrow, step=step):
        click.echo(str(path))


@train.command()
@click.argument("run", metavar="RUN", type=click.Path())
def card(run: str) -> None:
    """Write the model card of the run in folder RUN.

    README.md and curves.png, made from the run's own files: what was trained, on what, how the losses fell, samples,
    how to use it, and its limits.
    """
    from pusa.training.reports.model_card import write_card

    click.echo(str(write_card(run)))


def _show_log() -> None:
    """Log a run to stderr, from its first process only."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("pusa").setLevel(logging.INFO if _is_main_process() else logging.ERROR)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
