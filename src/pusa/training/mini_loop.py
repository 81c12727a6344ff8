"""One training loop for all stages of the small model: by the clock, resumable, in one process or several.

Under ``torchrun`` every process draws its own samples and gradients are averaged (gloo); on a CPU two processes of one
thread are faster than one process of two.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 60.0
_LOG_SECONDS = 20.0
Schedule = Callable[[float, int], float]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class ConvMuon(Muon):
    """`torch.optim.Muon` for convolution kernels, seen as matrices ``[out, in * taps]``.

    Args:
        kernels: weights in channels-last memory, so that the matrices are views of them.
        options: as for `torch.optim.Muon`.
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
    """A factor for learning rates: up over `warm_steps`, 1, from progress `cool_from` on down to `floor`, linearly."""

    def factor(progress: float, step: int) -> float:
        cooling = max(0.0, (progress - cool_from) / (1 - cool_from))
        return min((step + 1) / warm_steps, 1.0) * (1 - (1 - floor) * cooling)

    return factor


def fit(
    loss_of: Callable[[int, float], Tensor],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    seconds: float,
    schedule: Schedule,
    checkpoint: Path,
    ema_decay: float | None = None,
) -> None:
    """Train for `seconds` of wall time in all, counting what an earlier, interrupted call has spent.

    Args:
        loss_of: from a seed (another one for every step and process) and the progress in 0..1 to a loss.
        model: what is trained; only parameters that require gradients are saved.
        optimizers: over the model's parameters; `schedule` scales their learning rates.
        schedule: from progress and step to a factor.
        checkpoint: written once a minute and at the end; continued from if there. Beside it a file ``.jsonl`` gets
            step, seconds and loss every 20 seconds.
        ema_decay: the model ends with the moving average of its weights.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    averages = {name: p.detach().clone() for name, p in parameters.items()} if ema_decay is not None else {}
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    step, elapsed = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        step, elapsed = state["step"], state["elapsed"]
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        averages = {name: average.to(parameters[name].device) for name, average in state["averages"].items()}
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save() -> None:
        state = {"step": step, "elapsed": elapsed, "averages": averages}
        state["parameters"] = {name: p.detach() for name, p in parameters.items()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        if rank() == 0:
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)

    saved_at = logged_at = elapsed
    model.train()
    while elapsed < seconds:
        began = time.monotonic()
        factor = schedule(elapsed / seconds, step)
        for optimizer, group_rates in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, group_rates, strict=True):
                group["lr"] = rate * factor
        model.zero_grad()
        loss = loss_of(step * world_size() + rank(), elapsed / seconds)
        loss.backward()
        report = _average([p.grad for p in parameters.values() if p.grad is not None], float(loss.detach()))
        if not math.isfinite(report):
            raise RuntimeError(f"the loss is {report} at step {step}: lower the learning rates")
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for name, average in averages.items():
            # A short memory at first: the average of 100 steps is no use with weights of the first ten in it.
            decay = min(ema_decay or 0.0, (1 + step) / (10 + step))
            average.lerp_(parameters[name].detach(), 1 - decay)
        step += 1
        elapsed += _average([], time.monotonic() - began)  # every process stops at the same step
        if (elapsed - logged_at > _LOG_SECONDS or elapsed >= seconds) and rank() == 0:
            logger.info("%s: %4.0f s, step %d, loss %.4f", checkpoint.stem, elapsed, step, report)
            with checkpoint.with_suffix(".jsonl").open("a") as curve:
                curve.write(json.dumps({"step": step, "seconds": round(elapsed), "loss": report}) + "\n")
            logged_at = elapsed
        if elapsed - saved_at > _SAVE_SECONDS:
            save()
            saved_at = elapsed
    save()
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)
    model.eval()


def _average(gradients: Sequence[Tensor], number: float) -> float:
    """Average gradients over processes in place, and a number with them."""
    if world_size() == 1:
        return number
    flat = torch.cat([*(g.reshape(-1) for g in gradients), torch.tensor([number])])
    dist.all_reduce(flat)
    flat /= world_size()
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
    return float(flat[-1])
