"""Find, or download, single files that others publish of the zoo's models: smaller than the fp32 files of the Hub.

Loading a bf16 file gives the same weights as rounding the fp32 ones, but for those that diffusers keeps in fp32 (time
embedding, norms, modulation), which such a file has rounded. Imports no torch.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.errors import first_line
from pusa.models import files

logger = logging.getLogger(__name__)

Download = Callable[..., str]


@dataclass(frozen=True)
class PublishedFile:
    """Name a file in a repository of the Hub; `size_bytes` is computed from its parameters."""

    repository: str
    name: str
    size_bytes: int


def is_cached(hub_id: str, part: str, cache: str | Path | None = None) -> bool:
    """Tell if all weights of a part in diffusers layout are in the local cache of the Hub."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, f"{part}/config.json", cache_dir=cache)
    if not isinstance(config, str):
        return False
    shards = files.shards(Path(config).parent)
    return bool(shards) and all(path.is_file() for path in shards)


def cached_path(file: PublishedFile, cache: str | Path | None = None) -> Path | None:
    """Return a file's path in the local cache of the Hub; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(file.repository, file.name, cache_dir=cache)
    return Path(path) if isinstance(path, str) else None


def wanted(
    published: Mapping[str, Mapping[str, PublishedFile]],
    storages: Mapping[str, str],
    hub_id: str,
    *,
    larger_than: Mapping[str, int],
    skip: Iterable[str] = (),
    cache: str | Path | None = None,
) -> dict[str, PublishedFile]:
    """List the files to take instead of parts in diffusers layout, which are not in the cache yet.

    Args:
        published: part -> storage -> file.
        storages: part -> "bfloat16" or "fp8"; other parts are taken from `hub_id`. Where a model is not published in
            bf16, its fp16 file is the one to take.
        larger_than: part -> bytes in `hub_id`; a file has to be smaller.
        skip: parts that are not loaded, or not from the Hub.
    """
    found = {}
    for part, storage in storages.items():
        choices = published.get(part, {})
        file = choices.get(storage) or (choices.get("float16") if storage == "bfloat16" else None)
        is_smaller = file is not None and file.size_bytes < larger_than.get(part, 0)
        if file is not None and is_smaller and part not in skip and not is_cached(hub_id, part, cache):
            found[part] = file
    return found


def fetch(found: Mapping[str, PublishedFile], *, download: Download | None = None, **hub: Any) -> dict[str, Path]:
    """Download files, or find them in the cache.

    One that cannot be had is left out, with a warning: the part in diffusers layout takes its place.

    Args:
        download: in place of `huggingface_hub.hf_hub_download`.
        hub: its arguments (``cache_dir``, ``token``, ``local_files_only``, ...).

    Returns:
        Part -> path.
    """
    download = download or _hub_download()
    paths = {}
    for part, file in found.items():
        try:
            paths[part] = Path(download(file.repository, file.name, **hub))
        except Exception as error:  # its class depends on the Hub client's HTTP library
            logger.warning(
                "%s/%s is not to be had (%s): taking larger files", file.repository, file.name, first_line(error)
            )
    return paths


def fetch_own(model: str, weights: Mapping[str, PublishedFile], **hub: Any) -> dict[str, Path]:
    """Download, or find in the cache, the files of a model that nothing can take the place of.

    Args:
        model: its name, for messages.
        weights: part -> file.
        hub: as for `fetch`.

    Raises:
        FileNotFoundError: one cannot be had.
    """
    download, paths = _hub_download(), {}
    for part, file in weights.items():
        try:
            paths[part] = Path(download(file.repository, file.name, **hub))
        except Exception as error:  # its class depends on the Hub client's HTTP library
            raise FileNotFoundError(
                f"{file.repository}/{file.name}, the {part} of {model}, is not in the local cache and cannot be "
                f'downloaded ({first_line(error)}): download it once, or give files={{"{part}": path}} (--{part})'
            ) from error
    return paths


def _hub_download() -> Download:
    import huggingface_hub

    return huggingface_hub.hf_hub_download
