"""Make a request that is not to become a video: for its sizes, or to load its model."""

from typing import Any

from pusa.defaults import GenerationDefaults
from pusa.request.generation import GenerationRequest


def placeholder_request(defaults: GenerationDefaults, **fields: Any) -> GenerationRequest:
    """Make a request with `fields`, for any model, and with a prompt that one with these defaults can read.

    Raises:
        ValidationError: of pydantic.
    """
    return GenerationRequest.model_validate({"model": "any", "prompt": defaults.placeholder_prompt, **fields})
