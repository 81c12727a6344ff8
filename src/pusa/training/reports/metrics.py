"""Record the metrics of a run in ``metrics.jsonl`` and, if there is one, in a tracker."""

import json
import logging
import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from pusa.fsutil import replacing
from pusa.training.config import TrainConfig, leaves

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Reporter:
    """Write log entries as they come; on the main process only.

    Args:
        folder: for ``metrics.jsonl`` and TensorBoard's files.
        config: of the run.
        first_step: the step that the run resumes from; entries of later steps, from before a kill, are removed.
    """

    def __init__(self, folder: Path, config: TrainConfig, first_step: int) -> None:
        check_tracker(config)  # before any file changes
        self._path = folder / METRICS_FILE
        folder.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_metrics(folder) if entry["step"] <= first_step]
        with replacing(self._path) as part:
            part.write_text("".join(json.dumps(entry) + "\n" for entry in kept) if first_step else "")
        self._file = self._path.open("a")
        self._trackers = _trackers(folder, config, first_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log an entry of numbers and mappings of numbers; values that are not finite become null in the file."""
        self._file.write(json.dumps({"step": step, **_json_values(values)}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log({k: v for k, v in leaves(values, "/") if isinstance(v, int | float)}, step=step)

    def show(self, step: int, picture: Path) -> None:
        """Show an image beside the tracker's curves."""
        for tracker in self._trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            tracker.log_images({"validation": pixels[None]}, step=step, **layout)

    def close(self) -> None:
        """Flush the file to disk and close the tracker."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the entries of a run so far; a damaged line, as a killed run leaves, is skipped."""
    path = folder / METRICS_FILE
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("a damaged line of %s is left out: %.40s", path, line)
    return entries


def check_tracker(config: TrainConfig) -> None:
    """Check that the tracker is installed. Raises ValueError if not."""
    kind = config.report.tracker
    if kind in ("tensorboard", "wandb") and find_spec(kind) is None:
        raise ValueError(f"report.tracker={kind} is not installed: pip install {kind}, or report.tracker=none")


def _trackers(folder: Path, config: TrainConfig, first_step: int) -> list[GeneralTracker]:
    kind = config.report.tracker
    if kind == "auto":
        kind = "tensorboard" if find_spec("tensorboard") is not None else "none"
    if kind == "none":
        return []
    if kind == "tensorboard":
        tracker: GeneralTracker = TensorBoardTracker("tensorboard", str(folder), purge_step=first_step + 1)
    else:
        tracker = WandBTracker("pusa", name=config.name, dir=str(folder), config=json.loads(config.model_dump_json()))
    tracker.start()
    return [tracker]


def _json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _json_values(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in values.items()}
