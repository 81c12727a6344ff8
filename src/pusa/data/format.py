"""Define the format of a dataset folder and read its manifest; see `pusa.data.dataset`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FORMAT, VERSION = "pusa-dataset", 1
DATASET_FILE, CLIPS_FILE = "dataset.json", "clips.jsonl"
LATENTS_FOLDER, PROMPTS_FOLDER = "latents", "prompts"
ORIGINAL_SUFFIX = ".tensors.pth"  # of the training data of Pusa's original code

Shape = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """Describe one clip of a dataset: a line of ``clips.jsonl``.

    Attributes:
        shard: the file below ``latents/``.
        frames, height, width: of the encoded pixels.
        latent_shape: ``[C, F, h, w]``.
        prompt: key of the caption's embeddings.
        sha256: of the file (`source`) that the clip was cut from at `start_seconds`; empty for synthesized clips.
    """

    id: str
    shard: str
    frames: int
    height: int
    width: int
    latent_shape: Shape
    fps: float
    caption: str
    prompt: str
    sha256: str = ""
    source: str = ""
    start_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "latent_shape": list(self.latent_shape)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ClipInfo":
        """Parse a line of ``clips.jsonl``; fields of later versions are ignored.

        Raises:
            ValueError: a field is missing or has an impossible value.
        """
        present = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        try:
            shape = tuple(int(size) for size in present["latent_shape"])
            if len(shape) != 4:
                raise ValueError(f"latent_shape={list(shape)} has not four sizes")
            return cls(**{**present, "latent_shape": shape})
        except (KeyError, TypeError) as error:
            raise ValueError(f"a line of {CLIPS_FILE} lacks a field: {error}") from error


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """Hold the contents of ``dataset.json``; `vae` and `text_encoder` are hashes of the models, empty if unknown."""

    model: str = ""
    vae: str = ""
    text_encoder: str = ""
    latent_channels: int = 0
    max_sequence_length: int = 512
    dtype: str = "bfloat16"
    settings: Mapping[str, Any] | None = None


def caption_key(caption: str) -> str:
    """Hash a caption to the key of its embeddings."""
    return hashlib.sha256(caption.encode()).hexdigest()


def without_padding(embeds: "Tensor") -> "Tensor":
    """Drop the zero rows at the end of embeddings ``[n, D]``."""
    filled = embeds.ne(0).any(dim=1).nonzero()
    return embeds[: int(filled.max()) + 1 if len(filled) else 0]


def holds_dataset(folder: Path) -> bool:
    """Detect a dataset, a folder of datasets, or training data of Pusa's original code; loads no torch."""
    patterns = (DATASET_FILE, f"*/{DATASET_FILE}", f"**/*{ORIGINAL_SUFFIX}")
    return folder.is_dir() and any(True for pattern in patterns for _ in folder.glob(pattern))


def missing_dataset(folder: Path) -> str:
    """Write the message about a folder without a dataset."""
    return f"{folder} holds no dataset ({DATASET_FILE} is missing): make one with `pusa data`"


def read_facts(folder: Path) -> DatasetFacts:
    """Read ``dataset.json``. Raises FileNotFoundError or ValueError without a dataset of this version."""
    path = folder / DATASET_FILE
    if not path.is_file():
        raise FileNotFoundError(missing_dataset(folder))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind, version = values["format"], values["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if kind != FORMAT or version != VERSION:
        raise ValueError(f"{path} is a {kind} of version {version}; this pusa reads {FORMAT} of version {VERSION}")
    return DatasetFacts(**{f.name: values[f.name] for f in fields(DatasetFacts) if f.name in values})


def read_manifest(folder: Path) -> tuple[dict[str, ClipInfo], bool]:
    """Read clips by id, and True if the file ends in the middle of a line, as after a power cut.

    Raises:
        ValueError: another line is damaged.
    """
    path = folder / CLIPS_FILE
    lines: list[str] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="\n") as file:  # a caption may hold other line breaks
            lines = list(file)
    torn = bool(lines) and not lines[-1].endswith("\n")
    clips = {}
    for number, line in enumerate(lines[:-1] if torn else lines, start=1):
        try:
            clip = ClipInfo.from_json(json.loads(line))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error}; remove the line, or make the dataset again") from error
        clips[clip.id] = clip
    return clips, torn
