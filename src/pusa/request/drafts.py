"""Define a draft and its final: sizes, steps, and the noise multiplier of the frames that the final takes from it."""

from collections.abc import Sequence

from pusa.codes import CodedError
from pusa.defaults import GenerationDefaults
from pusa.positions import nearest_of

FINAL_NOISE = 0.7
"""Noise multiplier of a draft's frames in its final: docs/speed.md, Draft and final, has the table."""
_STEPS_SHARE = 0.4  # of a draft, in steps of the model
LEAST_SIDE = 80  # pixels: below, the things of the embedded model, which knows one size, lose their shape
MAX_SIDE = 2048


def draft_size(defaults: GenerationDefaults, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """Return width and height of a draft: half of the given ones, which are the model's by default.

    They are rounded to the model's multiple; the shorter side keeps 80 pixels, so that a draft of a small model shows
    something.
    """
    width, height = width or defaults.width, height or defaults.height
    scale = min(1.0, max(0.5, LEAST_SIDE / min(width, height)))
    multiple = defaults.size_multiple
    return nearest_of(round(width * scale), multiple), nearest_of(round(height * scale), multiple)


def draft_steps(steps: int) -> int:
    """Return the steps of a draft of a clip of so many steps: 4 for 10."""
    return max(1, round(steps * _STEPS_SHARE))


def final_size(defaults: GenerationDefaults, width: int, height: int) -> tuple[int, int]:
    """Return width and height of the final of a draft: the model's if the draft is one of that, else twice its own.

    Raises:
        ValueError: a side would be above 2048 pixels.
    """
    own = defaults.width, defaults.height
    for size, draft in ((own, draft_size(defaults)), (own[::-1], draft_size(defaults)[::-1])):
        if draft == (width, height):
            return size
    if max(width, height) * 2 > MAX_SIDE:
        raise CodedError(
            "final_too_large",
            f"twice the draft's {width}x{height} is above {MAX_SIDE} pixels: give the final a size",
            width=width,
            height=height,
            limit=MAX_SIDE,
        )
    return 2 * width, 2 * height


def final_steps(steps: int, noise: float) -> int:
    """Return the steps of a final whose frames start at `noise`, by those of a whole clip, which starts at 1."""
    return max(1, round(steps * noise))


def check_drafts(task: str, is_draft: bool, kinds: Sequence[str]) -> None:
    """Raise ValueError for a draft, or a final of one, that no task makes."""
    drafts = kinds.count("draft")
    if drafts > 1:
        raise CodedError("drafts_too_many", f"{drafts} drafts are given: a final is made from one", given=drafts)
    if drafts and is_draft:
        raise CodedError("draft_beside_final", "draft=true beside the draft of a final: ask for one of them")
    if (drafts or is_draft) and task not in ("generate", "extend"):
        raise CodedError(
            "task_no_draft",
            f"task {task} has no drafts: make it at once, or a draft of task generate or extend",
            task=task,
        )
