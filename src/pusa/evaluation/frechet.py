"""Compare two folders of videos by the Frechet distance of their features.

With the I3D network that is shared as TorchScript (``i3d_torchscript.pt``, of StyleGAN-V's evaluation) this is FVD
(arXiv 1812.01717), as FVDM reports it. Without that file, which is in no registry, it is a distance on simple features:
it sees wrong colours, brightness and amounts of motion, no shapes, and compares models of one kind only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from pusa.data.sources import VIDEO_SUFFIXES
from pusa.errors import first_line
from pusa.evaluation.metrics import as_video, frechet_distance
from pusa.media import read_video

_I3D_SIDE, _SIMPLE_SIDE = 224, 64  # pixels

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """Hold a distance: its name, its value, and the clips and frames that it is of."""

    name: str
    distance: float
    real_clips: int
    made_clips: int
    frames: int


def simple_features(video: Tensor) -> Tensor:
    """Compute over time the mean, deviation and change of the cells of a 4 x 4 grid, ``[B, 144]``.

    Args:
        video: ``[B, 3, F, H, W]`` in -1..1.

    Raises:
        ValueError: fewer than two frames.
    """
    if video.shape[2] < 2:
        raise ValueError(f"{video.shape[2]} frames: a change needs at least 2")
    cells = adaptive_avg_pool2d(video.transpose(1, 2).flatten(0, 1), 4)
    cells = cells.unflatten(0, (len(video), -1)).flatten(2)  # [B, F, 48]
    change = (cells[:, 1:] - cells[:, :-1]).abs().mean(dim=1)
    return torch.cat([cells.mean(dim=1), cells.std(dim=1), change], dim=1)


def load_i3d(path: Path) -> Features:
    """Load the I3D detector from a TorchScript file, on the CPU.

    Returns:
        ``[B, 3, F, 224, 224]`` in -1..1 -> ``[B, 400]``, what the network has before its softmax.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no TorchScript file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: give the I3D detector, i3d_torchscript.pt")
    try:
        detector = torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(
            f"{path.name} is no TorchScript file ({first_line(error)}): give i3d_torchscript.pt"
        ) from error
    return lambda video: detector(video, rescale=False, resize=False, return_features=True)


def compare(real: Path, made: Path, *, frames: int = 16, detector: Path | None = None) -> Comparison:
    """Compute the Frechet distance of the videos in two folders.

    Args:
        real, made: folders of videos; of each the first `frames` frames count, cut to a square in the middle.
        frames: 16 as in FVDM's tables; I3D needs 9 or more.
        detector: the I3D file; None: simple features.

    Raises:
        FileNotFoundError, ValueError: a folder has fewer than 2 videos, a video is shorter, or see `load_i3d`.
        MediaError: a file cannot be read.
    """
    if frames < 2:
        raise ValueError(f"frames={frames}: a video has at least 2")
    features, side = (simple_features, _SIMPLE_SIDE) if detector is None else (load_i3d(detector), _I3D_SIDE)
    sets = [_features_of(folder, features, frames, side) for folder in (real, made)]
    name = "Frechet distance on simple features (not FVD)" if detector is None else "FVD"
    return Comparison(name, frechet_distance(*sets), len(sets[0]), len(sets[1]), frames)


@torch.no_grad()
def _features_of(folder: Path, features: Features, frames: int, side: int) -> Tensor:
    return torch.cat([features(video).float() for video in _videos_in(folder, frames, side)])


def _videos_in(folder: Path, frames: int, side: int) -> Iterator[Tensor]:
    """Yield the videos of a folder, ``[1, 3, frames, side, side]`` in -1..1."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if len(paths) < 2:
        raise ValueError(
            f"{folder} has {len(paths)} videos: a distance needs at least 2, and hundreds to mean something"
        )
    for path in paths:
        video = read_video(path, max_frames=frames, fit=(side, side))
        if len(video) < frames:
            raise ValueError(f"{path} has {len(video)} frames: ask for at most as many (--frames), or leave it out")
        yield _square(as_video(video), side)


def _square(video: Tensor, side: int) -> Tensor:
    """Cut ``[1, 3, F, H, W]`` to a square in the middle, and resize that."""
    height, width = video.shape[3:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    frames = video[0, :, :, top : top + short, left : left + short].transpose(0, 1)  # [F, 3, short, short]
    return interpolate(frames, (side, side), mode="bilinear", antialias=True).transpose(0, 1)[None]
