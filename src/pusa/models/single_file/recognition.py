"""Recognise what a single file holds by its content: components, family, layout, sizes. Imports no torch.

Names of files are no proof (people rename freely), and shapes are not enough: VACE and S2V pass every check of shapes
of the text-to-video model. Only high and low noise are told by the name, as nothing in the content does.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pusa.fsutil import FileStat, stat_of
from pusa.lora.sources import NOISE_OF, expert_of
from pusa.models.files import DamagedFileError, WrongArchitectureError
from pusa.models.single_file.families import Shapes, family_of
from pusa.models.single_file.headers import FileHeader, Format, read_header
from pusa.models.single_file.quantisation import (
    COMPILED,
    MARKER,
    KeptStorage,
    StoredPart,
    kept_size,
    metadata_layers,
    stored_part,
)

Component = Literal["transformer", "text_encoder", "vae"]

SPIECE_MODEL = "spiece_model"  # the sentencepiece model of a tokenizer, as bytes

# The longest first. The last two may hold any component.
_PREFIXES = (
    re.compile(r"model\.diffusion_model\."),
    re.compile(r"diffusion_model\."),
    re.compile(r"text_encoders\.[^.]+\.transformer\."),
    re.compile(r"text_encoders\."),
    re.compile(r"(?:first_stage_model|vae)\."),
    re.compile(r"model\."),
    re.compile(r""),
)
_LORA = re.compile(r"lora[._](?:[AB]|up|down)\b|\.diff(?:_b|_m)?$")


@dataclass(frozen=True)
class Part:
    """Describe one component in a single file.

    Attributes:
        component: of a pipeline: "transformer", "text_encoder", "vae"; None: no part of a base.
        family: "t2v", "ti2v", "i2v", "vace", ..., "mochi"; "umt5", "t5"; "wan2.1-vae", "wan2.2-vae"; "unknown".
        title: the family in words.
        layout: see `StoredPart`; "" if it cannot be read.
        names: "wan", "genmo", "diffusers", "hf" (transformers') or "llama.cpp".
        prefix: before the names in the file.
        in_channels, out_channels: of the transformer's latents; of the VAE's, both.
        width: channels of the transformer or the text encoder.
        layers, heads: blocks, and attention heads of 128 channels; None where tensors do not tell.
        text_width: channels of the text that a transformer takes.
        parameters, size_bytes: in the file.
        problem: why it is not loaded, as far as headers tell; "" if nothing speaks against it.
        keys: name without prefix -> name in the file.
        kept_storage: "fp8", "int8" or "gguf": what most of its matrices can be kept as; "" for full weights.
        kept_bytes: of memory, with those matrices kept and the rest in 16 bits.
    """

    component: Component | None
    family: str
    title: str
    layout: str
    names: str
    prefix: str
    in_channels: int | None
    out_channels: int | None
    width: int | None
    layers: int | None
    heads: int | None
    text_width: int | None
    parameters: int
    size_bytes: int
    problem: str
    keys: Mapping[str, str]
    kept_storage: KeptStorage = ""
    kept_bytes: int = 0


@dataclass(frozen=True)
class SingleFile:
    """Describe a file of weights, as `recognise` finds it.

    Attributes:
        path, format, size_bytes: the file, "safetensors" or "gguf", and its size.
        parts: its components, the transformer first.
        noise: "high" or "low", as its name tells; None: it does not.
        is_lora: it is a LoRA, and no model.
        architecture: GGUF's, if any.
        spiece_model: name of the tensor that holds the tokenizer; None: there is none.
        header: for loading.
    """

    path: Path
    format: Format
    size_bytes: int
    parts: tuple[Part, ...]
    noise: str | None
    is_lora: bool
    architecture: str | None
    spiece_model: str | None
    header: FileHeader

    @property
    def expert(self) -> str | None:
        """Tell by the name which transformer of a Wan2.2 pair it is: "transformer" is the high-noise one."""
        return expert_of(str(self.path))

    @property
    def components(self) -> tuple[str, ...]:
        """List what of a pipeline is in it."""
        return tuple(part.component for part in self.parts if part.component)

    @property
    def problem(self) -> str:
        """Say why it cannot be loaded, as far as headers tell; "" if nothing speaks against it."""
        if self.is_lora:
            return "it is a LoRA: give it with --lora, or load_pusa, beside a model"
        if not self.parts:
            return f"{self.path.name} holds no tensors"
        problem = next((part.problem for part in self.parts if part.problem), "")
        if not problem and len(set(self.components)) < len(self.parts):
            return f"{self.path.name} holds several models of one kind: {self.title}"
        return problem

    @property
    def title(self) -> str:
        """Say in words what it is."""
        if self.is_lora:
            return "a LoRA"
        titles = [f"{part.title}, {part.layout}" if part.layout else part.title for part in self.parts]
        return " + ".join(titles) or "a file without tensors"

    def part(self, component: str) -> Part | None:
        """Find a component in it."""
        return next((part for part in self.parts if part.component == component), None)


def recognise(path: str | Path) -> SingleFile:
    """Recognise a safetensors or GGUF file by its header, which is not read again unless the file has changed.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: neither format, or cut short.
        ModuleNotFoundError: a GGUF file, and no package `gguf`.
    """
    path = Path(path).expanduser()
    return _recognise(path, stat_of(path) if path.is_file() else ())


@lru_cache(maxsize=128)  # half a megabyte each; a GGUF file with a tokenizer takes many seconds to read
def _recognise(path: Path, stats: tuple[FileStat, ...]) -> SingleFile:
    """Recognise a file as it is while it has these `stats`."""
    header = read_header(path)
    groups, spiece_model = _groups(header)
    is_lora = any(_LORA.search(key) for key in header.tensors)
    parts = [] if is_lora else [_part(header, prefix, keys) for prefix, keys in groups.items()]
    order = ("transformer", "text_encoder", "vae", None)
    parts.sort(key=lambda part: order.index(part.component))
    noise = NOISE_OF.get(expert_of(str(path)) or "")
    return SingleFile(
        path,
        header.format,
        header.size_bytes,
        tuple(parts),
        noise if not is_lora and parts and parts[0].component == "transformer" else None,
        is_lora,
        header.architecture,
        spiece_model,
        header,
    )


def _groups(header: FileHeader) -> tuple[dict[str, dict[str, str]], str | None]:
    """Sort tensors by their prefix: prefix -> name without it -> name in the file; and find the tokenizer."""
    groups: dict[str, dict[str, str]] = {}
    spiece_model = None
    for key in header.tensors:
        clean = key.replace(COMPILED, "")
        if clean.rpartition(".")[2] == SPIECE_MODEL:
            spiece_model = key
            continue
        prefix = next(match[0] for pattern in _PREFIXES if (match := pattern.match(clean)))
        name = clean.removeprefix(prefix)
        group = groups.setdefault(prefix, {})
        if name in group:
            raise DamagedFileError(f"{header.path.name} has {clean} twice")
        group[name] = key
    stray = groups.pop("", {}) if set(groups.get("", {})) == {MARKER} and len(groups) > 1 else {}
    for group in groups.values():  # a marker before all components is of all
        group.update({name: key for name, key in stray.items() if name not in group})
    return groups, spiece_model


def _part(header: FileHeader, prefix: str, keys: Mapping[str, str]) -> Part:
    shapes = Shapes({name: header.tensors[key].shape for name, key in keys.items()})
    family = family_of(shapes)
    where = f"the {family.noun} in {header.path.name}"
    problem, layout = f"{header.path.name} holds {family.problem}" if family.problem else "", ""
    stored: StoredPart | None = None
    try:
        _check_metadata(header, where)
        stored = stored_part(header, keys, (prefix,), where)
        layout = stored.layout
    except WrongArchitectureError as error:
        problem = problem or str(error)
    tensors = [header.tensors[key] for key in keys.values()]
    weights = [tensor.header for tensor in stored.tensors.values()] if stored else tensors
    return Part(
        family.component,
        family.name,
        family.title,
        layout,
        family.names,
        prefix,
        family.in_channels,
        family.out_channels,
        family.width,
        family.layers,
        family.width // 128 if family.component == "transformer" and family.width and family.width % 128 == 0 else None,
        family.text_width,
        sum(tensor.values for tensor in weights),
        sum(tensor.size_bytes for tensor in tensors),
        problem,
        keys,
        *(kept_size(stored.tensors) if stored else ("", 0)),
    )


def _check_metadata(header: FileHeader, where: str) -> None:
    """Refuse a file whose header names quantised layers that none of its tensors has."""
    names = {key.replace(COMPILED, "") for key in header.tensors}
    names |= {name for key in names for name in _without_prefix(key)}
    layers = metadata_layers(header, where)
    unknown = [layer for layer in layers if not {f"{name}.weight" for name in _without_prefix(layer)} & names]
    if unknown:
        raise WrongArchitectureError(
            f"{where} cannot be read exactly: its header names {len(unknown)} quantised layers that are not there "
            f"(first: {unknown[0]})"
        )


def _without_prefix(name: str) -> Iterator[str]:
    yield name
    for pattern in _PREFIXES:
        if (match := pattern.match(name)) and match[0]:
            yield name.removeprefix(match[0])
