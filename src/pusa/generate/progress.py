"""Count and report denoising steps, and show previews of the video so far."""

import time
from io import BytesIO

from PIL import Image
from torch import Tensor

from pusa import media
from pusa.events import Note, Preview, Report, Stage, Step
from pusa.models.vae import DecodeMemoryError, decode_video
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
        self._steps_resumed = 0
        self._began_at: float | None = None

    def begin_window(self, steps_resumed: int) -> None:
        """Count a window of which a checkpoint holds the first `steps_resumed` steps."""
        self.windows_begun += 1
        self.steps_done += steps_resumed
        self._steps_resumed += steps_resumed

    def begin_denoising(self) -> None:
        """Report the stage and start the clock, before the first step of the first window that is denoised."""
        if self._began_at is None:
            self._report(Stage("denoise"))
            self._began_at = time.monotonic()

    def count_step(self) -> int:
        """Count a step and return the number of steps done."""
        self.steps_done += 1
        return self.steps_done

    def report_step(self) -> None:
        """Report the last step done; the time left assumes that every step takes as long as the average one."""
        assert self._began_at is not None
        seconds_per_step = (time.monotonic() - self._began_at) / (self.steps_done - self._steps_resumed)
        seconds_left = seconds_per_step * (self.total_steps - self.steps_done)
        self._report(Step(self.steps_done, self.total_steps, seconds_left))


class Previews:
    """Decode and report one frame of the video so far, every few steps.

    Args:
        every: steps between two previews; 0: none.
        seconds: minimum time between two previews.
    """

    def __init__(self, report: Report, *, every: int = 0, seconds: float = 0.0) -> None:
        self._report, self._every, self._seconds = report, every, seconds
        self._shown_at = float("-inf")

    def is_due(self, step: int) -> bool:
        """Tell if `show` will show one after `step` steps."""
        is_early = time.monotonic() - self._shown_at < self._seconds
        return bool(self._every) and step % self._every == 0 and not is_early

    def show(self, pipe: PusaPipeline, denoised: Tensor) -> None:
        """Report a preview of predicted clean latents ``[1, C, F, h, w]``; if that fails, it is the last one."""
        middle = denoised.shape[2] // 2
        try:
            frame = media.to_uint8(decode_video(pipe.vae, denoised[:, :, middle : middle + 1]))[0]
        except DecodeMemoryError:
            self._every = 0
            self._report(Note("no previews: there is no memory for them"))
            return
        except (RuntimeError, ValueError) as error:  # the video is not lost yet: its own decoding tells
            self._every = 0
            self._report(Note(f"no previews: {error}"))
            return
        self._shown_at = time.monotonic()
        image = BytesIO()
        Image.fromarray(frame).save(image, "WEBP", quality=80)
        self._report(Preview(image.getvalue()))
