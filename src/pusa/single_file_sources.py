"""Choose the single files that a pipeline is loaded from.

They are those of a user, a model's own where only its transformer is published, and smaller ones that others publish.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pusa import resources, zoo
from pusa.models.single_file.recognition import recognise
from pusa.models.sources import file_parts, file_set, published
from pusa.models.sources.published import PublishedFile
from pusa.models.streaming import Devices, bytes_in_ram
from pusa.resources import DType, dtype_of
from pusa.zoo import ZooModel

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


@dataclass(frozen=True)
class FileSources:
    """Hold the parts of a pipeline that are in single files.

    Attributes:
        files: "transformer", "transformer_2", "text_encoder", "vae" -> file; checked by their headers.
        keep_quantized: the matrices of all parts, or of those that are named, stay as the files store them.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    keep_quantized: bool | Collection[str] = False

    def has_all(self, here: Collection[str], experts: int) -> bool:
        """Tell if `here` names every component that has weights or words, for a model with so many transformers."""
        needed = {"tokenizer", "text_encoder", "vae", "transformer"} | ({"transformer_2"} if experts == 2 else set())
        return needed <= set(here)

    def default_dtype(self, model: ZooModel | None, others: Mapping[str, int]) -> DType:
        """Choose the dtype of all parts by their parameters: those of a published model, or of the files and others."""
        counts = dict(model.parameters) if model and not model.is_ours else dict(others)
        return resources.default_dtype(sum({**counts, **file_parts.parameter_counts(self.files)}.values()))

    def load(
        self,
        replaced: Collection[str],
        *,
        dtype: DType,
        config: Mapping[str, Mapping[str, Any]] | None = None,
        device: Devices = "cpu",
        as_fp8: Collection[str] = (),
    ) -> dict[str, Any]:
        """Load the parts that nothing replaces; raise ResourcesError if they do not fit into memory together."""
        wanted = {part: path for part, path in self.files.items() if part not in replaced}
        names = ", ".join(dict.fromkeys(path.name for path in wanted.values()))
        need = file_parts.weight_bytes(wanted, dtype, self.keep_quantized)
        resources.check_ram(bytes_in_ram(need, device, as_fp8), names)
        given: dict[str, Any] = {"keep_quantized": self.keep_quantized, "device": device, "as_fp8": as_fp8}
        return file_parts.load_parts(wanted, dtype=dtype, config=config or None, **given)


def take(
    source: str | Path,
    options: dict[str, Any],
    dtype: "DType | None",
    only: str | None = None,
    *,
    check_ram: bool = True,
) -> FileSources:
    """Take what concerns single files out of the options of `pusa.loading.load_pipeline`.

    Args:
        source: of the pipeline; a model that the user has added, and ComfyUI's folder, have files of their own.
        options: of these the function removes
            ``files``: part -> path, in place of the source's part. An all-in-one file gives several;
            ``storage``: part -> "bfloat16" or "fp8": for a model that is downloaded, take a file of others' in it where
            that is smaller. None: "bfloat16" for the parts that run in it;
            ``keep_quantized``: keep weights of linear layers as the files store them; True, or the names of parts.
            Components and options of the Hub are looked at.
        dtype: of the pipeline.
        only: the one part that is loaded.
        check_ram: False: the caller has checked that a model fits that is downloaded.

    Raises:
        TypeError: `files` is no mapping. ValueError: it names no part of a pipeline.
        FileNotFoundError, DamagedFileError, WrongArchitectureError: a file is missing, is cut short, or does not hold
            the part, or not that of the model.
    """
    given = _checked(options.pop("files", None) or {})
    storage: Mapping[str, str] | None = options.pop("storage", None)
    keep_quantized = options.pop("keep_quantized", False)
    model = zoo.find(source)
    files = file_set.expand({**(model.files if model else {}), **given})
    if only is not None:
        files = {part: path for part, path in files.items() if part == only}
    if model is not None and not model.is_ours:
        file_parts.check_model(files, model.transformer, model.experts, model.family or model.name)
        if model.hub_id is not None:
            skip = [name for name in file_set.PARTS if name in options or name in files or only not in (None, name)]
            files |= _own_weights(model, dtype, skip, options, check_ram=check_ram)
            skip += files.keys() - set(skip)
            files |= _published(model, storage, dtype, skip, options, check_ram=check_ram)
    return FileSources(files, keep_quantized)


def _checked(given: Any) -> dict[str, Path]:
    if not isinstance(given, Mapping):
        raise TypeError(f'files is a {type(given).__name__}: give the part of each, such as {{"transformer": path}}')
    if unknown := sorted(map(str, given.keys() - set(file_set.PARTS))):
        raise ValueError(f"files has {unknown[0]!r}, which is none of {', '.join(file_set.PARTS)}")
    return {part: Path(path).expanduser() for part, path in given.items()}


def _own_weights(
    model: ZooModel, dtype: "DType | None", skip: Collection[str], options: Mapping[str, Any], *, check_ram: bool
) -> dict[str, Path]:
    """Find, or download, the single files of a model whose other parts are its base's.

    Raises:
        FileNotFoundError: one cannot be had; the base's own part would be another model.
        WrongArchitectureError: one is not what the zoo says.
    """
    wanted = {part: file for part, file in model.weights.items() if part not in skip}
    if not wanted:
        return {}
    _check_download(model, wanted, dtype, skip, options.get("cache_dir"), check_ram=check_ram)
    files = published.fetch_own(model.name, wanted, **_hub(options))
    for part, path in files.items():
        file_set.part_in(recognise(path), part)
    file_parts.check_model(files, model.transformer, model.experts, model.name)
    return files


def _check_download(
    model: ZooModel,
    wanted: Mapping[str, PublishedFile],
    dtype: "DType | None",
    skip: Collection[str],
    cache: str | Path | None,
    *,
    check_ram: bool,
) -> None:
    """Raise ResourcesError unless memory suffices for a model, and the disk for files that are not here yet."""
    from huggingface_hub.constants import HF_HUB_CACHE

    zoo.check_resources(model, dtype=dtype, skip=skip, ram=check_ram)
    missing = sum(file.size_bytes for file in wanted.values() if published.cached_path(file, cache) is None)
    resources.check_disk(missing, Path(cache or HF_HUB_CACHE), model.name)


def _hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("cache_dir", "local_files_only", "token") if name in options}


def _published(
    model: ZooModel,
    storage: Mapping[str, str] | None,
    dtype: "DType | None",
    skip: Collection[str],
    options: Mapping[str, Any],
    *,
    check_ram: bool,
) -> dict[str, Path]:
    """Find, or download, files that are smaller than those in the model's own repository."""
    if options.keys() & {"variant", "revision", "device_map", "quantization_config", "force_download"}:
        return {}  # these are about the repository's own files
    if storage is None:
        in_bf16 = [part for part in file_set.PARTS if dtype is None or dtype_of(part, dtype) == torch.bfloat16]
        storage = dict.fromkeys(in_bf16, "bfloat16")
    cache = options.get("cache_dir")
    wanted = published.wanted(
        model.published, storage, str(model.hub_id), larger_than=model.file_bytes, skip=skip, cache=cache
    )
    if not wanted:
        return {}
    _check_download(model, wanted, dtype, skip, cache, check_ram=check_ram)
    return published.fetch(wanted, **_hub(options))
