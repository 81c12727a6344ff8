"""Read datasets of encoded clips, which `pusa data` writes for training.

    dataset.json            the model, its VAE and text encoder, the settings
    clips.jsonl             a line per clip (`ClipInfo`); a later line of the same id replaces an earlier one
    latents/*.safetensors   clip id -> normalised latents [C, F, h, w]; one file holds clips of one shape
    prompts/*.safetensors   sha256 of the caption -> embeddings [L, D] without padding; the empty caption is among them

Latents come from `PusaPipeline.encode_frames`, embeddings from `encode_prompt`, without the zero rows at their end.
No file is a pickle; the original's ``*.tensors.pth`` are read too (`LatentDataset.from_original`).
"""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pusa.data.format import (
    DATASET_FILE,
    FORMAT,
    LATENTS_FOLDER,
    PROMPTS_FOLDER,
    VERSION,
    ClipInfo,
    DatasetFacts,
    Shape,
    caption_key,
    read_facts,
    read_manifest,
    without_padding,
)
from pusa.data.original import OriginalFolder, is_original
from pusa.data.writer import DatasetWriter

__all__ = ["ClipInfo", "DatasetFacts", "DatasetWriter", "LatentDataset", "caption_key", "without_padding"]

logger = logging.getLogger(__name__)

_OPEN_SHARDS = 256  # memory-mapped files that are kept open


class ClipFolder(Protocol):
    """Describe a folder of clips: one that `DatasetWriter` wrote, or one of the original's."""

    folder: Path
    facts: DatasetFacts
    clips: list[ClipInfo]

    def latents(self, clip: ClipInfo) -> Tensor: ...

    def embeds(self, clip: ClipInfo) -> Tensor: ...

    def empty_embeds(self) -> Tensor: ...


class ShardFolder:
    """Read a folder of `DatasetWriter`; files are memory-mapped at the first use, and again after unpickling."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = read_facts(folder)
        clips, torn = read_manifest(folder)
        if torn:
            logger.warning("%s was not finished: run the command that makes it again", folder)
        self.clips = list(clips.values())
        self._prompt_files: dict[str, str] | None = None
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._lock = Lock()  # clips are read by several threads

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=OrderedDict(), _lock=Lock())

    def latents(self, clip: ClipInfo) -> Tensor:
        return self._tensor(self.folder / LATENTS_FOLDER / clip.shard, clip.id)

    def embeds(self, clip: ClipInfo) -> Tensor:
        return self._prompt(clip.prompt, clip.caption)

    def empty_embeds(self) -> Tensor:
        return self._prompt(caption_key(""), "")

    def _prompt(self, key: str, caption: str) -> Tensor:
        if self._prompt_files is None:
            files = sorted((self.folder / PROMPTS_FOLDER).glob("*.safetensors"))
            self._prompt_files = {name: file.name for file in files for name in self._file(file).keys()}  # noqa: SIM118
        if key not in self._prompt_files:
            raise ValueError(
                f"{self.folder} has no embeddings of {caption[:60]!r}: run the command that makes the dataset again"
            )
        return self._tensor(self.folder / PROMPTS_FOLDER / self._prompt_files[key], key)

    def _tensor(self, path: Path, key: str) -> Tensor:
        try:
            return self._file(path).get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{path} has no {key}, or is damaged ({error}): make the dataset again") from error

    def _file(self, path: Path) -> Any:
        with self._lock:
            if path not in self._open:
                self._open[path] = _map_file(path)
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return self._open[path]


def _map_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the whole folder, or make the dataset again")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): make the dataset again") from error


class LatentDataset:
    """Read clips of one or several folders lazily; cheap to pickle into worker processes.

        data = LatentDataset("clips")
        for shape, indices in data.buckets.items():
            z = torch.stack([data.latents(i) for i in indices[:4]])  # [B, C, F, h, w]

    Clips are in the order of their ids, which does not depend on how the folders were filled.

    Args:
        folder: one of `DatasetWriter`, a folder of such folders (the parts of one `pusa data synthesize`), one in the
            original's layout (see `from_original`), or several of these. A clip that is in two of them counts once.

    Raises:
        FileNotFoundError, ValueError: there is no dataset, it is damaged or empty, or two folders do not go together
            (another VAE, text encoder or length of prompts).
    """

    def __init__(self, folder: str | Path | Sequence[str | Path]) -> None:
        folders = [folder] if isinstance(folder, str | Path) else list(folder)
        self._fill([store for one in folders for store in _stores(Path(one).expanduser())])

    @classmethod
    def from_original(cls, folder: str | Path, *, empty_embeds: Tensor | None = None) -> "LatentDataset":
        """Read a training set in the original code's layout: ``metadata.csv`` and a ``*.tensors.pth`` for each video.

        Files are loaded with ``weights_only``: no code in them runs.

        Args:
            folder: holds ``metadata.csv`` (``file_name``, ``text``), with the tensors beside it or in ``train/``.
            empty_embeds: ``[L, D]``, the embeddings of the empty caption, which this layout does not hold.

        Raises:
            FileNotFoundError, ValueError: no file can be read. Single unreadable files are left out with a warning.
        """
        data = cls.__new__(cls)
        data._fill([OriginalFolder(Path(folder).expanduser(), empty_embeds=empty_embeds)])
        return data

    def _fill(self, stores: list[ClipFolder]) -> None:
        if not stores:
            raise FileNotFoundError("no folder is given: name at least one dataset")
        for store in stores[1:]:
            _check_compatible(stores[0], store)
        self._owner: dict[str, ClipFolder] = {}
        clips = {}
        for store in stores:
            for clip in store.clips:
                if clip.id in clips:
                    logger.warning("%s is in %s and in %s: once is enough", clip.id, store.folder, self._owner[clip.id])
                else:
                    clips[clip.id] = clip
                    self._owner[clip.id] = store
        if not clips:
            raise ValueError(f"{', '.join(str(store.folder) for store in stores)}: the dataset has no clips")
        self._stores = stores
        self._set_clips(clips.values())

    def _set_clips(self, clips: Iterable[ClipInfo]) -> None:
        self.clips: list[ClipInfo] = sorted(clips, key=lambda clip: clip.id)
        self.buckets: dict[Shape, list[int]] = {}
        """Latent shape -> indices of its clips."""
        for index, clip in enumerate(self.clips):
            self.buckets.setdefault(clip.latent_shape, []).append(index)

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def folders(self) -> list[Path]:
        """The folders that the clips are read from."""
        return [store.folder for store in self._stores]

    @property
    def facts(self) -> DatasetFacts:
        """Facts of the first folder; those of the others are compatible."""
        return self._stores[0].facts

    @property
    def max_sequence_length(self) -> int:
        """Tokens to which embeddings are padded with zero rows before the model sees them."""
        return self.facts.max_sequence_length

    def latents(self, index: int) -> Tensor:
        """Read the normalised latents of a clip: fp32 ``[C, F, h, w]``, a copy.

        Raises:
            FileNotFoundError, ValueError: its file is missing, damaged, or holds something else.
        """
        clip = self.clips[index]
        z = self._owner[clip.id].latents(clip)
        if tuple(z.shape) != clip.latent_shape:
            raise ValueError(f"{clip.id}: latents {list(z.shape)}, and the manifest says {list(clip.latent_shape)}")
        return z.to(torch.float32, copy=True)

    def embeds(self, index: int) -> Tensor:
        """Read the embeddings of a clip's caption: fp32 ``[L, D]`` without padding. Raises as `latents` does."""
        clip = self.clips[index]
        return self._owner[clip.id].embeds(clip).to(torch.float32, copy=True)

    @property
    def empty_embeds(self) -> Tensor:
        """Embeddings of the empty caption, for caption dropout: fp32 ``[L, D]``.

        Raises:
            ValueError: the dataset has none (the original's layout).
        """
        return self._stores[0].empty_embeds().to(torch.float32, copy=True)

    @property
    def hash(self) -> str:
        """SHA-256 over the manifest of all clips, independent of the files that hold them."""
        facts = {name: getattr(self.facts, name) for name in ("vae", "text_encoder", "max_sequence_length", "dtype")}
        digest = hashlib.sha256(json.dumps({"format": FORMAT, "version": VERSION, **facts}).encode())
        for clip in self.clips:
            values = {name: value for name, value in clip.as_json().items() if name != "shard"}
            digest.update(json.dumps(values, sort_keys=True).encode())
        return digest.hexdigest()

    def check_compatible(self, other: "LatentDataset") -> None:
        """Check that the same VAE and text encoder made `other`. Raises ValueError if not."""
        for store in other._stores:
            _check_compatible(self._stores[0], store)

    def split(self, held_out_share: float, seed: int = 0) -> tuple["LatentDataset", "LatentDataset"]:
        """Split into a training and a held-out dataset; a share above 0 holds at least one clip out.

        The held-out clips depend on their ids and the seed alone.

        Raises:
            ValueError: the share is outside 0..1, or it leaves nothing to train on.
        """
        if not 0 <= held_out_share < 1:
            raise ValueError(f"held_out_share={held_out_share:g} is outside 0..1 (1 excluded)")
        ranked = sorted(self.clips, key=lambda clip: hashlib.sha256(f"{seed}:{clip.id}".encode()).digest())
        count = max(1, round(held_out_share * len(ranked))) if held_out_share else 0
        if count >= len(ranked):
            raise ValueError(
                f"data.held_out_share={held_out_share:g} of {len(ranked)} clip{'s' * (len(ranked) > 1)} leaves none to "
                "train on: add clips, or set it to 0 and hold none out"
            )
        return self._view(ranked[count:]), self._view(ranked[:count])

    def _view(self, clips: Iterable[ClipInfo]) -> "LatentDataset":
        view = type(self).__new__(type(self))
        view._stores, view._owner = self._stores, self._owner
        view._set_clips(clips)
        return view


def _stores(folder: Path) -> list[ClipFolder]:
    if (folder / DATASET_FILE).is_file():
        return [ShardFolder(folder)]
    parts = sorted(path.parent for path in folder.glob(f"*/{DATASET_FILE}"))
    if parts:
        return [ShardFolder(part) for part in parts]
    if is_original(folder):
        return [OriginalFolder(folder)]
    return [ShardFolder(folder)]  # whose error names what is missing


def _check_compatible(first: ClipFolder, other: ClipFolder) -> None:
    for name in ("vae", "text_encoder", "latent_channels", "max_sequence_length"):
        ours, theirs = (getattr(store.facts, name) for store in (first, other))
        if ours and theirs and ours != theirs:
            short = [value[:12] if isinstance(value, str) else value for value in (ours, theirs)]
            raise ValueError(
                f"{first.folder} and {other.folder} cannot be joined: {name} is {short[0]} here and {short[1]} there"
            )
