"""Measure one video against the clip that its given frames come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from pusa.evaluation.fidelity.tasks import Layout
from pusa.evaluation.metrics import as_video, changes, psnr, seam

MEASURE_VERSION = 1
"""Raised when a measure changes, so that kept values are measured again."""

REPEATED_BELOW = 0.25
"""Frames that differ by less, as the mean over pixels and channels in grey levels (0..255), are repeated."""

_SSIM_FRAMES = 8  # of the held-out ones, evenly spread: a large picture takes a quarter of a second
_CHUNK = 16  # frames that are floats at one time
_END = 4  # frames that count as the end of a video

Values = dict[str, float]


@dataclass(frozen=True)
class Measure:
    """Describe a measure for tables.

    Attributes:
        title: for a column.
        help: one line for people.
        better: which way; "real": near that of the real clip.
        summary: how the values of clips become one figure: their mean, or their mean divided by that of the real clips.
    """

    title: str
    help: str
    better: Literal["higher", "lower", "real"]
    summary: Literal["mean", "ratio"] = "mean"


MEASURES = {
    "given_psnr_db": Measure("given frames, dB", "PSNR of the frames that were given", "higher"),
    "given_ssim": Measure("given frames, SSIM", "structural similarity of the frames that were given", "higher"),
    "held_out_psnr_db": Measure("held out, dB", "PSNR of the frames that were not given", "higher"),
    "held_out_ssim": Measure("held out, SSIM", "structural similarity of frames that were not given", "higher"),
    "middle_psnr_db": Measure("middle, dB", "PSNR of the frames farthest from given ones on both sides", "higher"),
    "middle_ssim": Measure("middle, SSIM", "structural similarity of these frames", "higher"),
    "jump": Measure("jump", "change at the borders of given frames, divided by the real clip's there", "real", "ratio"),
    "seam": Measure("seam", "change at these borders, divided by the change around them", "real"),
    "later_seam": Measure("later seams", "the same between one extension and the next", "real"),
    "motion": Measure("motion", "change between made frames, divided by the real clip's", "real", "ratio"),
    "repeated": Measure("repeated", "share of made frames that equal the one before", "real"),
    "colour_drift": Measure("colour drift, dE", "CIEDE2000 of mean colours: the end against what was given", "real"),
    "drift_per_extension": Measure("drift per extension, dE", "colour drift divided by extensions", "real"),
    "contrast_kept": Measure("contrast kept", "deviation of lightness: the end divided by what was given", "real"),
}


def load_skimage() -> tuple[Any, Any]:
    """Import scikit-image's colour and metrics. Raises RuntimeError, which names the extra, without it."""
    try:
        from skimage import color, metrics
    except ImportError as error:
        raise RuntimeError(
            "SSIM and Lab colours need scikit-image, which is not installed: pip install 'pusa[eval]'"
        ) from error
    return color, metrics


def measure(frames: np.ndarray, real: np.ndarray, layout: Layout) -> Values:
    """Measure a video of a layout; a measure that does not apply is left out.

    Args:
        frames: the video, uint8 ``[layout.frames, H, W, 3]``.
        real: the clip, uint8 ``[F, H, W, 3]``; shorter where an extension goes beyond it.

    Raises:
        ValueError: the video has another length or size.
        RuntimeError: scikit-image is not installed.
    """
    if len(frames) != layout.frames or frames.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"the video has {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}; its task makes "
            f"{layout.frames} of {real.shape[2]}x{real.shape[1]}: make it again"
        )
    given = [frame for frame in layout.given if frame < len(real)]
    free = sorted(set(range(min(layout.frames, len(real)))) - set(given))
    values: Values = {}
    for name, places in (("given", given), ("held_out", free), ("middle", layout.middles)):
        values |= _likeness(name, frames, real, list(places))
    return values | _borders(frames, layout) | _motion(frames, layout) | _colours(frames, real, layout)


def _likeness(name: str, frames: np.ndarray, real: np.ndarray, places: Sequence[int]) -> Values:
    if not len(places):
        return {}
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, min(_SSIM_FRAMES, len(places))).round().astype(int)]
    return {
        f"{name}_psnr_db": float(np.mean(_psnr(frames, real, places))),
        f"{name}_ssim": float(np.mean([_ssim(frames[place], real[place]) for place in chosen])),
    }


def _psnr(frames: np.ndarray, real: np.ndarray, places: Sequence[int]) -> list[float]:
    found: list[float] = []
    for start in range(0, len(places), _CHUNK):
        some = list(places[start : start + _CHUNK])
        found += psnr(as_video(frames[some]), as_video(real[some]))[0].tolist()
    return found


def _ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the structural similarity of Wang et al. 2004: a Gaussian window, over the three channels."""
    _, metrics = load_skimage()
    return float(
        metrics.structural_similarity(
            first, second, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def frame_changes(frames: np.ndarray) -> np.ndarray:
    """Compute the mean absolute difference of neighbouring frames in grey levels, ``[F - 1]``."""
    starts = range(0, max(1, len(frames) - 1), _CHUNK)
    parts = [changes(as_video(frames[start : start + _CHUNK + 1]))[0] for start in starts]
    return np.asarray(torch.cat(parts)) * 127.5


def _borders(frames: np.ndarray, layout: Layout) -> Values:
    found: Values = {}
    if layout.joints:
        found["jump"] = float(np.mean([frame_changes(frames[joint - 1 : joint + 1])[0] for joint in layout.joints]))
        found["seam"] = float(np.mean([_seam(frames, joint) for joint in layout.joints]))
    if layout.extensions:
        found["later_seam"] = float(np.mean([_seam(frames, joint) for joint in layout.extensions]))
    return found


def _seam(frames: np.ndarray, joint: int, around: int = 8) -> float:
    start = max(0, joint - around - 1)
    return float(seam(as_video(frames[start : joint + around]), joint - start, around))


def _motion(frames: np.ndarray, layout: Layout) -> Values:
    given = set(layout.given)
    change = frame_changes(frames)
    made = change[[frame - 1 for frame in range(1, layout.frames) if not {frame - 1, frame} <= given]]
    if not len(made):
        return {}
    return {"motion": float(made.mean()), "repeated": float((made < REPEATED_BELOW).mean())}


def _colours(frames: np.ndarray, real: np.ndarray, layout: Layout) -> Values:
    """Compare colours at the end with those of the frames that were given at the beginning."""
    color, _ = load_skimage()
    given = set(layout.given)
    beginning = next(frame for frame in range(layout.frames + 1) if frame not in given)
    if layout.frames - 1 in given or not beginning:
        return {}  # the end was given as well, or there is no beginning: nothing can drift
    first = _lab(color, real[: min(beginning, _CHUNK)])
    last = _lab(color, frames[-_END:])
    drift = float(color.deltaE_ciede2000(first[0], last[0]))
    found = {"colour_drift": drift, "contrast_kept": last[1] / max(first[1], 1e-3)}
    return found | ({"drift_per_extension": drift / (len(layout.extensions) + 1)} if layout.extensions else {})


def _lab(color: Any, frames: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean Lab colour, ``[3]``, and the deviation of lightness within frames, averaged."""
    means, deviations = [], []
    for frame in frames:  # one at a time: a large one is 100 MB in Lab
        lab = color.rgb2lab(frame)
        means.append(lab.mean(axis=(0, 1)))
        deviations.append(float(lab[..., 0].std()))
    return np.mean(means, axis=0), float(np.mean(deviations))
