"""Run a command on several GPUs: start a rank for each, or be one of those that torchrun has started."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pusa.acceleration.decisions import LoadOptions
from pusa.cli.groups import Command, Session
from pusa.request import GenerationRequest

if TYPE_CHECKING:
    from pusa.acceleration.ranks import Ranks

C = TypeVar("C", bound=Callable[..., Any])


def _keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    setattr(ctx.find_root().obj, str(parameter.name), value)


class _Count(click.ParamType):
    """Parse a number of GPUs."""

    name = "integer"

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> int:
        if not (str(value).isdecimal() and int(value) >= 1):
            self.fail(f"{value!r} is no whole number from 1: give one, or leave --gpus out", parameter, ctx)
        return int(value)


def ranks_options(command: C) -> C:
    """Add ``--gpus`` to a command, and for tests the kind of device; the session holds their values."""
    gpus = click.option(
        "--gpus",
        metavar="N",
        type=_Count(),
        expose_value=False,
        callback=_keep,
        help="GPUs of this machine that share the work of this video. [default: the plan's choice]",
    )
    ranks_on = click.option(
        "--ranks-on",
        type=click.Choice(["cuda", "cpu"]),
        default="cuda",
        hidden=True,
        expose_value=False,
        callback=_keep,
    )
    return gpus(ranks_on(command))


def is_follower() -> bool:
    """Tell if torchrun has started this process as a rank other than 0, which reports and writes nothing."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and int(os.environ.get("RANK", 0)) > 0


class RanksCommand(Command):
    """Follow rank 0 instead of running the command, in every other process that torchrun has started."""

    def invoke(self, ctx: click.Context) -> Any:
        if is_follower():
            sys.exit(_follow(ctx.find_root().obj.ranks_on))
        return super().invoke(ctx)


def _follow(device_type: str) -> int:
    import logging

    from pusa.acceleration.launch import join_torchrun
    from pusa.acceleration.ranks import RankError
    from pusa.generate.follower import follow

    logging.disable(logging.WARNING)  # rank 0 has them all
    ranks = join_torchrun(device_type)
    try:
        follow(ranks)
    except RankError as error:
        if error.rank == 0:  # all others are named by rank 0
            click.echo(f"pusa: {error}", err=True)
        return 1
    finally:
        ranks.close()
    return 0


@contextmanager
def join_ranks(request: GenerationRequest, load: LoadOptions) -> Iterator["Ranks | None"]:
    """Start as many ranks as the command or the plan says, or join those of torchrun; None: this process works alone.

    Raises:
        ValueError: this machine has fewer GPUs, or torchrun has started another number of ranks.
    """
    session: Session = click.get_current_context().find_root().obj
    gpus, device_type = session.gpus, session.ranks_on
    started = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if started > 1:
        if gpus not in (None, started):
            raise ValueError(f"--gpus {gpus}: torchrun has started {started} ranks: leave --gpus out")
        from pusa.acceleration.launch import join_torchrun

        ranks = join_torchrun(device_type)
        try:
            yield ranks
        finally:
            ranks.close()
    elif (size := gpus or _planned_ranks(request, load)) == 1:
        if gpus == 1 and device_type == "cuda":
            from pusa.acceleration.launch import check_gpus

            check_gpus(1)
        yield None
    else:
        from pusa.acceleration.launch import launch

        with launch(size, device_type=device_type) as ranks:
            yield ranks


def _planned_ranks(request: GenerationRequest, load: LoadOptions) -> int:
    """Ask the plan how many ranks make a request's video on this machine."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        return 1
    from pusa import zoo
    from pusa.acceleration.machine import machine
    from pusa.generate.residents import choose_plans

    plans = choose_plans(request.resolved(zoo.defaults_of(request.model)), load, machine())
    return plans[0].parallel.ranks if plans else 1
