"""Name noise multipliers and alpha in one word."""

from typing import Literal, NamedTuple

from pusa.defaults import WAN_DEFAULTS, GenerationDefaults


class Preset(NamedTuple):
    """Hold the noise multipliers and alpha of a preset; a value that the request sets itself wins over them.

    `image_noise` holds one value for each image in the order of the request, `video_noise` one for each kept latent
    frame of a video; where there are more, the last value repeats.
    """

    image_noise: tuple[float, ...]
    video_noise: tuple[float, ...]
    alpha_offset: float
    help: str


PRESETS = {
    "faithful": Preset((0.0,), (0.0,), 0.1, "conditions are kept exactly, steady motion"),
    "balanced": Preset((0.2, 0.5), (0.0, 0.3, 0.4, 0.5), 0.0, "conditions may change a little and move better"),
    "creative": Preset((0.4, 0.7), (0.2, 0.5, 0.6, 0.7), -0.1, "conditions are a suggestion, livelier motion"),
}
"""``balanced`` has the values of the original demo, ``creative`` has 0.2 more. Pusa's README calls a larger alpha
steadier and less lively, with 1.3 to 1.5 as its range on Wan2.1 (default 1.4)."""


def preset_noise(
    preset: str, kind: Literal["image", "video"], count: int, defaults: GenerationDefaults = WAN_DEFAULTS
) -> list[float]:
    """Return a preset's noise multipliers for `count` images of a request, or `count` latent frames of a video.

    Args:
        defaults: of the model, which may have values of its own for ``balanced``.
    """
    own = defaults.image_noise if kind == "image" else defaults.video_noise
    values = PRESETS[preset].image_noise if kind == "image" else PRESETS[preset].video_noise
    if preset == "balanced" and own is not None:
        values = own
    return [values[min(number, len(values) - 1)] for number in range(count)]


def preset_alpha(preset: str, alpha: float) -> float:
    """Return a preset's alpha, 0.1..5, for a model whose default is `alpha`."""
    return min(5.0, max(0.1, round(alpha + PRESETS[preset].alpha_offset, 6)))
