"""Start CPU ranks for tests, and make videos with them or without."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from paths import ROOT
from PIL import Image

from pusa import media
from pusa.acceleration.decisions import Parallel
from pusa.acceleration.launch import launch
from pusa.acceleration.ranks import Ranks
from pusa.generate import generate
from pusa.request import GenerationRequest

IMAGE: dict[str, Any] = {"kind": "image", "file": "a.png", "positions": [0], "noise": [0.2]}
LAST: dict[str, Any] = {"kind": "image", "file": "b.png", "positions": ["last"], "noise": [0.0]}
VIDEO: dict[str, Any] = {"kind": "video", "file": "one.mp4", "noise": [0.0]}
INPUTS = {"a.png", "b.png", "one.mp4"}


def write_inputs(folder: Path) -> None:
    """Write two pictures and a video: the files of `INPUTS`."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), np.uint8)
    Image.fromarray(pixels[0]).save(folder / "a.png")
    Image.fromarray(pixels[1]).save(folder / "b.png")
    with media.VideoWriter(folder / "one.mp4", width=96, height=64) as writer:
        writer.write(pixels)


def run(folder: Path, name: str, ranks: Ranks | None, **asked: Any) -> np.ndarray:
    """Make a video as PNG files, which keep every bit, and return its frames."""
    options = {key: asked.pop(key) for key in ("checkpoint", "checkpoint_every", "stop") if key in asked}
    request = GenerationRequest(**{"model": "tiny", "prompt": "a cat", "seed": 0, "steps": 2, **asked})
    list(generate(request, folder / name, ranks=ranks, **options))
    return np.stack([np.asarray(Image.open(file)) for file in sorted((folder / name).glob("*.png"))])


@contextmanager
def start(size: int, parallel: Parallel | None = None, **options: Any) -> Iterator[Ranks]:
    """Start CPU ranks, which find the modules of this folder; a process has one group at a time."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests" / "support"), before]))
    try:
        with launch(size, device_type="cpu", **options) as ranks:
            ranks.parallel = parallel
            yield ranks
    finally:
        os.environ["PYTHONPATH"] = before
