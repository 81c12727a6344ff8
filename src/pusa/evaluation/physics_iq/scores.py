"""Compare generated clips with both takes of reality, and compute the Physics-IQ score (arXiv 2501.09038)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pusa.evaluation.physics_iq.clips import Clip

IOUS = ("spatial_iou", "spatiotemporal_iou", "weighted_spatial_iou")
_DIGITS, _SPATIAL_DIGITS = 4, 5  # that the benchmark's evaluator rounds to on its way


@dataclass(frozen=True)
class Comparison:
    """Hold how much two clips agree.

    Attributes:
        mse: mean squared difference of each frame's pixels in 0..1.
        spatiotemporal_iou: of each frame, what moves in both over what moves in either; 1 where nothing moves.
        spatial_iou: the same of the places where anything moves at any time.
        weighted_spatial_iou: the same of how often each place moves.
    """

    mse: list[float]
    spatiotemporal_iou: list[float]
    spatial_iou: float
    weighted_spatial_iou: float


@dataclass(frozen=True)
class SceneScores:
    """Hold a generated clip against take 1 and against take 2, and the takes against each other."""

    take_1: Comparison
    take_2: Comparison
    between_takes: Comparison

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object, of which `of_json` makes the scores again."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Any) -> "SceneScores":
        """Read what `as_json` has returned. Raises ValueError for anything else."""
        return _SCORES.validate_python(values)

    @property
    def shortfall(self) -> float:
        """Return how much further the clip is from take 1 than take 2 is: 0 for a clip as good as another take."""
        made, real = means(self.take_1), means(self.between_takes)
        return float(np.mean([real[name] - made[name] for name in IOUS])) + made["mse"] - real["mse"]


_SCORES = TypeAdapter(SceneScores)


@dataclass(frozen=True)
class Score:
    """Hold the means over scenes, and the score.

    Attributes:
        take_1, take_2: means of the generated clips' comparisons by measure.
        physical_variance: those of the two takes with each other.
        physics_iq: percent in 0..100; None: the takes share no motion, so that nothing can be divided by it.
        scenes: number of scenes.
    """

    take_1: dict[str, float]
    take_2: dict[str, float]
    physical_variance: dict[str, float]
    physics_iq: float | None
    scenes: int


def compare(first: Clip, second: Clip) -> Comparison:
    """Compare two clips of one length and size. Raises ValueError for others."""
    if first.frames.shape != second.frames.shape:
        raise ValueError(f"clips of {list(first.frames.shape)} and {list(second.frames.shape)} cannot be compared")
    pairs = list(zip(first.masks, second.masks, strict=True))
    counts = first.masks.sum(axis=0), second.masks.sum(axis=0)
    return Comparison(
        mse=list(_squared_errors(first.frames, second.frames)),
        spatiotemporal_iou=[overlap(*pair) for pair in pairs],
        spatial_iou=overlap(*(count > 0 for count in counts)),
        weighted_spatial_iou=overlap(*counts),
    )


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Divide the sum of the smaller values by the sum of the greater ones: the IoU of masks; 1 if both are empty.

    Args:
        first, second: bool, or counts of 0 or more, of one shape.
    """
    either = np.maximum(first, second).sum()
    return float(np.minimum(first, second).sum() / either) if either else 1.0


def _squared_errors(first: np.ndarray, second: np.ndarray) -> Iterator[float]:
    for one, other in zip(first, second, strict=True):
        difference = (one.astype(np.float32) - other.astype(np.float32)) / 255
        yield float(np.mean(difference * difference, dtype=np.float64))


def score_scene(made: Clip, take_1: Clip, take_2: Clip) -> SceneScores:
    """Compare a generated clip with both takes, and these with each other."""
    return SceneScores(compare(made, take_1), compare(made, take_2), compare(take_1, take_2))


def total(scenes: Sequence[SceneScores]) -> Score:
    """Compute the score over scenes.

    Each IoU against take 1 is divided by the takes' own IoU, their physical variance; the score is the mean of the
    three quotients, less what the squared error exceeds that between the takes, in percent within 0..100. Take 2 is
    used for nothing else. Values are rounded where the benchmark's evaluator rounds them, so that its figure comes
    out to the last digit.

    Raises:
        ValueError: there is no scene.
    """
    if not scenes:
        raise ValueError("no scene has been scored: generate videos first")
    made = _mean(means(scene.take_1) for scene in scenes)
    real = _mean(means(scene.between_takes) for scene in scenes)
    real = {name: round(v, _SPATIAL_DIGITS if name == "spatial_iou" else _DIGITS) for name, v in real.items()}
    score = None
    if all(real[name] > 0 for name in IOUS):
        quotients = [made[name] / real[name] for name in IOUS]
        score = 100 * (sum(quotients) / len(IOUS) - (made["mse"] - real["mse"]))
        score = round(min(max(score, 0.0), 100.0), 2)
    return Score(made, _mean(means(scene.take_2) for scene in scenes), real, score, len(scenes))


def means(comparison: Comparison) -> dict[str, float]:
    """Return each measure of a comparison as one number, the mean over frames of those that have one for each."""
    return {
        "mse": float(np.mean(np.round(comparison.mse, _DIGITS))),
        "spatial_iou": comparison.spatial_iou,
        "spatiotemporal_iou": float(np.mean(np.round(comparison.spatiotemporal_iou, _DIGITS))),
        "weighted_spatial_iou": comparison.weighted_spatial_iou,
    }


def _mean(values: Iterable[Mapping[str, float]]) -> dict[str, float]:
    rows = list(values)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
