"""Measure how many bytes of tensors a computation holds at once, on the meta device: real sizes, no memory, no time."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pusa.models.wan import PusaWanTransformer3DModel


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages that come into being inside, and remember the most at once.

    Attributes:
        live, peak: bytes now, and the most so far. Views share their storage's bytes; older ones do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """Give attention the memory of a fused kernel: its output. On the meta device torch would form all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            return torch.empty_like(query)
        return func(*args, **(kwargs or {}))


@contextmanager
def live_bytes() -> Iterator[LiveBytes]:
    """Count bytes of tensors inside the block, without gradients and with fused attention."""
    with torch.no_grad(), _FusedAttention(), LiveBytes() as count:
        yield count


def meta_transformer(
    config: Mapping[str, Any], dtype: torch.dtype, *, layers: int | None = None
) -> PusaWanTransformer3DModel:
    """Build a transformer without contents, in the dtypes in which diffusers loads it."""
    with torch.device("meta"):
        model = PusaWanTransformer3DModel(**{**config, "num_layers": layers or config["num_layers"]}).eval()
    for name, parameter in model.named_parameters():
        in_fp32 = set(model._keep_in_fp32_modules) & set(name.split("."))
        parameter.data = parameter.data.to(torch.float32 if in_fp32 else dtype)
    for name in ("freqs_cos", "freqs_sin"):  # which diffusers computes on the CPU
        setattr(model.rope, name, getattr(model.rope, name).to("meta"))
    return model
