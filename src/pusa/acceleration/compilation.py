"""Compile the repeated parts of a pipeline: the transformers' blocks, and the VAE's decoder.

All blocks of a transformer share their compiled code. It holds for every task, number of steps, guidance and alpha; a
new size compiles at most once more; the code of the second one serves most others. It stays on disk for the next runs.

Only the forward of a block is compiled, inside the hooks of step caches and of streamed blocks, which are Python.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pusa.acceleration.blocks import blocks_of
from pusa.errors import first_line
from pusa.lora.sources import transformers_of

_GRAPHS = 64  # of a block: torch gives up after 8, which a server with many sizes may need


@cache
def missing_tool(device_type: str, find: Callable[[str], Any] = shutil.which) -> str:
    """Say what keeps this machine from compiling for a device ("cpu" or "cuda"); empty if nothing does.

    A small function is compiled to find out, once per process.
    """
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
    if not any(map(find, compilers)):
        return f"there is no C++ compiler (looked for {', '.join(compilers)}): install g++"
    _keep_on_disk()
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device_type))
    except Exception as error:
        return f"torch cannot compile here ({first_line(error)})"
    return ""


def compile_blocks(pipe: Any, *, backend: Any = "inductor") -> int:
    """Compile the blocks of a pipeline's transformers, or of one transformer; nothing happens before they run.

    LoRAs, merging and weights in fewer bits come before it; step caches, and hooks that stream blocks, after it.

    Args:
        backend: of `torch.compile`.

    Returns:
        The number of blocks.

    Raises:
        ValueError: a cache of steps is enabled, whose decisions would become part of what is compiled.
    """
    if any(model.is_cache_enabled for model in transformers_of(pipe)):
        raise ValueError("a step cache is enabled: compile the blocks before it, or disable it first")
    _prepare()
    blocks = list(_blocks(pipe))
    for block in blocks:
        _CompiledForward(block, backend)
    return len(blocks)


def compile_decoder(vae: Any, *, backend: Any = "inductor") -> None:
    """Compile a VAE's decoder for all latent frames but the first two, which it treats in ways of their own.

    The caches of its convolutions are inputs and outputs of one graph: it holds both at once.
    """
    _prepare()
    _CompiledForward(vae.decoder, backend, _is_settled)


def remove(pipe: Any) -> None:
    """Undo `compile_blocks` and `compile_decoder`, also under hooks that came after them."""
    parts = list(_blocks(pipe))
    if (vae := getattr(pipe, "vae", None)) is not None:
        parts.append(vae.decoder)
    for module in parts:
        compiled = vars(module).get(_CompiledForward.KEY)
        if compiled is not None:
            compiled.remove()


def is_compiled(pipe: Any) -> bool:
    """Tell if the blocks of a pipeline's transformers, or of one transformer, are compiled."""
    return any(_CompiledForward.KEY in vars(block) for block in _blocks(pipe))


def cache_folder() -> Path:
    """Return the folder of compiled code: that of TORCHINDUCTOR_CACHE_DIR, or ``compiled`` in PUSA_CACHE."""
    own = Path(os.environ.get("PUSA_CACHE", "~/.cache/pusa")).expanduser() / "compiled"
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or own)


def _blocks(pipe: Any) -> Iterator[nn.Module]:
    for model in transformers_of(pipe):
        yield from blocks_of(model).values()


def _prepare() -> None:
    _keep_on_disk()
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)


def _keep_on_disk() -> None:
    """Let torch keep compiled code where it is not lost at the next start, as it may be in the folder for temporaries.

    torch reads the variable when it compiles.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))


def _is_settled(_: Tensor, feat_cache: Any = None, first_chunk: bool = False, **__: Any) -> bool:
    """Tell if a decoder has two earlier frames in all its caches: diffusers fills them, with marks, for two calls."""
    if first_chunk or not feat_cache or not isinstance(feat_cache[0], Tensor) or feat_cache[0].shape[2] < 2:
        return False
    return not any(isinstance(kept, str) for kept in feat_cache)


class _CompiledForward:
    """Stand in for a module's forward: call the compiled one, or the module's own once it is removed.

    The first size has code of its own, and the next one code for most sizes.

    Args:
        backend: of `torch.compile`.
        applies: tells by the arguments if the compiled one is called.
    """

    KEY = "_pusa_compiled"

    def __init__(self, module: nn.Module, backend: Any, applies: Callable[..., bool] = lambda *_, **__: True) -> None:
        if (previous := vars(module).get(self.KEY)) is not None:
            previous.remove()
        self._module, self._own, self._applies = module, module.forward, applies
        self._forward = torch.compile(self._own, fullgraph=True, backend=backend)
        vars(module)[self.KEY] = self
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._forward if self._applies(*args, **kwargs) else self._own)(*args, **kwargs)

    def remove(self) -> None:
        self._forward = self._own
        del vars(self._module)[self.KEY]
        if vars(self._module).get("forward") is self:
            self._module.forward = self._own
