"""Default size, length and sampling of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

WAN_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)
"""Wan's default negative prompt in English, from its model cards."""


@dataclass(frozen=True)
class GenerationDefaults:
    """Values that a model runs with unless the user says otherwise; those below are Wan2.1's.

    Attributes:
        width, height: pixels.
        num_frames: frames of the video, 4n + 1.
        fps: frames per second.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        shift: flow shift of the scheduler.
        alpha: LoRA alpha of the Pusa adapter, one number or one per expert.
        max_sequence_length: tokens of the prompt.
        encode: default of `PusaCondition.encode` for images. "single" is the original's; small VAEs in the style of
            Wan2.2 reproduce a lone frame badly at later places (docs/keyframe_encoding.md).
        boundary_ratio: sigma at which Wan2.2 changes from its high-noise to its low-noise expert; None: one expert.
    """

    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: float = 16.0
    steps: int = 10
    guidance: float = 3.0
    shift: float = 5.0
    alpha: float | Mapping[str, float] = 1.4
    max_sequence_length: int = 512
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    encode: Literal["single", "repeat"] = "single"
    boundary_ratio: float | None = None


WAN_DEFAULTS = GenerationDefaults()
