"""Define `pusa plan`: how a model runs on this machine, or on any other."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import click

from pusa.acceleration.decisions import QUANTIZE, WISHES, LoadOptions, Machine, Plan
from pusa.cli.files import find_files, take_files
from pusa.cli.groups import Command, json_option
from pusa.cli.options import add_options
from pusa.request import GenerationRequest

C = TypeVar("C", bound=Callable[..., Any])

_DESCRIBES = ("gpu_gb", "count", "ram_gb", "disk_gb", "capability", "nvlink")


class _Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Read WIDTHxHEIGHT."""
        width, _, height = str(value).lower().partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            self.fail(f"{value!r} is no size: write WIDTHxHEIGHT, such as 832x480")
        return int(width), int(height)


class _Capability(click.ParamType):
    name = "capability"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Read MAJOR.MINOR."""
        major, _, minor = str(value).partition(".")
        if not (major.isdecimal() and minor.isdecimal()):
            self.fail(f"{value!r} is no compute capability: write MAJOR.MINOR, such as 8.9")
        return int(major), int(minor)


_MACHINE_OPTIONS = [
    click.option(
        "--gpu-gb", type=click.FloatRange(min=0), help="Memory of a card as it is sold: 24 for a 24 GB card; 0: none."
    ),
    click.option("--count", type=click.IntRange(min=1), help="How many such cards. [default: 1]"),
    click.option("--ram-gb", type=click.FloatRange(min=0), help="RAM as it is sold. [default: 64]"),
    click.option("--disk-gb", type=click.FloatRange(min=0), help="Free disk. [default: 200]"),
    click.option(
        "--capability",
        type=_Capability(),
        metavar="MAJOR.MINOR",
        help="Compute capability: 8.6 for RTX 30 and A6000, 8.9 for RTX 40, 9.0 for H100, 12.0 for RTX 50. "
        "[default: 8.9]",
    ),
    click.option("--nvlink", is_flag=True, help="The cards are linked by NVLink, not by PCIe alone."),
]


def machine_options(command: C) -> C:
    """Add the options that describe a machine, which `take_machine` reads."""
    for option in reversed(_MACHINE_OPTIONS):
        command = option(command)
    return command


@click.command(cls=Command)
@click.argument("model", metavar="MODEL", required=False)
@machine_options
@click.option("--size", type=_Size(), metavar="WIDTHxHEIGHT", help="Size of the video. [default: the model's]")
@click.option(
    "--frames",
    type=click.IntRange(min=1),
    help="Frames of the video; more than the model's own are made in windows. [default: the model's]",
)
@click.option("--no-guidance", is_flag=True, help="Plan for guidance 1, which makes one pass per step.")
@click.option("--fast", is_flag=True, help="Plan for --fast: its guidance, and the model's 4-step LoRA beside Pusa's.")
@click.option(
    "--memory",
    type=click.Choice(WISHES),
    default="balanced",
    show_default=True,
    help="balanced: exact weights unless they cannot run; fastest: 8 bits where faster; smallest: least GPU memory.",
)
@click.option("--quantize", type=click.Choice(QUANTIZE), default="auto", show_default=True)
@click.option("--gpus", type=click.IntRange(min=1), help="Use exactly so many cards. [default: the plan's choice]")
@add_options
@click.option("--table", is_flag=True, help="Print the table of docs/on_your_card.md instead: models on common cards.")
@json_option
def plan(model: str | None, table: bool, as_json: bool, **options: Any) -> None:
    """Tell how MODEL runs on this machine, or on the one that --gpu-gb and the like describe.

    All figures are predictions from the model's shapes and published rates. Speed is relative to one such card with all
    weights resident in bf16.

    \b
    Here:               pusa plan wan2.1-14b
    On a 24 GB card:    pusa plan wan2.1-14b --gpu-gb 24 --ram-gb 64 --size 1280x720
    A file on 12 GB:    pusa plan --transformer wan2.1-t2v-14b-Q4_K_M.gguf --gpu-gb 12
    On two A6000:       pusa plan wan2.2-a14b --gpu-gb 48 --count 2 --ram-gb 128 --capability 8.6
    """
    if table:
        from pusa.acceleration.table import buyers_table

        click.echo(buyers_table())
        return
    from pusa.acceleration.needs import own_lora_ranks
    from pusa.acceleration.planning import plans
    from pusa.cli.info import find_model

    model, load = _load_options(model, options)
    found_model = find_model(model)
    defaults = found_model.defaults
    fast = defaults.fast if options["fast"] else None
    if options["fast"] and fast is None:
        raise click.UsageError(f"{found_model.name} has no fast mode: leave --fast out, or plan with --no-guidance.")
    width, height = options["size"] or (defaults.width, defaults.height)
    frames = options["frames"] or defaults.num_frames
    if frames > defaults.num_frames:
        click.echo(f"{frames} frames are made in windows of {defaults.num_frames}: planning for a window", err=True)
        frames = defaults.num_frames
    machine = take_machine(options)
    found = plans(
        found_model,
        size=(width, height, frames),
        machine=machine,
        options=load,
        guidance=not options["no_guidance"] and (fast or defaults).guidance > 1,
        lora_ranks=own_lora_ranks(found_model, fast=True) if fast else None,
    )
    if as_json:
        click.echo(json.dumps({"machine": asdict(machine), "plans": [asdict(one) for one in found]}))
    else:
        click.echo("\n".join(_lines(found, machine)))


def _load_options(model: str | None, options: dict[str, Any]) -> tuple[str, LoadOptions]:
    """Return the model, which the files tell where it is not named, and what is asked of its plan."""
    files: dict[str, Any] = take_files(options)
    load = LoadOptions(memory=options["memory"], quantize=options["quantize"], gpus=options["gpus"], **files)
    if not files:
        if model is None:
            raise click.UsageError("Missing argument 'MODEL'.")
        return model, load
    request = GenerationRequest(prompt="a plan") if model is None else GenerationRequest(prompt="a plan", model=model)
    request, load = find_files(request, load)
    return request.model, load


def take_machine(options: dict[str, Any]) -> Machine:
    """Remove the values of `machine_options` from `options`; return the machine that they describe, or this one.

    Raises UsageError for details of a card without its memory.
    """
    from pusa.acceleration.machine import described_machine
    from pusa.acceleration.machine import machine as this_machine

    given = {name: options.pop(name) for name in _DESCRIBES}
    described = {name: value for name, value in given.items() if value is not None and value is not False}  # 0 counts
    if not described:
        return this_machine()
    if "gpu_gb" not in described and (of_cards := described.keys() & {"count", "capability", "nvlink"}):
        raise click.UsageError(f"--{min(of_cards)} describes a card: give --gpu-gb, too.")
    if described.pop("nvlink", False):
        described["link"] = "nvlink"
    return described_machine(**described)


def _lines(found: list[Plan], machine: Machine) -> Iterator[str]:
    from pusa.resources import readable

    best, *fallbacks = found
    if best.problem:
        yield f"does not run: {best.problem}"
        return
    yield best.summary
    width = max(map(len, best.parts))
    for name, part in best.parts.items():
        yield f"  {name:<{width}}  {part.device}, {part.storage}: {part.reason}"
    if best.gpu_peak_bytes:
        stages = ", ".join(f"{stage} {readable(size)}" for stage, size in best.gpu_peak_bytes.items())
        yield f"  GPU memory  {stages} of {readable(machine.cards[0].memory_bytes)}"
    yield f"  RAM         {readable(best.ram_peak_bytes)} of {readable(machine.ram_bytes)}"
    if best.gpu_peak_bytes:
        yield f"  speed       {best.relative_speed:.2f} of one such card with all weights resident in bf16 (predicted)"
    yield from (f"  {note}" for note in best.notes)
    for number, other in enumerate(fallbacks, 1):
        yield (
            f"fallback {number}: {other.summary.partition(': ')[2]}; {readable(other.peak_bytes)} of GPU memory, "
            f"speed {other.relative_speed:.2f}"
        )
