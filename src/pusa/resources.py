"""Measure disk, RAM and GPU memory, and check that a model fits before work starts."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import psutil

if TYPE_CHECKING:  # `pusa models` shows sizes without torch
    import torch

DType: TypeAlias = "torch.dtype | Mapping[str, torch.dtype]"

GB = 1e9
LARGE_PARAMETERS = 10**9  # models of this size and above run in bf16 by default, as published
RESERVE_BYTES = 10**9  # for Python, torch and the driver


class ResourcesError(RuntimeError):
    """The machine lacks disk or memory for a model."""


def readable(count: float) -> str:
    """Format bytes in decimal units."""
    if count < GB:
        return f"{count / 1e6:.0f} MB"
    return f"{count / GB:.0f} GB" if count >= 10 * GB else f"{count / GB:.1f} GB"


def readable_time(seconds: float) -> str:
    """Format seconds: ``2 h 5 min``, ``3 min 20 s`` or ``8 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def free_disk_bytes(folder: Path) -> int:
    """Measure the free bytes of the disk of a folder, which need not exist yet."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def free_memory_bytes() -> int:
    """Measure free RAM and swap, or what a container's limit leaves (the kernel kills what exceeds it)."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def gpu_memory_bytes() -> int:
    """Measure free memory of the current GPU; 0 without one."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def default_dtype(parameters: int) -> DType:
    """Choose bf16 for large models, with the VAE in fp32 as in diffusers' examples of Wan, and fp32 for small ones."""
    import torch

    if parameters < LARGE_PARAMETERS:
        return torch.float32
    return {"default": torch.bfloat16, "vae": torch.float32}


def native_dtype() -> DType:
    """Choose bf16 for a small model trained in it, if this machine computes in bf16, else fp32.

    A CPU without AVX512-BF16 is slower in bf16 than in fp32. The text encoder stays in fp32: it
    runs once per prompt and gains nothing.
    """
    import torch

    if not is_bf16_fast("cuda" if torch.cuda.is_available() else "cpu"):
        return torch.float32
    return {"default": torch.bfloat16, "text_encoder": torch.float32}


def is_bf16_fast(device_type: str) -> bool:
    """Tell whether a kind of device ("cpu", "cuda") computes in bf16 itself.

    A CPU that does not emulates it, far slower than it computes in fp32.
    """
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported()
    # The CPU must have it and PyTorch must use it (ATEN_CPU_CAPABILITY=avx2 makes PyTorch use less).
    return torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def dtype_of(component: str, dtype: DType) -> "torch.dtype":
    """Return the dtype of a component as diffusers does: one for all, or by component with a "default" (else fp32)."""
    import torch

    return dtype.get(component, dtype.get("default", torch.float32)) if isinstance(dtype, Mapping) else dtype


def weight_bytes(parameters: Mapping[str, int], dtype: "DType | None" = None) -> dict[str, int]:
    """Compute the bytes of each component from its parameter count; without a dtype as in `default_dtype`."""
    if dtype is None:
        large = sum(parameters.values()) >= LARGE_PARAMETERS
        return {part: count * (2 if large and part != "vae" else 4) for part, count in parameters.items()}
    return {part: count * dtype_of(part, dtype).itemsize for part, count in parameters.items()}


def check_disk(need: int, folder: Path, what: str, *, otherwise: str = "") -> None:
    """Raise ResourcesError unless `need` bytes can be written to `folder` (which need not exist yet)."""
    have = free_disk_bytes(folder)
    if need > have:
        raise ResourcesError(
            f"{what} needs {readable(need)} more disk for its download, and {folder} has {readable(have)}: "
            f"free some, or set cache_dir or HF_HOME to a larger disk{otherwise}"
        )


def check_ram(weights: Mapping[str, int], what: str, *, otherwise: str = "") -> None:
    """Raise ResourcesError unless `weights` (component -> bytes) fit into free memory together."""
    need, have = sum(weights.values()) + RESERVE_BYTES, free_memory_bytes()
    if need > have:
        encoder = ", load it with text_encoder=None and cached prompts" if len(weights) > 1 else ""
        raise ResourcesError(
            f"{what} needs {readable(need)} of memory to be loaded, and {readable(have)} is free: close other programs"
            f"{encoder}{otherwise}"
        )


def check_gpu(need: int, what: str, *, otherwise: str = "") -> None:
    """Raise ResourcesError unless `need` bytes are free on the current GPU."""
    have = gpu_memory_bytes()
    if need > have:
        raise ResourcesError(
            f"{what} needs {readable(need)} of GPU memory with its parts there in turn, and {readable(have)} is free: "
            f"offload by groups, or quantise the transformer{otherwise}"
        )
