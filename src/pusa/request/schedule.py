"""Parse the schedule of a request: all latent frames together, or one after another in a wave."""

import re
from collections.abc import Collection

from pusa.codes import CodedError
from pusa.positions import latent_frames
from pusa.waves import least_delay

WAVE = "wave"
SCHEDULE_PATTERN = r"^(even|wave|wave:[1-9][0-9]?)$"
DEFAULT_DELAY = 2
"""Steps between neighbouring latent frames; see the table in docs/speed.md."""


def is_wave(schedule: str) -> bool:
    return schedule.startswith(WAVE)


def delay_of(schedule: str) -> int | None:
    """Return the delay of a resolved schedule, ``wave:2``; None for ``even``."""
    return int(schedule.partition(":")[2]) if is_wave(schedule) else None


def check_schedule(schedule: str) -> str:
    """Raise ValueError for anything but ``even``, ``wave`` and ``wave:1`` to ``wave:99``."""
    if not re.fullmatch(SCHEDULE_PATTERN, schedule, re.ASCII):
        raise CodedError(
            "schedule_unknown",
            f"schedule={schedule[:60]!r} is not understood: write even, wave or wave:DELAY with a delay of 1..99 steps "
            "between neighbouring latent frames, such as wave:2",
            value=schedule[:60],
        )
    return schedule


def check_beside_wave(kinds: Collection[str], guidance_range: tuple[float, float]) -> None:
    """Raise ValueError for what needs all frames at the same step: the draft of a final, a range of guided steps."""
    if "draft" in kinds:
        raise CodedError(
            "wave_no_final", "schedule=wave: all frames of a final follow its draft together: leave it out"
        )
    if guidance_range != (0, 1):
        raise CodedError(
            "wave_no_guidance_range",
            "guidance_start and guidance_stop are parts of the steps, and in a wave each frame is at another step: "
            "leave them out, or ask for schedule=even",
        )


def resolve_schedule(schedule: str, *, steps: int, frames: int, window: int, overlap: int, factor: int) -> str:
    """Add the delay to ``wave``: the default, or more where a long video's window needs it.

    Args:
        frames, window, overlap: in frames. factor: frames of a latent frame after the first.

    Raises:
        ValueError: the delay is too short, or the window too small, for a window that moves along a long video.
    """
    if not is_wave(schedule):
        return schedule
    kept = latent_frames(overlap, factor)
    least = least_delay(steps, latent_frames(window, factor), kept) if frames > window else 1
    if schedule == WAVE:
        return f"{WAVE}:{max(DEFAULT_DELAY, least)}"
    if (delay_of(schedule) or 0) < least:
        raise CodedError(
            "wave_too_quick",
            f"schedule={schedule}: with {steps} steps too many latent frames move at once for a window of {window} "
            f"frames with an overlap of {overlap}: give wave:{least} or more, fewer steps or a larger window",
            schedule=schedule,
            steps=steps,
            window=window,
            overlap=overlap,
            least=least,
        )
    return schedule
