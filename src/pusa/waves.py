"""Plan a wave: each latent frame starts some steps after the one before it, so that early frames are finished first.

A video longer than the model's window is one wave as well, seen through a window that moves along with the frames that
are in the making (Rolling Diffusion Models, arXiv 2402.09470; FIFO-Diffusion, arXiv 2405.11473). Nothing here imports
torch.
"""

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Turn:
    """Hold the steps `first` to `last` of a wave, in which no latent frame moves but those of one window.

    Attributes:
        start, length: the window, in latent frames.
        first, last: steps done before and after the turn.
    """

    start: int
    length: int
    first: int
    last: int

    @property
    def steps(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Wave:
    """Hold the steps at which each latent frame starts and ends.

    Attributes:
        frames: latent frames of the video.
        steps: that each of them takes.
        delay: steps between the starts of neighbouring frames.
        kept: frames that never move, as their noise multiplier is 0; they delay nothing.
    """

    frames: int
    steps: int
    delay: int
    kept: frozenset[int] = frozenset()

    @cached_property
    def starts(self) -> dict[int, int]:
        """Return the first step of each frame that moves, in the order of the frames."""
        moving = (frame for frame in range(self.frames) if frame not in self.kept)
        return {frame: number * self.delay for number, frame in enumerate(moving)}

    @property
    def total_steps(self) -> int:
        """Count the steps of the whole wave; those of one frame where nothing moves."""
        return wave_steps(len(self.starts), self.steps, self.delay)

    def finished(self, step: int) -> int:
        """Count the leading frames that are clean after `step` steps."""
        return next((frame for frame, start in self.starts.items() if start + self.steps > step), self.frames)

    def finished_in(self, turn: Turn, step: int) -> int:
        """Count the leading frames that are clean after `step` steps and are not beyond the window of a turn."""
        return min(self.finished(step), turn.start + turn.length)

    def turns(self, window: int, history: int) -> list[Turn]:
        """Divide the wave into turns of a window that moves along.

        Args:
            window: latent frames that the model denoises at once.
            history: finished frames that stay in the window before the first one that moves; fewer where the frames
                that move at once, and those kept among them, leave no room.

        Raises:
            ValueError: the frames that move at once do not fit into the window.
        """
        length = min(window, self.frames)
        found: list[Turn] = []
        start = first = 0
        while True:
            outside = (step for frame, step in self.starts.items() if frame >= start + length)
            last = next(outside, self.total_steps)
            found.append(Turn(start, length, first, last))
            if start + length == self.frames:
                return found
            finished = self.finished_in(found[-1], last)
            if finished == start:
                raise ValueError(
                    f"a wave of delay {self.delay} moves {math.ceil(self.steps / max(self.delay, 1))} latent frames at "
                    f"once, too many for a window of {length}: give a longer delay, fewer steps or a larger window"
                )
            following = min(max(finished - history, start + 1), self.frames - length)
            start, first = following, last


def wave_steps(moving: int, steps: int, delay: int) -> int:
    """Count the steps of a wave of `moving` latent frames."""
    return steps + delay * max(0, moving - 1)


def least_delay(steps: int, window: int, history: int) -> int:
    """Find the least delay at which the frames that move at once leave a window room to move along.

    Raises:
        ValueError: the window has no room for one frame that moves and one more.
    """
    room = window - history - 1
    if room < 1:
        raise ValueError(
            f"a window of {window} latent frames with {history} finished ones has no room for a wave that moves along: "
            "give a larger window or a smaller overlap"
        )
    return math.ceil(steps / room)
