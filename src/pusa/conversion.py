"""Write any model as a folder in diffusers layout, in bf16 or fp16, without holding it in memory.

Weights are read and cast one by one, and a shard of at most 2 GB is written before the next one is begun. The parts
that are loaded in fp32 whatever the dtype (the VAE, the transformers' norms and modulation) are written in fp32: a
model loaded from the folder in this dtype is the one loaded from the source in it, bit for bit.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from pusa import loading
from pusa.events import BytesProgress, Done, Events, Report, RunEnded, Stage, as_events
from pusa.fsutil import check_new_folder, flush, replacing_folder
from pusa.models import files, original, parts
from pusa.models.streaming import LoadCounter, Places, weight_dtype
from pusa.models.tensors import open_tensors
from pusa.pipeline import PusaPipeline
from pusa.resources import ResourcesError, readable
from pusa.scheduler import PusaFlowMatchEulerScheduler
from pusa.zoo import CARD_FILE

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 2 * 10**9

_SMALL_PARTS = ("scheduler", "tokenizer")


@dataclass(frozen=True)
class _Part:
    """Hold a part to write: its empty model, and for each name in it where its value is and which dtype it gets."""

    name: str
    model: Any
    sources: Mapping[str, tuple[Path, str]]
    dtypes: Mapping[str, torch.dtype]

    @property
    def shapes(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: torch.empty(state[name].shape, dtype=self.dtypes[name], device="meta") for name in self.sources}


def convert(
    source: str | Path,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    stop: Callable[[], bool] = lambda: False,
) -> Events:
    """Write a model as a new folder in diffusers layout.

    Args:
        source: as in `pusa.loading.load_pipeline`.
        folder: appears when it is whole; one that exists must be empty.
        dtype: a key of `DTYPES`, of the transformers and the text encoder.
        shard_bytes: size limit of a file, and of what is in memory; a larger tensor has a file of its own.
        stop: called between weights; True ends the run, and nothing is left.

    Yields:
        Events, see `pusa.events`; the last is ``done`` with the folder, unless `stop` ended the run.

    Raises:
        ValueError: the folder is not empty, an unknown dtype, or a quantised part; and as `load_pipeline`.
        FileNotFoundError: as `load_pipeline`.
        ResourcesError: the disk is too small.
    """

    def run(report: Report) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
        check_new_folder(folder)
        report(Stage("load"))
        place = loading.find_folder(source)
        found = list(_parts(place, DTYPES[dtype]))
        _check_disk(sum(value.nbytes for part in found for value in part.shapes.values()), folder)
        report(Stage("convert"))
        paths = {path for part in found for path, _ in part.sources.values()}
        shown = BytesProgress(report, "convert")

        def progress(done_bytes: int, total_bytes: int) -> None:
            if stop():
                raise RunEnded
            shown(done_bytes, total_bytes)

        counter = LoadCounter(progress, sum(path.stat().st_size for path in paths))
        with replacing_folder(folder) as target:
            for part in found:
                _write_part(part, target / part.name, shard_bytes, counter)
            _write_small_files(place, target, found)
        report(Done({"model": folder}))

    return as_events(run)


def _parts(place: Path, dtype: torch.dtype) -> Iterator[_Part]:
    """List the parts of a checked folder."""
    if files.is_original(place):
        for name, expert in files.original_experts(place).items():
            yield _part(name, original.empty_transformer(expert), original.places_of_transformer(expert), dtype)
        yield _part("vae", *original.empty_vae(place), torch.float32)
        yield _part("text_encoder", *original.empty_text_encoder(place), dtype)
        return
    streamed = parts.streamed_files(place)
    for name in files.diffusers_components(place):
        if name in streamed:
            model, weights = parts.empty_part(place, name, streamed[name])
            yield _part(name, model, weights, torch.float32 if name == "vae" else dtype)
        elif name not in _SMALL_PARTS:
            raise ValueError(f"{place.name}/{name} is quantised, or of another library: convert the model as published")


def _part(name: str, model: nn.Module, weights: Places, dtype: torch.dtype) -> _Part:
    sources: dict[str, tuple[Path, str]] = {}
    known = model.state_dict()
    for path, names in weights.items():
        for key, weight in names.items():
            if weight in known:
                sources[weight] = path, key
    if original.TIED_COPY in sources:  # transformers writes it under its first name alone
        tied = sources.pop(original.TIED_COPY)
        sources.setdefault(original.EMBEDDING, tied)
    return _Part(name, model, sources, {weight: weight_dtype(model, weight, dtype) for weight in sources})


def _check_disk(need: int, folder: Path) -> None:
    existing = next(place for place in folder.absolute().parents if place.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file, and {folder} would be in it: give another folder")
    have = shutil.disk_usage(existing).free
    if need > have:
        raise ResourcesError(
            f"the converted model needs {readable(need)} of disk, and {existing} has {readable(have)}: free some, or "
            "give a folder on a larger disk"
        )


def _write_part(part: _Part, folder: Path, shard_bytes: int, counter: LoadCounter) -> None:
    """Write configuration, shards and, if there are several, their index."""
    folder.mkdir()
    is_encoder = isinstance(part.model, PreTrainedModel)
    stem = "model" if is_encoder else "diffusion_pytorch_model"
    shards = split_torch_state_dict_into_shards(
        part.shapes, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in shards.filename_to_tensors.items():
        tensors: dict[str, Tensor] = {}
        for path, group in groupby(names, key=lambda name: part.sources[name][0]):
            with open_tensors(path) as get:
                for name in group:
                    stored = get(part.sources[name][1])
                    tensors[name] = stored.to(part.dtypes[name], copy=True).contiguous()
                    counter.add(stored.nbytes)
                    del stored
        save_file(tensors, folder / file, {"format": "pt"})
        flush(folder / file)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if is_encoder:
        part.model.config.architectures = [type(part.model).__name__]
        part.model.config.dtype = part.dtypes[original.EMBEDDING]
        part.model.config.save_pretrained(folder)
    else:
        part.model.save_config(folder)


def _write_small_files(place: Path, target: Path, found: list[_Part]) -> None:
    """Write ``model_index.json``, tokenizer and scheduler, and what a model of our own recipe has beside them."""
    if files.is_original(place):
        pipe = PusaPipeline(
            AutoTokenizer.from_pretrained(place / files.ORIGINAL_TOKENIZER), None, None, PusaFlowMatchEulerScheduler()
        )
        pipe.save_pretrained(target)
        index = files.read_json(target / "model_index.json")
        libraries = {part.name: type(part.model).__module__.partition(".")[0] for part in found}
        index |= {part.name: [libraries[part.name], type(part.model).__name__] for part in found}
        index["boundary_ratio"] = original.WAN22_BOUNDARY_RATIO if "transformer_2" in libraries else None
        (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        return
    shutil.copy(place / "model_index.json", target)
    for name in _SMALL_PARTS:
        if (place / name).is_dir():
            shutil.copytree(place / name, target / name)
    if (place / CARD_FILE).is_file():
        shutil.copy(place / CARD_FILE, target)
        for lora in files.read_json(place / CARD_FILE).get("lora", {}).values():
            shutil.copy(place / lora, target)
