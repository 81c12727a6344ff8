"""Make a run of VBench-I2V whose videos are there, without a model."""

from pathlib import Path

import numpy as np

from pusa.evaluation.runs import Item, RunFolder
from pusa.evaluation.runs.checks import expect
from pusa.evaluation.vbench.items import prepare, request_with
from pusa.evaluation.vbench.suite import read_suite
from pusa.media import VideoWriter


def made_run(folder: Path, suite: Path, per_prompt: int = 2) -> RunFolder:
    """Prepare a run of the tiny model, and put a video of moving colours in the place of each of its own."""
    request = request_with({"model": "tiny", "steps": 1, "frames": 5})
    run = prepare(folder, read_suite(suite), request, per_prompt=per_prompt)
    for number, item in enumerate(run.items):
        put_video(run, item, number)
    return run


def put_video(run: RunFolder, item: Item, number: int) -> None:
    """Write an item's video, another one for each number, as if it had been made."""
    expected = expect(item.request)
    x = np.arange(expected.width)[None, None, :, None]
    time = np.arange(expected.frames or 1)[:, None, None, None]
    shift = np.array([number * 40, number * 25, 128])[None, None, None, :]
    frames = np.broadcast_to(2 * x + 8 * time + shift, (expected.frames or 1, expected.height, expected.width, 3)) % 256
    part = run.parts / f"{item.id}.mp4"
    with VideoWriter(part, width=expected.width, height=expected.height, fps=expected.fps) as writer:
        writer.write(np.ascontiguousarray(frames, dtype=np.uint8))
    run.commit(item, part, seconds=1.0, worker="test")
