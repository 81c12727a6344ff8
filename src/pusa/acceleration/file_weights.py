"""Read from headers of single files how they store their weights, for a plan. Imports no torch."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pusa.acceleration.decisions import LoadOptions, Storage


def read_files(options: LoadOptions, files: Mapping[str, Path]) -> LoadOptions:
    """Fill in how the single files of a model store their weights, and what they take in memory if they are kept so.

    Files that are not on this machine, or that cannot be read, keep the entries that the options have.

    Args:
        options: with files of the user's for this run, and perhaps entries that are kept.
        files: of the model itself, part -> file; those of `options` go before them.
    """
    found = {**files, **options.files}
    if not found:
        return options
    from pusa.models.sources import file_set

    with suppress(ValueError, OSError, ModuleNotFoundError):  # loading says what is wrong with them
        found = file_set.expand(found)
    storages: dict[str, Storage] = {}
    sizes = {}
    for part, path in found.items():
        stored = _stored(path, file_set.component_of(part))
        if stored is not None:
            storages[part], sizes[part] = stored
    return replace(
        options,
        file_storage={**storages, **options.file_storage},
        file_bytes={**sizes, **options.file_bytes},
    )


def _stored(path: Path, component: str) -> tuple[Storage, int] | None:
    """Return the storage of a component and its bytes; None if the file is not here, or without it."""
    from pusa.models.single_file.recognition import recognise

    try:
        part = recognise(path).part(component)
    except (ValueError, OSError, ModuleNotFoundError):
        return None
    if part is None or part.problem:
        return None
    return part.kept_storage or "bfloat16", part.kept_bytes
