"""Find the files of LoRAs on this machine or the Hub, and the experts of a model that they go to."""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pusa.lora.layouts import WEIGHT_SUFFIXES, experts_of_keys
from pusa.lora.sources import EXPERTS, NOISE_OF, expert_of, parse_lora, stem_of

Source = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]


@dataclass(frozen=True)
class PlacedFile:
    """LoRA file of one expert.

    Attributes:
        strength: alpha written with the source (``FILE@1.2``); None: the caller's.
        reason: why the file goes to this expert, as the end of a sentence; empty where nothing had to be chosen.
    """

    path: Path
    strength: float | None = None
    reason: str = ""


def place_loras(experts: Collection[str], sources: Iterable[Source]) -> list[dict[str, PlacedFile]]:
    """Find the files of several LoRAs, and join those that are one: a high-noise and a low-noise file are a pair.

    Files of equal names but for high and low belong together; others in the order they are given.

    Args:
        experts: those of the model.
        sources: as for `load_pusa`.

    Returns:
        For each LoRA expert -> file, in the order of their first files.

    Raises:
        FileNotFoundError, ValueError: as `load_pusa` for its source; or both files of a pair for one transformer.
    """
    placed = [place_lora(experts, source) for source in sources]
    if len(experts) == 1:
        _refuse_pairs(placed)
        return placed
    for same_stem in (True, False):
        for high in [files for files in placed if files.keys() == {"transformer"}]:
            lows = [files for files in placed if files.keys() == {"transformer_2"}]
            if same_stem:
                lows = [files for files in lows if _stem(files) == _stem(high)]
            if lows:  # keep the place of the first
                order = [id(files) for files in placed]
                first, second = sorted((high, lows[0]), key=lambda files: order.index(id(files)))
                first |= second
                placed = [files for files in placed if files is not second]
    return placed


def _stem(files: Mapping[str, PlacedFile]) -> str:
    return stem_of(str(next(iter(files.values())).path))


def _refuse_pairs(placed: Iterable[Mapping[str, PlacedFile]]) -> None:
    paths = [file.path for files in placed for file in files.values()]
    for high in [path for path in paths if expert_of(str(path)) == "transformer"]:
        for low in [path for path in paths if expert_of(str(path)) == "transformer_2"]:
            if stem_of(str(low)) == stem_of(str(high)):
                raise ValueError(
                    f"{high.name} and {low.name} are a Wan2.2 pair and this model has one transformer: give one of them"
                )


def place_lora(experts: Collection[str], source: Source) -> dict[str, PlacedFile]:
    """Find the files of one LoRA: expert -> file; arguments and errors as `place_loras`."""
    if isinstance(source, Mapping):
        named, strengths = {expert: str(part) for expert, part in source.items()}, {}
    else:
        reference = parse_lora(str(source))
        if "" in reference.files:
            return _place_unnamed(experts, reference.files[""], reference.strengths.get(""))
        named, strengths = dict(reference.files), dict(reference.strengths)
    if not named or named.keys() - set(experts):
        raise ValueError(f"source names {', '.join(named) or 'nothing'}; this pipeline has {', '.join(experts)}")
    placed = {}
    for expert, text in named.items():
        reference = parse_lora(text)  # a mapping may hold FILE@STRENGTH, too
        files = find_files(reference.files.get("", text))
        strength = strengths.get(expert, reference.strengths.get(""))
        placed[expert] = PlacedFile(files.get("") or files[expert], strength, "as given")
    return placed


def _place_unnamed(experts: Collection[str], source: str, strength: float | None) -> dict[str, PlacedFile]:
    """Find the files of a source that names no expert, and choose the experts."""
    files = find_files(source)
    if "" not in files:
        if files.keys() - set(experts):
            names = " and ".join(path.name for path in files.values())
            raise ValueError(
                f"{source!r} is a Wan2.2 pair ({names}) and this pipeline has one transformer: name a file"
            )
        return {expert: PlacedFile(path, strength, "by its name") for expert, path in files.items()}
    path = files[""]
    in_keys = experts_of_keys(path)
    if len(in_keys) > 1 and len(experts) == 1:
        raise ValueError(f"{path.name} holds LoRAs of both experts of Wan2.2 and this pipeline has one transformer")
    if len(in_keys) > 1:
        return {expert: PlacedFile(path, strength, "by its keys") for expert in experts}
    by_keys, by_name = next(iter(in_keys), None), expert_of(str(path)) or expert_of(source)
    told = by_keys or by_name
    if len(experts) == 1:
        reason = f"though it is named as Wan2.2's {NOISE_OF[told]}-noise one" if told else ""
        return {expert: PlacedFile(path, strength, reason) for expert in experts}
    if told:
        return {told: PlacedFile(path, strength, "by its keys" if by_keys else "by its name")}
    reason = "as its name tells neither high nor low noise: high=FILE or low=FILE would"
    return {expert: PlacedFile(path, strength, reason) for expert in experts}


# ---- files ----


def find_files(source: str | os.PathLike[str]) -> dict[str, Path]:
    """Find the LoRA file of a source, under the key "", or a Wan2.2 pair, under "transformer" and "transformer_2".

    A source is a file, a folder, or on the Hub `owner/repo`, `owner/repo/folder` or `owner/repo/file.safetensors`. The
    names of a pair's two files tell the experts (see `pusa.lora.sources.expert_of`).

    Raises:
        FileNotFoundError: the source is neither on this machine nor on the Hub.
        ValueError: a folder holds no LoRA, or several that are not a pair.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return {"": path}
    if path.is_dir():
        chosen = _choose([entry.name for entry in sorted(path.iterdir())], str(source))
        return {expert: path / name for expert, name in chosen.items()}
    parts = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", str(source))
    if not parts or parts[1].endswith(WEIGHT_SUFFIXES):
        raise FileNotFoundError(f"there is no file or folder {str(source)!r}, and it is no Hub id (owner/repo)")
    return _from_hub(parts[1], (parts[2] or "").strip("/"))


def _choose(names: list[str], where: str) -> dict[str, str]:
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    weights = [name for name in weights if name.endswith(".safetensors")] or weights
    if len(weights) == 1:
        return {"": weights[0]}
    high, low = ([name for name in weights if expert_of(Path(name).name) == expert] for expert in EXPERTS)
    if len(weights) == 2 and len(high) == len(low) == 1 and high != low:
        return {"transformer": high[0], "transformer_2": low[0]}
    if not weights:
        raise ValueError(f"{where!r} holds no LoRA file ({', '.join(WEIGHT_SUFFIXES)})")
    raise ValueError(f"{where!r} holds {len(weights)} LoRA files; name one of them: {', '.join(weights[:8])}")


def _from_hub(repo: str, inside: str) -> dict[str, Path]:
    """Download LoRA files of a Hub repository; `inside` is a file, a folder or empty. Downloads no other files."""
    import huggingface_hub as hub

    where = f"{repo}/{inside}".rstrip("/")
    cached: Path | None = None
    names: list[str] = []
    try:
        if inside.endswith(WEIGHT_SUFFIXES):
            return {"": Path(hub.hf_hub_download(repo, inside))}
        if hub.constants.HF_HUB_OFFLINE:
            cached = Path(hub.snapshot_download(repo, local_files_only=True))
        else:
            names = [name for name in hub.list_repo_files(repo) if name.rpartition("/")[0] == inside]
    except Exception as error:  # its class depends on the Hub client's HTTP library
        raise FileNotFoundError(f"{where!r} is not on this machine, and the Hub did not give it: {error}") from error
    if cached is not None:
        return find_files(cached / inside)
    chosen = _choose(names, where)
    configs = [name for name in names if name.rpartition("/")[2] == "adapter_config.json"]  # PEFT's scale
    paths = {name: Path(hub.hf_hub_download(repo, name)) for name in [*chosen.values(), *configs]}
    return {expert: paths[name] for expert, name in chosen.items()}
