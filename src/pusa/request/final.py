"""Make the request for the final of a draft from that of the draft."""

from pusa.codes import CodedError
from pusa.defaults import GenerationDefaults
from pusa.request.drafts import final_size
from pusa.request.generation import GenerationRequest, stored_request


def final_request(
    request: GenerationRequest,
    draft: str,
    defaults: GenerationDefaults,
    *,
    noise: float | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
) -> GenerationRequest:
    """Make the request for the final of a draft, which every latent frame follows where nothing else is given.

    Args:
        request: that of the draft, with its size.
        draft: file of the draft's video.
        defaults: the model's.
        noise: how far the final may depart from the draft, 0..1; None takes `FINAL_NOISE`.
        size: width and height; None takes `final_size`.
        steps: None takes the model's times `noise`, as the frames start there.

    Raises:
        ValueError: the request is not one of a draft; pydantic's ValidationError for a value out of its range.
    """
    if not request.draft:
        raise CodedError("not_a_draft", "it is no draft: make one with --draft (draft=true), then its final")
    own = request.width or defaults.width, request.height or defaults.height
    width, height = size or final_size(defaults, *own)
    condition = {"kind": "draft", "file": draft, "fit": "stretch", **({} if noise is None else {"noise": [noise]})}
    changes = {
        "draft": False,
        "width": width,
        "height": height,
        "steps": steps,
        "schedule": "even",  # all frames follow the draft together
        "conditions": [*(spec.model_dump() for spec in request.conditions), condition],
    }
    return stored_request(request.model_dump() | changes)
