"""Choose and check the overlap: the frames that a continuation takes over from what comes before it."""

from typing import TYPE_CHECKING

from pusa.codes import CodedError
from pusa.defaults import GenerationDefaults
from pusa.positions import frames_of, latent_frames, nearest_of

if TYPE_CHECKING:
    from pusa.request.generation import GenerationRequest


def default_overlap(window: int, factor: int, *, most: int, sides: int = 1) -> int:
    """Return the frames that a continuation takes over by default: `most`, or as many as half a window has.

    Args:
        factor: frames of a latent frame after the first; whole latent frames are taken over.
        most: the model's `GenerationDefaults.overlap`.
        sides: ends of the window that are taken over; between two of them something is left to make.
    """
    length = latent_frames(window, factor)
    half = (length - 1) // 2 if sides == 2 else length // 2
    return min(nearest_of(most, factor, 1), frames_of(max(1, half), factor))


def resolve_overlap(request: "GenerationRequest", defaults: GenerationDefaults, *, frames: int, window: int) -> int:
    """Round the overlap of a request to whole latent frames, or choose the default.

    Args:
        frames, window: of the video, rounded.

    Raises:
        ValueError: it leaves nothing to make, or conditions have another number of noise multipliers.
    """
    factor, task = defaults.frames_per_latent, request.task
    sides = 2 if task in ("transition", "loop") else 1 if task == "extend" or frames > window else 0
    overlap = default_overlap(window, factor, most=defaults.overlap, sides=sides)
    overlap = nearest_of(request.overlap, factor, 1) if request.overlap else overlap
    kept, made_at_once = latent_frames(overlap, factor), latent_frames(window, factor)
    if task == "transition" and frames > window:
        raise CodedError(
            "transition_too_long",
            f"frames={frames}: a transition is made at once; give at most window={window}",
            frames=frames,
            window=window,
        )
    if sides * kept >= made_at_once:
        most = (made_at_once - 1) // sides
        raise CodedError(
            "overlap_too_large",
            f"overlap={overlap} leaves nothing to make in {window} frames: "
            + (f"give at most {frames_of(most, factor)}" if most else "give more frames"),
            overlap=overlap,
            window=window,
            most=frames_of(most, factor) if most else 0,
        )
    if task in ("extend", "transition"):
        for condition in request.conditions:
            if condition.noise and len(condition.noise) not in (1, kept):
                raise CodedError(
                    "overlap_noise_count",
                    f"{len(condition.noise)} noise multipliers for an overlap of {overlap} frames, which is {kept} "
                    f"latent frames: give 1 or {kept}",
                    given=len(condition.noise),
                    overlap=overlap,
                    needed=kept,
                )
    return overlap
