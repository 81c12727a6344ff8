"""Choose what computes attention on a card, and set it on a pipeline's transformers.

The backends are diffusers' own, by short names; PyTorch's is always there and every other one is an option. This module
loads neither torch nor diffusers until a backend is set, so that plans for other machines can choose one.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from pusa.lora.sources import transformers_of

logger = logging.getLogger(__name__)

_HOPPER = (9, 0)
_BLACKWELL = (10, 0)

Capability = tuple[int, int] | None
Has = Callable[[str], bool]


@dataclass(frozen=True)
class Backend:
    """Describe one way to compute attention.

    Attributes:
        name: of diffusers.
        modules: Python modules that bring it, of which one is enough; none: torch has it.
        install: how to get one of them.
        oldest: the first CUDA capability that it runs on; None: it runs on CPUs, too.
        newest: the first capability that it does not run on any more; None: there is none yet.
        shares_tokens: several cards can share its tokens (Ulysses, ring).
    """

    name: str
    modules: tuple[str, ...] = ()
    install: str = ""
    oldest: Capability = (8, 0)
    newest: Capability = None
    shares_tokens: bool = False

    def runs_on(self, capability: Capability) -> bool:
        """Tell if a card, or with None the CPU, has the instructions that it needs."""
        if self.oldest is None:
            return True
        return capability is not None and self.oldest <= capability < (self.newest or (99, 0))


_FROM_HUB = "pip install kernels; its kernel is downloaded from the Hugging Face Hub at first use"
_SAGE = "pip install the wheel or source of SageAttention 2.1.1 or newer (PyPI's 1.0.6 is too old)"

BACKENDS: dict[str, Backend] = {
    "native": Backend("native", oldest=None, shares_tokens=True),
    "cudnn": Backend("_native_cudnn", shares_tokens=True),
    "flash": Backend("flash", ("flash_attn",), "pip install flash-attn", shares_tokens=True),
    "flash3": Backend(
        "_flash_3",
        ("flash_attn_interface", "fa3_fwd_interface"),
        "pip install fa3-fwd, or build FlashAttention 3 from its source",
        oldest=_HOPPER,
        newest=_BLACKWELL,
    ),
    "flash3_hub": Backend("_flash_3_hub", ("kernels",), _FROM_HUB, _HOPPER, _BLACKWELL, shares_tokens=True),
    "flash4_hub": Backend("flash_4_hub", ("kernels",), _FROM_HUB, _HOPPER),
    "flash_hub": Backend("flash_hub", ("kernels",), _FROM_HUB, shares_tokens=True),
    "sage": Backend("sage", ("sageattention",), _SAGE, shares_tokens=True),
    "sage_hub": Backend("sage_hub", ("kernels",), _FROM_HUB, shares_tokens=True),
    "xformers": Backend("xformers", ("xformers",), "pip install xformers", oldest=(7, 0)),
    "native_flash": Backend("_native_flash", shares_tokens=True),
    "native_efficient": Backend("_native_efficient", oldest=(7, 0)),
    "native_math": Backend("_native_math", oldest=None),
}
WORDS = ("auto", *BACKENDS)


def word_of(name: str) -> str:
    """Return the short name of a backend that is called by it, or as diffusers calls it.

    Raises:
        ValueError: there is no such backend.
    """
    if name == "auto" or name in BACKENDS:
        return name
    for word, backend in BACKENDS.items():
        if name == backend.name:
            return word
    raise ValueError(f"attention={name!r} is none of {', '.join(WORDS)}")


@cache
def is_importable(module: str) -> bool:
    """Tell if a module is there: where torch is loaded, by importing it, as a build for another torch fails then."""
    if importlib.util.find_spec(module) is None:
        return False
    if "torch" in sys.modules:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            logger.warning("%s is installed and cannot be imported: %s", module, error)
            return False
    return True


def available(
    capability: Capability, *, shares_tokens: bool = False, is_importable: Has = is_importable
) -> tuple[str, ...]:
    """List the short names of the backends that a card (None: the CPU) can use with what is installed here."""
    return tuple(
        word
        for word, backend in BACKENDS.items()
        if backend.runs_on(capability)
        and (backend.shares_tokens or not shares_tokens)
        and (not backend.modules or any(map(is_importable, backend.modules)))
    )


def choose(
    capability: Capability,
    *,
    asked: str = "auto",
    dtype: str = "bfloat16",
    shares_tokens: bool = False,
    is_importable: Has = is_importable,
) -> str:
    """Choose a backend: FlashAttention 3 on Hopper if it can be imported, else cuDNN on Hopper and newer, else torch's.

    torch's own choice among its kernels leaves cuDNN's out, which computes 1.6 times as much per second on Hopper as
    FlashAttention 2 (FlashAttention-3, arXiv 2407.08608).

    Args:
        capability: the card's, such as (9, 0); None: the CPU.
        asked: a name of `BACKENDS`, or diffusers' name of it; "auto" leaves the choice here.
        dtype: of the computation; only torch's own take float32.
        shares_tokens: several cards share the tokens of a pass, which not all backends can.
        is_importable: tells if a Python module is there.

    Returns:
        A short name.

    Raises:
        ValueError: what is asked for does not run there, or is not installed.
    """
    word = word_of(asked)
    here = available(capability, shares_tokens=shares_tokens, is_importable=is_importable)
    if word != "auto":
        if word not in here:
            raise ValueError(_refusal(word, capability, shares_tokens, here))
        return word
    if capability is None or dtype == "float32":
        return "native"
    if "flash3" in here:
        return "flash3"
    return "cudnn" if capability >= _HOPPER and "cudnn" in here else "native"


def _refusal(word: str, capability: Capability, shares_tokens: bool, here: tuple[str, ...]) -> str:
    backend = BACKENDS[word]
    if capability is None and not backend.runs_on(None):
        reason = "needs a CUDA card, and there is none"
    elif capability is not None and not backend.runs_on(capability):
        span = f"{backend.oldest[0]}.{backend.oldest[1]}" if backend.oldest else ""
        span += f" up to, not including, {backend.newest[0]}.{backend.newest[1]}" if backend.newest else " or newer"
        reason = f"needs a card of compute capability {span}, and this one has {capability[0]}.{capability[1]}"
    elif shares_tokens and not backend.shares_tokens:
        reason = "cannot share the tokens of a pass among cards"
    else:
        reason = f"is not installed ({backend.install})"
    return f"attention={word} {reason}; available here: auto, {', '.join(here)}"


def describe(word: str) -> str:
    """Say in a line, for people, what computes attention."""
    names = {"native": "torch's own choice", "cudnn": "cuDNN", "flash3": "FlashAttention 3"}
    return f"attention: {names.get(word, word)}"


# ---- set it --------------------------------------------------------------------------------------------------------


def apply(pipe: Any, name: str) -> None:
    """Let a pipeline's transformers, or one transformer, compute attention by a backend.

    Other models of the process keep theirs.

    Args:
        name: short, or as diffusers calls it.

    Raises:
        ValueError: it is unknown, or cannot share tokens among cards as this model does.
        RuntimeError: it is not installed.
    """
    from diffusers.models import attention_dispatch as dispatch

    backend = BACKENDS[word_of(name)]
    if backend.name == "_flash_3":
        _find_flash_3(dispatch)
    for model in transformers_of(pipe):
        _keeping_others(dispatch, partial(model.set_attention_backend, backend.name))


def remove(pipe: Any) -> None:
    """Undo `apply`: attention is computed as diffusers does by default."""
    from diffusers.models import attention_dispatch as dispatch

    for model in transformers_of(pipe):
        if current(model) is not None:
            _keeping_others(dispatch, model.reset_attention_backend)


def current(model: Any) -> str | None:
    """Return diffusers' name of the backend that was set on a transformer; None: its default."""
    for module in model.modules():
        backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
        if backend is not None:
            return str(getattr(backend, "value", backend))
    return None


def is_chosen_by_environment() -> bool:
    """Tell if diffusers' variable DIFFUSERS_ATTN_BACKEND names a backend, which "auto" then leaves alone."""
    return bool(os.environ.get("DIFFUSERS_ATTN_BACKEND"))


def _keeping_others(dispatch: Any, change: Callable[[], None]) -> None:
    """Change one model: diffusers would make its backend that of every other model, too, and warn of an experiment."""
    from diffusers.models import modeling_utils

    registry = dispatch._AttentionBackendRegistry
    before, level = registry.get_active_backend()[0], modeling_utils.logger.level
    modeling_utils.logger.setLevel(logging.ERROR)
    try:
        change()
    finally:
        modeling_utils.logger.setLevel(level)
        registry.set_active_backend(before)


def _find_flash_3(dispatch: Any) -> None:
    """Give diffusers FlashAttention 3 of any package that brings it, fa3-fwd with the same arguments.

    diffusers looks for the package flash_attn_3 only, once, when it is imported.
    """
    for module in () if dispatch._CAN_USE_FLASH_ATTN_3 else BACKENDS["flash3"].modules:
        if is_importable(module):
            dispatch.flash_attn_3_func = importlib.import_module(module).flash_attn_func
            dispatch._CAN_USE_FLASH_ATTN_3 = True
            return
