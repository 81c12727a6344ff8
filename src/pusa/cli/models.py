"""Define `pusa models`: list, describe, add, remove and convert models."""

import json
from pathlib import Path
from typing import Any

import click

from pusa.cli.groups import Group, json_option
from pusa.cli.options import add_options
from pusa.cli.root import EXIT_CODES, print_facts, show_run


def _complete_models(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from pusa.zoo import names

    return [name for name in names() if name.startswith(incomplete)]


@click.group(cls=Group, invoke_without_command=True)
@json_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models, their sizes and how they would run on this machine."""
    if ctx.invoked_subcommand is None:
        from pusa.cli.info import list_models

        print_facts(list_models(), as_json)


@models.command()
@click.argument("name", metavar="NAME", shell_complete=_complete_models)
@click.option(
    "--words",
    is_flag=True,
    help="List the words that a small model knows; prompts are made of them: a duck slides to the right under the sea, "
    "the camera zooms in.",
)
@json_option
@click.pass_context
def show(ctx: click.Context, name: str, words: bool, as_json: bool) -> None:
    """Describe the model NAME, or the one in the folder NAME."""
    from pusa.cli.info import describe_model, words_as_text, words_of_model

    as_json = as_json or (ctx.parent is not None and ctx.parent.params["as_json"])  # pusa models --json show NAME
    if not words:
        print_facts(describe_model(name), as_json)
    elif as_json:
        click.echo(json.dumps(words_of_model(name), ensure_ascii=False))
    else:
        click.echo(words_as_text(words_of_model(name)))


@models.command(epilog=EXIT_CODES)
@click.argument("source", metavar="SOURCE", shell_complete=_complete_models)
@click.argument("folder", metavar="FOLDER", type=click.Path())
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
    help="Of the transformers and the text encoder; what is loaded in fp32 anyway stays in it.",
)
@json_option
def convert(source: str, folder: str, dtype: str, as_json: bool) -> None:
    """Write the model SOURCE (a name, a folder or a Hub id) to FOLDER, in diffusers layout and in 16 bits.

    Wan's published files are in fp32: converted once, they take half the disk, and half as many bytes are read. 2 GB of
    memory are enough for any model.
    """
    from pusa.cli.info import check_model

    check_model(source)

    from pusa.conversion import convert as convert_model

    show_run(lambda stop: convert_model(source, Path(folder).expanduser(), dtype=dtype, stop=stop), as_json)


@models.command()
@click.argument("folder", metavar="FOLDER", type=click.Path())
@click.option(
    "--vae",
    required=True,
    metavar="VAE",
    help="The VAE of pictures that encodes each frame: its folder, a pipeline's, or a Hub id "
    "(stabilityai/sd-vae-ft-ema).",
)
@click.option("--size", default="S/2", show_default=True, metavar="SIZE/PATCH", help="XL/2, L/2, B/2, S/2 or T/2.")
@click.option("--video", metavar="WIDTHxHEIGHT", help="Size of its videos in pixels. [default: 256x256]")
@click.option(
    "--frames", "num_frames", type=click.IntRange(1, 4096), default=16, show_default=True, help="Frames of its videos."
)
@click.option(
    "--classes", "num_classes", type=click.IntRange(1), help="How many classes its prompts choose from. [default: none]"
)
@click.option("--fps", type=click.FloatRange(0, min_open=True), default=8.0, show_default=True, help="Of its videos.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of a new network's weights.")
@click.option(
    "--checkpoint",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Take the weights of a .pt or .safetensors file of FVDM or Latte, which tells size, frames and classes.",
)
@click.option("--heads", "num_heads", type=click.IntRange(1), help="Attention heads of a checkpoint of another size.")
def make_fvdm(folder: str, vae: str, video: str | None, **options: Any) -> None:
    """Make an FVDM model in FOLDER: new, to be trained from nothing, or from a checkpoint.

    \b
    pusa models make-fvdm fvdm --vae stabilityai/sd-vae-ft-ema --size B/2
    pusa data prepare videos clips --model fvdm
    pusa train fvdm --set model.source=fvdm --set data.folders=clips
    """
    from pusa.numerals import parse_size

    width, height = parse_size(video, "--video") if video else (None, None)  # before libraries are loaded

    from pusa.new_models import make_fvdm as make

    click.echo(str(make(Path(folder).expanduser(), vae=vae, width=width, height=height, **options)))


@models.command()
@click.argument("name", metavar="NAME")
@click.option("--model", metavar="NAME", help="The model of the zoo that it is. [default: its files tell]")
@add_options
@click.option("--folder", metavar="FOLDER", type=click.Path(), help="A model's folder, for parts without a file.")
@click.option(
    "--comfyui", metavar="FOLDER", type=click.Path(), help="ComfyUI's folder of models: find the files there."
)
@click.option("--lora", metavar="FILE", multiple=True, help="Its LoRAs, instead of the model's own. [may be repeated]")
def add(name: str, **options: Any) -> None:
    """Give a model of files on this machine a NAME, which all commands, Python and the server know.

    \b
    pusa models add my-wan --transformer wan2.1-t2v-14b-Q8_0.gguf --vae wan_2.1_vae.safetensors
    pusa models add comfy --comfyui ~/ComfyUI/models
    """
    from pusa.cli.files import add_model

    click.echo(add_model(name, **options))


@models.command()
@click.argument("name", metavar="NAME", shell_complete=_complete_models)
def remove(name: str) -> None:
    """Forget the model NAME that was added; its files stay."""
    from pusa.added_models import remove as forget

    forget(name)
