"""Estimate the memory, hours and cost of a training run before it starts.

Operations and bytes are counted (`pusa.training.flops`). Seconds follow from a card's rate and an assumed share of it,
the least certain number here: `GPUS` names the source of each share.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa import zoo
from pusa.models import files
from pusa.training.config import TrainConfig, config_from, set_field
from pusa.training.flops import Flops, Memory, Workload, flops, memory

_GIB = 2**30
_CONTEXT_BYTES = 10**9  # driver, kernels, communication
_UNUSABLE_SHARE = 0.05  # of a card's memory: gaps that the allocator cannot fill

PAPER_STEPS, PAPER_CLIPS, PAPER_DOLLARS = 900, 8, 500
"""Pusa V1.0 (arXiv 2507.16116): 900 steps of 8 clips; about $500 is the authors' figure, without a wall-clock time."""


@dataclass(frozen=True)
class Gpu:
    """Describe a card.

    Attributes:
        memory_bytes: as PyTorch reports it.
        peak: dense bf16 operations per second with fp32 sums, by the data sheet.
        share: part of the peak that training is assumed to reach.
        link_bytes: per second to the other cards of a machine in one direction, by the data sheet.
        basis: source of the share.
    """

    name: str
    title: str
    memory_bytes: int
    peak: float
    share: float
    link_bytes: float
    basis: str

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * (1 - _UNUSABLE_SHARE)) - _CONTEXT_BYTES


def _gpu(name: str, title: str, gib: float, teraflops: float, share: float, link_gb: float, basis: str) -> Gpu:
    return Gpu(name, title, int(gib * _GIB), teraflops * 1e12, share, link_gb * 1e9, basis)


_HOPPER = "Wan's own timings of inference give 0.42 at 480p and 0.51 at 720p on an H100; a fifth less for a backward"
_AMPERE = "Wan's own timings of inference give 0.55 at 480p and 0.61 at 720p on an A800; a fifth less for a backward"
_ADA = "Wan's own timing of inference gives 0.66 for 1.3B on a 4090; a fifth less for a backward"
_GUESS = "a guess: no timing of Wan on this card is known to us"

GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", "NVIDIA B200", 178, 2250, 0.30, 900, _GUESS),
        _gpu("h200", "NVIDIA H200", 139, 989, 0.40, 450, _HOPPER),
        _gpu("h100", "NVIDIA H100 SXM", 79, 989, 0.40, 450, _HOPPER),
        _gpu("a100-80g", "NVIDIA A100 80 GB", 79, 312, 0.47, 300, _AMPERE),
        _gpu("a100-40g", "NVIDIA A100 40 GB", 39, 312, 0.47, 300, _AMPERE),
        _gpu("l40s", "NVIDIA L40S", 44, 362, 0.35, 32, _GUESS),
        _gpu("a6000", "NVIDIA RTX A6000", 47, 155, 0.45, 32, _GUESS),
        _gpu("5090", "NVIDIA GeForce RTX 5090", 31, 209, 0.45, 64, _GUESS),
        _gpu("4090", "NVIDIA GeForce RTX 4090", 23.5, 165, 0.53, 32, _ADA),
        _gpu("3090", "NVIDIA GeForce RTX 3090", 23.5, 71, 0.50, 32, _GUESS),
    )
}


@dataclass(frozen=True)
class BaseModel:
    """Hold a base model's transformer configuration, prompt length and VAE scales."""

    transformer: Mapping[str, Any]
    text_tokens: int = 512
    spatial_scale: int = 8
    temporal_scale: int = 4

    def grid(self, width: int, height: int, num_frames: int) -> tuple[int, int, int]:
        """Return latent frames, height and width of a clip in pixels."""
        frames = (num_frames - 1) // self.temporal_scale + 1
        return frames, height // self.spatial_scale, width // self.spatial_scale


def load_base(source: str) -> BaseModel:
    """Read a zoo model, a folder in diffusers layout, or a Hub id (its small configuration files are downloaded).

    Raises:
        ValueError, FileNotFoundError: there is no such model, or no estimate for its kind.
    """
    kind = zoo.base_of(source)
    if not kind.is_estimated:
        raise ValueError(
            f"{source} is a {kind.name} model, whose training nobody has counted yet: a run says its clips per second "
            "after the first steps"
        )
    if zoo.with_fallback(source) == "tiny":
        from pusa.models.tiny import TRANSFORMER

        return BaseModel(TRANSFORMER, text_tokens=zoo.ZOO["tiny"].defaults.max_sequence_length)
    zoo_model = zoo.find(source)
    folder = zoo_model.folder if zoo_model and zoo_model.folder else Path(source).expanduser()
    text_tokens = zoo.defaults_of(source).max_sequence_length
    if zoo_model and not folder.is_dir():
        defaults = zoo_model.defaults
        return BaseModel(zoo_model.transformer, text_tokens, defaults.size_multiple // 2, defaults.frames_per_latent)
    if folder.is_dir():
        read = {part: files.read_json(folder / part / "config.json") for part in ("transformer", "vae")}
    elif zoo.is_hub_id(source):
        from huggingface_hub import hf_hub_download

        parts = ("transformer", "vae")
        read = {part: files.read_json(Path(hf_hub_download(source, f"{part}/config.json"))) for part in parts}
    else:
        zoo.get(source)  # raises an error that lists the names
    if not read["transformer"]:
        raise FileNotFoundError(f"{source} has no transformer/config.json: give a folder in diffusers layout")
    vae = read["vae"] or {}
    return BaseModel(
        read["transformer"], text_tokens, vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    )


def workloads(config: TrainConfig, base: BaseModel, cards: int) -> list[Workload]:
    """List the passes of a card, one for each length that clips are cut to.

    Raises:
        ValueError: the clips of a step cannot be shared by so many cards.
    """
    shared = config.parallel.context_parallel
    heads = base.transformer.get("num_attention_heads", 40)
    for what, number in (("cards", cards), ("attention heads", heads)):
        if number % shared:
            raise ValueError(f"context_parallel={shared} does not divide the {number} {what}")
    frames, height, width = base.grid(config.data.width, config.data.height, config.data.num_frames)
    passes = config.accumulation(cards // shared)
    is_lora, is_muon = config.method.kind == "lora", config.optimizer.name == "muon"
    return [
        Workload(
            model=base.transformer,
            grid=(length, height, width),
            text_tokens=base.text_tokens,
            clips=config.clips_per_pass(length),
            passes=passes,
            rank=config.method.rank if is_lora else None,
            targets=config.method.targets,
            bf16=config.model.dtype == "bf16",
            checkpointing=config.model.gradient_checkpointing,
            ema=config.ema_decay is not None,
            states=1 if is_muon else 2,
            cards=cards,
            fsdp=config.parallel.fsdp,
            context_parallel=shared,
            math_attention=config.model.attention == "math",
        )
        for length in sorted({min(length, frames) for length in config.data.lengths or (frames,)})
    ]


def memory_of(config: TrainConfig, base: BaseModel, cards: int) -> Memory:
    """Count the bytes on each card with the longest clips. Raises as `workloads` does."""
    return max((memory(work) for work in workloads(config, base, cards)), key=lambda m: m.peak)


@dataclass(frozen=True)
class Estimate:
    """Hold the estimate of a run on `cards` cards; steps, hours and cost are those of all experts together."""

    gpu: Gpu
    cards: int
    works: tuple[Workload, ...]
    steps: float
    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    price: float | None = None

    @property
    def largest(self) -> Workload:
        return max(self.works, key=lambda work: work.tokens)

    @property
    def flops(self) -> Flops:
        """Operations of one pass of one card with the longest clips."""
        return flops(self.largest)

    @property
    def memory(self) -> Memory:
        return max((memory(work) for work in self.works), key=lambda m: m.peak)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.gpu.usable_bytes

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.cards

    @property
    def cost(self) -> float | None:
        """Cost in the currency of `price`, which is for one card and hour."""
        return None if self.price is None else self.gpu_hours * self.price


def estimate(config: TrainConfig, base: BaseModel, gpu: Gpu, *, cards: int = 1, price: float | None = None) -> Estimate:
    """Estimate a run. Communication and computing are assumed to overlap fully.

    Raises:
        ValueError: the clips of a step cannot be shared by so many cards.
    """
    works = workloads(config, base, cards)
    compute = sum(work.passes * flops(work).total for work in works) / len(works) / (gpu.peak * gpu.share)
    communication = sum(_moved_bytes(work) for work in works) / len(works) / gpu.link_bytes
    seconds = max(compute, communication)
    steps = config.steps if config.steps is not None else (config.seconds or 0.0) / seconds
    return Estimate(
        gpu=gpu,
        cards=cards,
        works=tuple(works),
        steps=len(config.model.experts) * steps,
        step_seconds=seconds,
        compute_seconds=compute,
        communication_seconds=communication,
        price=price,
    )


def _moved_bytes(work: Workload) -> float:
    """Count the bytes that a card sends in one step: FSDP gathers weights twice and reduces gradients."""
    if work.cards == 1:
        return 0.0
    share = (work.cards - 1) / work.cards
    trained = 4 * work.trained_parameters
    if not work.fsdp:
        return 2 * trained * share
    frozen = 0 if work.rank is None else work.parameters * work.itemsize
    return work.passes * (2 * (frozen + trained) + trained) * share


def paper_run(gpu: Gpu, *, cards: int, price: float | None = None) -> Estimate:
    """Estimate Pusa V1.0's run on these cards: 14B, rank 512, 81 frames of 1280x720, 900 steps of 8 clips, FSDP."""
    model = zoo.ZOO["wan2.1-14b"].transformer
    base = BaseModel(model)
    work = Workload(model=model, grid=base.grid(1280, 720, 81), cards=cards, fsdp=cards > 1)
    passes = PAPER_CLIPS / cards  # a comparison: cards need not divide the clips
    compute = passes * flops(work).total / (gpu.peak * gpu.share)
    communication = _moved_bytes(work) / gpu.link_bytes
    seconds = max(compute, communication)
    return Estimate(gpu, cards, (work,), PAPER_STEPS, seconds, compute, communication, price)


# ---- remedies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remedy:
    """Hold fields of the configuration to set, how many cards to use, and the peak memory with them."""

    overrides: Mapping[str, Any]
    cards: int
    peak: int


def remedies(config: TrainConfig, base: BaseModel, gpu: Gpu, *, cards: int) -> list[Remedy]:
    """Find for each option the smallest change that alone makes a run fit its cards; if none does, a set that does.

    Options that only cost time or cards come before those that change what is learned. Empty if nothing helps.
    """
    alone: list[Remedy] = []
    joined = Remedy({}, cards, memory_of(config, base, cards).peak)
    for option in _options(config, base, cards):
        for overrides, count in option:
            changed = _remedy(config, base, overrides, count)
            if changed and changed.peak <= gpu.usable_bytes:
                alone.append(changed)
                break
        for overrides, count in option:
            if joined.peak <= gpu.usable_bytes:
                break
            joined = _remedy(config, base, {**joined.overrides, **overrides}, max(count, joined.cards)) or joined
    return alone or ([joined] if joined.peak <= gpu.usable_bytes else [])


def _options(config: TrainConfig, base: BaseModel, cards: int) -> Iterator[list[tuple[dict[str, Any], int]]]:
    """Yield for each option the values to try, the mildest first."""
    data, parallel, rank = config.data, config.parallel, config.method.rank
    if not config.model.gradient_checkpointing:
        yield [({"model.gradient_checkpointing": True}, cards)]
    if config.model.dtype == "fp32":
        yield [({"model.dtype": "bf16"}, cards)]
    if (config.batch_size or 1) > 1:
        clips = config.global_batch or (config.batch_size or 1) * cards // parallel.context_parallel
        yield [({"batch_size": 1, "global_batch": clips}, cards)]
    if cards > 1 and not parallel.fsdp:
        yield [({"parallel.fsdp": True}, cards)]
    yield [({"parallel.fsdp": True}, count) for count in (2, 4, 8, 16, 32, 64) if count > cards]
    degrees = [degree for degree in (2, 4, 8) if degree > parallel.context_parallel]
    yield [({"parallel.context_parallel": degree}, max(cards, degree)) for degree in degrees]
    if config.method.kind == "lora":
        yield [
            ({"method.rank": rank // by, "method.alpha": config.method.alpha / by}, cards)
            for by in (2, 4, 8, 16, 32)
            if rank // by >= 8
        ]
    longest = max(data.lengths, default=base.grid(16, 16, data.num_frames)[0])
    yield [({"data.lengths": [length]}, cards) for length in (17, 13, 9, 5) if length < longest]
    sizes = [tuple(round(side * part / 16) * 16 for side in (data.width, data.height)) for part in (0.75, 0.5)]
    yield [({"data.width": width, "data.height": height}, cards) for width, height in sizes if min(width, height) >= 64]


def _remedy(config: TrainConfig, base: BaseModel, overrides: Mapping[str, Any], cards: int) -> Remedy | None:
    values = config.model_dump()
    for name, value in overrides.items():
        set_field(values, name, value)
    try:
        return Remedy(overrides, cards, memory_of(config_from(values), base, cards).peak)
    except ValueError:  # this number of cards cannot share the clips of a step
        return None
