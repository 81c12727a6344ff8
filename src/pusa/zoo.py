"""List models by name: their parts, their defaults, what they need of a machine.

A folder with a ``pusa.json`` describes itself: the embedded model does, and so does any other of our own recipe. Other
folders are recognised by the shapes of their transformer. This module imports no torch; `pusa.loading` turns a name
into a pipeline.
"""

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusa import added_models, resources
from pusa.defaults import FastSettings, GenerationDefaults
from pusa.fsutil import FileStat, stat_of
from pusa.models import files
from pusa.models.bases import Base, base_of_values, defaults_in
from pusa.models.catalogue import PUBLISHED, LoraSource, ZooModel
from pusa.models.sources import comfyui, configs
from pusa.resources import DType, readable

if TYPE_CHECKING:
    from pusa.acceleration.decisions import Machine

MINI_FOLDER = Path(__file__).parent / "mini" / "weights"
CARD_FILE = "pusa.json"


def read_folder(folder: Path, name: str) -> ZooModel | None:
    """Read the model that a folder's ``pusa.json`` describes; None without such a file.

    Raises:
        ValueError: the file lacks an entry, or has an unknown one.
    """
    if not os.path.isfile(folder / CARD_FILE):
        return None
    card = files.read_json(folder / CARD_FILE)
    try:
        fast = {"fast": FastSettings(**card["defaults"]["fast"])} if "fast" in card["defaults"] else {}
        return ZooModel(
            name=name,
            title=card["title"],
            transformer=files.read_json(folder / "transformer" / "config.json"),
            defaults=replace(defaults_in(folder), **card["defaults"] | fast),
            folder=folder,
            parameters=files.parameter_counts(folder),
            lora=LoraSource(str(folder), card["lora"]) if "lora" in card else None,
            words={
                kind: [[group] if isinstance(group, str) else group for group in groups]
                for kind, groups in card.get("words", {}).items()
            },
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CARD_FILE} does not describe a model ({error}): make it anew") from error


ZOO: dict[str, ZooModel] = {
    model.name: model
    for model in (
        *filter(None, [read_folder(MINI_FOLDER, "mini")]),
        ZooModel(
            name="tiny",
            title="random weights, for tests: makes noise",
            # `pusa.models.tiny` builds it
            transformer={"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 3},
            defaults=GenerationDefaults(
                width=96, height=64, num_frames=17, steps=4, max_sequence_length=64, negative_prompt=""
            ),
            parameters={"text_encoder": 65_152, "transformer": 473_536, "vae": 924_491},
            vae_config={"base_dim": 8},
        ),
        *PUBLISHED,
    )
}


def get(name: str) -> ZooModel:
    """Look up a model by its name.

    Raises:
        ValueError: unknown name; the message has the nearest known one, and all of them.
    """
    if model := ZOO.get(name) or _added(name):
        return model
    near = difflib.get_close_matches(name.lower(), names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no model is called {name!r}: {hint}known are {', '.join(names())}; or give a Hub id or a folder")


def names() -> list[str]:
    """List the names of all models: those of the zoo, and those that the user has added."""
    return [*ZOO, *(name for name in added_models.names() if name not in ZOO)]


def families() -> dict[str, tuple[Mapping[str, Any], int]]:
    """Return the published models that a user's files may be, for `pusa.models.sources.file_set`."""
    return {model.name: (model.transformer, model.experts) for model in ZOO.values() if model.hub_id is not None}


def _added(name: str) -> ZooModel | None:
    added = added_models.read(name)
    if added is None:
        return None
    if added.family not in families():
        raise ValueError(f"model {name} was added as {added.family}, which is unknown here: remove it and add it anew")
    family = ZOO[added.family]
    return replace(
        family,
        name=name,
        title=f"added: {family.title}",
        hub_id=None if added.folder else family.hub_id,
        folder=added.folder,
        family=family.name,
        files=added.files,
        own_lora=added.lora,
    )


def find(source: str | Path) -> ZooModel | None:
    """Find a model by its name, its Hub id or its folder; None for other sources.

    A folder is described by its ``pusa.json``, or recognised by its content (see `recognise`). The Hub id of a base
    stands for the base: with its own weights, not with those of the model of the zoo.

    Raises:
        ValueError: a folder, or a model that was added, is described badly; or a ComfyUI folder has no model, or
            several (the message lists them).
    """
    named = next((model for model in ZOO.values() if str(source) in (model.name, model.hub_id)), None)
    if named is not None and str(source) == named.hub_id:
        named = replace(named, weights={})
    folder = Path(os.path.expanduser(source))
    return named or _added(str(source)) or read_folder(folder, folder.name) or recognise(folder)


def recognise(folder: Path) -> ZooModel | None:
    """Recognise a folder as a model of the zoo, whose defaults and LoRA it gets.

    It is a model in diffusers' or Wan's own layout, or ComfyUI's folder of models. Every value of the transformer's
    configuration has to be that of the zoo's model: narrower ones are None. Raises ValueError as `find`.
    """
    if not folder.is_dir():
        return None
    if place := comfyui.models_folder(folder):
        return _in_comfyui(place)
    found = configs.folder_config(folder)
    family = None if found is None else family_of(*found)
    if family is None:
        return None
    name = Path(os.path.abspath(folder)).name
    return replace(
        family,
        name=name,
        title=f"recognised: {family.title}",
        hub_id=None,
        folder=folder,
        family=family.name,
        weights={},
    )


def in_folder(folder: Path) -> ZooModel | None:
    """Describe any model of a base in a folder in diffusers layout, for plans; None without a transformer there."""
    if not (folder / "transformer" / "config.json").is_file():
        return None
    defaults = defaults_in(folder)
    has_two = (folder / "transformer_2" / "config.json").is_file()
    return ZooModel(
        name=public_name(str(folder)),
        title="a folder in diffusers layout",
        transformer=files.read_json(folder / "transformer" / "config.json"),
        defaults=replace(defaults, boundary_ratio=0.875) if has_two else defaults,
        parameters=files.parameter_counts(folder),
        vae_config=files.read_json(folder / "vae" / "config.json"),
    )


def _in_comfyui(folder: Path) -> ZooModel:
    choice = _chosen(folder, tuple(stat for path in comfyui.files_in(folder) for stat in stat_of(path)))
    family = ZOO[choice.family]
    return replace(
        family,
        name=f"comfyui-{family.name}",
        title=f"in ComfyUI: {family.title}",
        family=family.name,
        files=choice.files,
        own_lora=choice.own_lora,
    )


@lru_cache(maxsize=8)
def _chosen(folder: Path, stats: tuple[FileStat, ...]) -> comfyui.Choice:
    """Choose the files of a ComfyUI folder; their headers are read again only if one has changed since."""
    return comfyui.choose(comfyui.scan(folder), families())


def family_of(config: Mapping[str, Any], experts: int = 1) -> ZooModel | None:
    """Find the published model with this configuration of its transformer and this number of them."""
    published = (model for model in ZOO.values() if model.hub_id is not None and model.experts == experts)
    return next((model for model in published if configs.fits(config, model.transformer)), None)


def public_name(source: str) -> str:
    """Name a model or a LoRA for others: without the folders of this machine, a name of the zoo or the Hub as it is."""
    path = Path(source).expanduser()
    is_local = path.is_absolute() or source.startswith((".", "~")) or path.exists()
    return Path(os.path.abspath(path)).name if is_local else source


def with_fallback(source: str) -> str:
    """Replace "mini" by "tiny" where an installation lacks its weights; return other sources unchanged."""
    return "tiny" if source == "mini" and "mini" not in ZOO else source


def defaults_of(source: str | Path) -> GenerationDefaults:
    """Return the defaults of the model that `find` returns for a source, after `with_fallback`; else its base's."""
    model = find(with_fallback(str(source)))
    return model.defaults if model else defaults_in(Path(os.path.expanduser(source)))


def base_of(source: str | Path) -> Base:
    """Find the kind of base of the model that `find` returns for a source, or of a folder; Wan where nothing tells."""
    return base_of_values(transformer_config(source))


def transformer_config(source: str | Path) -> Mapping[str, Any]:
    """Read what is known of the transformer of a source without a download; nothing of an unknown Hub id."""
    model = find(with_fallback(str(source)))
    folder = Path(os.path.expanduser(source)) if model is None else model.folder
    parts = ("transformer", "transformer_2")
    configs = [] if folder is None else [files.read_json(folder / part / "config.json") for part in parts]
    return next(filter(None, configs), {} if model is None else model.transformer)


# ---- resources -----------------------------------------------------------------------------------------------------


def check_resources(
    model: ZooModel,
    *,
    dtype: "DType | None" = None,
    folder: Path | None = None,
    skip: Collection[str] = (),
    ram: bool = True,
    machine: "Machine | None" = None,
) -> None:
    """Check that disk, RAM and GPU memory suffice for a model.

    Args:
        dtype: as for `pusa.loading.load_pipeline`: all parts must fit into RAM in it. None: there must be a plan by
            which the model makes a clip of its default size.
        folder: download folder, whose disk must have room; None: the files are on this machine.
        skip: components that are not loaded. Without a transformer, the others must fit into RAM.
        ram: False: the model is downloaded and not held in memory.
        machine: None: this one.

    Raises:
        ResourcesError: too little of one of them; the message has the need, the supply and a way out.
    """
    from pusa.acceleration.machine import machine as this_machine
    from pusa.acceleration.planning import plan

    total = sum(model.parameters.values())
    smaller = [other.name for other in ZOO.values() if other.name != "tiny" and sum(other.parameters.values()) < total]
    otherwise = f", or take a smaller model ({', '.join(smaller)})" if smaller else ""
    if folder is not None:
        download = sum(size for part, size in model.file_bytes.items() if part not in skip)
        resources.check_disk(download - _cached_bytes(model, folder), folder, model.name, otherwise=otherwise)
    counts = {part: count for part, count in model.parameters.items() if part not in skip}
    if not ram:
        return
    if dtype is not None or "transformer" in skip:
        resources.check_ram(resources.weight_bytes(counts, dtype), model.name, otherwise=otherwise)
    elif problem := plan(replace(model, parameters=counts), machine=machine or this_machine()).problem:
        said = problem.removesuffix(", or take a smaller model") if smaller else problem
        raise resources.ResourcesError(said + otherwise)


def _cached_bytes(model: ZooModel, cache: Path) -> int:
    from huggingface_hub.file_download import repo_folder_name

    blobs = cache / repo_folder_name(repo_id=str(model.hub_id), repo_type="model") / "blobs"
    return sum(path.stat().st_size for path in blobs.iterdir()) if blobs.is_dir() else 0


def describe_fit(model: ZooModel, machine: "Machine | None" = None) -> str:
    """Describe in one line how a model would make a clip of its default size on a machine (None: this one)."""
    from pusa.acceleration.machine import machine as this_machine
    from pusa.acceleration.planning import plan

    machine = machine or this_machine()
    found = plan(model, machine=machine)
    if found.problem:
        return f"no: {found.problem}"
    memory = f"{readable(found.ram_peak_bytes)} of {readable(machine.ram_bytes)} of RAM"
    if found.peak_bytes:
        memory = f"{readable(found.peak_bytes)} of {readable(machine.cards[0].memory_bytes)} of GPU memory, {memory}"
    slow = next((f"; {note}" for note in found.notes if note.startswith("very slow")), "")
    return f"yes: {found.summary.partition(': ')[2]}; {memory}{slow}"


def is_hub_id(source: str | Path) -> bool:
    """Detect names of the form ``owner/name``, which may be a model or a dataset on the Hub."""
    return isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~"))
