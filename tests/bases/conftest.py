"""Share the folders, pictures and videos of the tests of all bases."""

import numpy as np
import pytest
from bases import BASES, TinyBase
from PIL import Image
from studied_bases import Recorder, Studied

from pusa import media
from pusa.positions import frames_of


@pytest.fixture(scope="session", params=BASES, ids=lambda base: base.name)
def studied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Studied:
    base: TinyBase = request.param
    folder = tmp_path_factory.mktemp("bases")
    model = base.write(folder / base.name)
    draw = np.random.default_rng(0)
    pictures, videos, frames = [folder / "a.png", folder / "b.png"], [folder / "a.mp4", folder / "b.mp4"], []
    for path in pictures:
        Image.fromarray(draw.integers(0, 256, (base.side, base.side, 3), np.uint8)).save(path)
    for path in videos:
        frames.append(draw.integers(0, 256, (frames_of(4, base.factor), base.side, base.side, 3), np.uint8))
        with media.VideoWriter(path, width=base.side, height=base.side, lossless=True) as writer:
            writer.write(frames[-1])
    pipe = Recorder.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.made = []
    return Studied(base, model, pipe, pictures, videos, frames)
