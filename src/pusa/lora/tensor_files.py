"""Read the tensors of a LoRA file, safetensors or pickle, under the keys that it has; no code in it runs."""

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def read_tensors(path: Path, *, shapes_only: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Read tensors by key, with `shapes_only` all but the alphas on the meta device, and the header's metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no LoRA file {str(path)!r}")
    if path.suffix != ".safetensors":
        content = _read_pickle(path)
        return {key: value if shapes_only else _widened(value) for key, value in content.items()}, {}
    try:
        with safe_open(path, framework="pt") as file:
            if not shapes_only:
                tensors = {key: _widened(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 (not a dict)
                return tensors, file.metadata() or {}
            tensors = {}
            for key in file.keys():  # noqa: SIM118
                tensors[key] = file.get_tensor(key) if key.endswith(".alpha") else _on_meta(file.get_slice(key))
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a readable safetensors file: {error}") from error


def _widened(value: Any) -> Any:
    """Convert an fp8 tensor to bf16, which holds all values of both formats exactly; return others unchanged."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.itemsize == 1:
        return value.to(torch.bfloat16)
    return value


def _on_meta(part: Any) -> Tensor:
    return torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        raise ValueError(
            f"{path.name} is refused: its pickle is damaged or holds code, not only tensors. Nothing in it was run; "
            "ask its author for a safetensors file"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path.name} is not a readable PyTorch file: {error}") from error
    while isinstance(content, dict):
        inner = next(
            (content[key] for key in ("state_dict", "module", "model") if isinstance(content.get(key), dict)), None
        )
        if inner is None:
            return {
                key: value
                for key, value in content.items()
                if isinstance(value, Tensor) or (isinstance(value, float | int) and str(key).endswith(".alpha"))
            }
        content = inner
    raise ValueError(f"{path.name} holds a {type(content).__name__}, not a dict of tensors")
