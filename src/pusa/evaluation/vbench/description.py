"""Tell people what a run is before it begins, and what its totals are in the end."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pusa import zoo
from pusa.evaluation.runs import RunFolder
from pusa.evaluation.vbench.published import ROWS
from pusa.evaluation.vbench.suite import CAMERA, RATIOS, VIDEOS_PER_PROMPT, nearest_ratio, parse_ratio
from pusa.evaluation.vbench.totals import DIMENSIONS, Interval, Totals, total_of
from pusa.request import ResolvedRequest

PAPER_SETTINGS: Mapping[str, float] = {"steps": 10, "alpha": 1.4, "frames": 81}
"""Settings of the paper's runs on Wan2.1 (arXiv 2507.16116), beside a first frame without noise."""
ORIGINAL_SETTINGS: Mapping[str, float] = {"guidance": 3, "shift": 5}
"""Settings of the original's scripts that the paper does not give. Size and frame rate differ among these."""
WAN22_ALPHAS = (1.5, 1.4)
"""The paper's on Wan2.2, of its high-noise and its low-noise expert."""

COMPARED = ("Pusa", "Wan-I2V (14B)")
"""Published rows of the full set that totals are shown beside."""

_DYNAMIC_FPS = 8  # of the frames that dynamic degree looks at


def describe(run: RunFolder) -> dict[str, Any]:
    """Describe a run as JSON: its videos, those of each dimension, what is left open of the total, and notes."""
    counts = Counter(name for item in run.items for name in item.labels["dimensions"])
    dimensions = [name for name in DIMENSIONS if counts[name]]
    return {
        "videos": len(run.items),
        "prompts": len({item.labels["prompt"] for item in run.items}),
        "model": run.items[0].request.model,
        "dimensions": {name: counts[name] for name in dimensions},
        "missing_dimensions": [name for name in DIMENSIONS if not counts[name]],
        "share_of_total": round(share_of(dimensions), 4),
        "total_known_within": round(open_points(dimensions), 2),
        "made": len(run.items) - len(run.missing()),
        "notes": notes_on(run),
    }


def describe_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Format what `describe` returns, line by line."""
    yield f"{facts['videos']:,} videos of {facts['prompts']:,} prompts by {facts['model']}, {facts['made']:,} made"
    width = max(map(len, facts["dimensions"]))
    for name, count in facts["dimensions"].items():
        yield f"  {name:<{width}}  {count:>5,} videos  {DIMENSIONS[name].share:>6.1%} of the total"
    if facts["missing_dimensions"]:
        yield (
            f"without {', '.join(facts['missing_dimensions'])}: {facts['share_of_total']:.1%} of the total's weight, "
            f"which is then known within {facts['total_known_within']:.2f} points"
        )
    yield from facts["notes"]


def share_of(dimensions: Collection[str]) -> float:
    """Return the part of the total that some dimensions decide, 0..1."""
    return sum(DIMENSIONS[name].share for name in dimensions)


def open_points(dimensions: Collection[str]) -> float:
    """Return how far in points the true total may be from the middle of its range, if only these are scored."""
    return total_of(dict.fromkeys(dimensions, 50.0)).total.half


def notes_on(run: RunFolder) -> list[str]:
    """Tell what a person should know of a run's settings: its images, its rate, the paper's values, what it leaves out.

    Raises ValueError for a model that cannot make such videos.
    """
    request = run.items[0].request
    resolved = request.resolved(zoo.defaults_of(request.model))
    notes = [_ratio_note(resolved, run.settings["ratio"]), _fps_note(resolved)]
    if differences := _differences(resolved, run.settings["noise"]):
        notes.append("not as in the paper: " + "; ".join(differences))
    if CAMERA in run.settings["dimensions"]:
        camera = sum(item.labels["dimensions"] == [CAMERA] for item in run.items)
        rest = [name for name in run.settings["dimensions"] if name != CAMERA]
        if rest:
            notes.append(
                f"{camera:,} of the {len(run.items):,} videos are for camera motion, "
                f"{DIMENSIONS[CAMERA].share:.1%} of the total: begin with --no-camera"
            )
    if run.settings["per_prompt"] != VIDEOS_PER_PROMPT or run.settings["prompts_per_kind"]:
        notes.append("a part of the suite: its scores are noisier, and compare with runs of the same part only")
    return notes


def _differences(resolved: ResolvedRequest, noise: float) -> list[str]:
    differences = [
        f"{name} {getattr(resolved, name):g}, not {value:g}{of}"
        for of, values in (("", PAPER_SETTINGS), (" (the original's scripts)", ORIGINAL_SETTINGS))
        for name, value in values.items()
        if getattr(resolved, name) != value
        and not (name == "alpha" and (resolved.alpha, resolved.alpha_2) == WAN22_ALPHAS)
    ]
    if noise:
        return [*differences, f"noise {noise:g}, not 0"]
    return (
        differences if resolved.exact else [*differences, "the first frame is computed at every fifth step (--exact)"]
    )


def _ratio_note(resolved: ResolvedRequest, ratio: str) -> str:
    width, height = resolved.width, resolved.height
    nearest, shape = nearest_ratio(width, height), parse_ratio(ratio)
    kept = min(shape, width / height) / max(shape, width / height)
    text = f"images {ratio}: for {width}x{height} ({width / height:.3f}) {kept:.1%} of each is kept"
    return text if ratio == nearest else f"{text}; {nearest} ({RATIOS[nearest]:.3f}) is nearer"


def _fps_note(resolved: ResolvedRequest) -> str:
    every = {fps: max(1, round(fps / _DYNAMIC_FPS)) for fps in (resolved.fps, 16, 25)}
    return (
        f"{resolved.fps:g} fps: dynamic degree takes one frame in {every[resolved.fps]} by the rate in the file "
        f"(in {every[16]} at 16 fps, in {every[25]} at 25), so that --fps alone changes its score"
    )


# ---- totals ----------------------------------------------------------------------------------------------------------


def totals_as_json(scores: Mapping[str, float], totals: Totals) -> dict[str, Any]:
    """Describe totals as JSON, all in percent; each of the three is ``[low, high]``."""
    return {
        **{name: [round(value, 4) for value in (found.low, found.high)] for name, found in _parts(totals)},
        "scores": {name: round(score, 4) for name, score in scores.items()},
        "missing": list(totals.missing),
    }


def totals_lines(scores: Mapping[str, float], totals: Totals) -> Iterator[str]:
    """Format scores and totals beside the published rows of `COMPARED`, line by line."""
    rows = [next(row for row in ROWS if row.is_full_set and row.model == model) for model in COMPARED]
    yield "".join([" " * 24, f"{'this':>14}", *(f"{row.model:>15}" for row in rows)])
    for name, dimension in DIMENSIONS.items():
        score = f"{scores[name]:.2f}" if name in scores else "missing"
        yield "".join([f"{dimension.title:<24}", f"{score:>14}", *(f"{row.scores[name]:>15.2f}" for row in rows)])
    for name, found in _parts(totals):
        cells = "".join(f"{getattr(row, name):>15.2f}" for row in rows)
        yield f"{name if name != 'i2v' else 'I2V':<24}{found!s:>14}{cells}"
    if totals.missing:
        yield (
            f"{', '.join(totals.missing)} {'is' if len(totals.missing) == 1 else 'are'} missing: the total is "
            f"{totals.total.middle:.2f} within {totals.total.half:.2f} points"
        )


def _parts(totals: Totals) -> tuple[tuple[str, Interval], ...]:
    return ("quality", totals.quality), ("i2v", totals.i2v), ("total", totals.total)
