"""Read the scores of dimensions from the files that VBench writes, or from plain JSON."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pusa.evaluation.vbench.totals import DIMENSIONS, check_dimensions

RESULTS_SUFFIX = "_eval_results.json"
"""End of the names that VBench gives to its files: ``{dimension: [score, one entry for each video]}``."""

_UNSCORED = "temporal_flickering"
_CAN_BE_SMALL = {"dynamic_degree", "camera_motion"}  # shares of videos: a model that hardly moves has 0.5 %


def read_scores(paths: Iterable[Path]) -> dict[str, float]:
    """Read scores in percent by the names of `DIMENSIONS`, from files and folders.

    A folder, such as that of a run, stands for the files below it that VBench has written. A file of VBench holds
    fractions, 0..1. In any other, ``{dimension: number}``, all numbers are fractions, or all are percents.

    Raises:
        FileNotFoundError: a path is missing, or a folder has no results.
        ValueError: a file is damaged or of something else, a score is out of range, or two files disagree.
    """
    found: dict[str, tuple[float, Path]] = {}
    for file in _files(paths):
        for name, score in _read_file(file).items():
            if name in found and not math.isclose(found[name][0], score, abs_tol=1e-6):
                before, where = found[name]
                raise ValueError(
                    f"{name} is {before:.4f} in {where} and {score:.4f} in {file}: leave out what is older"
                )
            found[name] = score, file
    return {name: found[name][0] for name in DIMENSIONS if name in found}


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            files = sorted(path.rglob(f"*{RESULTS_SUFFIX}"))
            if not files:
                raise FileNotFoundError(f"{path} has no *{RESULTS_SUFFIX}: score it first, or give a file")
            yield from files
        elif path.is_file():
            yield path
        else:
            raise FileNotFoundError(f"{path} does not exist")


def _read_file(file: Path) -> dict[str, float]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{file} holds no scores: write {{dimension: score}}")
    try:
        check_dimensions(name for name in values if name != _UNSCORED)
        if all(isinstance(value, list) for value in values.values()):
            scores = {name: 100 * _number(name, value[0] if value else None, 1) for name, value in values.items()}
        else:
            scores = _as_percents({name: _number(name, value, 100) for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    scores.pop(_UNSCORED, None)
    return scores


def _number(name: str, value: Any, limit: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= limit:
        raise ValueError(f"{name}={value!r} is no score in 0..{limit}")
    return float(value)


def _as_percents(values: Mapping[str, float]) -> dict[str, float]:
    if all(value <= 1 for value in values.values()):
        return {name: 100 * value for name, value in values.items()}
    for name, value in values.items():
        if value <= 1 and name not in _CAN_BE_SMALL:
            raise ValueError(f"{name}={value:g} beside scores above 1: write all as fractions or all as percents")
    return dict(values)
