"""Let a call run out of memory, as a device or the CPU's allocator would."""

import itertools
from typing import Any

import pytest
import torch


def run_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, call: int, last: int = 0
) -> list[int]:
    """Let one call of a method, counted from 1, or all up to `last`, run out of memory; return a list of all calls."""
    method, numbers, calls = getattr(owner, name), itertools.count(1), []

    def short(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(number := next(numbers))
        if call <= number <= max(call, last):
            raise torch.OutOfMemoryError("out of memory")
        return method(self, *args, **options)

    monkeypatch.setattr(owner, name, short)
    return calls
