"""Reduce LoRAs to a lower rank, by the best approximation of each layer, and measure its error.

It needs a LoRA's own matrices alone: neither the model that it is for, nor the product B A.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pusa.lora.layouts import Layout, Pair, experts_of_keys, read_lora, write_lora


@dataclass(frozen=True)
class ExportReport:
    """List the files that `export_lora` or `reduce_file` wrote; in all, layers, largest rank and errors.

    Errors are Frobenius norms of the change of B A over those of B A, 0 if the rank is not reduced.
    """

    paths: tuple[Path, ...]
    layers: int
    rank: int
    relative_error: float
    worst_error: float
    worst_layer: str


def report_of(paths: Sequence[Path], layers: int, rank: int, lost: Mapping[str, Sequence[float]]) -> ExportReport:
    """Sum up the errors of layers: `lost` has the squared norms of the change of B A and of B A by layer."""
    relative = {name: math.sqrt(part / whole) if whole else 0.0 for name, (part, whole) in lost.items()}
    worst = max(relative, key=relative.__getitem__, default="")
    total = math.fsum(whole for _, whole in lost.values())
    return ExportReport(
        paths=tuple(paths),
        layers=layers,
        rank=rank,
        relative_error=math.sqrt(math.fsum(part for part, _ in lost.values()) / total) if total else 0.0,
        worst_error=relative.get(worst, 0.0),
        worst_layer=worst,
    )


def reduce_file(path: Path, output: Path, rank: int) -> ExportReport:
    """Write a LoRA file at a lower rank, in ComfyUI's layout (Wan's) or diffusers', without the model that it is for.

    Args:
        path: of any layout that `pusa.lora.layouts.read_lora` reads.
        output: ``NAME.safetensors``, another file than `path`.
        rank: singular values to keep in each layer; layers of this rank and below stay as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no LoRA, has layers of unknown layouts or of both experts, or an argument is bad.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} is below 1")
    if output.suffix != ".safetensors":
        raise ValueError(f"{output} must end in .safetensors")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output} cannot be written: {output.parent} is no folder")
    if output.exists() and output.samefile(path):
        raise ValueError(f"{output} is the file that is read: give the new file another name")
    if len(experts_of_keys(path)) > 1:
        raise ValueError(f"{path.name} holds LoRAs of both experts of Wan2.2: split it into two files first")
    lora = read_lora(path)
    if lora.unknown_keys:
        count, first = len(lora.unknown_keys), lora.unknown_keys[0]
        raise ValueError(f"{count} keys of {path.name} belong to no known LoRA layout; first: {first!r}")
    pairs: dict[str, Pair] = {}
    lost: dict[str, list[float]] = {}
    for name, pair in lora.pairs.items():
        pairs[name], *lost[name] = reduce_pair(pair, rank)
    largest = max((a.shape[0] for a, _ in pairs.values()), default=0)
    layout: Layout = "comfyui" if lora.model.family == "Wan" else "diffusers"
    metadata = {"base": str(lora.model), "rank": str(largest), "layout": layout}
    write_lora(output, pairs, lora.deltas, layout=layout, metadata=metadata)
    return report_of([output], len(lora.layers), largest, lost)


def reduce_pair(pair: Pair, rank: int | None) -> tuple[Pair, float, float]:
    """Compute the best pair of a lower rank, and the squared Frobenius norms of the change of B A and of B A.

    This never forms B A: with R_b from BᵀB and R_a from AAᵀ, its singular values are those of the small R_b R_aᵀ.
    """
    if rank is None:
        return pair, 0.0, 0.0
    a, b = (half.double().flatten(1) for half in pair)  # [r, in], [out, r]
    gram_a, gram_b = a @ a.T, b.T @ b  # [r, r]
    norm = float((gram_a * gram_b).sum())
    if rank >= len(a):
        return pair, 0.0, norm
    (root_a, inverse_a), (root_b, inverse_b) = _root(gram_a), _root(gram_b)
    u, s, vh = torch.linalg.svd(root_b @ root_a.T)
    half = s[:rank].sqrt()
    small_a = (half[:, None] * (vh[:rank] @ inverse_a.T @ a)).to(pair[0])  # [rank, in]
    small_b = (b @ (inverse_b @ u[:, :rank] * half)).to(pair[1])  # [out, rank]
    small = small_a.reshape(rank, *pair[0].shape[1:]), small_b.reshape(-1, rank, *pair[1].shape[2:])
    c, d = (part.double().flatten(1) for part in small)
    lost = norm - 2 * float(((a @ c.T) * (b.T @ d)).sum()) + float(((c @ c.T) * (d.T @ d)).sum())
    return small, max(lost, 0.0), norm


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a Gram matrix: R with RᵀR = gram, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(root > 1e-7 * root.max(), 1 / root, 0.0)
    return root[:, None] * vectors.T, vectors * inverse
