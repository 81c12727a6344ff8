"""Define and validate a request for a video: every field with its range, default and unit.

The command line's options, the HTTP API's schema and the studio's controls are derived from `GenerationRequest`.
Nothing here imports torch, so that a request can be checked where no model is.
"""

from pusa.fields import explain, field_specs
from pusa.request.abilities import check_abilities
from pusa.request.condition import ConditionSpec, ResolvedCondition
from pusa.request.drafts import FINAL_NOISE, draft_size, draft_steps, final_size
from pusa.request.final import final_request
from pusa.request.generation import (
    MAX_FRAMES,
    MAX_PROMPTS,
    METADATA,
    SIZE_MULTIPLE,
    GenerationRequest,
    Metadata,
    ResolvedRequest,
    Task,
    match_orientation,
    rounding_notes,
    stored_request,
)
from pusa.request.overlap import default_overlap
from pusa.request.placeholder import placeholder_request
from pusa.request.position import Position, PositionField, parse_positions
from pusa.request.presets import PRESETS, Preset, preset_alpha, preset_noise
from pusa.request.prompts import prompt_lines
from pusa.request.schedule import is_wave
from pusa.request.types import FileReference, Multiplier, Text

__all__ = [
    "FINAL_NOISE",
    "MAX_FRAMES",
    "MAX_PROMPTS",
    "METADATA",
    "PRESETS",
    "SIZE_MULTIPLE",
    "ConditionSpec",
    "FileReference",
    "GenerationRequest",
    "Metadata",
    "Multiplier",
    "Position",
    "PositionField",
    "Preset",
    "ResolvedCondition",
    "ResolvedRequest",
    "Task",
    "Text",
    "check_abilities",
    "default_overlap",
    "draft_size",
    "draft_steps",
    "explain",
    "field_specs",
    "final_request",
    "final_size",
    "is_wave",
    "match_orientation",
    "parse_positions",
    "placeholder_request",
    "preset_alpha",
    "preset_noise",
    "prompt_lines",
    "rounding_notes",
    "stored_request",
]
