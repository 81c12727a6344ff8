"""Describe a machine, what its user asks for, and a plan: how a model runs there.

Plain values, which this module defines without torch: `pusa.acceleration.plan` makes a plan, `pusa.acceleration.apply`
carries it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pusa.acceleration import attention as attention_backends

Wish = Literal["fastest", "balanced", "smallest"]
Quantize = Literal["auto", "none", "fp8", "int8"]
Link = Literal["none", "pcie", "nvlink"]
Offload = Literal["none", "model", "blocks", "leaves", "disk"]
Storage = Literal["float32", "bfloat16", "float16", "fp8", "int8", "gguf"]
Compile = Literal["auto", "always", "never"]

WISHES: tuple[Wish, ...] = ("fastest", "balanced", "smallest")
QUANTIZE: tuple[Quantize, ...] = ("auto", "none", "fp8", "int8")
COMPILE: tuple[Compile, ...] = ("auto", "always", "never")


@dataclass(frozen=True)
class LoadOptions:
    """Hold what a user asks for when a model is loaded, beside the model and its LoRAs.

    Attributes:
        memory: "balanced": exact weights unless they cannot run here; "fastest": quantised where that is faster;
            "smallest": the least GPU memory.
        quantize: how the transformers' weights are stored; "auto" leaves it to the plan.
        gpus: how many cards to use; None: the plan's choice, of those that are there.
        transformer, transformer_2, text_encoder, vae: single files that replace the model's parts.
        file_storage: component -> how its single file stores the weights; without an entry, by the file's header, or
            by its name where it is not here.
        file_bytes: component -> memory that its single file takes if its weights are kept as they are stored; without
            an entry, by the file's header, or a guess.
        attention: a name of `pusa.acceleration.attention.BACKENDS`, or diffusers' name of it; "auto" leaves it to the
            plan.
        compile: "never"; "always"; "auto": on cards, where this machine has what it takes.

    Raises:
        ValueError: an unknown word, or fewer than one card.
    """

    memory: Wish = "balanced"
    quantize: Quantize = "auto"
    gpus: int | None = None
    transformer: Path | None = None
    transformer_2: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    file_storage: Mapping[str, Storage] = field(default_factory=dict, hash=False, compare=False)
    file_bytes: Mapping[str, int] = field(default_factory=dict, hash=False, compare=False)
    attention: str = "auto"
    compile: Compile = "never"

    def __post_init__(self) -> None:
        for name, words in (("memory", WISHES), ("quantize", QUANTIZE), ("compile", COMPILE)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(words)}")
        attention_backends.word_of(self.attention)
        if self.gpus is not None and self.gpus < 1:
            raise ValueError(f"gpus={self.gpus} is below 1: leave it out for the plan's choice")

    @property
    def files(self) -> dict[str, Path]:
        """Return single files by the component that they replace."""
        parts = ("transformer", "transformer_2", "text_encoder", "vae")
        return {part: path for part in parts if (path := getattr(self, part)) is not None}


@dataclass(frozen=True)
class Card:
    """Describe one GPU.

    Attributes:
        memory_bytes: memory that is free for this process.
        capability: CUDA compute capability, such as (9, 0); None: no CUDA device.
    """

    memory_bytes: int
    name: str = "GPU"
    capability: tuple[int, int] | None = (8, 0)


@dataclass(frozen=True)
class Machine:
    """Describe a machine: its cards, and what is free of its memory and disk.

    Attributes:
        link: how cards exchange data.
        offload_bytes_per_second: from RAM to a card.
        cpu_has_bf16: the CPU computes in bf16 itself.
    """

    cards: tuple[Card, ...] = ()
    ram_bytes: int = 0
    disk_bytes: int = 0
    link: Link = "none"
    offload_bytes_per_second: float = 20e9
    cpu_has_bf16: bool = False


@dataclass(frozen=True)
class PartPlan:
    """Say how one part of a pipeline ("transformer", "transformer_2", "text_encoder", "vae") runs.

    Attributes:
        dtype: of the computation: "bfloat16" or "float32".
        storage: of the weights.
        device: where it computes: "cuda" or "cpu".
        card: which of the cards of a rank's machine, for models whose experts have one each.
        offload: "none": its weights stay on `device`; "model": they are there while it computes; "blocks": block by
            block, the next one copied while one computes; "leaves": layer by layer; "disk": as "blocks", from disk.
        when: "stay": loaded once and kept; "prompt": loaded for a new prompt and freed after it.
        tiles: decode in spatial tiles (the VAE's only).
        reason: one line for people.
        kept: its weights stay as its single file stores them, in fewer bits.
    """

    dtype: Literal["bfloat16", "float32"]
    storage: Storage
    device: Literal["cuda", "cpu"]
    offload: Offload = "none"
    when: Literal["stay", "prompt"] = "stay"
    card: int = 0
    tiles: bool = False
    reason: str = ""
    kept: bool = False


@dataclass(frozen=True)
class Parallel:
    """Say how many ranks share the work, one card each: their number is guidance * ulysses * ring.

    Attributes:
        guidance: 2: the two passes of classifier-free guidance run on two groups of ranks.
        ulysses, ring: degrees of sequence parallelism.
        shard: the transformer's weights are divided among the ranks (FSDP).
    """

    guidance: int = 1
    ulysses: int = 1
    ring: int = 1
    shard: bool = False
    reason: str = ""

    @property
    def ranks(self) -> int:
        return self.guidance * self.ulysses * self.ring

    @classmethod
    def divide(cls, ranks: int, *, guided: bool) -> "Parallel":
        """Divide ranks into the two passes of guidance where a step has two, and then the tokens of a pass."""
        guidance = 2 if guided and ranks % 2 == 0 else 1
        return cls(guidance=guidance, ulysses=ranks // guidance)


@dataclass(frozen=True)
class Plan:
    """Say how a model makes a clip on a machine.

    Attributes:
        model: its name.
        wish: what was asked for.
        parts: part -> how it runs.
        merge: the LoRAs are merged into the weights; False: they stay adapters, whose alpha changes at once.
        parallel: ranks.
        gpu_peak_bytes: the most that a card holds at once, by stage: "encode", "denoise", "decode"; and "load" where
            LoRAs are merged on the card.
        ram_peak_bytes: the most that the machine's RAM holds at once, while the model is loaded or afterwards.
        relative_speed: denoising steps per second, relative to all weights resident in bf16, merged, on one such card.
        problem: why nothing fits, what is needed and a way out; "" if the plan works.
        notes: further lines for people.
        in_8_bits: where the wish is "fastest", quantised layers multiply in 8 bits on cards that can. False: RAM has
            no room for the full weights that such layers are made of.
        computes_all: every latent frame is computed at every step: memory has no room for the keys and values of those
            that do not change (see `pusa.models.frame_skipping`).
        attention: what computes the transformers' attention, of `pusa.acceleration.attention.BACKENDS`; "": what
            diffusers takes by default.
        compile: the transformers' blocks are compiled.
        compile_decoder: the VAE's decoder is, too; it then holds what its convolutions keep of earlier frames twice.
        problem_values: the problem as values of the code ``does_not_fit`` (`pusa.codes`): what it `lacks` ("gpu",
            "ram", "disk" or "cards"), how much it `needs` and `has` of that (GB), and the `way` out ("gpus",
            "quantize", "smaller" or "memory"), with the `size` and `frames` that are smaller.
    """

    model: str
    wish: Wish
    parts: Mapping[str, PartPlan]
    merge: bool = False
    parallel: Parallel = field(default_factory=Parallel)
    gpu_peak_bytes: Mapping[str, int] = field(default_factory=dict)
    ram_peak_bytes: int = 0
    relative_speed: float = 1.0
    problem: str = ""
    notes: tuple[str, ...] = ()
    in_8_bits: bool = True
    computes_all: bool = False
    attention: str = ""
    compile: bool = False
    compile_decoder: bool = False
    problem_values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_fast(self) -> bool:
        """Tell if quantised layers multiply in 8 bits on cards that can."""
        return self.wish == "fastest" and self.in_8_bits

    @property
    def peak_bytes(self) -> int:
        """Return the most that a card holds in any stage."""
        return max(self.gpu_peak_bytes.values(), default=0)

    @property
    def summary(self) -> str:
        """Say in one line what runs where, for logs, the API and the studio."""
        transformer = self.parts.get("transformer")
        if transformer is None or self.problem:
            return self.problem
        where = "on the CPU" if transformer.device == "cpu" else "on the GPU"
        if self.parallel.ranks > 1:
            where = f"on {self.parallel.ranks} GPUs"
        offload = {
            "none": "",
            "model": ", one part at a time",
            "blocks": ", its blocks streamed from RAM",
            "leaves": ", its layers streamed from RAM",
            "disk": ", its blocks streamed from disk",
        }[transformer.offload]
        return f"{self.model}: transformer {where} in {transformer.storage}{offload}" + (
            (", merged" if self.merge else "") + (", compiled" if self.compile else "")
        )
