"""Define `pusa mini`: train the embedded model."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import click

from pusa.cli.groups import Group

_STAGES = ("vae", "base", "vta", "export")


@click.group(cls=Group)
def mini() -> None:
    """Make the embedded model anew."""


@mini.command()
@click.argument("work", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--budget",
    type=click.Choice(["cpu", "more", "gpu", "card", "rehearsal", "more-rehearsal", "card-rehearsal"]),
    default="cpu",
    show_default=True,
    help="cpu: two cores, about two hours, 96 pixels. more: the model of the package is trained further on a CPU, for "
    "as long as you like with --until base, and its adapter without it. gpu: one large GPU, about 25 minutes, 128 "
    "pixels. card: one data-centre GPU, eight minutes, 128 pixels, the VAE of the package kept. A rehearsal runs all "
    "stages of cpu and gpu, of more, or of card, with a toy model or in a few steps.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(10, 86400),
    help="All the time that budget card has.  [default: 480]",
)
@click.option("--until", type=click.Choice(_STAGES), default=_STAGES[-1], help="Stop after this stage.")
@click.option(
    "--pictures",
    "pack",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A file that `pusa mini pictures` has made; nothing is fetched then.",
)
@click.option("--processes", type=click.IntRange(1, 64), help="Of one thread each. [default: 1 with a GPU, else 2]")
def train(work: Path, budget: str, until: str, pack: Path | None, processes: int | None, seconds: float | None) -> None:
    """Draw clips, train VAE, text-to-video model and Pusa adapter, and write the model to FOLDER/model.

    The pictures it is drawn from are fetched from npm and Debian (npm, apt-get and dpkg-deb are needed, once). Stop it
    when you like: the same command goes on where it was.
    """
    is_card, is_more = budget.startswith("card"), budget.startswith("more")
    if is_more and until not in ("base", _STAGES[-1]):
        raise click.UsageError(
            f"--budget {budget} has no stage {until}: --until base trains the base, no --until the rest"
        )
    if is_card and (until != _STAGES[-1] or processes not in (None, 1)):
        raise click.UsageError(f"--budget {budget} is one process that does all stages: leave out --until, --processes")
    if seconds is not None and not is_card:
        raise click.UsageError("--seconds goes with --budget card: the times of the other budgets are fixed")
    if is_card:
        processes = 1
    elif is_more and processes is None:
        processes = 2
    if processes is None:
        import torch

        processes = 1 if torch.cuda.is_available() else 2
    options = ["--work", str(work), "--budget", budget, "--until", until]
    options += ["--pictures", str(pack)] if pack else []
    options += ["--seconds", f"{seconds:g}"] if seconds is not None else []
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launcher, "-m", "pusa.mini.recipe.recipe", *options]
    # One thread a process: two processes with averaged gradients are faster than one with two threads.
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} if processes > 1 else {}
    process = subprocess.Popen(command, env={**os.environ, **threads})
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise click.Abort from None
    if code:
        raise RuntimeError(f"the recipe ended with exit code {code}; its messages are above")
    click.echo(f"{work / 'model'}" if until == _STAGES[-1] else f"{work}: done up to stage {until}")


@mini.command("pictures")
@click.argument("pack", metavar="PACK.safetensors", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the downloads are kept.  [default: the folder pictures_cache beside PACK]",
)
def pictures_command(pack: Path, cache: Path | None) -> None:
    """Put the pictures that the model is trained on into one file, for a machine that can fetch nothing.

    `pusa mini train --pictures PACK.safetensors` takes it. The pictures are fetched from npm and Debian (npm, apt-get
    and dpkg-deb are needed, once); their credits and licences are in the file.
    """
    from pusa.mini.world import picture_pack, pictures

    if pack.suffix != ".safetensors":
        raise click.BadParameter(f"{pack} must end in .safetensors", param_hint="PACK.safetensors")
    cache = cache or pack.parent / "pictures_cache"
    pictures.fetch(cache)
    picture_pack.make_pack(cache, pack)
    click.echo(f"{pack}: {pack.stat().st_size / 1e6:.1f} MB")
