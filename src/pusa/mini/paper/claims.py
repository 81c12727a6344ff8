"""Judge claims of the paper from measured points, by rules that were fixed beforehand.

A claim states that one point is better than another, or that they are equal. Both have the same clips and noise, so the
difference is taken clip by clip, or, with several seeds, training by training; its interval of 95 % (Student's t)
decides:

    no difference   it lies within a margin around 0, which is too small to matter
    agrees          it lies on the claimed side of 0     (of equality: within the tolerance)
    contradicts     it lies on the other side                        (of equality: outside the tolerance)
    not settled     otherwise
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pusa.evaluation.metrics import Figure, mean, ratio
from pusa.mini.paper.points import STEPS
from pusa.mini.paper.training import BEST_ALPHAS, CURVE, Plan

PAPER = "independent"
REAL, FROZEN = REFERENCES = ("real clips", "first frame, frozen")

MARGIN_DB, MARGIN_LOSS, MARGIN_RATIO = 0.1, 0.005, 0.02
"""Differences too small to matter: in dB, and as a share of the base's loss, of the real change and the real jump."""

_SAME_DB, _SAME_LOSS = 0.3, 0.02  # what the paper's "equal" may be: dB, and a share of the base's loss
_ALMOST_ONLY, _HARDLY = 3.0, 1.5  # how much farther one kind of layer moves than any other
_FAR, _NOT_FAR = 10.0, 2.0  # how much farther weights move in one training than in the other

WeightChanges = dict[str, dict[str, dict[str, float]]]
"""Relative changes of weights, by regime, step and kind of layer."""


class Results:
    """Read all measurements so far, by point."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.plan = plan
        references = json.loads((out / "points" / "references.json").read_text())
        self.still = torch.tensor(references["still"])
        self.points: dict[str, dict[str, dict[str, list[float]]]] = {
            REAL: references["real"],
            FROZEN: references["frozen"],
        }
        for path in sorted((out / "points").glob("*.json")):
            if path.stem != "references":
                content = json.loads(path.read_text())
                self.points[content["point"]["name"]] = content["measured"]

    def values(self, point: str, measure: str, figure: str) -> Tensor | None:
        """Return one value per clip for which the figure is meaningful; None if it was not measured.

        Likeness without a caption: of still clips. Change: of moving ones.
        """
        found = self.points.get(point, {})
        # The references are no generated clips: the same ones whether there is a caption or not.
        source = "image" if measure == "caption" and point in REFERENCES else measure
        if figure not in found.get(source, {}):
            return None
        values = torch.tensor(found[source][figure])
        if measure == "image" and figure == "likeness":
            return values[self.still]
        if figure == "change" and not self.still.all():
            return values[~self.still]
        return values

    def figure(self, point: str, measure: str, figure: str) -> Figure | None:
        """Compute the mean with its standard error; jump and change as shares of those of the real clips."""
        values = self.values(point, measure, figure)
        if values is None:
            return None
        if figure in ("jump", "change"):
            real = self.values(REAL, "text" if measure == "text" else "image", figure)
            assert real is not None
            return ratio(values, real)
        return mean(values)

    def gain(
        self, first: str, second: str, measure: str, figure: str, transform: "Transform | None" = None
    ) -> Figure | None:
        """Compute the mean difference of two points, clip by clip, with its standard error."""
        a, b = self.values(first, measure, figure), self.values(second, measure, figure)
        if a is None or b is None:
            return None
        return mean(transform(a) - transform(b) if transform else a - b)

    def final(self, regime: str) -> str:
        return f"{regime} {self.plan.steps}"

    def alphas(self, regime: str) -> dict[float, str]:
        """Return the points of a finished training by alpha, of those alphas that every regime may be measured at."""
        prefix = "" if regime == PAPER else f"{regime} "
        return {1.0: self.final(regime), **{alpha: f"{prefix}alpha {alpha:g}" for alpha in BEST_ALPHAS}}

    def best_alphas(self, regimes: Sequence[str], measure: str) -> list[float]:
        """Return each regime's alpha of the largest likeness, of those at which all of them were measured."""
        by_regime = []
        for regime in regimes:
            figures = {a: self.figure(point, measure, "likeness") for a, point in self.alphas(regime).items()}
            by_regime.append({alpha: figure["value"] for alpha, figure in figures.items() if figure is not None})
        shared = set.intersection(*map(set, by_regime)) or {1.0}
        return [max(shared, key=lambda alpha: (found.get(alpha, 0.0), -alpha)) for found in by_regime]

    def curve(self, regime: str) -> list[tuple[int, str]]:
        """List the measured steps and points of a training, from the base on."""
        steps = [round(self.plan.steps * k / CURVE) for k in range(1, CURVE + 1)]
        found = [(step, f"{regime} {step}") for step in steps if f"{regime} {step}" in self.points]
        return [(0, "base"), *found] if "base" in self.points else found


class SeveralSeeds(Results):
    """Read the measurements of trainings with several seeds: a figure is one value per training."""

    def __init__(self, outs: Sequence[Path], plans: Sequence[Plan]) -> None:
        self.runs = [Results(out, plan) for out, plan in zip(outs, plans, strict=True)]
        self.plan, self.still = self.runs[0].plan, self.runs[0].still
        self.points = {
            name: found for name, found in self.runs[0].points.items() if all(name in r.points for r in self.runs)
        }

    def values(self, point: str, measure: str, figure: str) -> Tensor | None:
        """Return the values of all clips of all trainings; of the references, which no training changes, once."""
        if point in REFERENCES or point == "base":
            return self.runs[0].values(point, measure, figure)
        found = [run.values(point, measure, figure) for run in self.runs]
        return None if any(part is None for part in found) else torch.cat([part for part in found if part is not None])

    def figure(self, point: str, measure: str, figure: str) -> Figure | None:
        """Compute the mean over trainings with its standard error; of the references and the base, over clips."""
        if point in REFERENCES or point == "base":
            return self.runs[0].figure(point, measure, figure)
        return _mean_of([run.figure(point, measure, figure) for run in self.runs])

    def gain(
        self, first: str, second: str, measure: str, figure: str, transform: "Transform | None" = None
    ) -> Figure | None:
        """Compute the mean difference of two points, training by training, with its standard error."""
        return _mean_of([run.gain(first, second, measure, figure, transform) for run in self.runs])


def _mean_of(figures: Sequence[Figure | None]) -> Figure | None:
    found = [figure["value"] for figure in figures if figure is not None]
    return mean(torch.tensor(found)) if len(found) == len(figures) else None


Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Finding:
    """Hold one comparison that a claim of the paper implies, its measured difference and the verdict."""

    claim: str
    compared: str
    found: str
    verdict: str


def interval(difference: Figure) -> tuple[float, float]:
    """Compute the interval of 95 % around a mean by Student's t (a series in 1 / (n - 1), within 4 % from n = 3 on)."""
    error, freedom = difference.get("error"), difference["n"] - 1
    if error is None or freedom < 1:
        return -math.inf, math.inf
    z = 1.96
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return difference["value"] - t * error, difference["value"] + t * error


def verdict_of(gain: Figure, margin: float) -> str:
    """Judge the claim that the first is better, from its mean gain."""
    low, high = interval(gain)
    if -margin <= low and high <= margin:
        return "no difference"
    return "agrees" if low > 0 else "contradicts" if high < 0 else "not settled"


def verdict_of_equality(difference: Figure, tolerance: float) -> str:
    """Judge the claim that two points differ by no more than the tolerance."""
    low, high = interval(difference)
    if -tolerance <= low and high <= tolerance:
        return "agrees"
    return "contradicts" if low > tolerance or high < -tolerance else "not settled"


def verdict_of_keeping(rise: Figure, tolerance: float) -> str:
    """Judge the claim that a figure rises by no more than the tolerance; it may fall."""
    low, high = interval(rise)
    return "agrees" if high <= tolerance else "contradicts" if low > tolerance else "not settled"


def format_difference(figure: Figure, digits: int) -> str:
    error = figure.get("error")
    return f"{figure['value']:+.{digits}f}" + (f" ±{error:.{digits}f}" if error is not None else "")


_NAMES = {
    ("image", "likeness"): "likeness without caption, dB",
    ("caption", "likeness"): "likeness with caption, dB",
    ("losses", "image, no caption"): "image-to-video loss without caption",
    ("losses", "text"): "text-to-video loss",
    ("image", "change"): "change without caption",
    ("caption", "change"): "change with caption",
    ("image", "jump"): "log ratio of the first jump to the real one, without sign",
}


def judge_claims(results: Results, weight_changes: WeightChanges) -> list[Finding]:
    """Judge every claim by its comparisons; those that were not measured are left out."""
    findings: list[Finding] = []
    paper = results.final(PAPER)
    quarter = f"{PAPER} {round(results.plan.steps / CURVE)}"
    base_loss = results.figure("base", "losses", "text")
    loss_scale = base_loss["value"] if base_loss else 0.0
    real_change, real_jump = (results.values(REAL, "image", name) for name in ("change", "jump"))
    assert real_change is not None
    assert real_jump is not None
    margins = {
        "likeness": MARGIN_DB,
        "change": MARGIN_RATIO * float(real_change.mean()),
        "jump": MARGIN_RATIO,
    }

    def compare(
        claim: str,
        first: str,
        second: str,
        measure: str,
        figure: str,
        *,
        lower: bool = False,
        tolerance: float | None = None,
        transform: Transform | None = None,
    ) -> None:
        difference = results.gain(first, second, measure, figure, transform)
        if difference is None:
            return
        if tolerance is not None:
            verdict = (verdict_of_keeping if lower else verdict_of_equality)(difference, tolerance)
        else:
            gain = {**difference, "value": -difference["value"]} if lower else difference
            verdict = verdict_of(gain, margins.get(figure, MARGIN_LOSS * loss_scale))
        shown = format_difference(difference, 4 if measure == "losses" else 3)
        findings.append(Finding(claim, f"{first} against {second}: {_NAMES[measure, figure]}", shown, verdict))

    def beats(claim: str, first: str, second: str) -> None:
        compare(claim, first, second, "image", "likeness")
        compare(claim, first, second, "caption", "likeness")
        compare(claim, first, second, "losses", "image, no caption", lower=True)

    def beats_at_best(claim: str, other: str) -> None:
        for measure in ("image", "caption"):
            best = results.best_alphas((PAPER, other), measure)
            ours, theirs = (results.alphas(regime)[alpha] for regime, alpha in zip((PAPER, other), best, strict=True))
            compare(f"{claim}, each at its best alpha", ours, theirs, measure, "likeness")
        compare(f"{claim}, at alpha 1", paper, results.final(other), "losses", "image, no caption", lower=True)

    def both(claim: str, first: str, second: str, figure: str, **how: float | bool) -> None:
        for measure in ("image", "caption"):
            compare(claim, first, second, measure, figure, **how)  # type: ignore[arg-type]

    beats("Without adaptation the kept frame is ignored; adaptation cures it (figure 4)", paper, "base")
    for regime in ("p 0.8", "p 0.5", "p 0.2"):
        beats_at_best("Independent times beat partly synchronous ones (tables 2 and 5b)", regime)
    beats_at_best("Training on image-to-video alone is far worse (tables 2 and 5b)", "image-to-video")
    beats("More training steps help (table 4c)", paper, quarter)
    both("Two inference steps are too few (table 4b)", paper, "steps 2", "likeness")
    claim = f"Twice the {STEPS} inference steps add little (table 4b; here: within {_SAME_DB} dB)"
    both(claim, "steps 20", paper, "likeness", tolerance=_SAME_DB)
    both("Alpha 1.4 beats 1 (table 4c)", "alpha 1.4", paper, "likeness")
    both("A high alpha costs motion (table 4c: dynamic degree)", "alpha 2", "alpha 1.4", "change", lower=True)
    claim = "A little noise on the picture makes the clip more coherent (appendix B)"
    real = real_jump.clamp(min=1e-6)
    compare(claim, "noise 0.2", paper, "image", "jump", lower=True, transform=lambda jump: (jump / real).log().abs())
    claim = f"Text-to-video is kept (here: its loss rises by no more than {_SAME_LOSS:.0%})"
    compare(claim, paper, "base", "losses", "text", lower=True, tolerance=_SAME_LOSS * loss_scale)
    return findings + _judge_moved(weight_changes, results.plan)


def _judge_moved(weight_changes: WeightChanges, plan: Plan) -> list[Finding]:
    findings = []
    last = str(plan.steps)
    ours, theirs = weight_changes[PAPER].get(last), weight_changes["image-to-video"].get(last)
    if ours is not None:
        factor = ours["self-attention"] / max(ours["cross-attention"], ours["feed-forward"])
        verdict = "agrees" if factor >= _ALMOST_ONLY else "contradicts" if factor < _HARDLY else "in part"
        claim = "Weights move almost only in self-attention (a figure without numbers)"
        compared = f"self-attention against the next kind (agrees from {_ALMOST_ONLY:g} times, not below {_HARDLY:g})"
        findings.append(Finding(claim, compared, f"{factor:.2f} times as far", verdict))
    if ours is not None and theirs is not None:
        factor = math.hypot(*theirs.values()) / math.hypot(*ours.values())
        verdict = "agrees" if factor >= _FAR else "contradicts" if factor < _NOT_FAR else "in part"
        claim = "Image-to-video training moves weights more than ten times as far (the paper: full training of Wan-I2V)"
        compared = f"image-to-video against {PAPER} (agrees from {_FAR:g} times, not below {_NOT_FAR:g})"
        findings.append(Finding(claim, compared, f"{factor:.2f} times as far", verdict))
    return findings
