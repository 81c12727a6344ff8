"""Make a video from the request inside another: the same again, or the final of a draft."""

from pathlib import Path
from typing import Any

import click

from pusa.cli.groups import json_option
from pusa.cli.options import (
    final_options,
    find_file,
    load_options,
    mark_options,
    metadata_option,
    take_load_options,
    take_mark_options,
    with_files_found,
)
from pusa.cli.ranks import RanksCommand, ranks_options
from pusa.cli.root import EXIT_CODES, model_option, output_option, run_request
from pusa.cli.run import MissingModelError
from pusa.lora.sources import parse_lora, replace_loras
from pusa.numerals import parse_size
from pusa.request import GenerationRequest, Metadata, final_request

_lora = click.option("--lora", metavar="FILE", multiple=True, help="The same for LoRA files. [may be repeated]")


def _stored_request(
    video: str, model: str | None, lora: tuple[str, ...], metadata: Metadata | None
) -> tuple[Path, GenerationRequest, dict[str, bytes], dict[str, Any]]:
    """Read the request inside a video, with the files it needs; return it with the file, its inputs and metadata."""
    from pusa.media import read_metadata

    file = Path(video) if Path(video).is_dir() else find_file(video, "video")
    stored = read_metadata(file)

    from pusa.generate import read_request

    request, carried = read_request(stored)
    changes = {"model": model, "lora": replace_loras(request.lora, lora), "metadata": metadata}
    request = request.model_copy(update={name: value for name, value in changes.items() if value})
    for lora_file in (name for source in request.lora for name in parse_lora(source).files.values()):
        if not Path(lora_file).expanduser().exists() and "/" not in lora_file:
            raise MissingModelError(f"LoRA {lora_file!r} is not here: say where it is with --lora FILE")
    return file, with_files_found(request, carried, beside=file.parent), carried, stored or {}


@click.command(cls=RanksCommand, epilog=EXIT_CODES)
@click.argument("video", metavar="VIDEO", type=click.Path())
@model_option
@_lora
@metadata_option("that of VIDEO")
@ranks_options
@mark_options
@load_options
@output_option
@json_option
def replay(
    video: str,
    model: str | None,
    lora: tuple[str, ...],
    metadata: Metadata | None,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make VIDEO again from the request that is stored inside it.

    Small images and videos that it was made from are inside, too; large ones have to be where they were, or beside
    VIDEO. A watermark is embedded again; --watermark none leaves it out.
    """
    file, request, carried, stored = _stored_request(video, model, lora, metadata)

    from pusa.provenance.watermark import watermark_for_replay

    load = take_load_options(options)
    marks = take_mark_options({**options, "watermark": watermark_for_replay(stored, options["watermark"])})
    weights = stored.get("weights")
    run_request(
        request,
        output,
        marks=marks,
        load=load,
        as_json=as_json,
        name=f"{file.stem} again",
        carried=carried,
        made_with=weights,
    )


@click.command(cls=RanksCommand, epilog=EXIT_CODES)
@click.argument("draft", metavar="DRAFT", type=click.Path())
@final_options
@model_option
@_lora
@metadata_option("that of DRAFT")
@ranks_options
@mark_options
@load_options
@output_option
@json_option
def final(
    draft: str,
    noise: float | None,
    size: str | None,
    steps: int | None,
    model: str | None,
    lora: tuple[str, ...],
    metadata: Metadata | None,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make the final of DRAFT, a video of `pusa generate --draft`: the same scene and motion in full quality.

    Its request is inside DRAFT. Images and videos that it was made from stay at their places.
    """
    file, request, carried, _ = _stored_request(draft, model, lora, metadata)

    from pusa import zoo
    from pusa.cli.files import find_files

    marks, load = take_mark_options(options), take_load_options(options)
    request, load = find_files(request, load)  # a folder of ComfyUI's becomes its model here
    pixels = None if size is None else parse_size(size, "--size")
    defaults = zoo.defaults_of(request.model)
    request = final_request(request, str(file), defaults, noise=noise, size=pixels, steps=steps)
    name = f"{file.stem} final"
    run_request(request, output, marks=marks, load=load, as_json=as_json, name=name, carried=carried)
