"""Optimise with Muon in few kernel launches: matrices of one shape are orthogonalised together.

`torch.optim.Muon` takes them one after another, some thirty launches each: 2,402 a step for an 8-layer transformer,
in which time a data-centre card could take the whole step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pusa.resources import is_bf16_fast

# The quintic of Keller Jordan's Muon, which torch.optim.Muon takes too.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7


class BatchedMuon(Optimizer):
    """Optimise matrices by Muon (Nesterov), with one Newton-Schulz iteration for all of one shape.

    The same numbers as `torch.optim.Muon` with ``adjust_lr_fn="original"``, up to the rounding of the iteration, which
    is computed in bf16 where the device does that itself.

    Args:
        params: matrices ``[rows, columns]``.
        lr: learning rate of a square matrix; one with more rows than columns gets more, by the root of their ratio.
        momentum: Nesterov momentum, in 0..1.
        weight_decay: decoupled, times `lr`.
        ns_steps: Newton-Schulz iterations.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": ns_steps})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with the gradients there are; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for parameters in by_shape.values():
                self._step_together(parameters, group)
        return loss

    def _step_together(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        rows, columns = parameters[0].shape
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        averages = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, averages, group["momentum"])
        updates = orthogonalise(torch.stack(nesterov), group["ns_steps"]).to(parameters[0].dtype)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-rate)


class ConvMuon(BatchedMuon):
    """Optimise convolution kernels by Muon, as matrices ``[out, in * taps]``.

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


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of ``[N, rows, columns]`` near 1 by a quintic Newton-Schulz iteration."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if is_bf16_fast(matrices.device.type) else matrices.float()
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_EPS)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
