"""Run the training loop of the VAE and base stages: timed, resumable, in one process or several.

Under ``torchrun`` every process draws its own samples and the loop averages gradients (gloo); on a CPU two processes of
one thread are faster than one process of two. The loop of `pusa.training.run` reads the loss after every step and its
clips from a dataset; here the host runs ahead of the device, and clips are drawn as they are needed.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pusa.fsutil import replacing
from pusa.resources import is_bf16_fast
from pusa.training.distributed import connect_processes
from pusa.training.model import Updater

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 60.0
_LOG_SECONDS = 20.0


class LossNotFiniteError(RuntimeError):
    """Report a loss that is infinite or no number."""


def precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bf16 where the device computes in it; elsewhere fp32 is faster."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device, on which steps are counted
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16_fast(device.type))


def fit(
    loss_fn: Callable[[int, float], Tensor],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    seconds: float = math.inf,
    steps: int | None = None,
    schedule: Callable[[int, float], float],
    checkpoint: Path,
    ema_decay: float | None = None,
    publish: Callable[[int], None] | None = None,
    publish_seconds: float = 1200.0,
) -> None:
    """Train for `seconds` of wall time or for `steps` in all, including those of an earlier, interrupted call.

    On an accelerator the host only queues work: it reads the loss when it writes a line or a checkpoint.

    Args:
        loss_fn: maps a seed (different for every step and process) and the progress in 0..1 to a loss.
        model: the model to train; only parameters that require gradients are saved.
        optimizers: over the model's parameters; `schedule` scales their learning rates.
        schedule: maps step and progress to a factor.
        checkpoint: a file, written once a minute and at the end; training continues from it if it exists. Beside it a
            file ``.jsonl`` gets step, seconds and loss every 20 seconds.
        ema_decay: decay of the moving average of the weights, with which the model ends; None: no average.
        publish: called in the main process with the number of steps so far, every `publish_seconds`, while the model
            has the averaged weights.

    Raises:
        LossNotFiniteError: the loss is infinite or no number.
    """
    processes = connect_processes()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    updater = Updater(model, parameters, optimizers, ema_decay=ema_decay)
    step, elapsed = _restore(checkpoint, updater) if checkpoint.exists() else (0, 0.0)

    def progress() -> float:
        return step / steps if steps is not None else elapsed / seconds

    is_cpu = all(p.device.type == "cpu" for p in parameters.values())
    losses = LossLog(checkpoint, writes=processes.is_main)
    saved_at = logged_at = published_at = elapsed
    started = time.monotonic() - elapsed
    model.train()
    while progress() < 1:
        updater.scale_rates(schedule(step, progress()))
        loss = loss_fn(step * processes.world + processes.rank, progress())
        loss.backward()
        loss = loss.detach()
        processes.average([*updater.gradients, loss], [])
        losses.add(loss)
        if is_cpu:
            losses.read(step)
        updater.clip(1.0)
        updater.update(step)
        updater.clear()
        step += 1
        (elapsed,) = processes.mean([time.monotonic() - started])  # every process stops at the same step
        if elapsed - logged_at > _LOG_SECONDS or progress() >= 1:
            losses.write(step, elapsed)
            logged_at = elapsed
        if elapsed - saved_at > _SAVE_SECONDS:
            losses.read(step)
            _save(checkpoint, updater, step, elapsed, writes=processes.is_main)
            saved_at = elapsed
        if publish is not None and elapsed - published_at > publish_seconds:
            if processes.is_main:
                _publish(publish, updater, step)
            published_at = elapsed
    _save(checkpoint, updater, step, elapsed, writes=processes.is_main)
    if updater.average is not None:
        updater.average.swap()
    model.eval()


def _publish(publish: Callable[[int], None], updater: Updater, step: int) -> None:
    updater.model.eval()
    with nullcontext() if updater.average is None else updater.average.applied():
        publish(step)
    updater.model.train()


class LossLog:
    """Collect the losses of steps, and write their mean to the file ``.jsonl`` beside the checkpoint."""

    def __init__(self, checkpoint: Path, *, writes: bool) -> None:
        self._checkpoint, self._writes = checkpoint, writes
        self._losses: list[Tensor] = []
        self._mean = math.nan

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss)

    def read(self, step: int) -> None:
        """Average the losses since the last call; this waits for the device.

        Raises:
            LossNotFiniteError: the mean is infinite or no number.
        """
        if not self._losses:
            return
        self._mean = float(torch.stack(self._losses).mean())
        self._losses.clear()
        if not math.isfinite(self._mean):
            raise LossNotFiniteError(f"the loss is {self._mean} at step {step}: lower the learning rates")

    def write(self, step: int, elapsed: float) -> None:
        """Write a line about the steps up to `step`."""
        self.read(step)
        if self._writes:
            logger.info("%s: %4.0f s, step %d, loss %.4f", self._checkpoint.stem, elapsed, step, self._mean)
            with self._checkpoint.with_suffix(".jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "seconds": round(elapsed), "loss": self._mean}) + "\n")


def _save(checkpoint: Path, updater: Updater, step: int, elapsed: float, *, writes: bool) -> None:
    if not writes:
        return
    state = {"step": step, "elapsed": elapsed, "averages": updater.average.averages if updater.average else {}}
    state["parameters"] = {name: p.detach() for name, p in updater.parameters.items()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in updater.optimizers]
    with replacing(checkpoint) as part:
        torch.save(state, part)


@torch.no_grad()
def _restore(checkpoint: Path, updater: Updater) -> tuple[int, float]:
    """Load weights, averages and optimizers from a checkpoint, in place; return its step and seconds."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    for name, parameter in updater.parameters.items():
        parameter.copy_(state["parameters"][name])
    if updater.average is not None:
        for name, average in updater.average.averages.items():
            average.copy_(state["averages"][name])
    for optimizer, saved in zip(updater.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["elapsed"]


def spent_seconds(checkpoint: Path) -> float:
    """Read the seconds that a run has spent so far; 0 if it left no checkpoint."""
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["elapsed"] if checkpoint.exists() else 0.0


@torch.no_grad()
def load_averages(checkpoint: Path, model: nn.Module) -> int:
    """Load the averaged weights of a checkpoint into a model; return the number of steps.

    Raises:
        FileNotFoundError: there is no such file.
    """
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    model.load_state_dict(state["averages"], strict=False)
    return int(state["step"])
