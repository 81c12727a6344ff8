"""Run `pusa train`: estimate the cost of adapting a text-to-video model, adapt it, and export the adapter."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pusa.cli.groups import Group, json_option
from pusa.cli.run import Stopped

if TYPE_CHECKING:
    from pusa.training.config import TrainConfig
    from pusa.training.disk import DiskNeed
    from pusa.training.estimate import Estimate, Gpu, Remedy

_LAYOUTS = ("comfyui", "diffusers", "original")


class _TrainGroup(Group):
    """Take the command `run` where none is named: ``pusa train CONFIG`` is ``pusa train run CONFIG``."""

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


_config = click.argument("config", metavar="CONFIG")
_changes = click.argument("changes", metavar="[SECTION.FIELD=VALUE]...", nargs=-1)
_set_option = click.option(
    "--set",
    "more_changes",
    metavar="SECTION.FIELD=VALUE",
    multiple=True,
    help="Change a field of the configuration: optimizer.lr=1e-4, data.folders=clips, seconds=600. [may be repeated]",
)


@train.command()
@_config
@_changes
@_set_option
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint; begin if it has none.")
@click.option("--other-data", is_flag=True, help="With --resume: go on with other data than those it was begun with.")
def run(config: str, changes: tuple[str, ...], more_changes: tuple[str, ...], resume: bool, other_data: bool) -> None:
    """Train as CONFIG says: the name of a ready configuration, a .toml file, or the folder of a run.

    The same command alone, under `accelerate launch -m` and under `torchrun -m`. Ctrl-C and SIGTERM end the run after
    the step, with a checkpoint; a run that was killed goes on with --resume.
    """
    from pusa.training.config import load_config

    if other_data and not resume:
        raise click.UsageError("--other-data goes with --resume")
    train_config = load_config(config, [*changes, *more_changes], needs_files=True)
    _show_log()

    from pusa.training.trainer import TrainingStoppedError, train

    options: dict[str, Any] = {}
    if train_config.report.validate_every is not None and train_config.data.folders:
        from pusa.data.dataset import LatentDataset
        from pusa.training.reports.validation import Validator

        options["dataset"] = dataset = LatentDataset(train_config.data.folders)
        options["on_validate"] = Validator(train_config, dataset)
    try:
        folder = train(train_config, resume=resume, other_data=other_data, **options)
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
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(),
    help="NAME.safetensors to write; of a full fine-tune a new folder.",
)
@click.option(
    "--layout",
    type=click.Choice(_LAYOUTS),
    help="original: as pusa_v1.pt. comfyui: for ComfyUI, read by diffusers too. [default: comfyui; diffusers for other "
    "models than Wan]",
)
@click.option(
    "--scale", type=float, default=1.0, show_default=True, help="1.4 makes strength 1 what alpha 1.4 is without it."
)
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of the matrices."
)
@click.option("--step", type=click.IntRange(1), help="Of a checkpoint that is there. [default: the finished run's]")
def export(run: str, output: str, layout: Any, scale: float, dtype: str, step: int | None) -> None:
    """Write the adapter of the run in folder RUN in another layout, or the whole model of a full fine-tune."""
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


# ---- estimate --------------------------------------------------------------------------------------------------------


@train.command()
@_config
@_changes
@_set_option
@click.option("--gpu", "gpu_name", metavar="NAME", default="h200", show_default=True, help="A card by name, or cpu.")
@click.option("--count", type=click.IntRange(1, 4096), default=1, show_default=True, help="How many of them.")
@click.option("--price", type=click.FloatRange(0), help="Of one card for an hour, in any currency.")
@json_option
def estimate(
    config: str,
    changes: tuple[str, ...],
    more_changes: tuple[str, ...],
    gpu_name: str,
    count: int,
    price: float | None,
    as_json: bool,
) -> None:
    """Say what a run of CONFIG takes: operations, memory, hours and money, beside the run of the paper.

    CONFIG is the name of a ready configuration, a .toml file or the folder of a run; its fields can be changed as for a
    run. Nothing is downloaded or trained. With --gpu cpu the rate of this machine is measured, which takes seconds.

    \b
    pusa train estimate wan2.1-14b-vta --gpu h200 --count 8 --price 3.5
    pusa train estimate wan2.1-1.3b-vta method.rank=64 --gpu 4090
    """
    from pusa.training import estimate as estimates
    from pusa.training.config import load_config

    train_config = load_config(config, [*changes, *more_changes])
    gpu = _find(gpu_name, train_config)
    base = estimates.load_base(train_config.model.source)
    result = estimates.estimate(train_config, base, gpu, cards=count, price=price)
    paper = estimates.paper_run(gpu, cards=count, price=price)
    ways = [] if result.fits else estimates.remedies(train_config, base, gpu, cards=count)
    if as_json:
        click.echo(json.dumps(_as_json(train_config, result, paper, ways), ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(train_config, result, paper, ways)))


def _find(name: str, config: "TrainConfig") -> "Gpu":
    from pusa.training.estimate import GPUS

    if name == "cpu":
        return _measure_cpu(config)
    if name not in GPUS:
        raise ValueError(f"--gpu {name!r} is not known: take the nearest of {', '.join(GPUS)}, or cpu")
    return GPUS[name]


def _measure_cpu(config: "TrainConfig") -> "Gpu":
    """Measure this processor's rate for matrix products of size 1024, the width of the smallest models."""
    import time

    import torch

    from pusa import resources
    from pusa.training.estimate import Gpu

    size, dtype = 1024, torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    a, b = torch.randn(2, size, size).to(dtype)
    products, seconds = 0, 0.0
    torch.mm(a, b)  # the first call chooses kernels
    while seconds < 1.0:
        began = time.perf_counter()
        torch.mm(a, b)
        seconds += time.perf_counter() - began
        products += 1
    rate = 2 * size**3 * products / seconds
    title = f"this processor, {torch.get_num_threads()} threads"
    return Gpu("cpu", title, resources.free_memory_bytes(), rate, 0.35, 10e9, "a guess; the rate was measured now")


def _format_rate(rate: float) -> str:
    return f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:.0f} GFLOP/s"


def _format_count(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def _format_operations(count: float) -> str:
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e9:.3g} GFLOP"


def _format_time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} seconds"
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def _lines(config: "TrainConfig", result: "Estimate", paper: "Estimate", ways: list["Remedy"]) -> Iterator[str]:
    from pusa.resources import readable
    from pusa.training.estimate import PAPER_CLIPS, PAPER_DOLLARS, PAPER_STEPS

    gpu, work, flops, memory = result.gpu, result.largest, result.flops, result.memory
    kind = f"LoRA of rank {work.rank}" if work.rank else "all weights"
    experts = len(config.model.experts)
    each = f" for each of {experts} transformers" if experts > 1 else ""
    grid = "x".join(map(str, work.grid))
    trained, total = _format_count(work.trained_parameters), _format_count(work.parameters)
    yield f"{config.name}: {kind}, {trained} parameters for a model of {total}"
    yield f"on        {result.cards} x {gpu.title}, {readable(gpu.memory_bytes)}, {_format_rate(gpu.peak)} at most"
    clips = sorted({work.clips_per_step for work in result.works})
    many = f"{clips[0]} to {clips[-1]}" if len(clips) > 1 else f"{clips[0]}"
    yield f"work      {result.steps / experts:,.0f} steps of {many} clips{each}"
    yield f"a clip    {grid} latents, {work.sequence:,} tokens"
    again = f", once more {_format_operations(flops.recompute)}" if flops.recompute else ""
    yield (
        f"a pass    {_format_operations(flops.total)}: forward {_format_operations(flops.forward)}{again}, "
        f"backward {_format_operations(flops.backward)}"
    )
    yield ""
    yield "memory per card"
    rows = {
        "weights": memory.weights,
        "adapter": memory.adapter,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "moving average": memory.ema,
        "gathered by FSDP": memory.gathered,
        "activations": memory.activations,
    }
    for name, count in rows.items():
        if count:
            yield f"  {name:<17} {readable(count):>8}"
    room = f"{readable(memory.peak)} of {readable(gpu.usable_bytes)} that can be used"
    yield f"  {'at the peak':<17} {readable(memory.peak):>8}  (gradients come while activations go)"
    yield f"fits      {'yes' if result.fits else 'NO'}: {room}"
    if not result.fits:
        yield from _ways(result, ways)
    disk, disk_bytes = _disk(config, result)
    many = f"{disk.checkpoints} checkpoints" if disk.checkpoints > 1 else "one checkpoint"
    yield (
        f"disk      {readable(disk_bytes)}: {many} of {readable(disk.checkpoint)}"
        f"{', one of them being written' if disk.checkpoints > 1 else ''}, and {readable(disk.result)} for the "
        f"result{each}"
    )
    yield ""
    speed = f"{result.step_seconds:.3g} s a step at {gpu.share:.0%} of the rate"
    if result.communication_seconds > result.compute_seconds:
        speed += f" (waiting for communication; {result.compute_seconds:.3g} s of computing)"
    yield f"speed     {speed}"
    yield f"          the share: {gpu.basis}"
    yield f"takes     {_format_time(result.hours)}, {result.gpu_hours:,.1f} card-hours{_format_cost(result)}"
    if gpu.name == "cpu":
        return
    yield (
        f"the paper {PAPER_STEPS} steps of {PAPER_CLIPS} clips at 1280x720, rank 512 (they report about "
        f"${PAPER_DOLLARS}): here {_format_time(paper.hours)}, {paper.gpu_hours:,.0f} card-hours{_format_cost(paper)}"
    )


def _disk(config: "TrainConfig", result: "Estimate") -> tuple["DiskNeed", int]:
    """Return what one transformer's run takes of the disk, and the bytes of all of them."""
    from pusa.training.disk import disk_need

    need = disk_need(config, result.largest.trained_parameters)
    return need, need.total * len(config.model.experts)


def _format_cost(result: "Estimate") -> str:
    return "" if result.cost is None else f", {result.cost:,.2f} at {result.price:g} an hour"


def _ways(result: "Estimate", ways: list["Remedy"]) -> Iterator[str]:
    from pusa.resources import readable

    if not ways:
        yield "          no change of the configuration makes it fit: take a larger card or a smaller model"
        return
    yield "          it would with" if len(ways) == 1 else "          it would with any one of these"
    for way in ways:
        changes = [f"{name}={json.dumps(value)}" for name, value in way.overrides.items()]
        if way.cards != result.cards:
            changes.append(f"--count {way.cards}")
        yield f"            {' '.join(changes):<48} {readable(way.peak)}"
    if any("data.width" in way.overrides for way in ways):
        yield "          (a size is that of the clips: prepare the data so)"


def _as_json(config: "TrainConfig", result: "Estimate", paper: "Estimate", ways: list["Remedy"]) -> dict[str, Any]:
    memory, flops = result.memory, result.flops
    disk, disk_bytes = _disk(config, result)
    return {
        "gpu": result.gpu.name,
        "count": result.cards,
        "steps": result.steps,
        "clips_per_step": result.largest.clips_per_step,
        "flops": {"forward": flops.forward, "recompute": flops.recompute, "backward": flops.backward},
        "parameters": result.largest.parameters,
        "trained_parameters": result.largest.trained_parameters,
        "memory_bytes": vars(memory) | {"usable": result.gpu.usable_bytes},
        "disk_bytes": vars(disk) | {"total": disk_bytes},
        "fits": result.fits,
        "remedies": [{"set": dict(way.overrides), "count": way.cards, "peak_bytes": way.peak} for way in ways],
        "assumed_share": result.gpu.share,
        "step_seconds": result.step_seconds,
        "hours": result.hours,
        "gpu_hours": result.gpu_hours,
        "cost": result.cost,
        "paper": {"hours": paper.hours, "gpu_hours": paper.gpu_hours, "cost": paper.cost},
    }
