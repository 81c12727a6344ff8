"""Read state dicts from files, without running code in them."""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class UnsafeFileError(ValueError):
    """A pickle holds objects other than tensors."""


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors of a ``.safetensors`` or ``.pth`` file to the CPU, mapped from disk; run no code in the file.

    Raises:
        UnsafeFileError: a pickle that holds more than tensors.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
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
