"""Keep the models that a user has added by name: a small JSON file for each, in a folder of settings.

A file names the model of the zoo that it is, and where its parts are on this machine. Nothing of it goes into results:
`pusa.zoo` makes a model of it, whose public name is its own. This module imports no torch.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pusa.fsutil import replacing
from pusa.models.sources.file_set import PARTS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class AddedModel:
    """Describe a model of the zoo (`family`) whose parts are files, or a folder, of the user's.

    Attributes:
        files: part of a pipeline ("transformer", "transformer_2", "text_encoder", "vae") -> file.
        lora: LoRAs, as a request has them; empty: the family's own.
        folder: a model's folder in either layout, for parts that `files` lacks; None: the Hub's.
    """

    name: str
    family: str
    files: Mapping[str, Path] = field(default_factory=dict)
    lora: tuple[str, ...] = ()
    folder: Path | None = None


def home() -> Path:
    """Name the folder of this user's settings: that of PUSA_HOME, or ``~/.config/pusa``."""
    return Path(os.environ.get("PUSA_HOME") or "~/.config/pusa").expanduser()


def names() -> list[str]:
    """List the names of the models that were added."""
    folder = home() / "models"
    return sorted(path.stem for path in folder.glob("*.json") if _NAME.fullmatch(path.stem)) if folder.is_dir() else []


def read(name: str) -> AddedModel | None:
    """Read a model; None if none has this name.

    Raises:
        ValueError: its file is damaged.
    """
    path = _path(name)
    if path is None or not path.is_file():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        files = {part: Path(card["files"][part]) for part in PARTS if part in card["files"]}
        folder = Path(card["folder"]) if card.get("folder") else None
        return AddedModel(name, card["family"], files, tuple(card.get("lora", ())), folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not describe a model ({error}): `pusa models remove {name}`, and add it again"
        ) from error


def write(model: AddedModel) -> Path:
    """Write a model with absolute paths; return its file.

    Raises:
        ValueError: a name that is no plain word.
        OSError: the folder of settings cannot be written.
    """
    path = _path(model.name)
    if path is None:
        raise ValueError(f"name {model.name!r}: letters, digits, and . _ - after the first, at most 64 of them")
    card = {
        "family": model.family,
        "files": {part: str(_absolute(file)) for part, file in model.files.items()},
        "lora": list(model.lora),
        "folder": str(_absolute(model.folder)) if model.folder else None,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}): set PUSA_HOME to a folder that you may write to"
        ) from error
    return path


def remove(name: str) -> None:
    """Forget a model; its files stay. Raises ValueError if none has this name."""
    path = _path(name)
    if path is None or not path.is_file():
        known = ", ".join(names()) or "none"
        raise ValueError(f"no model {name!r} was added (added: {known}); models of the zoo cannot be removed")
    path.unlink()


def _path(name: str) -> Path | None:
    return home() / "models" / f"{name}.json" if _NAME.fullmatch(name) else None


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))
