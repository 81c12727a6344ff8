"""Define the default size, length and sampling of a model, and the sizes that it can make."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pusa.codes import CodedError
from pusa.positions import latent_frames, nearest_of

logger = logging.getLogger(__name__)

WAN_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)
"""Wan's default negative prompt in English, from its model cards."""


@dataclass(frozen=True)
class FastSettings:
    """Hold the values that `fast` sets; those below are of the 4-step LoRAs that LightX2V distilled from Wan.

    Such a model knows no other timesteps than those it was distilled at: 1000, 750, 500 and 250 before a shift of 5.
    The scheduler's own grid has exactly these at 4 steps.

    Attributes:
        guidance: the negative prompt is distilled into the weights: 1 is one pass a step.
        shift: flow shift; None: the model's.
        alpha: LoRA alpha of the Pusa adapter beside it, one number or one per expert; None: the model's.
    """

    steps: int = 4
    guidance: float = 1.0
    shift: float | None = 5.0
    alpha: float | Mapping[str, float] | None = None


@dataclass(frozen=True)
class GenerationDefaults:
    """Hold the values that a model runs with unless the user says otherwise; those below are Wan2.1's.

    Attributes:
        width, height: pixels.
        num_frames: frames of the video, `frames_per_latent` * n + 1.
        fps: frames per second.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        shift: flow shift of the scheduler.
        alpha: LoRA alpha of the Pusa adapter, one number or one per expert.
        max_sequence_length: tokens of the prompt.
        encode: default of `PusaCondition.encode` for images. "single" is the original's; small VAEs in the style of
            Wan2.2 reproduce a lone frame badly at later places (docs/keyframe_encoding.md).
        boundary_ratio: sigma at which Wan2.2 changes from its high-noise to its low-noise expert; None: one expert.
        size_multiple: sides are multiples of it: the VAE's 8 or 16 pixels, times 2 by the transformer's patches.
        fast: values of a request with `fast`; None: the model has no such mode.
        image_noise, video_noise: noise multipliers of a request with the preset "balanced", as `request.presets` has
            them for images, and for the kept latent frames of a video; None: those of the preset.
        condition_guidance: guidance of a request with a picture or a video, where it was measured to help; None: as
            `guidance`.
        frames_per_latent: frames of a latent frame after the first, which is one frame: 4 of Wan's VAEs, 6 of Mochi's,
            1 of a VAE of pictures.
        overlap: frames that a continuation takes over, or fewer in a short window; 4 latent frames of Wan, as Pusa V1.0
            (arXiv 2507.16116) keeps of a video to extend it.
        longest_window: the most frames that the model can make at once; None: as many as fit.
        has_shift: its sampler has a flow shift.
        classes: what its prompt is. None: text; a number: that of one of so many classes, or empty; 0: always empty.
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
    size_multiple: int = 16
    fast: FastSettings | None = None
    image_noise: tuple[float, ...] | None = None
    video_noise: tuple[float, ...] | None = None
    condition_guidance: float | None = None
    frames_per_latent: int = 4
    overlap: int = 13
    longest_window: int | None = None
    has_shift: bool = True
    classes: int | None = None

    @property
    def has_text(self) -> bool:
        """Tell if the prompt is text."""
        return self.classes is None

    @property
    def placeholder_prompt(self) -> str:
        """Return a prompt for requests that are made for their sizes or their model only."""
        return "-" if self.has_text else ""


WAN_DEFAULTS = GenerationDefaults()
TI2V_DEFAULTS = GenerationDefaults(
    width=1280,
    height=704,
    num_frames=121,
    fps=24.0,
    steps=50,
    guidance=5.0,
    shift=5.0,
    size_multiple=32,
    image_noise=(0.0,),
)
"""Wan2.2 TI2V-5B's, from its configuration (wan/configs/wan_ti2v_5B.py); it was trained with a clean first frame."""


def check_class(name: str, text: str, classes: int) -> None:
    """Raise ValueError for a text that is not empty, and no number of one of so many classes."""
    text = text.strip()
    if not text or (text.isdecimal() and int(text) < classes):
        return
    if not classes:
        raise CodedError(
            "prompt_not_empty",
            f"{name}={text[:60]!r}: this model knows neither text nor classes: leave the {name} empty",
            field=name,
            value=text[:60],
        )
    raise CodedError(
        "class_unknown",
        f"{name}={text[:60]!r}: this model's {name} is the number of a class, 0..{classes - 1}, or empty",
        field=name,
        value=text[:60],
        last=classes - 1,
    )


@dataclass(frozen=True)
class ClipSize:
    """Hold the size of one video, rounded to the model's grid; `shape` is that of its latents, ``(C, F, h, w)``."""

    height: int
    width: int
    num_frames: int
    shape: tuple[int, int, int, int]


def clip_size(
    defaults: GenerationDefaults,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    *,
    channels: int,
    patch: int,
    spatial_factor: int,
    temporal_factor: int,
) -> ClipSize:
    """Fill in a size from `defaults`, and round it to whole patches and latent frames, with a warning.

    Args:
        channels: latent channels.
        patch: latent pixels that the transformer takes as one token, along a side.
        spatial_factor, temporal_factor: pixels and frames to a latent one.

    Raises:
        ValueError: a number is below 1.
    """
    multiple = spatial_factor * patch
    height = _rounded("height", defaults.height if height is None else height, multiple)
    width = _rounded("width", defaults.width if width is None else width, multiple)
    num_frames = _rounded("num_frames", defaults.num_frames if num_frames is None else num_frames, temporal_factor, 1)
    frames = latent_frames(num_frames, temporal_factor)
    return ClipSize(height, width, num_frames, (channels, frames, height // spatial_factor, width // spatial_factor))


def _rounded(name: str, value: int, multiple: int, offset: int = 0) -> int:
    if value < 1:
        raise ValueError(f"{name}={value} is below 1")
    rounded = nearest_of(value, multiple, offset)
    if rounded != value:
        rule = f"{multiple}n + {offset}" if offset else f"a multiple of {multiple}"
        logger.warning("%s=%d becomes %d: it must be %s", name, value, rounded, rule)
    return rounded
