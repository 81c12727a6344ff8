"""Stand in for the engine: quick, and able to misbehave, for tests and benchmarks of everything around the model.

Its steps are a chain of hashes, with a checkpoint after every few of them; the video shows the last hash in coloured
frames. So a run that lost or repeated a step makes another video. The prompt holds its instructions, as JSON:

    {"steps": 8, "step_seconds": 0.05, "decode_seconds": 0.0, "at_step": 4, "then": "segfault", "times": 1}

`then` happens right after that step (0: before the first one), in the first `times` attempts (default 1):
"segfault", "kill", "stop", "exit", "hang", "raise", "invalid", "out_of_memory", "decode_memory", "disk_full".
"grows": true appends a byte to a growing video at each step. "frames" is the length of the video.
"at_stage" ("load", "encode", "denoise" or "decode") instead of "at_step" means the beginning of that stage.

In a group of ranks only the one that "rank" names (default 0) misbehaves, or all for "rank": null. The ranks meet
between any two steps, as those of a real model do in every step: each waits for the others, and the first decides if
the task is cancelled. They are plain processes, so they meet by files.
"""

import ctypes
import errno
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pusa import media
from pusa.events import Checkpoint, Done, Frames, Note, Preview, Resolved, Stage, Step
from pusa.server.worker.engine_process import ReportLoading
from pusa.server.worker.messages import Cancelled, Message, Task

WIDTH, HEIGHT, FRAMES = 64, 48, 8


class FakeEngine:
    """`model` may say how loading goes, as JSON: ``{"load_seconds": 1}`` or ``{"load_fails": true}``."""

    def __init__(self, model: str, *loras: str) -> None:
        self.model, self.loading = model, {}
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        with suppress(ValueError):
            self.loading = json.loads(model)

    def load(self, report: ReportLoading) -> str:
        report("loading", 0.0)
        if self.loading.get("rank", 0) == self.rank and "then" in self.loading:
            misbehave(self.loading["then"])
        seconds = self.loading.get("load_seconds", 0.0)
        for tenth in range(10 if seconds else 0):
            time.sleep(seconds / 10)
            report("loading", 10.0 * (tenth + 1))
        if self.loading.get("load_fails"):
            raise ValueError("no such model")
        return self.model

    def run(self, task: Task, is_cancelled: Callable[[], bool]) -> Iterator[Message]:
        instructions = json.loads(task.request["prompt"])
        steps = instructions.get("steps", 4)
        yield from self._begin("load", instructions, task)
        state, done = self._state_of(task)
        seed = task.request.get("seed")
        yield Resolved({**task.request, "seed": 7 if seed is None else seed})
        if not done:
            yield Note("made by a fake")
        if instructions.get("at_stage") == "encode":
            yield from self._begin("encode", instructions, task)
        yield from self._begin("denoise", instructions, task)
        began = time.monotonic()
        if instructions.get("at_step") == 0:
            self._misbehave(instructions, task)
        for step in range(done + 1, steps + 1):
            time.sleep(instructions.get("step_seconds", 0.0))
            state = hashlib.sha256(f"{state}/{step}".encode()).hexdigest()
            if (step % task.checkpoint_every == 0 or step == steps) and not self.rank:
                write_whole(task.checkpoint, json.dumps({"state": state, "step": step}).encode())
                yield Checkpoint(task.checkpoint, step)
            yield Step(step, steps, (steps - step) * (time.monotonic() - began) / (step - done))
            if task.preview_seconds:
                yield Preview(picture(state, 0, "WEBP"))
            if instructions.get("grows"):
                growing = task.folder / "growing.mp4"
                with growing.open("ab") as file:
                    file.write(bytes([step % 256]))
                yield Frames(step, steps, growing)
            if instructions.get("at_step") == step:
                self._misbehave(instructions, task)
            if self._meet(task, step, is_cancelled):
                yield Cancelled()
                return
        denoised = time.monotonic()
        yield from self._begin("decode", instructions, task)
        if self.rank:
            yield Done({})
            return
        time.sleep(instructions.get("decode_seconds", 0.0))
        video = task.folder / "video.mp4"
        with media.VideoWriter(video, width=WIDTH, height=HEIGHT, metadata={"request": task.request}) as writer:
            for number in range(instructions.get("frames", FRAMES)):
                writer.write(frame(state, number)[None])
        thumbnail = task.folder / "thumbnail.webp"
        thumbnail.write_bytes(picture(state, FRAMES // 2, "WEBP"))
        files = {"video": video, "thumbnail": thumbnail, "spritesheet": thumbnail, "contact_sheet": thumbnail}
        decoded = time.monotonic()
        yield Done(files, {"load": 0.0, "denoise": denoised - began, "decode": decoded - denoised, "finish": 0.0})

    def _begin(self, stage: str, instructions: dict[str, Any], task: Task) -> Iterator[Message]:
        yield Stage(stage)
        if instructions.get("at_stage") == stage:
            self._misbehave(instructions, task)

    def _misbehave(self, instructions: dict[str, Any], task: Task) -> None:
        if task.attempt <= instructions.get("times", 1) and instructions.get("rank", 0) in (None, self.rank):
            misbehave(instructions["then"], task)

    def _meet(self, task: Task, step: int, is_cancelled: Callable[[], bool]) -> bool:
        """Wait for the other ranks after a step; return the first rank's decision to stop."""
        if self.ranks == 1:
            return is_cancelled()
        prefix = f".{task.attempt}-{step}"
        decision = task.folder / f"{prefix}.decision"
        if self.rank:
            write_whole(task.folder / f"{prefix}.{self.rank}", b"")
            await_files([decision])
            return decision.read_bytes() == b"stop"
        await_files([task.folder / f"{prefix}.{rank}" for rank in range(1, self.ranks)])
        stop = is_cancelled()
        write_whole(decision, b"stop" if stop else b"go")
        return stop

    def _state_of(self, task: Task) -> tuple[str, int]:
        if not task.checkpoint.exists():
            inputs = [path.read_bytes() for path in task.inputs.values()]
            return hashlib.sha256(b"/".join([task.request["prompt"].encode(), *inputs])).hexdigest(), 0
        kept = json.loads(task.checkpoint.read_bytes())
        return kept["state"], kept["step"]


def await_files(paths: list[Path]) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(0.002)


def misbehave(how: str, task: Task | None = None) -> None:
    match how:
        case "segfault":
            ctypes.string_at(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(3)
        case "hang":
            time.sleep(3600)
        case "raise":
            raise RuntimeError("the engine broke")
        case "invalid" if task is not None:
            raise ValueError(f"{next(iter(task.inputs.values()), task.folder / 'x')} is not an image")
        case "out_of_memory":
            raise MemoryError
        case "decode_memory" if task is not None:
            import torch

            from pusa.models.vae import DecodeMemoryError

            (task.folder / "video.latents.safetensors").write_bytes(b"latents")
            raise DecodeMemoryError("out of memory", torch.zeros(1))
        case "disk_full":
            raise OSError(errno.ENOSPC, "no space left on device")
        case other:
            raise AssertionError(f"then={other!r} is not known")


def frame(state: str, number: int) -> np.ndarray:
    """uint8 ``[H, W, 3]``: 4 x 3 blocks whose colours are a hash."""
    values = np.frombuffer(hashlib.sha512(f"{state}/{number}".encode()).digest()[:36], np.uint8)
    return np.kron(values.reshape(3, 4, 3), np.ones((HEIGHT // 3, WIDTH // 4, 1), np.uint8))


def picture(state: str, number: int, kind: str) -> bytes:
    from io import BytesIO

    target = BytesIO()
    Image.fromarray(frame(state, number)).save(target, kind)
    return target.getvalue()


def write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
