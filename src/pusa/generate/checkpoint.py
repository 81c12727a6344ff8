"""Save the latents of a run while it denoises, and resume an interrupted run from them.

Denoising solves an ordinary differential equation: its state is the latents, the number of steps done and the state of
the generator that draws the noise of later windows. A resumed run makes the same video, bit for bit. Where frames that
do not move are left out of steps, their keys and values are part of the state, too large for a file: such a run is
saved before steps that compute every frame, see `pusa.models.frame_skipping`.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa import __version__
from pusa.codes import CodedText
from pusa.fsutil import flush
from pusa.request import ResolvedRequest


def request_key(request: ResolvedRequest, weights: Mapping[str, Any] | None = None) -> str:
    """Compute a key that two requests share exactly if they make the same video, whatever their files' names.

    Conditions are compared by `sha256`, which must be set. Another version of this package makes another key, and so do
    other `weights` (hashes of the model's and the LoRAs' files).
    """
    values = request.model_dump(mode="json", exclude={"metadata"})
    for condition in values["conditions"]:
        del condition["file"]
    return hashlib.sha256(json.dumps([__version__, values, weights], sort_keys=True).encode()).hexdigest()


class DenoisingCheckpoint:
    """Hold the latents of every window begun, and keep them in a file.

    Euler steps resume to the bit; a solver or a cache that remembers earlier steps does not (docs/solvers.md).

    Args:
        path: safetensors file with the latents of every window begun and the generator's state.
        request: the request of the run.
        every: least number of steps between two writes; the last step of a window is always written.
        seconds: minimum time between two writes, except for the last step of a window.
        weights: hashes of the files that the run is made with.

    Attributes:
        windows: latents of the windows begun, fp32 ``[1, C, F, h, w]`` on the CPU, kept until the end: a window of 81
            frames at 832 x 480 takes 8.4 MB. A wave's are its turns, of the earlier ones the frames finished in each.
        steps_of_last: steps done in the last of them; the earlier ones are finished.
        generator_state: uint8 state after drawing the noise of the last window; None before that.
    """

    def __init__(
        self,
        path: Path,
        request: ResolvedRequest,
        *,
        every: int = 4,
        seconds: float = 0.0,
        weights: Mapping[str, Any] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"checkpoint_every={every} is below 1")
        self.path, self.key, self.every = path, request_key(request, weights), every
        self.seconds, self.written_at = seconds, time.monotonic()
        self.windows: list[Tensor] = []
        self.steps_of_last, self._steps = 0, request.steps  # done in the last window, and of all its steps
        self.generator_state: Tensor | None = None

    def read(self) -> str | None:
        """Load the file if there is one; ignore one of another request and return the reason."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {})["checkpoint"])
                if header["key"] != self.key:
                    message = f"{self.path.name} is the checkpoint of another request: starting from the beginning"
                    return CodedText("checkpoint_unused", message)
                windows = [file.get_tensor(f"window_{number}") for number in range(header["windows"])]
                self.generator_state = file.get_tensor("generator")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            message = f"{self.path.name} cannot be read as a checkpoint ({error}): starting from the beginning"
            return CodedText("checkpoint_unused", message)
        self.windows, self.steps_of_last = windows, header["steps_of_last"]
        return None

    def resume(self, window: int, steps: int) -> tuple[Tensor | None, int]:
        """Return the latents of a window of `steps` steps and its steps done; None and 0 if it was not begun."""
        if window >= len(self.windows):
            return None, 0
        return self.windows[window], self.steps_of_last if window == len(self.windows) - 1 else steps

    def is_past(self, window: int) -> bool:
        """Tell if a later window was begun."""
        return window < len(self.windows) - 1

    def trim(self, window: int, begin: int, end: int) -> None:
        """Keep latent frames `begin` to `end` of a finished window only: a later one has the others, too."""
        if window == len(self.windows) - 1:
            self.windows[window] = self.windows[window][:, :, begin:end]

    def is_due(self, steps_done: int, steps: int) -> bool:
        """Tell if `save` will write the file after `steps_done` of the `steps` steps of a window."""
        written = self.steps_of_last if self.steps_of_last < self._steps else 0  # none of a window after a finished one
        is_early = steps_done - written < self.every or time.monotonic() - self.written_at < self.seconds
        return not is_early or steps_done >= steps

    def save(self, window: int, latents: Tensor, steps_done: int, steps: int, generator: torch.Generator) -> bool:
        """Write the file durably and atomically if it is due; return True if it was.

        Args:
            window: number of the window; the earlier ones are finished.
            latents: the window's latents after `steps_done` of its `steps` steps, ``[1, C, F, h, w]``.
        """
        if not self.is_due(steps_done, steps):
            return False
        self.windows[window:] = [latents.detach().float().cpu()]
        self.steps_of_last, self._steps = steps_done, steps
        header = {"key": self.key, "windows": len(self.windows), "steps_of_last": steps_done}
        tensors = {
            f"window_{number}": window_latents.contiguous() for number, window_latents in enumerate(self.windows)
        }
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        save_file({**tensors, "generator": generator.get_state()}, temporary, {"checkpoint": json.dumps(header)})
        flush(temporary)
        os.replace(temporary, self.path)
        flush(self.path.parent)
        self.written_at = time.monotonic()
        return True
