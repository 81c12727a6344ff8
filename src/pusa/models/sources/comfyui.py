"""Find the parts of a model in a ComfyUI ``models`` folder, by the content of the files. Imports no torch.

Only headers are read. Names count for high and low noise alone, which no content tells.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pusa.lora.sources import stem_of
from pusa.models.files import DamagedFileError
from pusa.models.single_file.recognition import SingleFile, recognise
from pusa.models.sources.file_set import OPTIONS, Families, describe, expand, families_of, family_of, is_same

_TRANSFORMERS = ("diffusion_models", "unet", "checkpoints")
FOLDERS = (*_TRANSFORMERS, "text_encoders", "clip", "vae", "loras")
_SUFFIXES = (".safetensors", ".sft", ".gguf")
_VAE_OF = {16: "wan2.1-vae", 48: "wan2.2-vae"}  # by latent channels


@dataclass(frozen=True)
class Found:
    """Files of a ComfyUI folder.

    Attributes:
        usable: files with parts of Wan text-to-video models; an all-in-one file has several.
        loras: LoRA files.
        refused: a line for each file of Wan's that cannot be used, with the reason, or that is damaged.
    """

    folder: Path
    usable: tuple[SingleFile, ...]
    loras: tuple[Path, ...]
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """A model of the zoo, and the files of its parts (part of a pipeline -> file)."""

    family: str
    files: Mapping[str, Path]


def models_folder(folder: Path) -> Path | None:
    """Return ComfyUI's folder of models, if a folder is one or has it under ``models``; else None."""
    for place in (folder, folder / "models"):
        has_transformers = any((place / name).is_dir() for name in _TRANSFORMERS)
        if has_transformers and not (place / "model_index.json").exists():
            return place
    return None


def scan(folder: Path) -> Found:
    """Read the headers of all files below a ComfyUI folder of models; files of other models are left out.

    Symbolic links are followed, and a file that has several names counts once.
    """
    usable, loras, refused = [], [], []
    for path in _files(folder):
        try:
            file = recognise(path)
        except (DamagedFileError, ModuleNotFoundError, OSError) as error:
            refused.append(f"{path.relative_to(folder)}: {error}")
            continue
        if file.is_lora:
            loras.append(path)
        parts = [part for part in file.parts if part.component]
        if any(not part.problem for part in parts):
            usable.append(file)
        else:
            refused += [f"{path.relative_to(folder)}: {part.problem}" for part in parts[:1]]
    return Found(folder, tuple(usable), tuple(loras), tuple(refused))


def _files(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for name in FOLDERS:
        for place, folders, names in os.walk(folder / name, followlinks=True):
            real = os.path.realpath(place)
            folders[:] = sorted(folders) if real not in seen else []
            if real in seen:
                continue
            seen.add(real)
            for path in sorted(Path(place) / entry for entry in names if entry.lower().endswith(_SUFFIXES)):
                target = os.path.realpath(path)
                if target not in seen and path.is_file():
                    seen.add(target)
                    yield path


def choose(found: Found, families: Families, given: Mapping[str, Path] | None = None) -> Choice:
    """Choose the files of a model.

    Args:
        found: of `scan`.
        families: the models that the files may be.
        given: files that were chosen before, by part; they are checked as `expand` does.

    Raises:
        ValueError: nothing fits, or several files do; the message lists them with the options that choose.
    """
    files = expand(given or {})
    if not {"transformer", "transformer_2"} & files.keys():
        files = {**_transformers(found, families), **files}
    family = family_of(files, families)
    if family is None:
        raise ValueError(f"{files['transformer'].name} is no transformer of {', '.join(families)}")
    chosen = expand(files)  # with what an all-in-one file has
    channels = families[family][0]["in_channels"]
    for part, kind in (("vae", _VAE_OF[channels]), ("text_encoder", "umt5")):
        if part not in chosen and (path := _only(found, families, part, kind)):
            chosen[part] = path
    return Choice(family, chosen)


def _transformers(found: Found, families: Families) -> dict[str, Path]:
    """Choose the transformer, or a pair of them."""
    fitting = [file for file in found.usable if families_of(file, families)]
    pairs = {name for name, (_, experts) in families.items() if experts == 2}
    of_pairs = [file for file in fitting if file.expert and pairs & set(families_of(file, families))]
    sets: list[dict[str, SingleFile]] = [{"transformer": file} for file in fitting if file not in of_pairs]
    highs, lows = ([file for file in of_pairs if file.expert == part] for part in ("transformer", "transformer_2"))
    for high in highs:
        same = [low for low in lows if stem_of(str(low.path)) == stem_of(str(high.path))]
        sets += [{"transformer": high, "transformer_2": low} for low in same or lows]
    if len(sets) == 1:
        return {part: file.path for part, file in sets[0].items()}
    if not sets:
        alone = [f"{file.path.name} has no partner for the other noise" for file in of_pairs]
        reasons = [*alone, *found.refused]
        raise ValueError(
            f"{found.folder} holds no transformer of {', '.join(families)}" + "".join(f"; {text}" for text in reasons)
        )
    lines = [
        " ".join(f"{OPTIONS[part]} {file.path}" for part, file in files.items())
        + f" ({describe(files['transformer'], families)})"
        for files in sets
    ]
    raise ValueError(_several(found, "transformers", lines))


def _only(found: Found, families: Families, part: str, kind: str) -> Path | None:
    """Return the only file with a VAE or a text encoder; files that hold nothing else go before all-in-one files."""
    fitting = [
        file
        for file in found.usable
        if any(entry.component == part and entry.family == kind and not entry.problem for entry in file.parts)
    ]
    alone = [file for file in fitting if len(file.components) == 1] or fitting
    distinct = [file for n, file in enumerate(alone) if not any(is_same(file.path, other.path) for other in alone[:n])]
    if len(distinct) > 1:
        lines = [f"{OPTIONS[part]} {file.path} ({describe(file, families)})" for file in distinct]
        raise ValueError(_several(found, {"vae": "VAEs"}.get(part, "text encoders"), lines))
    return distinct[0].path if distinct else None


def _several(found: Found, what: str, lines: Sequence[str]) -> str:
    return f"{found.folder} holds several {what}: choose one with {', or '.join(lines)}"
