"""Sort single files by the parts of a pipeline that they hold, and tell which model they are. Imports no torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pusa.fsutil import samples_of
from pusa.lora.sources import EXPERTS, NOISE_OF
from pusa.models.files import PARTS, WrongArchitectureError
from pusa.models.mochi import layout as mochi_layout
from pusa.models.single_file.families import NO_PART, noun_of
from pusa.models.single_file.recognition import Part, SingleFile, recognise
from pusa.models.sources import configs
from pusa.resources import readable

OPTIONS = {part: "--" + part.replace("_", "-") for part in PARTS}

Families = Mapping[str, tuple[Mapping[str, Any], int]]
"""Name of a model -> its transformer's configuration, and how many transformers it has."""


def component_of(part: str) -> str:
    """Return the component that a part of a pipeline is: the second expert is a transformer, too."""
    return part.removesuffix("_2")


def part_in(file: SingleFile, part: str) -> Part:
    """Find a part in a file.

    Raises:
        WrongArchitectureError: the file holds something else, or a kind that cannot be used; the message says what.
    """
    option = OPTIONS[part]
    if file.is_lora:
        raise WrongArchitectureError(f"{option} {file.path.name} is a LoRA: give it with --lora, beside a model")
    found = file.part(component_of(part))
    if found is None:
        others = [entry.title for entry in file.parts if entry.component] or [NO_PART]
        noun = noun_of(component_of(part))
        raise WrongArchitectureError(f"{option} {file.path.name} holds {' and '.join(others)}, and no {noun}")
    if found.problem:
        raise WrongArchitectureError(f"{option}: {found.problem}")
    return found


def expand(files: Mapping[str, Path]) -> dict[str, Path]:
    """Check that each file holds its part, and add what else an all-in-one file of a transformer has.

    Args:
        files: part of a pipeline ("transformer", "transformer_2", "text_encoder", "vae") -> file.

    Returns:
        Part -> file. What is given alone goes before what an all-in-one file has.

    Raises:
        FileNotFoundError: a file is not there.
        DamagedFileError, WrongArchitectureError: a file is cut short, or does not hold its part.
        ValueError: both experts are the same file, or their names say that they are swapped.
    """
    unknown = sorted(set(files) - set(PARTS))
    if unknown:
        raise ValueError(f"files for {', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    found = {part: recognise(path) for part, path in files.items()}
    for part, file in found.items():
        part_in(file, part)
    _check_experts(found)
    expanded = dict(files)
    for file in (found[part] for part in EXPERTS if part in found):
        for entry in file.parts:
            if entry.component in ("text_encoder", "vae") and not entry.problem:
                expanded.setdefault(entry.component, file.path)
    return expanded


def _check_experts(found: Mapping[str, SingleFile]) -> None:
    if not {"transformer", "transformer_2"} <= found.keys():
        return
    high, low = found["transformer"], found["transformer_2"]
    if is_same(high.path, low.path):
        raise ValueError(
            f"--transformer {high.path.name} and --transformer-2 {low.path.name} are the same file: the first is for "
            "high noise, the second for low noise"
        )
    if high.expert == "transformer_2" and low.expert == "transformer":
        raise ValueError(
            f"--transformer {high.path.name} is named as the low-noise expert and --transformer-2 {low.path.name} as "
            "the high-noise one: swap them"
        )


def is_same(first: Path, second: Path) -> bool:
    """Tell if two files hold the same bytes, by their sizes and samples of their content."""
    if first.samefile(second):
        return True
    if first.stat().st_size != second.stat().st_size:
        return False
    pairs = zip(samples_of(first, _SAMPLES), samples_of(second, _SAMPLES), strict=True)
    return all(one == other for one, other in pairs)


_SAMPLES = 64


# ---- families --------------------------------------------------------------------------------------------------------


def transformer_config(file: SingleFile) -> dict[str, Any] | None:
    """Derive a configuration, as `configs.folder_config`, from the transformer in a file; None without one."""
    part = file.part("transformer")
    if part is not None and part.family == "mochi" and not part.problem:
        shapes = {name: file.header.tensors[key].shape for name, key in part.keys.items()}
        return {"_class_name": mochi_layout.STOCK_CLASS, **mochi_layout.config_from_keys(shapes, part.names)}
    if part is None or part.heads is None:
        return None
    rows = _rows(file, part, "blocks.0.ffn.0.bias", "blocks.0.ffn.net.0.proj.bias")
    return {
        "in_channels": part.in_channels,
        "out_channels": part.out_channels,
        "num_attention_heads": part.heads,
        "attention_head_dim": configs.HEAD_DIM,
        "text_dim": part.text_width,
        "freq_dim": 256,  # of all models of Wan's; no other tensor shows it where its own is packed
        "ffn_dim": rows,
        "num_layers": part.layers,
    }


def _rows(file: SingleFile, part: Part, *names: str) -> int | None:
    keys = [part.keys[name] for name in names if name in part.keys]
    return file.header.tensors[keys[0]].shape[0] if keys else None


def families_of(file: SingleFile, families: Families) -> list[str]:
    """List the models whose transformer, or one of whose experts, a file may be."""
    config = transformer_config(file)
    return [] if config is None else [name for name, (values, _) in families.items() if configs.fits(config, values)]


def family_of(files: Mapping[str, Path], families: Families) -> str | None:
    """Tell which model the transformers among some files are.

    Returns:
        Its name; None without a transformer, or with one of unknown widths.

    Raises:
        ValueError: two transformers that are no pair, or one whose name says that it is half of a pair.
    """
    found = {part: recognise(files[part]) for part in EXPERTS if part in files}
    if not found:
        return None
    names = [set(families_of(file, families)) for file in found.values()]
    fitting = [name for name in families if all(name in some for some in names)]
    if not fitting:
        if len(found) == 2 and all(names):
            raise ValueError(f"{' and '.join(file.path.name for file in found.values())} are of different models")
        return None
    pairs, single = ([name for name in fitting if families[name][1] == count] for count in (2, 1))
    if len(found) == 2:
        if not pairs:
            raise ValueError(f"{fitting[0]} has one transformer: leave --transformer-2 out")
        return pairs[0]
    (part, file), *_ = found.items()
    if pairs and (part == "transformer_2" or file.expert):
        noise = NOISE_OF[file.expert or part]
        other = "--transformer-2" if noise == "high" else "--transformer"
        raise ValueError(
            f"{file.path.name} is {'named as ' if file.expert else ''}the {noise}-noise expert of a {pairs[0]} pair: "
            f"give the other one with {other}, or say --model {pairs[0]} to download it"
            + (f", or --model {single[0]} if it is none" if single else "")
        )
    return next(iter(single), None)


# ---- texts -----------------------------------------------------------------------------------------------------------


def describe(file: SingleFile, families: Families) -> str:
    """Describe a file in one line: its parts, layout, size, and the models that it fits."""
    parts = list(_parts_as_text(file))
    fitting = families_of(file, families)
    fits = f"; fits {' or '.join(fitting)}" if fitting else ""
    return f"{' and '.join(parts) or NO_PART}, {readable(file.size_bytes)}{fits}"


def _parts_as_text(file: SingleFile) -> Iterator[str]:
    for part in file.parts:
        if part.component:
            noise = f", {file.noise} noise" if file.noise and part.component == "transformer" else ""
            yield f"{part.title} ({part.layout or 'a layout that is not read'}{noise})"
