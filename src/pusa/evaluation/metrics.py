"""Measure videos, and summarise samples of measurements with their uncertainty.

Videos are ``[B, 3, F, H, W]`` in -1..1 (`as_video` converts uint8 frames). Results are one number per clip, ``[B]``,
unless a docstring says otherwise.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

EQUAL_DB = 80.0
"""Upper limit of `psnr`: the pictures differ by less than a hundredth of a grey level."""

_FLAT = 1e-3  # smaller differences, an eighth of a grey level, come from rounding


def as_video(frames: np.ndarray) -> Tensor:
    """Convert uint8 frames ``[F, H, W, 3]`` to a video ``[1, 3, F, H, W]``."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


# ---- videos ----------------------------------------------------------------------------------------------------------


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each frame in dB, ``[B, F]``, at most `EQUAL_DB`."""
    error = (first.float() - second.float()).square().mean(dim=(1, 3, 4))
    return (10 * torch.log10(4 / error.clamp(min=1e-12))).clamp(max=EQUAL_DB)


def changes(video: Tensor) -> Tensor:
    """Compute the mean absolute difference of neighbouring frames, ``[B, F - 1]``."""
    return (video[:, :, 1:].float() - video[:, :, :-1].float()).abs().mean(dim=(1, 3, 4))


def seam(video: Tensor, joint: int, around: int = 8) -> Tensor:
    """Divide the change at a joint by the mean change within `around` frames of it: 1 is no seam.

    Args:
        joint: the first frame after it, 1..F - 1.
        around: neighbours on both sides, without the joint itself.

    Raises:
        ValueError: there is no such joint.
    """
    change = changes(video)
    if not 1 <= joint <= change.shape[1]:
        raise ValueError(f"joint={joint} is outside 1..{change.shape[1]}: it is the first frame after a joint")
    near = [i for i in range(max(0, joint - around), min(change.shape[1], joint + around)) if i != joint - 1]
    return change[:, joint - 1] / change[:, near].mean(dim=1).clamp(min=_FLAT)


def unevenness(video: Tensor) -> Tensor:
    """Divide the largest change between neighbours by the mean one: 1 is perfectly even, a cut is far above."""
    change = changes(video)
    return change.amax(dim=1) / change.mean(dim=1).clamp(min=_FLAT)


def sharpness(video: Tensor) -> Tensor:
    """Compute the mean absolute difference of neighbouring pixels, ``[B, F]``: it falls as a picture blurs."""
    down = (video[..., 1:, :] - video[..., :-1, :]).abs().mean(dim=(1, 3, 4))
    across = (video[..., 1:] - video[..., :-1]).abs().mean(dim=(1, 3, 4))
    return down + across


class Drift(NamedTuple):
    """Compare the end of a video with its beginning: colour in grey levels (0..255), the others as ratios."""

    colour: Tensor
    contrast: Tensor
    motion: Tensor


def drift(video: Tensor, length: int) -> Drift:
    """Compare the last `length` frames with the first.

    Colour: mean over the channels of the absolute difference of their means. Contrast: standard deviation within a
    frame, averaged. Motion: mean change between neighbours.
    """
    first, last = video[:, :, :length].float(), video[:, :, -length:].float()
    colour = (first.mean(dim=(2, 3, 4)) - last.mean(dim=(2, 3, 4))).abs().mean(dim=1) * 127.5
    contrast = [part.std(dim=(3, 4), correction=0).mean(dim=(1, 2)) for part in (first, last)]
    motion = [changes(part).mean(dim=1) for part in (first, last)]
    return Drift(colour, contrast[1] / contrast[0].clamp(min=_FLAT), motion[1] / motion[0].clamp(min=_FLAT))


def first_jump(latents: Tensor) -> Tensor:
    """Compute the root mean square difference of latent frames 0 and 1 of ``[B, C, F, h, w]``.

    Divided by that of real clips, 1 is ideal; above 1 the clip jumps away from its first frame.
    """
    return (latents[:, :, 1].float() - latents[:, :, 0].float()).square().mean(dim=(1, 2, 3)).sqrt()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Compute the Fréchet distance of normal distributions fitted to features ``[N, D]`` and ``[M, D]``.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)``, as in the Frechet inception distance (arXiv 1706.08500). It is biased
    upwards for few samples: compare only distances of equally many.

    Raises:
        ValueError: fewer than two samples.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"{len(first)} and {len(second)} samples: a covariance needs at least 2")
    a, b = first.double(), second.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


# ---- samples ---------------------------------------------------------------------------------------------------------

Figure = dict[str, Any]
"""A measured number with its uncertainty, ready for JSON: `rate`, `mean` and `ratio` make them."""


def rate(hits: Tensor) -> Figure:
    """Compute the share of true values in ``[N]`` with Wilson's 95 % interval: ``{"value", "n", "low", "high"}``."""
    n, z = len(hits), 1.96
    if n == 0:
        return {"value": None, "n": 0}
    share = float(hits.float().mean())
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"value": share, "n": n, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def mean(values: Tensor) -> Figure:
    """Compute the mean of ``[N]`` and its standard error: ``{"value", "n", "error"}``; no error for a single one."""
    values = values.double().flatten()
    n = len(values)
    if n == 0:
        return {"value": None, "n": 0}
    error = float(values.std() / math.sqrt(n)) if n > 1 else None
    return {"value": float(values.mean()), "n": n, "error": error}


def ratio(values: Tensor, reference: Tensor) -> Figure:
    """Divide the mean of ``[N]`` by that of its paired references, with the standard error of the ratio."""
    top, below = values.double().flatten(), reference.double().flatten()
    n = len(top)
    if n == 0:
        return {"value": None, "n": 0}
    value = top.mean() / below.mean()
    error = float((top - value * below).std() / math.sqrt(n) / below.mean()) if n > 1 else None
    return {"value": float(value), "n": n, "error": error}


def format_figure(figure: Figure, name: str, *, decibel_digits: int = 1) -> str:
    """Format a figure with its standard error or its interval; PSNR at its upper limit as "equal".

    Args:
        name: of the measure; its end tells the unit: ``_db`` or ``ssim``.
    """
    value, error = figure["value"], figure.get("error")
    if value is None:
        return ""
    if name.endswith("_db") and value >= EQUAL_DB - 0.05:
        return "equal"
    digits = decibel_digits if name.endswith("_db") else 3 if name.endswith("ssim") else 2
    if "low" in figure and "high" in figure:
        return f"{figure['low']:.{digits}f}..{figure['high']:.{digits}f}"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
