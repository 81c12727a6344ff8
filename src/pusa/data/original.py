"""Read training data in the layout of Pusa's original code: a table of videos and a file of tensors for each.

    metadata.csv                     file_name, text
    train/video_00001.mp4.tensors.pth    {"latents": [C, F, h, w], "prompt_emb": {"context": [1, L, D]}, ...}

Latents are normalised as ours are; the context is padded to its full length with zero rows. The videos themselves are
not needed.
"""

import csv
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.data.format import ORIGINAL_SUFFIX, ClipInfo, DatasetFacts, caption_key, without_padding
from pusa.errors import first_line
from pusa.positions import frames_of

logger = logging.getLogger(__name__)

METADATA_FILE = "metadata.csv"
_NAMES = ("file_name", "video", "file", "path")
_TEXTS = ("text", "prompt", "caption")
_FPS = 16.0  # of Wan's models; the layout stores none
_FRAMES_PER_LATENT = 4
_PIXELS_PER_LATENT = 8


def is_original(folder: Path) -> bool:
    """Detect a folder in the layout of Pusa's original code."""
    return folder.is_dir() and any(True for _ in folder.rglob(f"*{ORIGINAL_SUFFIX}"))


class OriginalFolder:
    """Read a folder, see `LatentDataset.from_original`; `skipped` lists (name, reason) of unreadable files."""

    def __init__(self, folder: Path, *, empty_embeds: Tensor | None = None) -> None:
        self.folder = folder
        self._empty = empty_embeds
        self._paths: dict[str, Path] = {}
        self.clips: list[ClipInfo] = []
        self.skipped: list[tuple[str, str]] = []
        length = 0
        for name, path, caption in _entries(folder):
            try:
                latents, context = _load(path)
            except (FileNotFoundError, ValueError) as error:
                logger.warning("%s is left out: %s", name, error)
                self.skipped.append((name, str(error)))
                continue
            channels, frames, height, width = latents.shape
            self._paths[name] = path
            length = max(length, context.shape[0])
            self.clips.append(
                ClipInfo(
                    id=name,
                    shard=str(path.relative_to(folder)),
                    frames=frames_of(frames, _FRAMES_PER_LATENT),
                    height=height * _PIXELS_PER_LATENT,
                    width=width * _PIXELS_PER_LATENT,
                    latent_shape=(channels, frames, height, width),
                    fps=_FPS,
                    caption=caption,
                    prompt=caption_key(caption),
                    source=name,
                )
            )
        if not self.clips:
            raise ValueError(
                f"{folder} has no {ORIGINAL_SUFFIX} file that can be read: name the folder of {METADATA_FILE}"
            )
        channels = self.clips[0].latent_shape[0]
        self.facts = DatasetFacts(latent_channels=channels, max_sequence_length=length)

    def latents(self, clip: ClipInfo) -> Tensor:
        return _load(self._paths[clip.id])[0]

    def embeds(self, clip: ClipInfo) -> Tensor:
        return without_padding(_load(self._paths[clip.id])[1])

    def empty_embeds(self) -> Tensor:
        if self._empty is None:
            raise ValueError(
                f"{self.folder} has no embeddings of the empty caption: train without caption dropout, convert the "
                "folder with `pusa data prepare`, or give from_original(empty_embeds=...)"
            )
        return self._empty


def _entries(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield (name, file of tensors, caption); without a table, all files, with empty captions."""
    tables = sorted(folder.rglob(METADATA_FILE))
    for table in tables:
        yield from _rows(folder, table)
    if not tables:
        for path in sorted(folder.rglob(f"*{ORIGINAL_SUFFIX}")):
            yield path.relative_to(folder).as_posix().removesuffix(ORIGINAL_SUFFIX), path, ""


def _rows(folder: Path, table: Path) -> Iterator[tuple[str, Path, str]]:
    base = table.parent
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        name_column = next((column for column in _NAMES if column in columns), None)
        text_column = next((column for column in _TEXTS if column in columns), None)
        if name_column is None:
            raise ValueError(f"{table} has the columns {', '.join(columns)}: one of {', '.join(_NAMES)} is needed")
        for row in rows:
            name = row[name_column]
            places = [base / parent / name for parent in ("train", "")]
            if not name.endswith(ORIGINAL_SUFFIX):
                places = [place.with_name(place.name + ORIGINAL_SUFFIX) for place in places]
            path = next((place for place in places if place.is_file()), places[0])
            display_name = (base.relative_to(folder) / name).as_posix()
            # Links are not resolved: those of the Hub's cache lead outside.
            if os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep):
                yield display_name, path, row.get(text_column or "") or ""
            else:
                logger.warning("%s is left out: it is outside of %s", name, folder)


def _load(path: Path) -> tuple[Tensor, Tensor]:
    """Map latents ``[C, F, h, w]`` and context ``[L, D]`` of a file. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the original's data_process, or copy the file")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = first_line(error)[:100]
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason})") from error
    return _tensor_of(path, "latents", content, 4), _tensor_of(path, "prompt_emb.context", content, 2)


def _tensor_of(path: Path, name: str, content: Any, dimensions: int) -> Tensor:
    """Look a dotted name up in nested dicts and drop leading dimensions of size 1 down to `dimensions`."""
    value = content
    for key in name.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif key != "context":  # some caches hold the context itself
            raise ValueError(f"{path} holds no {name!r}")
    value = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: {name!r} is no tensor")
    while value.ndim > dimensions and value.shape[0] == 1:
        value = value[0]
    if value.ndim != dimensions:
        raise ValueError(f"{path}: {name!r} has the shape {list(value.shape)}, and {dimensions} dimensions are needed")
    return value.detach()
