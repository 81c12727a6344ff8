"""Count the disk that a run's checkpoints take, check that it is free, and report a disk that fills up; no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from pathlib import Path

from safetensors import SafetensorError

from pusa.fsutil import is_full
from pusa.resources import ResourcesError, free_disk_bytes, readable
from pusa.training.config import TrainConfig

_FP32 = 4


@dataclass(frozen=True)
class DiskNeed:
    """Hold the bytes of one checkpoint, the number on disk at the most, and the bytes of the result.

    The number counts the ones that are kept and the next one, which is written before an old one is deleted.
    """

    checkpoint: int
    checkpoints: int
    result: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.checkpoints + self.result


def disk_need(config: TrainConfig, trained_parameters: int) -> DiskNeed:
    """Count the disk of one expert's run: weights, moving average and optimizer state, all in fp32.

    With `seconds` instead of `steps`, the checkpoints that `keep_every` keeps for good cannot be counted.
    """
    states = 1 if config.optimizer.name == "muon" else 2
    tensors = 1 + states + (config.ema_decay is not None)
    itemsize = _FP32 if config.method.kind == "lora" or config.model.dtype == "fp32" else 2
    return DiskNeed(
        checkpoint=tensors * _FP32 * trained_parameters,
        checkpoints=_most_checkpoints(config),
        result=itemsize * trained_parameters,
    )


def _most_checkpoints(config: TrainConfig) -> int:
    rule, steps = config.checkpoint, config.steps
    most = rule.keep_last + 1
    if rule.every_steps is not None and rule.keep_every is not None and steps is not None:
        most += steps // lcm(rule.every_steps, rule.keep_every)
    if steps is None or rule.every_seconds is not None:
        return most
    return min(most, -(-steps // (rule.every_steps or steps)))  # no more than are written; one at the end always is


def check_disk(config: TrainConfig, need: DiskNeed, folder: Path) -> None:
    """Check that a run's files fit beside those it has written already. Raises ResourcesError if not."""
    held = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    missing, free = need.total - held, free_disk_bytes(folder)
    if missing > free:
        raise ResourcesError(
            f"the checkpoints of {folder} need {readable(missing)} of disk ({need.checkpoints} of "
            f"{readable(need.checkpoint)}, and {readable(need.result)} for the result), and {readable(free)} are free: "
            f"free some, name a larger disk with output=FOLDER, or lower checkpoint.keep_last "
            f"({config.checkpoint.keep_last}) or method.rank"
        )


@contextmanager
def explaining_full_disk(folder: Path, what: str, need: int) -> Iterator[None]:
    """Replace the error of a full disk by one that names the path, the bytes needed and the way out.

    Raises:
        ResourcesError: the disk, or the quota on it, is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not (is_full(error) or "No space left on device" in str(error)):  # the latter is safetensors'
            raise
        raise ResourcesError(
            f"the disk is full: {what} in {folder} needs {readable(need)}, and {readable(free_disk_bytes(folder))} are "
            "free. Earlier checkpoints are intact: free some space, or move the folder to a larger disk, and go on "
            "with --resume"
        ) from error
