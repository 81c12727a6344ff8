"""Run the training loop of the VAE and base stages: timed, resumable, in one process or several.

Under ``torchrun`` every process draws its own samples and the loop averages gradients (gloo); on a CPU two processes of
one thread are faster than one process of two.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pusa.mini.recipe.muon import BatchedMuon
from pusa.resources import is_bf16_fast

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 60.0
_LOG_SECONDS = 20.0
Schedule = Callable[[float, int], float]


class NotFiniteError(RuntimeError):
    """The loss is infinite or no number."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bf16 where the device computes in it; elsewhere fp32 is faster."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device, on which steps are counted
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16_fast(device.type))


class ConvMuon(BatchedMuon):
    """Muon for convolution kernels, seen as matrices ``[out, in * taps]``.

    Args:
        kernels: weights in channels-last memory, so that the matrices are views of them.
        options: as for `BatchedMuon`.
    """

    def __init__(self, kernels: Sequence[Tensor], **options: float) -> None:
        self.kernels = list(kernels)
        matrices = [nn.Parameter(self._matrix(kernel.data)) for kernel in self.kernels]
        for kernel, matrix in zip(self.kernels, matrices, strict=True):
            if kernel.data_ptr() != matrix.data_ptr():
                raise ValueError(f"a kernel of shape {list(kernel.shape)} is not in channels-last memory")
        super().__init__(matrices, **options)  # type: ignore[arg-type]

    @staticmethod
    def _matrix(kernel: Tensor) -> Tensor:
        return kernel.movedim(1, -1).reshape(kernel.shape[0], -1)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for kernel, matrix in zip(self.kernels, self.param_groups[0]["params"], strict=True):
            matrix.grad = None if kernel.grad is None else self._matrix(kernel.grad)
        return super().step(closure)


def warm_then_cool(warm_steps: int, cool_from: float, floor: float = 0.0) -> Schedule:
    """Make a schedule of learning rates: linearly up over `warm_steps`, down to `floor` from `cool_from` on."""

    def factor(progress: float, step: int) -> float:
        cooling = max(0.0, (progress - cool_from) / (1 - cool_from))
        return min((step + 1) / warm_steps, 1.0) * (1 - (1 - floor) * cooling)

    return factor


def fit(
    loss_fn: Callable[[int, float], Tensor],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    seconds: float = math.inf,
    steps: int | None = None,
    schedule: Schedule,
    checkpoint: Path,
    ema_decay: float | None = None,
) -> None:
    """Train for `seconds` of wall time or for `steps` in all, including those of an earlier, interrupted call.

    On an accelerator the host only queues work: it reads the loss when it writes a line or a checkpoint.

    Args:
        loss_fn: maps a seed (different for every step and process) and the progress in 0..1 to a loss.
        model: the model to train; only parameters that require gradients are saved.
        optimizers: over the model's parameters; `schedule` scales their learning rates.
        schedule: maps progress and step to a factor.
        checkpoint: a file, written once a minute and at the end; training continues from it if it exists. Beside it a
            file ``.jsonl`` gets step, seconds and loss every 20 seconds.
        ema_decay: decay of the moving average of the weights, with which the model ends; None: no average.

    Raises:
        NotFiniteError: the loss is infinite or no number.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    averages = {name: p.detach().clone() for name, p in parameters.items()} if ema_decay is not None else {}
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    step, elapsed = 0, 0.0
    if checkpoint.exists():
        step, elapsed, averages = _restore(checkpoint, parameters, optimizers)

    def save() -> None:
        state = {"step": step, "elapsed": elapsed, "averages": averages}
        state["parameters"] = {name: p.detach() for name, p in parameters.items()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        if rank() == 0:
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)

    def progress() -> float:
        return step / steps if steps is not None else elapsed / seconds

    def mean_loss() -> float:
        """Return the mean loss since the last call; this waits for the device."""
        loss = float(torch.stack(losses).mean())
        losses.clear()
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss} at step {step}: lower the learning rates")
        return loss

    is_cpu = next(iter(parameters.values())).device.type == "cpu" if parameters else True
    losses: list[Tensor] = []
    report = math.nan
    saved_at = logged_at = elapsed
    started = time.monotonic() - elapsed
    model.train()
    while progress() < 1:
        factor = schedule(progress(), step)
        for optimizer, group_rates in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, group_rates, strict=True):
                group["lr"] = rate * factor
        model.zero_grad()
        loss = loss_fn(step * world_size() + rank(), progress())
        loss.backward()
        losses.append(loss.detach())
        _average_gradients([p.grad for p in parameters.values() if p.grad is not None], losses)
        if is_cpu:
            report = mean_loss()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if averages:
            # A short memory at first: the average of 100 steps must not hold the weights of the first ten.
            decay = min(ema_decay or 0.0, (1 + step) / (10 + step))
            update = get_ema_multi_avg_fn(decay)
            update(list(averages.values()), [p.detach() for p in parameters.values()], step)
        step += 1
        elapsed = _mean_over_processes(time.monotonic() - started)  # every process stops at the same step
        is_due = elapsed - logged_at > _LOG_SECONDS or progress() >= 1
        if is_due and losses:
            report = mean_loss()
        if is_due and rank() == 0:
            logger.info("%s: %4.0f s, step %d, loss %.4f", checkpoint.stem, elapsed, step, report)
            with checkpoint.with_suffix(".jsonl").open("a") as curve:
                curve.write(json.dumps({"step": step, "seconds": round(elapsed), "loss": report}) + "\n")
        if is_due:
            logged_at = elapsed
        if elapsed - saved_at > _SAVE_SECONDS:
            if losses:
                mean_loss()
            save()
            saved_at = elapsed
    save()
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)
    model.eval()


@torch.no_grad()
def _restore(
    checkpoint: Path, parameters: dict[str, nn.Parameter], optimizers: Sequence[Optimizer]
) -> tuple[int, float, dict[str, Tensor]]:
    """Load parameters and optimizers from a checkpoint, in place; return its step, seconds and averages."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    for name, parameter in parameters.items():
        parameter.copy_(state["parameters"][name])
    averages = {name: average.to(parameters[name].device) for name, average in state["averages"].items()}
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["elapsed"], averages


def spent_seconds(checkpoint: Path) -> float:
    """Read the seconds that a run has spent so far; 0 if it left no checkpoint."""
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["elapsed"] if checkpoint.exists() else 0.0


def _average_gradients(gradients: Sequence[Tensor], losses: list[Tensor]) -> None:
    """Average gradients and the last loss over processes in place."""
    if world_size() == 1:
        return
    flat = torch.cat([*(g.reshape(-1) for g in gradients), losses[-1].reshape(1)])
    dist.all_reduce(flat)
    flat /= world_size()
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
    losses[-1] = flat[-1]


def _mean_over_processes(seconds: float) -> float:
    """Average `seconds` over processes."""
    if world_size() == 1:
        return seconds
    mean = torch.tensor([seconds])
    dist.all_reduce(mean)
    return float(mean) / world_size()
