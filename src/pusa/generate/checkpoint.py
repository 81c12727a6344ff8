"""A run that was cut short goes on where it was: its latents are on the disk, whole or not at all.

Denoising is an ordinary differential equation: latents, the step they have reached and the state of the generator that
draws the noise of later windows are all there is. What goes on from them makes the same video, equal to the bit.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa import __version__
from pusa.fsutil import flush
from pusa.request import ResolvedRequest


def key_of(request: ResolvedRequest) -> str:
    """The same for two requests exactly if they make the same video: what their files are called does not matter.

    Conditions go by their `sha256`, so it has to be filled in. Another version of this package is another key.
    """
    asked = request.model_dump(mode="json")
    for condition in asked["conditions"]:
        del condition["file"]
    return hashlib.sha256(json.dumps([__version__, asked], sort_keys=True).encode()).hexdigest()


class Checkpoint:
    """How far a run has come, and the file that says so.

    Euler steps resume to the bit; a solver or a cache that remembers earlier steps does not (docs/solvers.md).

    Args:
        path: the file, safetensors: latents of every window begun and the generator's state.
        request: what is made, with nothing left open.
        every: steps between two writes; what the last step of a window has made is always written.
        seconds: least time between two writes, save those after a window.

    Attributes:
        windows: latents of the windows begun, fp32 ``[1, C, F, h, w]`` on the CPU. They are kept until the end: a
            window of 81 frames at 832 x 480 has 8.4 MB.
        steps_of_last: steps that the last of them has done; those before it are finished.
        generator_state: uint8, after the noise of the last window was drawn; None before that.
    """

    def __init__(self, path: Path, request: ResolvedRequest, *, every: int = 4, seconds: float = 0.0) -> None:
        if every < 1:
            raise ValueError(f"checkpoint_every={every} is below 1")
        self.path, self.key, self.every, self.steps = path, key_of(request), every, request.steps
        self.seconds, self.written_at = seconds, time.monotonic()
        self.windows: list[Tensor] = []
        self.steps_of_last = 0
        self.generator_state: Tensor | None = None

    def read(self) -> str | None:
        """Take over what the file holds. A file that is not of this request is left aside; the answer then says why."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads((file.metadata() or {})["checkpoint"])
                if about["key"] != self.key:
                    return f"{self.path.name} is the checkpoint of another request: starting from the beginning"
                windows = [file.get_tensor(f"window_{number}") for number in range(about["windows"])]
                self.generator_state = file.get_tensor("generator")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            return f"{self.path.name} cannot be read as a checkpoint ({error}): starting from the beginning"
        self.windows, self.steps_of_last = windows, about["steps_of_last"]
        return None

    def reached(self, window: int) -> tuple[Tensor | None, int]:
        """The latents of a window and the steps they have done; None and 0 if it was not begun."""
        if window >= len(self.windows):
            return None, 0
        return self.windows[window], self.steps_of_last if window == len(self.windows) - 1 else self.steps

    def keep(self, window: int, latents: Tensor, steps_done: int, generator: torch.Generator) -> bool:
        """Write the file if it is due, durably and at once; say whether it was.

        Args:
            window: its number; those before it are finished.
            latents: of this window after `steps_done` of its steps.
        """
        is_early = steps_done % self.every or time.monotonic() - self.written_at < self.seconds
        if is_early and steps_done < self.steps:
            return False
        self.windows[window:] = [latents.detach().float().cpu()]
        self.steps_of_last = steps_done
        about = {"key": self.key, "windows": len(self.windows), "steps_of_last": steps_done}
        tensors = {f"window_{number}": kept.contiguous() for number, kept in enumerate(self.windows)}
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        save_file({**tensors, "generator": generator.get_state()}, temporary, {"checkpoint": json.dumps(about)})
        flush(temporary)
        os.replace(temporary, self.path)
        flush(self.path.parent)
        self.written_at = time.monotonic()
        return True
