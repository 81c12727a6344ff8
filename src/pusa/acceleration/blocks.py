"""Find the blocks of a transformer, whatever its base calls them."""

from torch import nn


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the classes that a model names as its repeated ones, by name; none for other parts."""
    classes = set(getattr(model, "_repeated_blocks", None) or ())
    return {name: module for name, module in model.named_modules() if type(module).__name__ in classes}
