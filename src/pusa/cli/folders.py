"""Describe model folders for `pusa info` and `pusa models show`: layout, family, parts, missing files, what fits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pusa.resources import readable


def describe_folder(folder: Path) -> dict[str, Any]:
    """Return the facts about a model's folder, or ComfyUI's folder of models, by their names; reads headers only.

    Raises:
        ValueError: the folder holds no model in a layout that is known.
    """
    from pusa import zoo
    from pusa.models import files
    from pusa.models.sources import comfyui

    if place := comfyui.models_folder(folder):
        return _describe_comfyui(place)
    is_diffusers = (folder / "model_index.json").is_file()
    if not is_diffusers and not files.is_original(folder):
        raise ValueError(
            f"{folder} holds no model: no model_index.json (diffusers' layout), no files of Wan's own layout, and no "
            "diffusion_models (ComfyUI's)"
        )
    model = zoo.read_folder(folder, folder.name) or zoo.recognise(folder)
    return {
        "kind": "a model's folder",
        "layout": "diffusers'" if is_diffusers else "Wan's own",
        "family": _family(folder, model),
        "parts": dict(_parts(folder)),
        "missing files": files.missing_files(folder),
        "Pusa LoRA": _lora(folder, model),
        "here": zoo.describe_fit(model) if model else None,
    }


def _family(folder: Path, model: Any) -> str:
    from pusa.acceleration.shapes import parts_of
    from pusa.models.bases import base_of_config
    from pusa.models.sources import configs

    if model is not None:
        return model.family or f"{model.name}: {model.title}"
    found = configs.folder_config(folder)
    if found is None:
        return "unknown: its transformer is missing, damaged or of no known base"
    config, experts = found
    shape, base = parts_of(config, {}, {}).transformer, base_of_config(config, folder.name)
    count = "two transformers" if experts == 2 else "a transformer"
    sizes = f"{shape.layers} blocks, width {shape.width}, {shape.channels} channels"
    return f"none of the zoo: {count} of {sizes} ({base.name})"


def _lora(folder: Path, model: Any) -> str | None:
    from pusa.models.bases import base_in

    if model is None:
        return "none is known: --lora FILE adds one" if base_in(folder).conditions_note else "none is needed"
    if model.lora is None:
        return "none is published"
    return "part of it" if model.is_ours else model.lora.source


def _parts(folder: Path) -> Iterator[tuple[str, str]]:
    """Describe each part by its tensors, or by its size where a pickle hides them."""
    from pusa.models import files

    for part, paths in files.weight_files(folder).items():
        here = [path for path in paths if path.is_file()]
        if not here:
            yield part, "missing"
            continue
        size = readable(sum(path.stat().st_size for path in here))
        try:
            headers = [files.safetensors_header(path) for path in here if path.suffix == ".safetensors"]
        except files.DamagedFileError as error:
            yield part, f"{size}; {error}"
            continue
        dtypes = sorted({entry["dtype"] for header in headers for entry in header.values()})
        yield part, ", ".join([*dtypes, size]) if dtypes else f"a pickle, {size}"


def _describe_comfyui(folder: Path) -> dict[str, Any]:
    from pusa import zoo
    from pusa.models.sources import comfyui, file_set

    found, families = comfyui.scan(folder), zoo.families()
    facts: dict[str, Any] = {
        "kind": "ComfyUI's folder of models",
        "files": {str(file.path.relative_to(folder)): file_set.describe(file, families) for file in found.usable},
        "LoRAs": [str(file.path.relative_to(folder)) for file in found.loras],
        "cannot be used": list(found.refused),
    }
    try:
        choice = comfyui.choose(found, families)
    except ValueError as error:
        return {**facts, "to choose": str(error)}
    chosen = {part: str(path.relative_to(folder)) for part, path in choice.files.items()}
    return {**facts, "family": choice.family, "chosen": chosen, "here": zoo.describe_fit(zoo.ZOO[choice.family])}
