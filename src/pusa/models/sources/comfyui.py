"""Find the parts of a model in a ComfyUI ``models`` folder, by the content of the files. Imports no torch.

Only headers are read. Names count for high and low noise alone, which no content tells.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.lora.sources import EXPERTS, NOISE_OF, stem_of
from pusa.models.bases import base_of_values
from pusa.models.files import DamagedFileError
from pusa.models.single_file.families import noun_of
from pusa.models.single_file.recognition import SingleFile, recognise
from pusa.models.sources.file_set import OPTIONS, Families, describe, expand, families_of, family_of, is_same

_TRANSFORMERS = ("diffusion_models", "unet", "checkpoints")
FOLDERS = (*_TRANSFORMERS, "text_encoders", "clip", "vae", "loras")
_SUFFIXES = (".safetensors", ".sft", ".gguf")
_VAE_OF = {16: "wan2.1-vae", 48: "wan2.2-vae"}  # by latent channels; that of other models comes from their folder


@dataclass(frozen=True)
class Found:
    """Hold the files of a ComfyUI folder.

    Attributes:
        usable: files with parts of a model of the zoo; an all-in-one file has several.
        loras: LoRA files, recognised.
        refused: a line for each file of Wan's that cannot be used, with the reason, or that is damaged.
    """

    folder: Path
    usable: tuple[SingleFile, ...]
    loras: tuple[SingleFile, ...]
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """Name a model of the zoo, the files of its parts (part of a pipeline -> file), and the Pusa LoRAs that fit it.

    Attributes:
        loras: each as `pusa.lora.sources.parse_lora` reads it; a pair for two experts is one.
    """

    family: str
    files: Mapping[str, Path]
    loras: tuple[str, ...] = ()

    @property
    def own_lora(self) -> tuple[str, ...]:
        """Return the LoRA that the folder has for this model, if it is the only one."""
        return self.loras if len(self.loras) == 1 else ()

    @property
    def lora_note(self) -> str:
        """Say which LoRA is used of the folder's, or that there are several; "" if there are none."""
        if len(self.loras) == 1:
            return f"with the Pusa LoRA of the folder: --lora {self.loras[0]}"
        ways = " or ".join(f"--lora {source}" for source in self.loras)
        return f"the folder has several Pusa LoRAs, and none of them is used: choose with {ways}" if ways else ""


def models_folder(folder: Path) -> Path | None:
    """Return ComfyUI's folder of models, if a folder is one or has it under ``models``; else None."""
    for place in (folder, folder / "models"):
        names = {name for name in FOLDERS if (place / name).is_dir()}
        has_transformers = names.intersection(_TRANSFORMERS) and names != {"checkpoints"}  # a training run has such
        if has_transformers and not (place / "model_index.json").exists():
            return place
    return None


def scan(folder: Path) -> Found:
    """Read the headers of all files below a ComfyUI folder of models; files of other models are left out.

    Symbolic links are followed, and a file that has several names counts once.
    """
    usable, loras, refused = [], [], []
    for path in files_in(folder):
        try:
            file = recognise(path)
        except (DamagedFileError, ModuleNotFoundError, OSError) as error:
            refused.append(f"{path.relative_to(folder)}: {error}")
            continue
        if file.is_lora:
            loras.append(file)
        parts = [part for part in file.parts if part.component]
        if any(not part.problem for part in parts):
            usable.append(file)
        else:
            refused += [f"{path.relative_to(folder)}: {part.problem}" for part in parts[:1]]
    return Found(folder, tuple(usable), tuple(loras), tuple(refused))


def files_in(folder: Path) -> Iterator[Path]:
    """List the files that `scan` reads, in order."""
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
    transformer = families[family][0]
    kinds = {"vae": _VAE_OF.get(transformer["in_channels"]), "text_encoder": base_of_values(transformer).text_encoder}
    for part, kind in kinds.items():
        if part not in chosen and (path := _only(found, families, part, kind)):
            chosen[part] = path
    return Choice(family, chosen, tuple(_pusa_loras(found, *families[family])))


def _transformers(found: Found, families: Families) -> dict[str, Path]:
    """Choose the transformer, or a pair of them."""
    fitting = [file for file in found.usable if families_of(file, families)]
    pairs = {name for name, (_, experts) in families.items() if experts == 2}
    of_pairs = [file for file in fitting if file.expert and pairs & set(families_of(file, families))]
    sets: list[dict[str, SingleFile]] = [{"transformer": file} for file in fitting if file not in of_pairs]
    highs, lows = ([file for file in of_pairs if file.expert == part] for part in EXPERTS)
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


def _only(found: Found, families: Families, part: str, kind: str | None) -> Path | None:
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
        raise ValueError(_several(found, f"{noun_of(part)}s", lines))
    return distinct[0].path if distinct else None


# ---- LoRAs -----------------------------------------------------------------------------------------------------------

_PUSA_RANK = 512  # of the published ones; those for speed or style have 256 at most
_LORA_INPUT = re.compile(r"blocks[._](\d+)[._](?:self_attn|attn1).*(?:lora_A|lora_down|lora\.down)\b.*weight$")


def _pusa_loras(found: Found, transformer: Mapping[str, Any], experts: int) -> Iterator[str]:
    """List the Pusa LoRAs that fit a model, by their shapes, and by their name or their rank.

    Those for Wan2.2's experts have the shapes of Wan2.1's: a pair, as its names tell, is for two experts only.
    """
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    fitting = [file for file in found.loras if _is_pusa_lora(file, width, transformer["num_layers"])]
    pairs: dict[str, dict[str, SingleFile]] = {}
    for file in fitting:
        if experts == 1 and file.expert is None:
            yield str(file.path)
        elif experts == 2 and file.expert is not None:
            pairs.setdefault(stem_of(str(file.path)), {})[file.expert] = file
    for pair in pairs.values():
        if len(pair) == 2:
            yield ",".join(f"{NOISE_OF[expert]}={pair[expert].path}" for expert in sorted(pair))


def _is_pusa_lora(file: SingleFile, width: int, layers: int) -> bool:
    shapes = {key: tensor.shape for key, tensor in file.header.tensors.items()}
    inputs = [(int(match[1]), shape) for key, shape in shapes.items() if (match := _LORA_INPUT.search(key))]
    if {number for number, _ in inputs} != set(range(layers)) or {shape[-1] for _, shape in inputs} != {width}:
        return False
    return "pusa" in file.path.name.lower() or {shape[0] for _, shape in inputs} == {_PUSA_RANK}


def _several(found: Found, what: str, lines: Sequence[str]) -> str:
    return f"{found.folder} holds several {what}: choose one with {', or '.join(lines)}"
