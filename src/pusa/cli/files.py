"""Turn single files, folders and ComfyUI's folder of models into a model and its files, for a command."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pusa.acceleration.decisions import LoadOptions
from pusa.request import GenerationRequest

_PARTS = {
    "transformer": "A single file with the transformer (safetensors or GGUF), instead of the model's; of Wan2.2's two, "
    "the high-noise one. Without --model it tells the model.",
    "transformer_2": "The same for Wan2.2's low-noise transformer.",
    "text_encoder": "The same for the text encoder (UMT5).",
    "vae": "The same for the VAE.",
}

FILE_OPTIONS = [
    click.option("--" + part.replace("_", "-"), metavar="FILE", type=click.Path(), help=text)
    for part, text in _PARTS.items()
]


def take_files(options: dict[str, Any]) -> dict[str, Path]:
    """Remove the values of `FILE_OPTIONS` from `options`; return part -> file. Raises FileNotFoundError."""
    given = {part: options.pop(part, None) for part in _PARTS}
    files = {part: Path(file).expanduser() for part, file in given.items() if file}
    for part, path in files.items():
        if not path.is_file():
            raise FileNotFoundError(
                f"--{part.replace('_', '-')} {str(path)!r} is no file: check the name and the folder"
            )
    return files


def find_files(request: GenerationRequest, load: LoadOptions) -> tuple[GenerationRequest, LoadOptions]:
    """Find out which model single files are, where a request names none, and the files in ComfyUI's folder.

    Returns:
        The request and the options with the model's name and all its files.

    Raises:
        ValueError: the files do not tell one model, or the folder has several; the message says how to choose.
    """
    is_default = "model" not in request.model_fields_set
    folder = None if is_default else Path(request.model).expanduser()
    if not load.files and (folder is None or not folder.is_dir()):
        return request, load

    from pusa import zoo
    from pusa.models.sources import comfyui, file_set

    place, loras = comfyui.models_folder(folder) if folder is not None else None, list(request.lora)
    if place is not None:
        choice = comfyui.choose(comfyui.scan(place), zoo.families(), load.files)
        family, files = choice.family, dict(choice.files)
        if not loras and choice.loras:
            loras = list(choice.own_lora)
            click.echo(choice.lora_note, err=True)
    elif is_default and load.files:
        files = file_set.expand(load.files)
        found = file_set.family_of(files, zoo.families())
        if found is None:
            what = "of no published size" if "transformer" in files else "no transformer, which would tell the model"
            names = " and ".join(path.name for path in load.files.values())
            raise ValueError(f"{names}: {what}: give --model ({', '.join(zoo.families())}, or a folder)")
        family = found
    else:
        return request, load
    named = ", ".join(f"{part} {path.name}" for part, path in files.items())
    click.echo(f"{family}, with {named}", err=True)
    changes: dict[str, Any] = files
    return request.model_copy(update={"model": family, "lora": loras}), replace(load, **changes)


def add_model(
    name: str,
    *,
    model: str | None = None,
    folder: str | None = None,
    comfyui: str | None = None,
    lora: tuple[str, ...] = (),
    **options: Any,
) -> str:
    """Check the files of a model and keep it under a name; return a line about it.

    Raises:
        ValueError: the name is taken or no plain word; the files are of no known model, or of several.
        FileNotFoundError: a file or a folder is missing.
    """
    from pusa import added_models, zoo
    from pusa.models.sources import comfyui as comfyui_folder
    from pusa.models.sources import file_parts, file_set

    files, families = take_files(options), zoo.families()
    note = ""
    if name in zoo.ZOO:
        raise ValueError(f"{name} is a model of the zoo: give another name")
    if model is not None and model not in families:
        raise ValueError(f"--model {model!r} is none of {', '.join(families)}")
    if not (files or folder or comfyui or lora):
        raise ValueError("nothing to add: give --transformer or other files, --folder, --comfyui or --lora")
    if comfyui is not None and folder is not None:
        raise ValueError("--comfyui and --folder: give one of them")
    place = _folder(folder, "--folder") if folder else None
    if comfyui is not None:
        found = comfyui_folder.models_folder(_folder(comfyui, "--comfyui"))
        if found is None:
            raise ValueError(f"--comfyui {comfyui} has no folder diffusion_models, unet or checkpoints")
        choice = comfyui_folder.choose(comfyui_folder.scan(found), families, files)
        family, files = choice.family, dict(choice.files)
        if not lora:
            lora, note = choice.own_lora, choice.lora_note
    else:
        files = file_set.expand(files)
        recognised = zoo.recognise(place) if place else None
        family = model or file_set.family_of(files, families) or (recognised.family if recognised else None) or ""
    if not family:
        ways = f"--model ({', '.join(families)})"
        if "transformer" in files:
            raise ValueError(f"--transformer {files['transformer'].name} is of no published size: give {ways}")
        raise ValueError(f"nothing tells which model {name} is: give --transformer, --folder, --comfyui, or {ways}")
    if model is not None and family != model:
        raise ValueError(f"--model {model} is given, and the files are {family}")
    file_parts.check_model(files, *families[family], family)
    sources = tuple(_absolute(source) for source in lora)
    added_models.write(added_models.AddedModel(name, family, files, sources, place))
    parts = ", ".join(f"{part} {path.name}" for part, path in files.items())
    return (
        f"{name} is {family}"
        + (f" with {parts}" if parts else "")
        + (f" of {place.name}" if place else "")
        + (f"; {note}" if note else "")
    )


def _folder(text: str, option: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{option} {text!r} is no folder: check the name")
    return path


def _absolute(source: str) -> str:
    """Check a LoRA and return it with absolute paths."""
    from pusa.lora.placement import find_files as find_loras
    from pusa.lora.sources import parse_lora

    reference = parse_lora(source)
    for file in reference.files.values():
        find_loras(file)

    def absolute(file: str) -> str:
        path = Path(file).expanduser()
        return str(path.absolute()) if path.exists() else file  # or a Hub id

    return str(reference.with_files(absolute))
