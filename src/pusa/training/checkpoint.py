"""Write and read checkpoints: the whole state of a run, intact if the process is killed at any moment.

    checkpoints/step-00000100/
      state.json                  step, training time, number and layout of the processes that wrote it
      weights-00001.safetensors   trained weights, whole tensors by name
      average-00001.safetensors   their moving average, if one is kept
      optimizer-00001.safetensors whole tensors by ``parameter/name``
      process-00000.pt            for each process: random states and counters of the log

Tensors are whole and named, however they were sharded, so that any number of processes can resume from them. A file
ends at about 4 GB: no more is gathered at a time. A checkpoint is written under another name and renamed once on disk.
"""

import io
import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from pusa.fsutil import flush
from pusa.training.config import CheckpointConfig
from pusa.training.disk import explaining_full_disk
from pusa.training.distributed import Processes
from pusa.training.model import local

STATE_FILE = "state.json"
_FILE_BYTES = 4 * 2**30
_NAME = re.compile(r"step-(\d{8,})")

Named = Iterable[tuple[str, Tensor]]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Find the complete checkpoints in ``folder/checkpoints``: step -> folder, ascending."""
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
    process_state: Mapping[str, Any],
    processes: Processes,
    rule: CheckpointConfig,
    need_bytes: int,
) -> Path:
    """Write a checkpoint and delete those that the rule does not keep. Every process must call it.

    Args:
        folder: the run's, or the expert's if there are two.
        state: plain values for ``state.json``.
        tensors: (name, tensor) pairs by the prefix of their files' names.
        process_state: tensors and plain values that this process alone will need.
        need_bytes: about as large will the checkpoint be; only for the message of a full disk.

    Raises:
        ResourcesError: the disk is full. What was written of this checkpoint is removed; earlier ones are intact.
    """
    target = folder / "checkpoints" / folder_name(step)
    part = target.with_name(f".{target.name}.part")
    with explaining_full_disk(folder, f"the checkpoint of step {step}", need_bytes), _removed_if_broken(part):
        if processes.is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        processes.wait()
        for prefix, named in tensors.items():
            _write_tensors(part, prefix, named, writes=processes.is_main)
        content = io.BytesIO()  # torch reports a full disk in its own words, Python as such
        torch.save({**process_state, "random": random_states()}, content)
        file = part / f"process-{processes.rank:05d}.pt"
        file.write_bytes(content.getvalue())
        flush(file)
        processes.wait()
        if processes.is_main:
            (part / STATE_FILE).write_text(json.dumps(dict(state), indent=2) + "\n")
            flush(part / STATE_FILE)
            flush(part)
            if target.exists():  # an earlier run wrote this step and was resumed from before it
                shutil.rmtree(target)
            part.rename(target)
            flush(target.parent)
            _prune(folder, rule)
        processes.wait()
    return target


@contextmanager
def _removed_if_broken(part: Path) -> Iterator[None]:
    """Remove the unfinished folder after an error: on a full disk it holds what the log and a retry need."""
    try:
        yield
    except (OSError, SafetensorError):
        shutil.rmtree(part, ignore_errors=True)
        raise


def _prune(folder: Path, rule: CheckpointConfig) -> None:
    found = checkpoints(folder)
    for step in list(found)[: -rule.keep_last]:
        if not (rule.keep_every and step % rule.keep_every == 0):
            shutil.rmtree(found[step].rename(found[step].with_name(f".{found[step].name}.old")))
    for leftover in (folder / "checkpoints").glob(".step-*"):  # of runs that were killed while writing
        shutil.rmtree(leftover)


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
    """Read the tensors of one prefix of a checkpoint, each on access."""

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
        """Copy a tensor, or the rows of it that this process holds, into `target`.

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
        part_here = local(target)
        if isinstance(target, DTensor):
            rows = -(-target.shape[0] // target.device_mesh.size())  # as FSDP2 cuts the first dimension
            first = min(target.device_mesh.get_local_rank() * rows, target.shape[0])
            part_here.copy_(part[first : first + part_here.shape[0]])
        elif target.ndim:
            part_here.copy_(part[:])
        else:
            part_here.copy_(self[name])


def read_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json`` of a checkpoint."""
    return json.loads((folder / STATE_FILE).read_text())


def read_process_state(folder: Path, rank: int) -> dict[str, Any]:
    """Read the state of process `rank`; {} if fewer processes wrote the checkpoint."""
    file = folder / f"process-{rank:05d}.pt"
    return torch.load(file, weights_only=True, map_location="cpu") if file.is_file() else {}


# ---- optimizers ----------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor]) -> Named:
    """Yield all state of the optimizers as (``parameter/name``, tensor)."""
    for name, parameter in parameters.items():
        for optimizer in optimizers:
            for field, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}/{field}", value if isinstance(value, Tensor) else torch.tensor(value)


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor], tensors: Tensors
) -> None:
    """Restore the written state into optimizers that have not stepped yet."""
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
    """Return the random states of Python, numpy and torch on this process as plain values and tensors."""
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
    """Set the random states that `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
