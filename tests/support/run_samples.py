"""Runs of tiny items, and makers that write a few grey frames instead of running a model."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pusa.evaluation.runs import Item, RunFolder, seed_of
from pusa.media import VideoWriter
from pusa.request import GenerationRequest

FRAMES, SIDE, FPS = 5, 16, 16.0


def make_items(count: int) -> list[Item]:
    """Make items of videos with 5 frames of 16x16 pixels."""
    return [
        Item(
            f"clip {number}",
            GenerationRequest(
                prompt=f"clip {number}", seed=seed_of(0, number), frames=FRAMES, width=SIDE, height=SIDE, fps=FPS
            ),
            {"number": number},
        )
        for number in range(count)
    ]


def make_fake_items(count: int, **instructions: Any) -> list[Item]:
    """Make items for the fake engine, whose prompts are its instructions."""
    items = []
    for number in range(count):
        prompt = json.dumps({"frames": FRAMES, "number": number, **instructions})
        request = GenerationRequest(prompt=prompt, seed=seed_of(0, number), frames=FRAMES, width=64, height=48, fps=FPS)
        items.append(Item(f"clip {number}", request))
    return items


def make_run(folder: Path, count: int = 3) -> RunFolder:
    """Make the folder of a run with so many items."""
    return RunFolder.create(folder, "sample", {"steps": 4}, make_items(count))


def write_grey(item: Item, output: Path, *, frames: int = FRAMES, fps: float = FPS) -> None:
    """Write a video whose brightness is that of the item's number."""
    value = 16 * item.labels["number"] % 256
    with VideoWriter(output, width=SIDE, height=SIDE, fps=fps) as writer:
        writer.write(np.full((frames, SIDE, SIDE, 3), value, np.uint8))


class GreyMaker:
    """Write grey videos, and call `before` with each item first, which may raise.

    Attributes:
        made: names of the items that were asked for, in order.
    """

    def __init__(self, before: Callable[[Item], object] | None = None) -> None:
        self._before = before
        self.made: list[str] = []

    def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
        self.made.append(item.name)
        if self._before is not None:
            self._before(item)
        write_grey(item, output)


class DyingMaker(GreyMaker):
    """Kill the process in the middle of an item, once for each file in `folder` that can be removed."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__()
        self._folder, self._name = folder, name

    def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
        if item.name == self._name:
            for file in self._folder.iterdir():
                file.unlink()
                output.write_bytes(b"half of a video")
                os.kill(os.getpid(), signal.SIGKILL)
        super().make(item, output, stop)


class SlowMaker(GreyMaker):
    """Take some seconds for each video, in steps after which it can be stopped."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
        for _ in range(10):
            time.sleep(self._seconds / 10)
            if stop():
                return
        super().make(item, output, stop)
