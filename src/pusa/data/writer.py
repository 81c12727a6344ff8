"""Write a dataset so that a kill at any moment loses little and corrupts nothing.

A shard is written under a hidden name, flushed to disk and renamed; only then do its clips enter the manifest. Each
shard holds their lines too, so that clips of a writer killed in between are recovered when the folder is opened again.
"""

import json
import logging
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa import __version__
from pusa.data.format import (
    CLIPS_FILE,
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
from pusa.fsutil import flush
from pusa.models.finite import is_finite

logger = logging.getLogger(__name__)

_MAX_CLIPS_PER_SHARD = 4096  # a safetensors header is limited to 100 MB, and holds their manifest lines
_PROMPT_SHARD_BYTES = 128 * 2**20


class DatasetWriter:
    """Write a dataset folder, from the start or where an earlier run stopped.

        with DatasetWriter("clips", model="tiny", max_sequence_length=64) as writer:
            writer.add_prompt("", empty)                            # [L, D]
            writer.add_prompt("a fox", embeds)
            if "fox-0" not in writer:
                writer.add("fox-0", z, "a fox", fps=16, height=64, width=96, frames=17)  # z [C, F, h, w], normalised

    One process at a time may write to a folder: several processes take a folder each, and `LatentDataset` joins them.
    After an exception the added clips are kept; `close` (or the end of the ``with`` block) also checks that every
    caption has embeddings.

    Args:
        folder: created if it does not exist.
        model: the model to train: a name of the zoo, a Hub id or a folder.
        vae, text_encoder: their hashes (see `pusa.models.text_encoder.identity_of_module`); empty: set later
            with `identify`.
        max_sequence_length: tokens of a prompt.
        settings: how the clips are made; stored in `dataset.json`, and must be equal when the folder is opened again.
        growing: names of settings that are lists and may differ: what is new in them is added to what is stored.
        dtype: of the latents on disk, bf16 or fp32.
        shard_bytes: size of a file of latents.
        flush_seconds: added clips are on disk after so long, even if a file is not full.

    Raises:
        ValueError: the folder holds a dataset of another kind, or another process is writing to it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str = "",
        vae: str = "",
        text_encoder: str = "",
        max_sequence_length: int = 512,
        settings: Mapping[str, Any] | None = None,
        growing: Collection[str] = (),
        dtype: torch.dtype = torch.bfloat16,
        shard_bytes: int = 256 * 2**20,
        flush_seconds: float = 120.0,
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"dtype={dtype}: latents are kept as torch.bfloat16 or torch.float32")
        self.folder = Path(folder).expanduser()
        for name in (LATENTS_FOLDER, PROMPTS_FOLDER):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.folder} is being written by another process: wait, or name another folder"
            ) from None
        try:
            self._dtype = dtype
            self._shard_bytes = shard_bytes
            self._flush_seconds = flush_seconds
            self._flushed_at = time.monotonic()
            self._pending: dict[Shape, list[tuple[ClipInfo, Tensor]]] = {}
            self._pending_prompts: dict[str, Tensor] = {}
            self._pending_prompt_bytes = 0
            self._open(
                DatasetFacts(
                    model=model,
                    vae=vae,
                    text_encoder=text_encoder,
                    max_sequence_length=max_sequence_length,
                    dtype=str(dtype).removeprefix("torch."),
                    settings=None if settings is None else json.loads(json.dumps(settings)),
                ),
                growing,
            )
        except BaseException:
            self._lock.release()
            raise

    def _open(self, facts: DatasetFacts, growing: Collection[str]) -> None:
        """Create the dataset, or check that an existing one has the same facts and recover its manifest."""
        for leftover in self.folder.rglob(".*.part"):
            leftover.unlink()
        self.facts = facts
        if (self.folder / DATASET_FILE).is_file():
            stored = read_facts(self.folder)
            for name in ("model", "max_sequence_length", "dtype"):
                self._check_same(name, getattr(stored, name), getattr(facts, name))
            settings = dict(stored.settings or {})
            for name in sorted({*settings, *(facts.settings or {})}):
                if facts.settings is not None and name in growing and isinstance(settings.get(name), list):
                    settings[name] = sorted([*settings[name], *_missing(facts.settings[name], settings[name])])
                elif facts.settings is not None:
                    self._check_same(name, settings.get(name), facts.settings.get(name))
            self.facts = replace(stored, settings=settings) if stored.settings is not None else stored
            self.identify(vae=facts.vae, text_encoder=facts.text_encoder)
        else:
            self._write_facts()
        self._clips, torn = read_manifest(self.folder)
        lost = []
        for shard in sorted((self.folder / LATENTS_FOLDER).glob("*.safetensors")):
            with safe_open(shard, "pt") as file:
                if not self._clips.keys() >= set(file.keys()):
                    lines = [ClipInfo.from_json(line) for line in json.loads((file.metadata() or {})["pusa"])]
                    lost += [clip for clip in lines if clip.id not in self._clips]
        if torn:
            self._replace(self.folder / CLIPS_FILE, "".join(_line(clip) for clip in self._clips.values()).encode())
        if lost:
            logger.info("%d clips of a run that was killed are recovered", len(lost))
        self._append(lost)
        self._prompts: dict[str, Path | None] = {}  # key -> file, None until it is written
        for path in sorted((self.folder / PROMPTS_FOLDER).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._prompts.update(dict.fromkeys(file.keys(), path))

    def _check_same(self, name: str, stored: Any, value: Any) -> None:
        if stored != value:
            raise ValueError(
                f"{self.folder} was begun with {name}={stored!r}, not {value!r}: give that, or name another folder"
            )

    def identify(self, *, vae: str = "", text_encoder: str = "") -> None:
        """Record the hashes of the VAE and text encoder. Raises ValueError if the folder was begun with others."""
        for name, identity in (("vae", vae), ("text_encoder", text_encoder)):
            stored = getattr(self.facts, name)
            if identity and stored and stored != identity:
                raise ValueError(
                    f"{self.folder} was begun with another {name} ({stored[:12]}, not {identity[:12]}): name another "
                    "folder"
                )
        self.facts = replace(
            self.facts, vae=vae or self.facts.vae, text_encoder=text_encoder or self.facts.text_encoder
        )
        self._write_facts()

    def __contains__(self, clip_id: str) -> bool:
        return clip_id in self._clips

    def __len__(self) -> int:
        return len(self._clips)

    def __iter__(self) -> Iterator[ClipInfo]:
        """Iterate over the clips so far."""
        return iter(list(self._clips.values()))

    def has_prompt(self, caption: str) -> bool:
        """Check for the embeddings of a caption."""
        return caption_key(caption) in self._prompts

    def embeds(self, caption: str) -> Tensor:
        """Return the added embeddings of a caption, ``[L, D]`` without padding. Raises KeyError for an unknown one."""
        key = caption_key(caption)
        path = self._prompts[key]
        if path is None:
            return self._pending_prompts[key]
        with safe_open(path, "pt") as file:
            return file.get_tensor(key)

    def add_prompt(self, caption: str, embeds: Tensor) -> None:
        """Add the embeddings ``[n, D]`` of a caption, in their own dtype; zero rows at the end are not stored.

        Raises:
            ValueError: another shape, NaN or infinity.
        """
        key = caption_key(caption)
        if embeds.ndim != 2:
            raise ValueError(f"embeddings of shape {list(embeds.shape)}: give [tokens, width]")
        if not is_finite(embeds):
            raise ValueError(f"the embeddings of {caption[:60]!r} hold NaN or infinity")
        if key in self._prompts:
            return
        self._pending_prompts[key] = without_padding(embeds).detach().cpu().contiguous().clone()
        self._pending_prompt_bytes += self._pending_prompts[key].nbytes
        self._prompts[key] = None
        if self._pending_prompt_bytes >= _PROMPT_SHARD_BYTES:
            self._write_prompts()
        self._flush_if_due()

    def add(
        self,
        clip_id: str,
        latents: Tensor,
        caption: str,
        *,
        fps: float,
        height: int,
        width: int,
        frames: int,
        source: str = "",
        sha256: str = "",
        start_seconds: float = 0.0,
    ) -> None:
        """Add a clip: normalised latents ``[C, F, h, w]`` of `frames` frames of `height` x `width` pixels.

        Raises:
            ValueError: the id is taken, the latents have another shape or number of channels, or hold NaN or infinity.
        """
        if not clip_id or clip_id in self._clips:
            raise ValueError(f"clip id {clip_id!r} is {'taken' if clip_id else 'empty'}: each clip needs its own")
        if latents.ndim != 4 or 0 in latents.shape:
            raise ValueError(f"latents of shape {list(latents.shape)}: give [channels, latent frames, height, width]")
        if not is_finite(latents):
            raise ValueError(f"the latents of {clip_id} hold NaN or infinity")
        if not (fps > 0 and math.isfinite(fps)) or min(height, width, frames) < 1:
            raise ValueError(f"{clip_id}: {frames} frames of {width}x{height} at {fps:g} fps are no clip")
        channels = latents.shape[0]
        if not self.facts.latent_channels:
            self.facts = replace(self.facts, latent_channels=channels)
            self._write_facts()
        elif channels != self.facts.latent_channels:
            raise ValueError(f"{clip_id} has {channels} latent channels, the dataset has {self.facts.latent_channels}")
        shape: Shape = tuple(latents.shape)  # type: ignore[assignment]
        clip = ClipInfo(
            id=clip_id,
            shard="",
            frames=frames,
            height=height,
            width=width,
            latent_shape=shape,
            fps=float(fps),
            caption=caption,
            prompt=caption_key(caption),
            sha256=sha256,
            source=source,
            start_seconds=float(start_seconds),
        )
        pending = self._pending.setdefault(shape, [])
        pending.append((clip, latents.detach().to("cpu", self._dtype, copy=True).contiguous()))
        self._clips[clip_id] = clip
        if len(pending) * pending[0][1].nbytes >= self._shard_bytes or len(pending) >= _MAX_CLIPS_PER_SHARD:
            self._write_shard(shape)
        self._flush_if_due()

    def recaption(self, clip_id: str, caption: str) -> None:
        """Replace the caption of a clip and keep its latents. Raises KeyError for an unknown id."""
        if self._clips[clip_id].caption == caption:
            return
        if not self._clips[clip_id].shard:
            self.flush()
        self._append([replace(self._clips[clip_id], caption=caption, prompt=caption_key(caption))])

    def flush(self) -> None:
        """Write all added clips and prompts to disk."""
        self._write_prompts()
        for shape in list(self._pending):
            self._write_shard(shape)
        self._flushed_at = time.monotonic()

    def _flush_if_due(self) -> None:
        if time.monotonic() - self._flushed_at > self._flush_seconds:
            self.flush()

    def close(self) -> None:
        """Flush, and check that every caption, and the empty one, has embeddings.

        Raises:
            ValueError: some have none; the added clips are kept.
        """
        try:
            self.flush()
            missing = {clip.caption for clip in self._clips.values() if clip.prompt not in self._prompts}
            missing |= set() if self.has_prompt("") else {""}
            if missing:
                some = ", ".join(repr(caption[:40]) for caption in sorted(missing)[:3])
                raise ValueError(f"captions without embeddings: {len(missing)} ({some}); add_prompt them")
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.flush()
        finally:
            self._lock.release()

    # ---- files -----------------------------------------------------------------------------------------------------

    def _write_facts(self) -> None:
        values = {"format": FORMAT, "version": VERSION, **asdict(self.facts), "pusa": __version__}
        self._replace(self.folder / DATASET_FILE, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())

    def _write_shard(self, shape: Shape) -> None:
        pending = self._pending.pop(shape)
        self._write_prompts()  # first, so that every clip on disk has its prompt there
        path = self._next(LATENTS_FOLDER, "x".join(map(str, shape)) + "-")
        clips = [replace(clip, shard=path.name) for clip, _ in pending]
        tensors = {clip.id: latents for clip, latents in pending}
        self._save(path, tensors, {"pusa": json.dumps([clip.as_json() for clip in clips], ensure_ascii=False)})
        self._append(clips)

    def _write_prompts(self) -> None:
        if self._pending_prompts:
            path = self._next(PROMPTS_FOLDER, "")
            self._save(path, self._pending_prompts, {})
            self._prompts.update(dict.fromkeys(self._pending_prompts, path))
            self._pending_prompts, self._pending_prompt_bytes = {}, 0

    def _next(self, folder: str, stem: str) -> Path:
        taken = [int(path.stem.rpartition("-")[2]) for path in (self.folder / folder).glob(f"{stem}*.safetensors")]
        return self.folder / folder / f"{stem}{max(taken, default=-1) + 1:05d}.safetensors"

    def _append(self, clips: list[ClipInfo]) -> None:
        if clips:
            with (self.folder / CLIPS_FILE).open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(_line(clip) for clip in clips)
                file.flush()
                os.fsync(file.fileno())
            self._clips.update((clip.id, clip) for clip in clips)

    def _save(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        part = path.with_name(f".{path.name}.part")
        save_file(tensors, part, metadata)
        rename_flushed(part, path)

    def _replace(self, path: Path, content: bytes) -> None:
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        rename_flushed(part, path)


def _missing(values: list[Any], stored: list[Any]) -> list[Any]:
    return [value for value in values if value not in stored]


def _line(clip: ClipInfo) -> str:
    return json.dumps(clip.as_json(), ensure_ascii=False) + "\n"


def rename_flushed(part: Path, path: Path) -> None:
    """Flush a file before renaming it, so that not even a power cut leaves half a file."""
    flush(part)
    os.replace(part, path)
    flush(path.parent)
