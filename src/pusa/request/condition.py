"""Define a condition: an image or a video that is known, and where it goes."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from pusa.codes import CodedError
from pusa.fields import StrictModel, field
from pusa.numerals import MAX_VALUES
from pusa.request.position import PositionField
from pusa.request.types import FileReference, Multiplier


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


class ConditionSpec(StrictModel):
    """Describe one condition: an image or a video file, its positions, and how far the model may depart from it."""

    kind: Literal["image", "video", "draft"] = field(
        "image", "What the file is: an image, a video, or the draft that a final is made from."
    )
    file: FileReference = field(
        ..., "The image or video: a path on the command line, the name of an upload in the API."
    )
    positions: Annotated[list[PositionField], BeforeValidator(_as_list)] = field(
        [],
        "Where it goes: latent frame (3), frame (80f), seconds (1.5s) or last; negative counts from the end. An image "
        "has one place. A video's latent frames stay at their own places, these are the ones kept; none keeps all.",
        unset="the beginning",
        max_length=MAX_VALUES,
    )
    noise: Annotated[list[Multiplier], BeforeValidator(_as_list)] | None = field(
        None,
        "How far the model may depart from it: 0 keeps it exactly, 1 ignores it. One for all or one for each place.",
        unset="the preset's",
        min_length=1,
        max_length=MAX_VALUES,
    )
    encode: Literal["single", "repeat"] | None = field(
        None,
        "How an image after the first frame is encoded: alone, as the original does, or as equal frames that fill its "
        "latent frame (four for Wan).",
        unset="the model's",
    )
    fit: Literal["crop", "letterbox", "stretch"] = field(
        "crop", "How an image of another shape is fitted: cut its edges, show it all on black, or distort it."
    )
    sha256: str | None = field(None, "Of the file's content, recorded with the result.", pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _fits_together(self) -> "ConditionSpec":
        places = self.positions
        if self.kind == "draft" and (places or len(self.noise or [0.0]) > 1):
            raise CodedError(
                "draft_positions",
                "a draft is followed in all frames: leave its positions out and give one noise multiplier",
            )
        if self.kind == "image" and len(places) > 1:
            raise CodedError(
                "picture_positions",
                f"an image has one position, not {len(places)}: add the image once for each",
                given=len(places),
            )
        if len(set(places)) < len(places):
            raise CodedError(
                "position_twice",
                f"position {next(p for p in places if places.count(p) > 1)} is given twice",
                position=str(next(p for p in places if places.count(p) > 1)),
            )
        count = len(places) or (1 if self.kind == "image" else None)
        if self.noise is not None and count is not None and len(self.noise) not in (1, count):
            raise CodedError(
                "noise_count",
                f"{len(self.noise)} noise multipliers for {count} position{'s' if count > 1 else ''}: "
                "give one for all or one for each",
                given=len(self.noise),
                positions=count,
            )
        return self


class ResolvedCondition(ConditionSpec):
    """Hold a condition with every field set; a video without `positions` is kept whole, or as the task takes it."""

    noise: list[Multiplier]
    encode: Literal["single", "repeat"]
