"""Check a request against what its model can read and do."""

from typing import TYPE_CHECKING

from pusa.codes import CodedError
from pusa.defaults import GenerationDefaults, check_class
from pusa.request.prompts import parse_prompts

if TYPE_CHECKING:
    from pusa.request.generation import GenerationRequest


def check_abilities(request: "GenerationRequest", defaults: GenerationDefaults) -> None:
    """Check that a model can read a request's prompts, and has the window, the shift and the guidance that it sets.

    Raises:
        ValueError: it cannot, or has not.
    """
    _check_prompts(request, defaults)
    _check_sampling(request, defaults)


def _check_prompts(request: "GenerationRequest", defaults: GenerationDefaults) -> None:
    """Check that a model can read a request's prompts.

    Raises:
        ValueError: a model of text has neither a prompt nor a condition; for another a prompt is no class of its own.
    """
    if defaults.has_text:
        return check_text(request)
    texts = [prompt.text for prompt in parse_prompts(request.prompts)] if request.prompts else [request.prompt]
    for text in texts:
        check_class("prompt", text, defaults.classes or 0)
    check_class("negative_prompt", request.negative_prompt or "", defaults.classes or 0)


def check_text(request: "GenerationRequest") -> None:
    """Raise ValueError for a request that has neither a prompt nor a condition."""
    if not request.prompt.strip() and not request.conditions:
        raise CodedError("prompt_missing", "the prompt is empty: say what the video shows, or give an image or a video")


def _check_sampling(request: "GenerationRequest", defaults: GenerationDefaults) -> None:
    """Check that a model has what a request sets: a window of that length, a shift, guidance.

    Raises:
        ValueError: it does not.
    """
    longest = defaults.longest_window
    if longest is not None and request.window is not None and min(request.window, request.frames or longest) > longest:
        raise CodedError(
            "window_too_long",
            f"window={request.window}: this model makes at most {longest} frames at once: leave the window out, and a "
            "longer video is chained from windows",
            window=request.window,
            longest=longest,
        )
    if not defaults.has_shift and request.shift not in (None, defaults.shift):
        raise CodedError(
            "no_shift", f"shift={request.shift:g}: this model samples at evenly spaced timesteps: leave the shift out"
        )
    if defaults.classes == 0 and (request.guidance or 1) > 1:
        raise CodedError(
            "no_guidance",
            f"guidance={request.guidance:g}: this model reads no prompt, so that nothing can guide it: leave it out",
        )
