"""Find NaN and infinity where they arise, without waiting for the device at every step."""

import torch
from torch import Tensor


class NotFiniteError(RuntimeError):
    """Report NaN or infinity that `part` of the model has computed; `latents` are those it was given."""

    def __init__(self, message: str, part: str, latents: Tensor | None = None) -> None:
        super().__init__(message)
        self.part = part
        self.latents = latents


def is_finite(tensor: Tensor) -> bool:
    """Tell if a tensor holds neither NaN nor infinity; waits for its device."""
    return bool(tensor.isfinite().all())


def check_decoded(frames: Tensor, latents: Tensor | None = None) -> Tensor:
    """Return frames that a VAE has decoded from finite latents; raise NotFiniteError unless they are finite, too."""
    if is_finite(frames):
        return frames
    if latents is not None and not is_finite(latents):
        raise ValueError("the latents to decode hold NaN or infinity: denoise them again")
    raise NotFiniteError("the vae has decoded NaN or infinity from finite latents: load it in fp32", "vae", latents)


class FiniteSteps:
    """Record on the device, for each denoising step, if its latents are finite; `check` reads all of it at once.

    Args:
        begin: number of the first step recorded.
        steps: of the whole run.
    """

    def __init__(self, begin: int, steps: int) -> None:
        self._begin, self._steps = begin, steps
        self._flags: list[Tensor] = []
        self._parts: list[str] = []

    def record(self, latents: Tensor, part: str) -> None:
        """Record the latents after the next step, which the transformer `part` has computed."""
        self._flags.append(latents.isfinite().all())
        self._parts.append(part)

    def check(self) -> None:
        """Raise NotFiniteError for the first step whose latents are not finite."""
        flags = torch.stack(self._flags).tolist() if self._flags else []
        if False not in flags:
            return
        first = flags.index(False)
        raise NotFiniteError(
            f"the {self._parts[first]} has computed NaN or infinity in step {self._begin + first + 1} of {self._steps}"
            ": its weights are damaged, a LoRA is too strong, or fp16 too narrow (take bf16 or fp32)",
            self._parts[first],
        )
