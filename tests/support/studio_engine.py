"""Make videos of the requested size, length and seed without a model, for tests of the studio.

A prompt says how it goes: ``slowly`` makes each step take a second, ``never`` fails after the first.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pusa import media, zoo
from pusa.events import Done, Note, Planned, Preview, Resolved, Stage, Step
from pusa.request import GenerationRequest
from pusa.server.worker.engine_process import ReportLoading
from pusa.server.worker.messages import Cancelled, Error, Message, Task


class StudioEngine:
    load_seconds = 0.0

    def __init__(self, model: str, *loras: str) -> None:
        self.model = model

    def load(self, report: ReportLoading) -> str:
        for tenth in range(10):
            report("loading", 10.0 * tenth)
            time.sleep(self.load_seconds / 10)
        return self.model

    def run(self, task: Task, is_cancelled: Callable[[], bool]) -> Iterator[Message]:
        asked = GenerationRequest.model_validate_json(json.dumps(task.request))
        request = asked.resolved(zoo.defaults_of(self.model)).model_dump(mode="json")
        yield Stage("load")
        yield Resolved(request)
        yield Planned(f"{self.model}: transformer on the CPU in float32")
        if "zeppelin" in asked.prompt:
            yield Note("mini was not trained on 'zeppelin'")
        yield Stage("denoise")
        pause = 1.0 if "slowly" in asked.prompt else 0.01
        for step in range(1, request["steps"] + 1):
            time.sleep(pause)
            yield Step(step, request["steps"], (request["steps"] - step) * pause)
            yield Preview(_webp(_frame(request, 0, 1 - step / request["steps"])))
            if "never" in asked.prompt:
                yield Error("internal_error", "the engine was told to fail: ask for something else", retry=False)
                return
            if is_cancelled():
                yield Cancelled()
                return
        yield Stage("decode")
        files = _written(task.folder, request)
        yield Done(files, {"load": 0.0, "denoise": request["steps"] * pause, "decode": 0.1, "finish": 0.0})


class SlowToLoad(StudioEngine):
    load_seconds = 8.0


class FailsToLoad(StudioEngine):
    def load(self, report: ReportLoading) -> str:
        raise ValueError("the weights are not there: download them first")


def _written(folder: Path, request: dict[str, Any]) -> dict[str, Path]:
    frames = np.stack([_frame(request, number) for number in range(request["frames"])])
    video = folder / "video.mp4"
    size = {"width": request["width"], "height": request["height"]}
    with media.VideoWriter(video, fps=request["fps"], metadata={"request": request}, **size) as writer:
        writer.write(frames)
    pictures = {"thumbnail": media.thumbnail(frames, 320), "contact_sheet": media.contact_sheet(frames)}
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.webp")
    return {"video": video, **{name: folder / f"{name}.webp" for name in pictures}}


def _frame(request: dict[str, Any], number: int, noise: float = 0.0) -> np.ndarray:
    """A disc on a slope, uint8 ``[H, W, 3]``, of colours and on a way that prompt and seed decide."""
    digest = hashlib.sha256(f"{request['prompt']}/{request['seed']}".encode()).digest()
    height, width = request["height"], request["width"]
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    low, high, disc = (np.array(list(digest[i : i + 3]), float) for i in (0, 3, 6))
    picture = low + (high - low) * y[..., None]
    place = 0.2 + 0.6 * number / max(1, request["frames"] - 1)
    picture[(x - place) ** 2 + (y - 0.3 - digest[9] / 900) ** 2 < 0.02] = disc
    grain = np.random.default_rng(digest[10]).uniform(0, 255, picture.shape)
    return (picture * (1 - noise) + grain * noise).astype(np.uint8)


def _webp(frame: np.ndarray) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "WEBP")
    return buffer.getvalue()
