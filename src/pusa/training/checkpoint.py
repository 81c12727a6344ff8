"""The whole state of a run, written so that a kill at any moment leaves the last one intact.

    checkpoints/step-00000100/
      state.json                  step, training time, how many processes wrote it and how
      weights-00001.safetensors   what is trained, whole tensors by name
      average-00001.safetensors   its moving average, if one is kept
      optimizer-00001.safetensors whole tensors by ``parameter/name``
      process-00000.pt            of each process: random states and counters of the log

Tensors are whole and named, however they were sharded, so that any number of processes can go on with them. A file ends
at about 4 GB: only so much is gathered at a time. Everything is written beside and renamed when it is on the disk.
"""

import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from pusa.fsutil import flush
from pusa.training.config import CheckpointConfig
from pusa.training.distributed import Processes
from pusa.training.model import local

STATE_FILE = "state.json"
_FILE_BYTES = 4 * 2**30
_NAME = re.compile(r"step-(\d{8,})")

Named = Iterable[tuple[str, Tensor]]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints below ``folder/checkpoints`` by their step, ascending."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("step-*")):
        if (match := _NAME.fullmatch(path.name)) and (path / STATE_FILE).is_file():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def write_checkpoint(
    folder: Path,
    step: int,
    *,
    state: Mapping[str, Any],
    tensors: Mapping[str, Named],
    own: Mapping[str, Any],
    processes: Processes,
    rule: CheckpointConfig,
) -> Path:
    """Write a checkpoint and drop those that the rule does not keep. Every process must call it.

    Args:
        folder: of the run.
        state: what ``state.json`` says, plain values.
        tensors: by the beginning of their files' names.
        own: what this process keeps for itself, tensors and plain values.
    """
    target = folder / "checkpoints" / folder_name(step)
    part = target.with_name(f".{target.name}.part")
    if processes.is_main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    processes.wait()
    for prefix, named in tensors.items():
        _write_tensors(part, prefix, named, writes=processes.is_main)
    file = part / f"process-{processes.rank:05d}.pt"
    torch.save({**own, "random": random_states()}, file)
    flush(file)
    processes.wait()
    if processes.is_main:
        (part / STATE_FILE).write_text(json.dumps(dict(state), indent=2) + "\n")
        flush(part / STATE_FILE)
        flush(part)
        if target.exists():  # this step again, after going on from an earlier one
            shutil.rmtree(target)
        part.rename(target)
        flush(target.parent)
        _prune(folder, rule)
    processes.wait()
    return target


def _prune(folder: Path, rule: CheckpointConfig) -> None:
    found = checkpoints(folder)
    for step in list(found)[: -rule.keep_last]:
        if not (rule.keep_every and step % rule.keep_every == 0):
            doomed = found[step].rename(found[step].with_name(f".{found[step].name}.old"))
            shutil.rmtree(doomed)
    for left in (folder / "checkpoints").glob(".step-*"):  # of runs that were killed here
        shutil.rmtree(left)


def _write_tensors(folder: Path, prefix: str, named: Named, *, writes: bool) -> None:
    pending: dict[str, Tensor] = {}
    size = number = 0

    def write() -> None:
        nonlocal pending, size, number
        number += 1
        path = folder / f"{prefix}-{number:05d}.safetensors"
        save_file(pending, path)
        flush(path)
        pending, size = {}, 0

    for name, tensor in named:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # all processes together
        if writes:
            pending[name] = whole.detach().cpu().contiguous().clone()
            size += whole.nbytes
            if size >= _FILE_BYTES:
                write()
    if pending:
        write()


# ---- reading -------------------------------------------------------------------------------------------------------


class Tensors:
    """The tensors below one prefix of a checkpoint, read when they are asked for."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob(f"{prefix}-*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    @torch.no_grad()
    def into(self, name: str, target: Tensor) -> None:
        """Copy a tensor, or this process's rows of it, into `target`.

        Raises:
            ValueError: there is none, or it has another shape.
        """
        if name not in self._files:
            raise ValueError(f"{self.folder.name} has no {name}: it was written with other settings (method, model)")
        part = self._files[name].get_slice(name)
        if list(part.get_shape()) != list(target.shape):
            raise ValueError(
                f"{self.folder.name} has {name} as {part.get_shape()}, and this run as {list(target.shape)}: resume "
                "with the method it was begun with"
            )
        mine = local(target)
        if isinstance(target, DTensor):
            rows = -(-target.shape[0] // target.device_mesh.size())  # as FSDP2 cuts the first dimension
            first = min(target.device_mesh.get_local_rank() * rows, target.shape[0])
            mine.copy_(part[first : first + mine.shape[0]])
        elif target.ndim:
            mine.copy_(part[:])
        else:
            mine.copy_(self[name])


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_FILE).read_text())


def read_own(folder: Path, rank: int) -> dict[str, Any]:
    """What process `rank` kept for itself; {} if there were fewer processes."""
    file = folder / f"process-{rank:05d}.pt"
    return torch.load(file, weights_only=True, map_location="cpu") if file.is_file() else {}


# ---- optimizers ----------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor]) -> Named:
    """All state of the optimizers by ``parameter/name``."""
    for name, parameter in parameters.items():
        for optimizer in optimizers:
            for field, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}/{field}", value if isinstance(value, Tensor) else torch.tensor(value)


def fill_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor], tensors: Tensors
) -> None:
    """Give optimizers that have not stepped yet the state that was written."""
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key in tensors:
        name, _, field = key.rpartition("/")
        if name not in parameters:
            raise ValueError(f"{tensors.folder.name} has {name}, which this run does not train: it was another method")
        parameter = parameters[name]
        stored = tensors[key]
        if stored.shape == parameter.shape:
            value = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            tensors.into(key, value)
        else:  # a counter
            value = stored.to(parameter.device)
        owners[id(parameter)].state[parameter][field] = value


# ---- random states -------------------------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """Of Python, numpy and torch on this process, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": [list(part) if isinstance(part, tuple) else part for part in random.getstate()],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
