"""Render clips of photographs that no model here was trained on, under the moving cameras of the world."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pusa.conditions import fit_image, pixels
from pusa.evaluation.metrics import psnr
from pusa.media import read_image
from pusa.mini.world.scenery import CANVAS
from pusa.mini.world.vocabulary import CAMERAS, THINGS
from pusa.mini.world.world import PHOTOGRAPH, Scenes, World

if TYPE_CHECKING:
    from pusa.mini.evaluation.setup import Clips, Evaluator

_INSTALLED = (
    ("skimage", "data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def installed_photographs() -> list[Path]:
    """List the photographs inside scikit-image and scikit-learn, if these are installed."""
    found: list[Path] = []
    for package, folder, names in _INSTALLED:
        spec = find_spec(package)
        places = [Path(place) / folder for place in (spec.submodule_search_locations or [])] if spec else []
        found += [place / name for place in places for name in names if (place / name).is_file()]
    return found


def list_photographs(places: Sequence[Path]) -> list[Path]:
    """List the files among `places`, and the JPEG, PNG and WebP files in its folders."""
    files: list[Path] = []
    for place in places:
        files += sorted(f for f in place.iterdir() if f.suffix.lower() in _SUFFIXES) if place.is_dir() else [place]
    return files


class PhotographWorld:
    """Photographs, the largest square of each, before a camera that pans and zooms.

    Args:
        files: pictures, which are only read.
        motion_frames: frames that a camera move takes.

    Raises:
        ValueError: there are none. MediaError, FileNotFoundError: one cannot be read.
    """

    def __init__(self, files: Sequence[Path], *, motion_frames: int) -> None:
        if not files:
            raise ValueError("no photographs: give files, or install scikit-image and scikit-learn, which carry some")
        squares = [pixels([fit_image(read_image(file), CANVAS, CANVAS)])[0, :, 0] for file in files]
        self.count = len(squares)
        self.world = World(
            torch.zeros(len(THINGS), 4, 16, 16), (torch.stack(squares) + 1) / 2, variants=1, motion_frames=motion_frames
        )

    def clips(self, evaluator: "Evaluator", count: int) -> "Clips":
        """Render `count` clips of all photographs in turn under all moving cameras in turn."""
        number = torch.arange(count)
        camera = (number + number // self.count) % (len(CAMERAS) - 1) + 1
        return evaluator.real(self._scenes(number % self.count, camera), world=self.world)

    def nearest_end(self, evaluator: "Evaluator", real: "Clips", frames: Tensor) -> Tensor:
        """Compute the PSNR in dB of last frames ``[B, 3, 1, H, W]`` against those of the nearest camera: ``[B]``.

        A clip without a caption may thus pan or zoom freely, as long as the picture stays the same.
        """
        last, size = evaluator.defaults.num_frames - 1, evaluator.defaults.width
        best = torch.full((len(frames),), -torch.inf)
        for camera in range(len(CAMERAS)):
            scenes = Scenes(**{**vars(real.scenes), "camera": torch.full_like(real.scenes.camera, camera)})
            truth, _ = self.world.render(scenes, 1, size=size, start=last)
            best = torch.maximum(best, psnr(frames, truth)[:, 0])
        return best

    def _scenes(self, photograph: Tensor, camera: Tensor) -> Scenes:
        count = len(photograph)
        nothing = torch.full((count,), -1)
        jitter = torch.full((count, 20), 0.5)  # in the middle, neither tinted nor the other way round
        jitter[:, 7] = (photograph + 0.5) / self.count
        zero = torch.zeros(count, dtype=torch.long)
        return Scenes(nothing, zero, torch.full_like(nothing, PHOTOGRAPH), camera, nothing, zero, zero, jitter)
