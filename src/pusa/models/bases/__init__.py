"""List the kinds of base models, and find that of a transformer. Nothing here imports torch."""

from pathlib import Path
from typing import Any

from pusa.defaults import GenerationDefaults
from pusa.models.bases.base import Base, Config
from pusa.models.bases.fvdm import FVDMBase
from pusa.models.bases.mochi import MochiBase
from pusa.models.bases.wan import WanBase
from pusa.models.files import WrongArchitectureError, read_json

WAN = WanBase()
BASES: tuple[Base, ...] = (WAN, MochiBase(), FVDMBase())
_BY_CLASS = {name: base for base in BASES for name in base.transformer_classes}
TRANSFORMER_CLASSES = tuple(_BY_CLASS)


def base_named(class_name: str) -> Base | None:
    """Find the base with a transformer of this class, stock or ours; None for any other class."""
    return _BY_CLASS.get(class_name)


def base_of_config(config: Config, where: str) -> Base:
    """Find the base of a transformer's ``config.json``, and check that the model is one.

    Raises:
        WrongArchitectureError: the class of another model, or a kind that cannot be a base.
    """
    name = config.get("_class_name", WAN.transformer_classes[0])
    base = base_named(name)
    if base is None:
        names, classes = zip(*((base.name, base.transformer_classes[0]) for base in BASES), strict=True)
        kinds = f"{', '.join(names[:-1])} or {names[-1]}"
        raise WrongArchitectureError(f"{where} is a {name}; Pusa needs a {kinds} transformer ({', '.join(classes)})")
    base.check_config(config, where)
    return base


def base_of_values(config: Config) -> Base:
    """Find the base of what is known of a transformer's configuration; Wan where it names no class of another."""
    return base_named(config.get("_class_name", "")) or WAN


def base_in(folder: Path) -> Base:
    """Find the base of a model's folder by the class of its transformer; Wan where nothing tells another.

    The folder of a model whose transformer is in a single file has only ``model_index.json`` to tell it.
    """
    experts = ("transformer", "transformer_2")
    classes = [read_json(folder / part / "config.json").get("_class_name", "") for part in experts]
    index = read_json(folder / "model_index.json")
    classes += [(index.get(part) or ["", ""])[1] or "" for part in experts]
    return next((base for name in classes if (base := base_named(name))), WAN)


def defaults_in(folder: Path) -> GenerationDefaults:
    """Return the defaults of a model's folder by the configurations of its parts; Wan2.1's where there are none."""
    transformer, vae = (read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    return base_in(folder).defaults_of(transformer, vae)


def base_of(transformer: Any) -> Base:
    """Find the base of a transformer by its class or one above; Wan for none and for stand-ins."""
    return next(filter(None, map(base_named, _class_names(transformer))), WAN)


def is_transformer(model: Any) -> bool:
    """Tell if a model is a transformer of a base."""
    return any(name in _BY_CLASS for name in _class_names(model))


def _class_names(model: Any) -> list[str]:
    return [cls.__name__ for cls in type(model).__mro__]
