"""Read state dicts from files, without running code in them."""

import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class UnsafeFileError(ValueError):
    """A pickle holds objects other than tensors."""


@dataclass(frozen=True)
class OpenTensors:
    """Give the tensors of an open file: `keys` lists them, a call with a key reads one."""

    keys: Sequence[str]
    _read: Callable[[str], Tensor]

    def __call__(self, key: str) -> Tensor:
        return self._read(key)


@contextmanager
def open_tensors(path: Path) -> Iterator[OpenTensors]:
    """Open a ``.safetensors`` or ``.pth`` file to read its tensors one by one, mapped from disk; run no code in it.

    Raises:
        UnsafeFileError: a pickle that holds more than tensors.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            yield OpenTensors(list(file.keys()), file.get_tensor)
    else:
        state = _load_pickle(path)
        yield OpenTensors(list(state), state.__getitem__)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file to the CPU, mapped from disk; raise as `open_tensors`."""
    with open_tensors(path) as get:
        return {key: get(key) for key in get.keys}


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path.name} holds more than tensors and was not loaded, because that could run code: get the published "
            "file, or one in safetensors"
        ) from error
    state = state.get("model_state", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UnsafeFileError(f"{path.name} is no state dict: a mapping from names to tensors was expected")
    return state
