"""Run `pusa data`: make datasets to train on and inspect them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pusa.cli.groups import Group, json_option
from pusa.cli.run import Start, Stopped, run
from pusa.fields import shown
from pusa.numerals import is_whole, parse_size, parse_whole

if TYPE_CHECKING:
    import torch

C = TypeVar("C", bound=Callable[..., Any])

_STOPPED = "stopped; what is done is kept, and the same command goes on with it"

_model = click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="The model to be trained, whose VAE and text encoder are used: a name of the zoo, a Hub id or a folder.",
)
_dtype = click.option(
    "--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True, help="Of the latents on disk."
)


@click.group(cls=Group)
def data() -> None:
    """Make datasets of encoded clips to train on, and inspect them.

    \b
    From videos:     pusa data prepare videos clips --model wan2.1-14b
    From the model:  pusa data synthesize prompts.txt clips --model wan2.1-14b
    Inspect it:      pusa data inspect clips -o look.html
    """


@data.command()
@click.argument("source", metavar="SOURCE")
@click.argument("output", metavar="OUT", type=click.Path())
@_model
@click.option(
    "--size",
    "sizes",
    metavar="WIDTHxHEIGHT",
    multiple=True,
    help="Size of clips in pixels, multiples of 16; each gets the one that needs the least cutting. [default: the "
    "model's, the same upright, and a square; may be repeated]",
)
@click.option(
    "--frames",
    type=int,
    multiple=True,
    help="Length of clips that the model makes, 4n + 1 frames for Wan, 6n + 1 for Mochi; each video gets the longest "
    "that it fills, pictures have 1. [default: the model's; may be repeated]",
)
@click.option("--fps", type=float, help="Frames per second of clips. [default: the model's]")
@click.option(
    "--clips-per-video", default="1", show_default=True, metavar="N|all", help="How many clips are cut from one video."
)
@click.option(
    "--stride-seconds", type=float, help="From the start of one clip to the next. [default: one follows the other]"
)
@click.option(
    "--captions",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Captions by file: JSON, JSONL or CSV. They go before those beside the videos.",
)
@click.option("--caption", metavar="TEXT", help="For files that have none; may be empty. [default: they are left out]")
@click.option("--workers", type=click.IntRange(0, 256), help="Processes that decode. [default: one per core, up to 8]")
@_dtype
@json_option
def prepare(
    source: str,
    output: str,
    model: str,
    sizes: tuple[str, ...],
    clips_per_video: str,
    captions: Path | None,
    caption: str | None,
    workers: int | None,
    dtype: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Encode videos and pictures with captions.

    From SOURCE, to a dataset in the folder OUT.

    SOURCE is a folder (captions in NAME.txt beside each file, in captions.json or metadata.csv), a table (CSV, JSON or
    JSONL with a file and a caption in each row), a dataset of the `datasets` library, the original's training data
    (metadata.csv and *.tensors.pth), or one of these on the Hub (owner/name).

    The same command goes on after a stop, and adds what is new in SOURCE. Files that cannot be used are listed in
    OUT/skipped.jsonl.
    """
    chosen_sizes = tuple(parse_size(size, "--size") for size in sizes)
    _check_model(model)

    from pusa.data.prepare import ClipSettings
    from pusa.data.prepare import prepare as start

    count, torch_dtype = _clips_per_video(clips_per_video), _torch_dtype(dtype)
    settings = ClipSettings(model=model, sizes=chosen_sizes, clips_per_video=count, dtype=torch_dtype, **options)
    _show(
        lambda stop: start(
            source, Path(output), settings, captions=captions, caption=caption, workers=workers, stop=stop
        ),
        as_json,
    )


@data.command()
@click.argument("prompts", metavar="PROMPTS", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path())
@_model
@click.option("--count", type=click.IntRange(1), help="Clips to make, in all parts together. [default: one per prompt]")
@click.option(
    "--part", default="1/1", show_default=True, metavar="I/N", help="Which of N equal shares to make, on N machines."
)
@click.option("--size", metavar="WIDTHxHEIGHT", help="Size in pixels, multiples of 16. [default: the model's]")
@click.option(
    "--frames",
    type=click.IntRange(1),
    help="Length that the model makes, 4n + 1 frames for Wan. [default: the model's]",
)
@click.option("--fps", type=float, help="Frames per second. [default: the model's]")
@click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True, help="Denoising steps.")
@click.option(
    "--guidance", type=click.FloatRange(1), help="Guidance scale. [default: 5; the default of a model in the package]"
)
@click.option("--shift", type=click.FloatRange(0, min_open=True), help="Flow shift. [default: the model's]")
@click.option("--negative", "negative_prompt", metavar="TEXT", help="What to avoid. [default: the model's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Clip k is made from seed + k.")
@_dtype
@json_option
def synthesize(
    prompts: Path,
    output: str,
    model: str,
    count: int | None,
    part: str,
    size: str | None,
    dtype: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Let the base model make the clips.

    One from each line of the file PROMPTS, in the folder OUT. Pusa V1.0 was trained on such clips. No adapter is used,
    and nothing is decoded: the latents are the dataset. The same command goes on after a stop. Several machines, or
    several GPUs of one, take a part each: --part 1/4 and so on.
    """
    chosen_part, chosen_size = _part(part), parse_size(size, "--size") if size else None
    _check_model(model)

    from pusa.data.sources import read_prompts
    from pusa.data.synthesize import SynthesisSettings
    from pusa.data.synthesize import synthesize as start

    settings = SynthesisSettings(model=model, size=chosen_size, dtype=_torch_dtype(dtype), **options)
    lines = read_prompts(prompts)
    _show(lambda stop: start(lines, Path(output), settings, count=count, part=chosen_part, stop=stop), as_json)


@data.command()
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="FILE.html",
    type=click.Path(path_type=Path),
    help="Page to write; the contact sheet gets the same name with .png. [default: inspect.html in FOLDER]",
)
@click.option(
    "--clips",
    type=click.IntRange(0, 500),
    default=12,
    show_default=True,
    help="How many to decode and show, from the stillest to the liveliest. 0: none, which needs no model.",
)
@click.option("--frames", type=click.IntRange(1, 16), default=4, show_default=True, help="How many of each to show.")
@click.option("--model", metavar="MODEL", help="Whose VAE decodes. [default: the one that the dataset was made with]")
@json_option
def inspect(folder: Path, output: Path | None, clips: int, frames: int, model: str | None, as_json: bool) -> None:
    """Show a dataset: a page and a contact sheet.

    The page has numbers (length, motion, detail, captions, what was left out) and pictures of the dataset in FOLDER.
    """
    from pusa.data.inspect import inspect as start

    page = folder / "inspect.html" if output is None else output
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"-o {str(page)!r} is a page: give a name that ends in .html")
    _show(lambda stop: start(folder, page, clips=clips, frames=frames, model=model, stop=stop), as_json, "")


def _show(start: Start, as_json: bool, stopped: str = _STOPPED) -> None:
    try:
        run(start, as_json=as_json)
    except Stopped:
        raise Stopped(stopped) from None


def _check_model(model: str) -> None:
    from pusa import zoo
    from pusa.cli.info import check_model, find_model

    check_model(model)
    if model == "mini" and zoo.find(model) is None:
        find_model(model)


def _torch_dtype(name: str) -> "torch.dtype":
    import torch

    return torch.bfloat16 if name == "bf16" else torch.float32


def _clips_per_video(text: str) -> int | None:
    if text == "all":
        return None
    if not is_whole(text) or parse_whole(text) < 1:
        raise ValueError(f"--clips-per-video {shown(text)} is neither a number from 1 on nor 'all'")
    return parse_whole(text)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part {shown(text)} is not understood: write I/N with I from 1 to N, such as 1/4")
    return int(match[1]), int(match[2])
