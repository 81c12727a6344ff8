"""Inspect a model folder: its layout, tensor shapes, missing and damaged files. Reads no tensor and imports no torch.

There are two layouts: diffusers' (``model_index.json`` and one folder per component) and the one in which Wan publishes
its own code's weights (``Wan2.1_VAE.pth`` and ``models_t5_umt5-xxl-enc-bf16.pth`` beside the transformer's shards;
Wan2.2 A14B keeps the shards in ``high_noise_model/`` and ``low_noise_model/``, TI2V-5B has ``Wan2.2_VAE.pth``).
"""

import json
import math
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

COMPONENTS = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer", "transformer_2")
PARTS = ("transformer", "transformer_2", "text_encoder", "vae")  # those with weights
ORIGINAL_VAE, ORIGINAL_WAN22_VAE = "Wan2.1_VAE", "Wan2.2_VAE"
ORIGINAL_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16"
ORIGINAL_TOKENIZER = "google/umt5-xxl"
ORIGINAL_EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


class MissingFilesError(FileNotFoundError):
    """A model folder lacks files, or some are cut short; the message lists all of them."""


class DamagedFileError(ValueError):
    """A file is not of the format that its name tells."""


class WrongArchitectureError(ValueError):
    """The weights are intact, but not those of a Wan text-to-video model."""


def safetensors_shapes(path: Path) -> dict[str, list[int]]:
    """Read the shapes of all tensors from the header alone; raise as `safetensors_header`."""
    return {key: entry["shape"] for key, entry in safetensors_header(path).items()}


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read the header: key -> ``dtype``, ``shape`` and ``data_offsets``; raise as `safetensors_contents`."""
    return safetensors_contents(path)[0]


def safetensors_contents(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any], int]:
    """Read the header with what belongs to it.

    Returns:
        Entries of the tensors, as `safetensors_header`; the file's metadata; and where its data begin.

    Raises:
        DamagedFileError: no safetensors header, or the file ends before its last tensor (an interrupted download).
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or header_bytes > size_bytes - 8:
            raise DamagedFileError(
                f"{path.name} is no whole safetensors file: it has {size_bytes} bytes; download or copy it again"
            )
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise DamagedFileError(f"{path.name} is no safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise DamagedFileError(f"{path.name} is no safetensors file: its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    tensors: dict[str, dict[str, Any]] = header
    for key, entry in tensors.items():
        if not _is_entry(entry):
            raise DamagedFileError(f"{path.name} is no safetensors file: its header does not describe {key!r}")
    data_start = 8 + header_bytes
    whole_bytes = data_start + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size_bytes < whole_bytes:
        raise DamagedFileError(
            f"{path.name} is cut short: {size_bytes} of {whole_bytes} bytes; download or copy it again"
        )
    return tensors, metadata, data_start


def _is_entry(entry: Any) -> bool:
    """Tell if an entry of a safetensors header has a dtype, sizes, and the two ends of its data."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, ends = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(ends, list) or len(ends) != 2:
        return False
    return all(type(number) is int and number >= 0 for number in (*shape, *ends)) and ends[0] <= ends[1]


def is_original(folder: Path) -> bool:
    """Tell if a folder has Wan's own layout, complete or not (`missing_files` lists what it lacks)."""
    if (folder / "model_index.json").exists():
        return False
    stems = (ORIGINAL_VAE, ORIGINAL_WAN22_VAE, ORIGINAL_TEXT_ENCODER)
    marks = [*ORIGINAL_EXPERTS.values(), *(f"{stem}.{kind}" for stem in stems for kind in ("pth", "safetensors"))]
    return (
        any((folder / mark).exists() for mark in marks)
        or read_json(folder / "config.json").get("_class_name") == "WanModel"
    )


def original_experts(folder: Path) -> dict[str, Path]:
    """Find the folders with the transformers' shards: pipeline component -> folder. Wan2.2 has two."""
    if any((folder / name).is_dir() for name in ORIGINAL_EXPERTS.values()):
        return {component: folder / name for component, name in ORIGINAL_EXPERTS.items()}
    return {"transformer": folder}


def original_weights(folder: Path, stem: str) -> Path:
    """Find the file of the VAE or the text encoder: a safetensors copy, if there is one, or else the pickle."""
    safe = folder / f"{stem}.safetensors"
    return safe if safe.exists() else folder / f"{stem}.pth"


def original_vae(folder: Path) -> Path:
    """Find the VAE's file: of Wan2.2 TI2V-5B, or else of Wan2.1, which all others use; the one missing if none is."""
    wan22, wan21 = (original_weights(folder, stem) for stem in (ORIGINAL_WAN22_VAE, ORIGINAL_VAE))
    is_ti2v = read_json(folder / "config.json").get("model_type") == "ti2v"
    return wan22 if is_ti2v or (wan22.exists() and not wan21.exists()) else wan21


def shards(folder: Path) -> list[Path]:
    """List the safetensors files of one model: those in its index, or all in the folder."""
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    if indices:
        return sorted({folder / name for index in indices for name in read_json(index)["weight_map"].values()})
    found = sorted(folder.glob("*.safetensors"))
    for path in list(found):
        if match := _SHARD.fullmatch(path.name):
            count = int(match["count"])
            found += [folder / f"{match['stem']}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return sorted(set(found))


def missing_files(folder: Path, *, skip: Collection[str] = ()) -> list[str]:
    """List the files that loading this folder needs and that are missing or damaged.

    Args:
        folder: a model folder in either layout.
        skip: pipeline components that are not loaded from it.

    Returns:
        Paths relative to the folder, with the reason in brackets for damaged files. Empty: the folder is complete.
    """
    return list(
        dict.fromkeys(_missing_original(folder, skip) if is_original(folder) else _missing_diffusers(folder, skip))
    )


def _missing_original(folder: Path, skip: Collection[str]) -> Iterator[str]:
    for component, expert in original_experts(folder).items():
        if component not in skip:
            yield from _damaged_shards(
                folder, transformer_shards(expert), expert / "diffusion_pytorch_model.safetensors"
            )
    text_encoder = original_weights(folder, ORIGINAL_TEXT_ENCODER)
    for component, path in (("vae", original_vae(folder)), ("text_encoder", text_encoder)):
        if component not in skip:
            yield from _damaged(folder, path)
    if "tokenizer" not in skip:
        yield from _missing_tokenizer(folder, folder / ORIGINAL_TOKENIZER)


def transformer_shards(expert: Path) -> list[Path]:
    """List the safetensors files of the transformer in a folder that may hold other models' files, too."""
    return [path for path in shards(expert) if path.name.startswith("diffusion_pytorch_model")]


def _missing_diffusers(folder: Path, skip: Collection[str]) -> Iterator[str]:
    if not (folder / "model_index.json").is_file():
        yield "model_index.json"
        return
    for component in diffusers_components(folder):
        part = folder / component
        if component in skip:
            continue
        if component == "tokenizer":
            yield from _missing_tokenizer(folder, part)
        elif component == "scheduler":
            yield from _damaged(folder, part / "scheduler_config.json")
        else:
            yield from _damaged(folder, part / "config.json")
            if not any(part.glob("*.bin")):
                stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
                yield from _damaged_shards(folder, shards(part), part / f"{stem}.safetensors")


def weight_files(folder: Path, *, skip: Collection[str] = ()) -> dict[str, list[Path]]:
    """List the files with the weights of each part of a folder in either layout, missing ones included.

    Args:
        skip: parts to leave out.
    """
    if is_original(folder):
        found = {part: transformer_shards(place) for part, place in original_experts(folder).items()}
        found["text_encoder"] = [original_weights(folder, ORIGINAL_TEXT_ENCODER)]
        found["vae"] = [original_vae(folder)]
        return {part: paths for part, paths in found.items() if part not in skip}
    parts = [part for part in diffusers_components(folder) if part not in ("tokenizer", "scheduler", *skip)]
    return {part: shards(folder / part) or sorted((folder / part).glob("*.bin")) for part in parts}


def transformer_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what tensors of an unpublished size do not tell, from a folder in either layout: "transformer" -> fields."""
    if not is_original(folder):
        config = read_json(folder / "transformer" / "config.json")
    else:
        original = read_json(original_experts(folder)["transformer"] / "config.json")
        config = {"num_attention_heads": original["num_heads"]} if "num_heads" in original else {}
    return {"transformer": config} if config else {}


def diffusers_components(folder: Path) -> list[str]:
    """List the components of a text-to-video pipeline that ``model_index.json`` has."""
    index = read_json(folder / "model_index.json")
    return [name for name in COMPONENTS if (index.get(name) or [None])[0] is not None]


def _missing_tokenizer(root: Path, folder: Path) -> Iterator[str]:
    yield from _damaged(root, folder / "tokenizer_config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        yield from _damaged(root, folder / "spiece.model")


def _damaged_shards(root: Path, paths: list[Path], expected: Path) -> Iterator[str]:
    for path in paths or [expected]:
        yield from _damaged(root, path)


def _damaged(root: Path, path: Path) -> Iterator[str]:
    name = path.relative_to(root).as_posix()
    if not path.is_file():
        yield name
    elif path.suffix == ".safetensors":
        try:
            safetensors_shapes(path)
        except DamagedFileError as error:
            yield f"{name} ({str(error).partition(' is ')[2]})"
    elif path.suffix == ".pth":
        with path.open("rb") as file:
            begins_as_zip = file.read(4) == b"PK\x03\x04"
        if begins_as_zip and not zipfile.is_zipfile(path):  # torch writes a zip; its directory comes last
            yield f"{name} (cut short: {path.stat().st_size} bytes)"


def check_text_to_video(config: Mapping[str, Any], where: str) -> None:
    """Check that the configuration of a Wan transformer is that of a text-to-video model.

    Raises:
        WrongArchitectureError: an image-to-video model of Wan's.
    """
    channels = (config.get("in_channels", 16), config.get("out_channels", 16))
    if channels[0] != channels[1] or config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise WrongArchitectureError(
            f"{where} is an image-to-video transformer ({channels[0]} input channels for {channels[1]} latent ones): "
            "Pusa needs a text-to-video base, which it conditions by its timesteps (wan2.1-14b, for one)"
        )


def parameter_counts(folder: Path, *, skip: Collection[str] = ()) -> dict[str, int]:
    """Count the parameters of each model in a complete folder, from headers and file sizes: component -> count."""
    counts = {}
    if is_original(folder):
        parts = {component: transformer_shards(expert) for component, expert in original_experts(folder).items()}
        text_encoder = original_weights(folder, ORIGINAL_TEXT_ENCODER)
        for component, path, bytes_each in (("vae", original_vae(folder), 4), ("text_encoder", text_encoder, 2)):
            if component not in skip:
                counts[component] = path.stat().st_size // bytes_each
    else:
        parts = {component: shards(folder / component) for component in diffusers_components(folder)}
    for component, paths in parts.items():
        if component not in skip and paths:
            counts[component] = sum(math.prod(shape) for path in paths for shape in safetensors_shapes(path).values())
    return counts


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def describe_single_file(path: Path) -> str:
    """Explain, for an error, that a file given as a model is none, and what it seems to be."""
    from pusa.models.single_file.families import noun_of
    from pusa.models.single_file.recognition import recognise  # it reads headers by this module

    found = "a single GGUF file" if path.suffix == ".gguf" else "a single file"
    if path.suffix in (".safetensors", ".gguf"):
        try:
            file = recognise(path)
        except DamagedFileError as error:
            return f"{path} is {found}: {error}: get it again, and give a model's folder"
        except ModuleNotFoundError as error:
            return f"{path} is {found}: {error}"
        if file.is_lora:
            return f"{path} is a LoRA: give it with --lora, or load_pusa, beside a model"
        if file.problem:
            return f"{path} is {found}: {file.problem}"
        nouns = [noun_of(part) for part in file.components]
        found = "an all-in-one checkpoint" if len(nouns) > 1 else f"a single-file checkpoint of the {nouns[0]}"
    elif any(stem in path.name for stem in (ORIGINAL_VAE, ORIGINAL_WAN22_VAE, ORIGINAL_TEXT_ENCODER)):
        part = "text encoder" if ORIGINAL_TEXT_ENCODER in path.name else "VAE"
        found = f"a single-file checkpoint of the {part}"
    return (
        f"{path} is {found}, not a folder: give the folder of a whole model (diffusers' or Wan's own layout), a Hub id "
        "or a name of `pusa models`; a file goes beside it, with --transformer, --text-encoder or --vae"
    )
