"""Fill a model from its files tensor by tensor, and remember where each weight came from.

A tensor is read, cast and put in its place before the next one is read, so that memory holds the model and one tensor.
`pusa.lora` reads weights again from there, in place of keeping a second copy of a model.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pusa.models import files
from pusa.models.fp8 import STORAGE
from pusa.models.tensors import open_tensors

Progress = Callable[[int, int], None]  # bytes read so far, and of all
Places = Mapping[Path, Mapping[str, str]]  # file -> key in it -> name in the model
Devices = torch.device | str | Mapping[str, torch.device | str]  # one for all parts, or by part


class WeightsChangedError(RuntimeError):
    """A file is not the one any more that a model was loaded from."""


def rows_of(tensor: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    """Take ranges of a tensor's rows, in this order; all without any. A single one is a view."""
    if len(rows) < 2:
        return tensor[slice(*rows[0])] if rows else tensor
    return torch.cat([tensor[first:last] for first, last in rows])


@dataclass(frozen=True)
class WeightSource:
    """Name a tensor in a file, with the file's size and time of change when it was read.

    Attributes:
        scale_key: of the tensor that it is multiplied by, one number or one for each row; "": none.
        rows: ranges of the stored rows that it is made of, in this order; (): all of them.
    """

    path: Path
    key: str
    size_bytes: int
    changed_ns: int
    scale_key: str = ""
    rows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, path: Path, key: str, scale_key: str = "", rows: tuple[tuple[int, int], ...] = ()) -> "WeightSource":
        """Describe a tensor of a file as it is now."""
        stat = path.stat()
        return cls(path, key, stat.st_size, stat.st_mtime_ns, scale_key, rows)

    def check(self) -> None:
        """Raise WeightsChangedError unless the file is as it was."""
        fault = "is gone"
        if self.path.is_file():
            stat = self.path.stat()
            if (stat.st_size, stat.st_mtime_ns) == (self.size_bytes, self.changed_ns):
                return
            fault = "has changed"
        raise WeightsChangedError(
            f"{self.path} {fault} since the model was loaded from it, and its weights are needed again: put the file "
            "back as it was, or load the model again"
        )

    def read(self) -> Tensor:
        """Read the tensor as it is stored, mapped from disk, or its scaled values in fp32; raise as `check`."""
        self.check()
        with open_tensors(self.path) as get:
            stored = get(self.key)
            if not self.scale_key:
                return rows_of(stored, self.rows)
            scale = get(self.scale_key).float().reshape(-1, *[1] * (stored.ndim - 1))
            return rows_of(stored.to(torch.float32, copy=True).mul_(scale), self.rows)


class LoadCounter:
    """Count the bytes read of several parts, and report them with those of all."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress, self._total_bytes = progress, total_bytes
        self._done_bytes = 0

    def add(self, count: int) -> None:
        self._done_bytes = min(self._done_bytes + count, self._total_bytes)
        self._progress(self._done_bytes, self._total_bytes)


def device_of(part: str, device: Devices) -> torch.device | str:
    """Return the device of a part: the one for all, or its own, and the CPU if it has none."""
    return device.get(part, "cpu") if isinstance(device, Mapping) else device


def bytes_in_ram(weights: Mapping[str, int], device: Devices, as_fp8: Collection[str]) -> dict[str, int]:
    """Leave out of the bytes of parts those that go to other devices, and halve those that are read as fp8."""
    on_cpu = {part: size for part, size in weights.items() if str(device_of(part, device)) == "cpu"}
    return {part: size // 2 if part in as_fp8 else size for part, size in on_cpu.items()}


def weight_dtype(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Choose the dtype of a parameter as its library does when it loads the model in `dtype`.

    Diffusers keeps some of Wan's weights (time embedding, norms, modulation) in fp32, and transformers some of UMT5's
    in fp16 only, which cannot hold them.
    """
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if isinstance(model, transformers.PreTrainedModel) and dtype != torch.float16:
        keep = set()
    return torch.float32 if keep & set(name.split(".")) else dtype


def places(paths: Iterable[Path], rename: Callable[[dict[str, str]], Mapping[str, str]] = dict) -> Places:
    """List the tensors of files in the order in which they are stored, and where each belongs.

    Args:
        paths: safetensors files or pickles.
        rename: turns keys of the mapping key -> key into names in the model.
    """
    found: dict[Path, dict[str, str]] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            header = files.safetensors_header(path)
            keys = sorted(header, key=lambda key: header[key]["data_offsets"])
        else:
            with open_tensors(path) as get:
                keys = list(get.keys)
        found[path] = {key: name for name, key in rename({key: key for key in keys}).items()}
    return found


@torch.no_grad()
def fill(
    model: nn.Module,
    weights: Places,
    dtype: torch.dtype,
    *,
    device: "torch.device | str" = "cpu",
    counter: LoadCounter | None = None,
    keep_mapped: bool = False,
) -> None:
    """Read all weights of a model on the meta device, cast them and put them on a device.

    Args:
        model: as `accelerate.init_empty_weights` leaves it, with `pusa.models.fp8.store_as_fp8` if wanted: weights
            that are fp8 there are cast to it, too. The caller has checked that the files have exactly its tensors;
            names that it lacks are passed over.
        weights: see `places`.
        dtype: see `weight_dtype`.
        keep_mapped: leave weights that need no cast on disk, mapped into memory: right for a model on the CPU that is
            used once. Otherwise no file stays mapped.
    """
    sources = model.__dict__.setdefault("_pusa_weights", {})
    known = {name: empty.dtype for name, empty in model.state_dict().items()}
    for path, names in weights.items():
        source = WeightSource.of(path, "")
        with open_tensors(path) as get:
            for key, name in names.items():
                if name not in known:
                    continue
                stored = get(key)
                value = stored.to(device, weight_dtype(model, name, dtype), copy=not keep_mapped)
                _put(model, name, value.to(STORAGE) if known[name] == STORAGE else value)
                sources[name] = replace(source, key=key)
                if counter is not None:
                    counter.add(stored.nbytes)
                del stored, value
    if isinstance(model, transformers.PreTrainedModel):
        _tie(model)
        model.config.dtype = dtype
    model.to(device)  # buffers, which are in no file
    model.eval()


def sources_of(model: nn.Module) -> dict[str, WeightSource]:
    """Return where the weights of a model were read from, by name; empty if it was not filled from files."""
    found = getattr(model, "_pusa_weights", {})
    return found if isinstance(found, dict) else {}


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    before = getattr(module, attribute)
    if isinstance(before, nn.Parameter):
        setattr(module, attribute, nn.Parameter(value, requires_grad=before.requires_grad))
    else:
        setattr(module, attribute, value)


def _tie(model: Any) -> None:
    """Tie weights of which the files have one, or both with equal values; others stay as the files have them."""
    pairs: Mapping[str, str] | Collection[str] = model._tied_weights_keys or {}
    for target, source in pairs.items() if isinstance(pairs, Mapping) else ():
        first, second = model.get_parameter(source), model.get_parameter(target)
        if first.is_meta and not second.is_meta:
            _put(model, source, second.data)
        elif not first.is_meta and not second.is_meta and not torch.equal(first, second):
            return
    model.tie_weights()
