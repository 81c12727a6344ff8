"""Compute the totals of VBench-I2V from the scores of its dimensions.

Formula and constants are those of VBench's `scripts/cal_i2v_final_score.py` and `scripts/constant.py` (Vchitect/VBench,
commit 45e79ec). Scores and totals are percents, 0..100, as the leaderboard and the papers print them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Group = Literal["quality", "i2v"]


@dataclass(frozen=True)
class Dimension:
    """Describe one of the nine scored dimensions.

    Attributes:
        name: in the suite's files.
        title: for people.
        short: two or three letters, for narrow tables.
        group: the half of the total that it counts in.
        weight: in its group.
        minimum, maximum: scores in percent that become 0 and 1 before they are weighted.
    """

    name: str
    title: str
    short: str
    group: Group
    weight: float = 1.0
    minimum: float = 0.0
    maximum: float = 100.0

    @property
    def share(self) -> float:
        """Return the part of the total that is decided by this dimension, 0..1: half of its part of the group."""
        return self.weight / _weight_of(self.group) / 2

    def normalized(self, score: float) -> float:
        """Map a score in percent to the suite's scale: 0 at `minimum`, 1 at `maximum`."""
        return (score - self.minimum) / (self.maximum - self.minimum)


DIMENSIONS: Mapping[str, Dimension] = {
    dimension.name: dimension
    for dimension in (
        Dimension("subject_consistency", "subject consistency", "SC", "quality", minimum=14.62),
        Dimension("background_consistency", "background consistency", "BC", "quality", minimum=26.15),
        Dimension("motion_smoothness", "motion smoothness", "MS", "quality", minimum=70.60, maximum=99.75),
        Dimension("dynamic_degree", "dynamic degree", "DD", "quality", weight=0.5),
        Dimension("aesthetic_quality", "aesthetic quality", "AQ", "quality"),
        Dimension("imaging_quality", "imaging quality", "IQ", "quality"),
        Dimension("i2v_subject", "I2V subject", "IS", "i2v", minimum=14.62),
        Dimension("i2v_background", "I2V background", "IB", "i2v", minimum=26.15),
        Dimension("camera_motion", "camera motion", "CM", "i2v", weight=0.1),
    )
}
"""The scored dimensions by name. Temporal flickering is in the suite's list of prompts, but not in its totals."""


@dataclass(frozen=True)
class Interval:
    """Hold the least and the greatest value that a total can have, in percent; both are equal if it is known."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """Return the value that is at most `half` from the true one."""
        return (self.low + self.high) / 2

    @property
    def half(self) -> float:
        """Return half of the width: the greatest error of `middle`."""
        return (self.high - self.low) / 2

    @property
    def is_known(self) -> bool:
        """Tell if there is one value only."""
        return self.low == self.high

    def __str__(self) -> str:
        """Format as ``87.32``, or ``86.61..88.99`` where it is not known."""
        return f"{self.low:.2f}" if self.is_known else f"{self.low:.2f}..{self.high:.2f}"


@dataclass(frozen=True)
class Totals:
    """Hold the totals of a model, and the dimensions that were not measured: each of these may be anything, 0..100."""

    total: Interval
    quality: Interval
    i2v: Interval
    missing: tuple[str, ...] = ()


def total_of(scores: Mapping[str, float]) -> Totals:
    """Compute the totals from scores in percent by the names of `DIMENSIONS`.

    A dimension that is not there widens the totals to intervals. The suite's own script counts it as 0, which is far
    below what any model gets: 27 points less of the total for `i2v_subject`.

    Raises:
        ValueError: no score at all, a name that is no dimension, a score outside 0..100.
    """
    if not scores:
        raise ValueError(f"no scores: give at least one of {', '.join(DIMENSIONS)}")
    for name, score in scores.items():
        check_dimensions([name])
        if not (math.isfinite(score) and 0 <= score <= 100):
            raise ValueError(f"{name}={score:g} is outside 0..100: scores are percents")
    missing = tuple(name for name in DIMENSIONS if name not in scores)
    low = {**dict.fromkeys(missing, 0.0), **scores}
    high = {**dict.fromkeys(missing, 100.0), **scores}
    quality = Interval(_group_score(low, "quality"), _group_score(high, "quality"))
    i2v = Interval(_group_score(low, "i2v"), _group_score(high, "i2v"))
    total = Interval((quality.low + i2v.low) / 2, (quality.high + i2v.high) / 2)
    return Totals(total, quality, i2v, missing)


def check_dimensions(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is none of `DIMENSIONS`."""
    for name in names:
        if name not in DIMENSIONS:
            raise ValueError(f"{name[:60]!r} is no dimension of VBench-I2V that counts: it has {', '.join(DIMENSIONS)}")


def _group_score(scores: Mapping[str, float], group: Group) -> float:
    members = [dimension for dimension in DIMENSIONS.values() if dimension.group == group]
    weighted = sum(dimension.weight * dimension.normalized(scores[dimension.name]) for dimension in members)
    return 100 * weighted / _weight_of(group)


def _weight_of(group: Group) -> float:
    return sum(dimension.weight for dimension in DIMENSIONS.values() if dimension.group == group)
