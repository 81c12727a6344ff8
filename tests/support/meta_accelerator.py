"""Stand in for an accelerator on a machine without one.

The meta device computes shapes and holds no values: a read of a value, a copy to the CPU and a mix of devices all
raise, where a GPU would wait, or copy, without a word. ``cpu:0`` is the CPU under another name, so that moves there and
back can be counted while everything still computes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from pusa.models import finite
from pusa.pipeline import PusaPipeline

ACCELERATOR = torch.device("cpu:0")


class Waits:
    """Record the reads of values that a call of a pipeline may make: before its first step, and after its last.

    The checks for NaN and infinity are such reads; on the meta device they are recorded and pass.

    Attributes:
        in_loop: reads between the first and the last step.
        outside: reads before and after.
        steps: forwards of the transformers.
    """

    def __init__(self, pipe: PusaPipeline, forwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_loop = self.outside = self.steps = 0
        self._forwards = forwards
        monkeypatch.setattr("pusa.pipeline.is_finite", self._is_finite)
        monkeypatch.setattr(finite.FiniteSteps, "check", lambda _: self._count())
        for expert in (pipe.transformer, pipe.transformer_2):
            if expert is not None:
                expert.register_forward_hook(self._after_forward)

    def _after_forward(self, *_: Any) -> None:
        self.steps += 1

    def _is_finite(self, tensor: torch.Tensor) -> bool:
        self._count()
        return tensor.is_meta or bool(tensor.isfinite().all())

    def _count(self) -> None:
        if 0 < self.steps < self._forwards:
            self.in_loop += 1
        else:
            self.outside += 1


class _Placed(torch.nn.Parameter):
    """Say that a parameter is on another device."""

    place: torch.device

    @property
    def device(self) -> torch.device:
        return self.place


class Moves:
    """List the moves of parts between RAM and the accelerator, in their order.

    A part that has moved to `ACCELERATOR` says that it is there, as the hooks of model offloading ask it.

    Args:
        parts: name -> part, such as a pipeline's components; those that are no modules are passed over.

    Attributes:
        log: ``("transformer", "in")``, ``("transformer", "out")``, ...
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.log: list[tuple[str, str]] = []
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                self.watch(name, part)

    def watch(self, name: str, part: torch.nn.Module) -> None:
        """List the moves of one part more, which is in RAM."""
        # A class, as accelerate deletes a method that is set on a module when it takes its hook away.
        part.__class__ = _watched(type(part), name, self.log)

    def of(self, name: str) -> list[str]:
        """List the moves of one part."""
        return [way for part, way in self.log if part == name]


def _watched(owner: Any, name: str, log: list[tuple[str, str]]) -> type:
    """Derive a class whose module says where it was moved last, and lists its moves."""

    class Watched(owner):  # type: ignore[misc]
        place = torch.device("cpu")

        def to(self, *args: Any, **options: Any) -> Any:
            targets = [value for value in (*args, *options.values()) if isinstance(value, (str, torch.device))]
            for target in map(torch.device, targets):
                if target != self.place:
                    self.place = target
                    log.append((name, "in" if target == ACCELERATOR else "out"))
            return super().to(*args, **options)

        def parameters(self, recurse: bool = True) -> Iterator[Any]:
            for parameter in super().parameters(recurse):
                placed = parameter.detach().as_subclass(_Placed)
                placed.place = self.place
                yield placed

    Watched.__name__ = owner.__name__
    return Watched
