"""Turn a stock transformer of diffusers into ours in place, where nothing goes on calling its old forward."""

from collections.abc import Iterable

from torch import nn


def check_promotable(model: nn.Module, stock: type[nn.Module], blocks: str, function: str) -> None:
    """Raise if the class of a transformer cannot be changed in place.

    Args:
        model: the transformer.
        stock: the class of diffusers that it must have.
        blocks: the attribute that holds its blocks.
        function: the name of the caller, for messages.

    Raises:
        TypeError: `model` is of another class, such as a sharded or wrapped one.
        ValueError: the model or a block is compiled or carries hooks (offloading, caching, parallelism), which would
            go on calling the old forward.
    """
    if type(model) is not stock:
        raise TypeError(
            f"{function} takes a diffusers {stock.__name__}, not {type(model).__name__}: "
            "promote before sharding or wrapping"
        )
    parts: Iterable[tuple[str, nn.Module]] = [("", model), *getattr(model, blocks).named_children()]
    for name, module in parts:
        where = f"block {name}" if name else "the model"
        if hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{where} already carries hooks (offloading, a cache or parallelism): promote with {function} first, "
                "then enable them"
            )
        if module._compiled_call_impl is not None:
            raise ValueError(f"{where} is already compiled: promote with {function} first, then compile")
