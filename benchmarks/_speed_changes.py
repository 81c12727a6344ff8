"""List the changes that make a pipeline faster, each with how it is applied and undone."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pusa.acceleration import attention, compilation, step_cache
from pusa.acceleration.quantization import Storage, multiplies_in_8_bits, quantize
from pusa.defaults import FastSettings
from pusa.lora.adapters import adapter_names
from pusa.models.frame_skipping import REFRESH_EVERY
from pusa.pipeline import PusaPipeline

GUIDED_PART = 0.5  # of the steps, in the line of a guidance range


@dataclass
class Subject:
    """Hold a pipeline that changes are applied to.

    Attributes:
        call: arguments of its calls, which a change may add to.
        guidance: of the full computation; 1 has no second pass to leave out.
        fast: what a fast run of this model sets; None: it has no fast mode.
        compiler: backend of `torch.compile`.
    """

    pipe: PusaPipeline
    device: torch.device
    guidance: float
    fast: FastSettings | None = None
    call: dict[str, Any] = field(default_factory=dict)
    compiler: str = "inductor"

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.transformer.dtype


Apply = Callable[[Subject], AbstractContextManager[None]]


@dataclass(frozen=True)
class Change:
    """Describe one change.

    Attributes:
        apply: a context in which a subject has it.
        obstacle: says why it does not apply to a subject; "" where it does.
        keeps: it computes the same, but for rounding and for what kept frames see: "all together" has it.
    """

    name: str
    apply: Apply
    obstacle: Callable[[Subject], str] = lambda subject: ""
    keeps: bool = True


@contextmanager
def merged(subject: Subject) -> Iterator[None]:
    subject.pipe.merge_lora()
    try:
        yield
    finally:
        subject.pipe.unmerge_lora()


@contextmanager
def other_attention(subject: Subject) -> Iterator[None]:
    attention.apply(subject.pipe, _attention(subject))
    try:
        yield
    finally:
        attention.remove(subject.pipe)


def _attention(subject: Subject) -> str:
    capability = torch.cuda.get_device_capability(subject.device) if subject.device.type == "cuda" else None
    return attention.choose(capability, dtype=str(subject.dtype).removeprefix("torch."))


def _attention_obstacle(subject: Subject) -> str:
    return "torch's own is the best here" if _attention(subject) == "native" else ""


@contextmanager
def compiled(subject: Subject, compile_part: Callable[..., object], part: Any) -> Iterator[None]:
    compile_part(part, backend=subject.compiler)
    try:
        yield
    finally:
        compilation.remove(subject.pipe)


def _compile_obstacle(subject: Subject) -> str:
    return compilation.missing_tool(subject.device.type)


def _decoder_obstacle(subject: Subject) -> str:
    is_card = subject.device.type == "cuda"
    return "left out, as compiling it took 51 s on a CPU" if is_card else _compile_obstacle(subject)


@contextmanager
def with_arguments(subject: Subject, **arguments: Any) -> Iterator[None]:
    before, subject.call = subject.call, subject.call | arguments
    try:
        yield
    finally:
        subject.call = before


def fast(subject: Subject) -> AbstractContextManager[None]:
    assert subject.fast is not None  # the obstacle says so
    return with_arguments(subject, num_inference_steps=subject.fast.steps, guidance_scale=subject.fast.guidance)


@contextmanager
def cached_steps(subject: Subject) -> Iterator[None]:
    step_cache.enable(subject.pipe)
    try:
        yield
    finally:
        step_cache.disable(subject.pipe)


@contextmanager
def half_vae(subject: Subject) -> Iterator[None]:
    full = subject.pipe.vae
    subject.pipe.vae = copy.deepcopy(full).to(torch.bfloat16, memory_format=torch.channels_last_3d)
    try:
        yield
    finally:
        subject.pipe.vae = full


def _half_vae_obstacle(subject: Subject) -> str:
    return "" if subject.device.type == "cuda" else "for cards: a CPU without bf16 units is far slower in it"


@contextmanager
def stored_as(subject: Subject, storage: Storage) -> Iterator[None]:
    """Swap in a copy of the merged transformer with weights in 8 bits, which multiplies in them where the card can."""
    full = subject.pipe.transformer
    with merged(subject) if adapter_names(full) else ExitStack():
        small = copy.deepcopy(full)
    is_fast = multiplies_in_8_bits(storage, subject.device, has_adapters=False)
    quantize(small, storage, dtype=subject.dtype, is_fast=is_fast)
    subject.pipe.transformer = small
    try:
        yield
    finally:
        subject.pipe.transformer = full


def _fp8_obstacle(subject: Subject) -> str:
    is_fast = multiplies_in_8_bits("fp8", subject.device, has_adapters=False)
    return "" if is_fast else "this device does not multiply in fp8"


CHANGES = (
    Change("merged adapter", merged, lambda s: "" if adapter_names(s.pipe.transformer) else "there is no adapter"),
    Change("attention backend", other_attention, _attention_obstacle),
    Change("compiled blocks", lambda s: compiled(s, compilation.compile_blocks, s.pipe), _compile_obstacle),
    Change("frames not computed", lambda s: with_arguments(s, refresh_every=REFRESH_EVERY)),
    Change("bf16 VAE", half_vae, _half_vae_obstacle),
    Change("compiled decoder", lambda s: compiled(s, compilation.compile_decoder, s.pipe.vae), _decoder_obstacle),
    Change("int8 weights", lambda s: stored_as(s, "int8"), keeps=False),
    Change("fp8 weights", lambda s: stored_as(s, "fp8"), _fp8_obstacle, keeps=False),
    Change(
        "guidance in half the steps",
        lambda s: with_arguments(s, guidance_stop=GUIDED_PART),
        lambda s: "" if s.guidance > 1 else "guidance is off",
        keeps=False,
    ),
    Change("step cache", cached_steps, keeps=False),
    Change("fast", fast, lambda s: "" if s.fast else "this model has no fast mode", keeps=False),
)


@contextmanager
def applied(subject: Subject, changes: tuple[Change, ...]) -> Iterator[None]:
    """Apply changes in the order of `CHANGES`, and undo them in the other one."""
    with ExitStack() as stack:
        for change in CHANGES:
            if change in changes:
                stack.enter_context(change.apply(subject))
        yield
