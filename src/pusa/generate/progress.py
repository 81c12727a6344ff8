"""Count and report denoising steps, and show previews of the video so far."""

import time
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor

from pusa.events import Note, Preview, Report, Stage, Step
from pusa.models.latent_preview import FrameDecoder, preview_of
from pusa.models.tiny_decoder import load_tiny_decoder
from pusa.models.vae import is_out_of_memory
from pusa.pipeline import PusaPipeline


class DenoisingProgress:
    """Count the denoising steps over all windows of a video and report them with the time left.

    Attributes:
        total_steps: steps of all windows; known once the windows are planned.
        steps_done: steps done so far, those of a checkpoint included.
        windows_begun: windows begun so far.
    """

    def __init__(self, report: Report) -> None:
        self.total_steps = self.steps_done = self.windows_begun = 0
        self._report = report
        self._steps_resumed = self._steps_reported = 0
        self._began_at: float | None = None

    def begin_window(self, steps_resumed: int) -> None:
        """Count a window of which a checkpoint holds the first `steps_resumed` steps."""
        self.windows_begun += 1
        self.steps_done += steps_resumed
        self._steps_resumed += steps_resumed

    def begin_denoising(self) -> None:
        """Report the stage, before the steps of each window; start the clock before the first that is denoised."""
        self._report(Stage("denoise"))
        if self._began_at is None:
            self._began_at = time.monotonic()

    def go_on(self) -> None:
        """Report the stage again, after frames were decoded between two steps."""
        self._report(Stage("denoise"))

    def count_step(self) -> int:
        """Count a step and return the number of steps done."""
        self.steps_done += 1
        return self.steps_done

    def repeat(self, steps: int) -> None:
        """Take back the last steps, which will be done again; they are not reported twice."""
        self.steps_done -= steps

    def report_step(self) -> None:
        """Report the last step done; the time left assumes that every step takes as long as the average one."""
        assert self._began_at is not None
        if self.steps_done <= self._steps_reported:
            return
        self._steps_reported = self.steps_done
        seconds_per_step = (time.monotonic() - self._began_at) / (self.steps_done - self._steps_resumed)
        seconds_left = seconds_per_step * (self.total_steps - self.steps_done)
        self._report(Step(self.steps_done, self.total_steps, seconds_left))


class Previews:
    """Show and report one frame of the video so far, every few steps; the VAE does not run for it.

    Args:
        every: steps between two previews; 0: none.
        seconds: minimum time between two previews.
        decoder: file of a tiny decoder (see `pusa.models.tiny_decoder`); None: a linear map, see
            `pusa.models.latent_preview`.
    """

    def __init__(self, report: Report, *, every: int = 0, seconds: float = 0.0, decoder: Path | None = None) -> None:
        self._report, self._every, self._seconds, self._file = report, every, seconds, decoder
        self._shown_at = float("-inf")
        self._decode: FrameDecoder | None = None

    def prepare(self, pipe: PusaPipeline) -> None:
        """Load what `show` needs, once; call it before denoising, as fitting a map takes the VAE and seconds."""
        if not self._every or self._decode is not None:
            return
        try:
            if self._file is None:
                self._decode = preview_of(pipe.vae)
            else:
                channels = (pipe.transformer or pipe.transformer_2).config.in_channels
                self._decode = load_tiny_decoder(self._file, channels=channels, device=pipe._execution_device)
        except (RuntimeError, ValueError, OSError) as error:  # the video does not depend on it
            self._give_up(error)

    def is_due(self, step: int) -> bool:
        """Tell if `show` will show one after `step` steps."""
        is_early = time.monotonic() - self._shown_at < self._seconds
        return bool(self._every) and step % self._every == 0 and not is_early

    def show(self, pipe: PusaPipeline, denoised: Tensor) -> None:
        """Report the middle of predicted clean latents ``[1, C, F, h, w]``; if that fails, there are no more."""
        assert self._decode is not None
        try:
            frame = self._decode(denoised, denoised.shape[2] // 2)
        except RuntimeError as error:
            self._give_up(error)
            return
        self._shown_at = time.monotonic()
        height, width = (side * pipe.vae_scale_factor_spatial for side in denoised.shape[3:])
        image = BytesIO()
        picture = Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(image, "WEBP", quality=80)
        self._report(Preview(image.getvalue()))

    def _give_up(self, error: Exception) -> None:
        self._every = 0
        is_memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
        message = f"no previews: {'there is no memory for them' if is_memory else error}"
        self._report(Note(message, code="no_previews"))
