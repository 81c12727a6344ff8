"""Compare figures with bounds: a gate against regressions."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Bounds = Mapping[str, Mapping[str, Mapping[str, float]]]
"""By task and measure ``{"min": ..., "max": ...}``, one of them or both."""


def read_bounds(path: Path, measures: Mapping[str, Any], tasks: Mapping[str, Any] | tuple[str, ...]) -> Bounds:
    """Read bounds from a JSON file: ``{"i2v": {"given_psnr_db": {"min": 20}}}``.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it has a task, a measure or a bound that is unknown.
    """
    try:
        bounds = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"--bounds {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--bounds {path} is no JSON: {error}") from None
    if not isinstance(bounds, dict) or not all(isinstance(part, dict) for part in bounds.values()):
        raise ValueError(f'--bounds {path}: write {{"i2v": {{"given_psnr_db": {{"min": 20}}}}}}')
    for task, figures in bounds.items():
        if task not in tasks:
            raise ValueError(f"--bounds {path}: {task!r} is none of {', '.join(tasks)}")
        for name, limits in figures.items():
            if name not in measures:
                raise ValueError(f"--bounds {path}: {name!r} is none of {', '.join(measures)}")
            if not isinstance(limits, dict) or not limits or not set(limits) <= {"min", "max"}:
                raise ValueError(f'--bounds {path}, {task} {name}: give "min", "max" or both, not {limits!r}')
            if not all(map(_is_number, limits.values())):
                raise ValueError(f"--bounds {path}, {task} {name}: {limits!r} has a limit that is no number")
            if limits.get("min", -math.inf) > limits.get("max", math.inf):
                raise ValueError(f"--bounds {path}, {task} {name}: {limits!r} has a min above its max")
    return bounds


def _is_number(limit: Any) -> bool:
    return isinstance(limit, int | float) and not isinstance(limit, bool) and math.isfinite(limit)


def violations(figures: Mapping[str, Mapping[str, Any]], bounds: Bounds) -> list[str]:
    """Return a line for each figure outside its bounds, or that was not measured.

    Args:
        figures: of the made videos, by task and measure, as `pusa.evaluation.metrics.Figure`.
    """
    found = []
    for task, limits_of in bounds.items():
        for name, limits in limits_of.items():
            figure = figures.get(task, {}).get(name)
            value = None if figure is None else figure.get("value")
            if value is None:
                found.append(f"{task} {name} was not measured")
                continue
            if "min" in limits and not value >= limits["min"]:
                found.append(f"{task} {name} is {value:.4g}, less than {limits['min']:g}")
            if "max" in limits and not value <= limits["max"]:
                found.append(f"{task} {name} is {value:.4g}, more than {limits['max']:g}")
    return found
