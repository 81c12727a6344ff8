"""Parse the prompts of a long video: one for each window, or each from a time on; and choose one for a window."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pusa.codes import CodedError
from pusa.fields import shown
from pusa.positions import Span, latent_frames, spans
from pusa.request.position import Position

_TIMED = re.compile(r"\s*(-?\d{1,7}(?:\.\d{1,3})?s|-?\d{1,7}f)\s*:\s*(.*)", re.ASCII | re.DOTALL)


def prompt_lines(text: str) -> list[str]:
    """Divide a text into prompts: its lines that are not blank."""
    return [line for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class TimedPrompt:
    """Hold a prompt and the position from which on it holds; None: it is that of a window."""

    start: Position | None
    text: str


def parse_prompts(prompts: Sequence[str]) -> list[TimedPrompt]:
    """Parse prompts: each with its time before a colon (``4.5s: it flies``, ``72f: it flies``), or none of them.

    Raises:
        ValueError: one is empty, only some have times, the first is not at 0, or times do not rise.
    """
    found = []
    for number, line in enumerate(prompts, start=1):
        timed = _TIMED.fullmatch(line)
        start, text = (Position.parse(timed[1]), timed[2]) if timed else (None, line)
        if not text.strip():
            raise CodedError(
                "prompts_empty",
                f"prompt {number} of prompts is empty: say what its part of the video shows",
                number=number,
            )
        found.append(TimedPrompt(start, text.strip()))
    starts = [prompt.start for prompt in found if prompt.start is not None]
    if starts and len(starts) < len(found):
        plain = next(number for number, prompt in enumerate(found, start=1) if prompt.start is None)
        raise CodedError(
            "prompts_time_missing",
            f"prompt {plain} of prompts has no time and others have: write a time before each (0s: ...), or before "
            "none",
            number=plain,
        )
    if starts and starts[0].value != 0:
        raise CodedError(
            "prompts_first_time",
            f"the first of prompts begins at {starts[0]}: the first must be at 0s",
            start=str(starts[0]),
        )
    for before, after in pairwise(starts):
        if before.unit != after.unit:
            raise CodedError(
                "prompts_time_units",
                f"prompts begin at {before} and at {after}: give all times in seconds, or all in frames",
                before=str(before),
                after=str(after),
            )
        if after.value <= before.value:
            raise CodedError(
                "prompts_time_order",
                f"prompts begin at {before} and then at {after}: their times must rise",
                before=str(before),
                after=str(after),
            )
    return found


@dataclass(frozen=True)
class Story:
    """Hold the prompts of a video, each from a latent frame on."""

    starts: tuple[int, ...]
    texts: tuple[str, ...]

    def number_at(self, latent_frame: float) -> int:
        """Return the number of the prompt in force at a latent frame, from 0 on."""
        return bisect_right(self.starts, max(latent_frame, 0)) - 1

    def at(self, latent_frame: float) -> str:
        """Return the prompt in force at a latent frame."""
        return self.texts[self.number_at(latent_frame)]

    def of_window(self, span: Span) -> str:
        """Return the prompt in force in the middle of what a window adds."""
        return self.at(_middle(span))


def story(prompts: Sequence[str], *, frames: int, fps: float, window: int, overlap: int, factor: int) -> Story:
    """Place prompts in a video of `frames` frames that is made in windows; a plain one begins with its window.

    Where there are fewer prompts than windows, the last one holds on.

    Args:
        frames, window, overlap: in frames. factor: frames of a latent frame after the first.

    Raises:
        ValueError: as `parse_prompts`; or one is outside the video, or in force in no window.
    """
    parsed = parse_prompts(prompts)
    total, length, kept = (latent_frames(count, factor) for count in (frames, window, overlap))
    windows = spans(total, length, kept) if total > length else [Span(0, total, 0)]
    counted = f"{len(windows)} window{'s' if len(windows) > 1 else ''} of {window} frames"
    if len(parsed) > len(windows):
        raise CodedError(
            "prompts_too_many",
            f"{len(parsed)} prompts for a video of {frames} frames, which is made in {counted}: give at most "
            f"{len(windows)}, a longer video or a smaller window",
            given=len(parsed),
            frames=frames,
            window=window,
            windows=len(windows),
        )
    if parsed[0].start is None:
        starts = [span.start + span.overlap for span in windows[: len(parsed)]]
    else:
        starts = [_latent_index(prompt, frames, fps, factor) for prompt in parsed]
    found = Story(tuple(starts), tuple(prompt.text for prompt in parsed))
    used = {found.number_at(_middle(span)) for span in windows}
    for number, prompt in enumerate(parsed):
        if number not in used:
            raise CodedError(
                "prompt_in_no_window",
                f"the prompt at {prompt.start} holds in no window of this video, which is made in {counted}, each with "
                "the prompt that is in force in the middle of what it adds: move it, or give a smaller window",
                start=str(prompt.start),
                window=window,
                windows=len(windows),
            )
    return found


def _middle(span: Span) -> float:
    return span.start + span.overlap + (span.length - span.overlap - 1) / 2


def _latent_index(prompt: TimedPrompt, frames: int, fps: float, factor: int) -> int:
    assert prompt.start is not None
    try:
        return prompt.start.latent_index(frames, fps, factor)
    except ValueError as error:
        raise ValueError(f"the prompt {shown(prompt.text)}: {error}") from None
