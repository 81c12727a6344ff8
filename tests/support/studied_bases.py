"""Hold a base, its folder, a pipeline of it, and pictures and videos in its size, for the tests of all bases."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bases import BASES, TinyBase

from pusa.pipeline import PusaPipeline
from pusa.positions import frames_of

# Wan goes this way in all other tests, and TI2V in its own; both kinds of FVDM differ in their prompt only.
NOT_WAN = pytest.mark.parametrize(
    "studied",
    [base for base in BASES if base.name in ("mochi", "fvdm")],
    indirect=True,
    ids=lambda base: base.name,
)


class Recorder(PusaPipeline):
    """Record the latents that each call returns."""

    made: list[Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        self.made.append(output.frames)
        return output


@dataclass(repr=False)
class Studied:
    """Hold a base, its folder, a pipeline of it, and a picture and two videos in its size."""

    base: TinyBase
    folder: Path
    pipe: Recorder
    pictures: list[Path]
    videos: list[Path]
    frames: list[np.ndarray]  # of the videos, [n, H, W, 3]

    def length(self, latents: int) -> int:
        """Return the frames of so many latent frames."""
        return frames_of(latents, self.base.factor)

    @property
    def request(self) -> dict[str, Any]:
        """Return the fields that all requests of a base share."""
        side = self.base.side
        return {
            "model": str(self.folder),
            "prompt": self.base.prompt,
            "seed": 3,
            "steps": 3,
            "fps": 16.0,
            "width": side,
            "height": side,
            "frames": self.length(self.base.latents),
        }
