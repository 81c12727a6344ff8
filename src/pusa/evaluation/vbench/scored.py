"""Read what is scored of a run: the result of each dimension in the run's folder, ``scores/DIMENSION/``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.errors import first_line
from pusa.evaluation.runs import Item, RunFolder
from pusa.evaluation.runs.files import hash_of, read_json
from pusa.evaluation.vbench.results import RESULTS_SUFFIX
from pusa.evaluation.vbench.suite import VIDEOS_PER_PROMPT

# the suite writes the scores of these videos as percents, and their mean as a fraction
_VIDEO_SCALES = {"imaging_quality": 100.0}


@dataclass(frozen=True)
class Scored:
    """Hold the result of a dimension, as it is in the run's folder.

    Attributes:
        score: of the dimension, 0..1.
        videos: score of each video by its item's name, 0..1.
        seconds: that it took.
        scorer: that made it.
        is_current: the videos are the ones that were scored.
    """

    dimension: str
    score: float
    videos: Mapping[str, float]
    seconds: float
    scorer: str
    is_current: bool


def folder_of(run: RunFolder, dimension: str) -> Path:
    """Return the folder of a dimension's result."""
    return run.folder / "scores" / dimension


def log_of(run: RunFolder, dimension: str) -> Path:
    """Return the path of the log of a dimension's last scoring."""
    return folder_of(run, dimension) / "log.txt"


def items_of(run: RunFolder, dimension: str) -> list[Item]:
    """List the items that the suite scores for a dimension: the first five of each prompt that counts for it."""
    return [
        item
        for item in run.items
        if dimension in item.labels["dimensions"] and item.labels["index"] < VIDEOS_PER_PROMPT
    ]


def read_scored(run: RunFolder, dimension: str) -> Scored | None:
    """Read the result of a dimension; None if it was not scored, or a file of it is damaged."""
    folder = folder_of(run, dimension)
    record, result = read_json(folder / "record.json"), read_json(folder / f"{dimension}{RESULTS_SUFFIX}")
    if record is None or result is None:
        return None
    try:
        score, videos = parse_result(result, dimension)
        return Scored(
            dimension=dimension,
            score=score,
            videos=videos,
            seconds=float(record["seconds"]),
            scorer=str(record["scorer"]),
            is_current=record["fingerprint"] == fingerprint_of(run, dimension, record["scorer"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def parse_result(result: Mapping[str, Any], dimension: str) -> tuple[float, dict[str, float]]:
    """Read the suite's ``{dimension: [score, ..., videos]}``: the score, and that of each video by its item's name.

    Raises:
        ValueError: it is something else.
    """
    values = result.get(dimension)
    if not isinstance(values, list) or len(values) < 2 or not isinstance(values[-1], list):
        raise ValueError(f"the result has no {dimension} with a score and its videos")
    score = values[0]
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score) or not 0 <= score <= 1:
        raise ValueError(f"{dimension}={score!r} is no score in 0..1")
    try:
        scale = _VIDEO_SCALES.get(dimension, 1.0)
        videos = {Path(entry["video_path"]).stem: float(entry["video_results"]) / scale for entry in values[-1]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the videos of {dimension} have no scores ({first_line(error)})") from None
    for name, value in videos.items():
        if not math.isfinite(value):
            raise ValueError(f"{dimension}={value} of {name} is no score")
    return float(score), videos


def fingerprint_of(run: RunFolder, dimension: str, scorer: str) -> str:
    """Hash what a dimension's score depends on: the contents of its videos, the prompts and the scorer."""
    records = {item.name: run.record_of(item) for item in items_of(run, dimension)}
    videos = {name: record.sha256 if record else None for name, record in records.items()}
    return hash_of([videos, run.settings["suite_sha256"], scorer])
