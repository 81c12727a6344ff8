"""Fewer steps and fewer passes by the HTTP API: in JSON and in forms, where all values are text."""

from typing import Any

import pytest

from pusa.request import GenerationRequest
from pusa.server.errors import ServiceError
from pusa.server.http.schemas import CreateVideo
from pusa.server.http.to_request import build_request
from pusa.server.http.validation import validate_fields
from pusa.zoo import defaults_of


@pytest.mark.parametrize(
    ("is_text", "values"),
    [
        (False, {"fast": True, "guidance_scale": 3.0, "guidance_stop": 0.25, "step_cache": "first_block"}),
        (True, {"fast": "true", "guidance_scale": "3", "guidance_stop": "0.25", "step_cache": "first_block"}),
    ],
)
def test_the_fields_reach_the_request(is_text: bool, values: dict[str, Any]) -> None:
    body = validate_fields(CreateVideo, {"prompt": "a cat", **values}, is_text=is_text)
    request = GenerationRequest.model_validate(build_request(body, defaults=defaults_of("wan2.1-14b")))
    resolved = request.model_copy(update={"model": "wan2.1-14b"}).resolved(defaults_of("wan2.1-14b"))
    assert (resolved.fast, resolved.steps, resolved.step_cache) == (True, 4, "first_block")
    assert (resolved.guidance, resolved.guidance_start, resolved.guidance_stop) == (3.0, 0.0, 0.25)
    assert "fast" not in build_request(CreateVideo(prompt="a cat"), defaults=defaults_of("tiny"))


def test_values_outside_are_refused_by_name() -> None:
    with pytest.raises(ServiceError, match=r"guidance_stop=1\.5 is outside 0\.\.1"):
        validate_fields(CreateVideo, {"prompt": "a cat", "guidance_stop": 1.5}, is_text=False)
    with pytest.raises(ServiceError, match="step_cache='tea' is none of none, first_block"):
        validate_fields(CreateVideo, {"prompt": "a cat", "step_cache": "tea"}, is_text=False)
