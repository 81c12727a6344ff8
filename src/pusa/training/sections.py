"""Define the sections of the configuration of a training run: model, data, method, objective and so on."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Strict

from pusa.fields import StrictModel, bound, field
from pusa.models.bases import WAN

Expert = Literal["transformer", "transformer_2"]
T = TypeVar("T")

LORA_TARGETS = WAN.lora_targets
"""Layers of the released adapters: q, k, v and o of self- and cross-attention, both matrices of the feed-forward."""


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _noise_range(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not 0 <= low < high <= 1:
        raise ValueError(f"noise range {bound(low)}..{bound(high)}: give two levels in 0..1, the lower one first")
    return value


Several = Annotated[tuple[T, ...], Strict(False), BeforeValidator(_split_commas)]
NoiseRange = Annotated[tuple[float, float], Strict(False), AfterValidator(_noise_range)]


class ModelConfig(StrictModel):
    """Choose the model to adapt and the numerics of the computation."""

    source: str = field(
        "wan2.1-14b", "The model: a name of the zoo, a Hub id or a folder in diffusers layout.", min_length=1
    )
    experts: dict[Expert, NoiseRange] = field(
        {"transformer": (0.0, 1.0)},
        "Which transformers are trained, one after the other, and the noise levels at which each one works. Wan2.2's "
        "first is for levels from 0.875 up, its second for those below.",
        min_length=1,
    )
    dtype: Literal["bf16", "fp32"] = field(
        "bf16",
        "bf16: frozen weights in bf16 and computation by autocast, trained weights in fp32. fp32: everything. A CPU "
        "without bf16 of its own trains in fp32 and says so.",
    )
    gradient_checkpointing: bool = field(
        True, "Keep only what enters each block and compute the rest again: a third more work, far less memory."
    )
    attention: Literal["auto", "math"] = field(
        "auto", "PyTorch's choice, or the plain formula, which is the fastest on a CPU for a few hundred tokens."
    )
    deterministic: bool = field(
        True,
        "On a GPU, only kernels whose sums do not depend on timing, so that a run that was killed goes on to the same "
        "weights bit for bit; off is faster.",
    )


class DataConfig(StrictModel):
    """Choose the clips to train on."""

    folders: Several[str] = field((), "Datasets that `pusa data prepare` has made.")
    held_out_share: float = field(
        0.02, "The share of clips that are never trained on, for the held-out loss.", ge=0, le=0.5
    )
    lengths: Several[int] = field(
        (),
        "Cut clips to so many latent frames, drawn anew for each batch; empty: whole clips. The VAE is causal: the "
        "first latent frames of a clip are those of a shorter clip.",
    )
    width: int = field(
        832, "Width of the clips, for estimates; the dataset decides in training.", unit="pixels", ge=16, le=8192
    )
    height: int = field(
        480, "Height of the clips, for estimates; the dataset decides in training.", unit="pixels", ge=16, le=8192
    )
    num_frames: int = field(81, "Frames of the clips, for estimates; the dataset decides in training.", ge=1, le=4801)
    workers: int = field(1, "Threads that read clips and draw noise in the background.", ge=1, le=64)
    prefetch: int = field(3, "Batches that are kept ready.", ge=1, le=64)


class MethodConfig(StrictModel):
    """Choose what is trained: a LoRA or all weights."""

    kind: Literal["lora", "full"] = field("lora", "A LoRA beside frozen weights, or all weights.")
    rank: int = field(512, "Rank of the LoRA; Pusa V1.0: 512.", ge=1, le=8192)
    alpha: float = field(512.0, "Alpha of the LoRA while training; B A is scaled by alpha / rank.", gt=0, le=65536)
    targets: Several[str] = field(
        LORA_TARGETS, "The adapted layers, by the end of their names; another base than Wan has its own.", min_length=1
    )


class ObjectiveConfig(StrictModel):
    """Choose the noise level of each latent frame and the weight of its error; see `pusa.training.objective`."""

    times: Literal["independent", "image_to_video", "scalar"] = field(
        "independent",
        "independent: each frame its own time. image_to_video: the first frame clean, the others share one. scalar: "
        "all share one.",
    )
    asynchronous: float = field(
        1.0,
        "PTSS: the probability that a clip's times are independent rather than shared. Pusa V1.0: 1; FVDM, unless set: "
        "0.2.",
        ge=0,
        le=1,
    )
    distribution: Literal["shifted", "uniform"] = field(
        "shifted",
        "Distribution of one time. shifted: a uniform index into the base's 1000-step grid, shifted, as the released "
        "code does. uniform: U(0, 1), as the paper says.",
    )
    shift: float = field(
        5.0, "Flow shift of the grid, that of sampling; of other bases than Wan, unless set: 1.", gt=0, le=100
    )
    clean_frames: float = field(0.0, "The share of frames that stay clean; their error does not count.", ge=0, lt=1)
    weighting: Literal["per_sample", "per_frame", "none"] = field(
        "per_sample",
        "per_sample: a clip's error times the mean of its frames' weights, as the released code does. per_frame: each "
        "frame's error times its own weight. none: the only one of other bases than Wan.",
    )
    caption_dropout: float = field(0.0, "The share of clips trained with an empty caption. Pusa V1.0: 0.", ge=0, le=1)


class OptimizerConfig(StrictModel):
    """Choose the optimizer and its hyperparameters."""

    name: Literal["adamw", "muon"] = field(
        "adamw", "muon: torch's Muon for the matrices of the blocks, AdamW for the rest."
    )
    lr: float = field(1e-5, "Learning rate.", gt=0, le=1)
    muon_lr: float = field(0.02, "Learning rate of the matrices, with muon.", gt=0, le=1)
    beta1: float = field(0.9, "Beta 1 of AdamW.", ge=0, lt=1)
    beta2: float = field(0.999, "Beta 2 of AdamW.", ge=0, lt=1)
    eps: float = field(1e-8, "Epsilon of AdamW.", gt=0, le=1)
    weight_decay: float = field(0.01, "Weight decay (the default of PyTorch, and so of the released code).", ge=0, le=1)
    max_gradient_norm: float | None = field(
        1.0, "Longer gradients are scaled down to it.", unset="no limit", gt=0, le=1e6
    )


class ScheduleConfig(StrictModel):
    """Scale the learning rate: up over `warmup_steps`, then by `shape`, down to `floor` over the cool-down."""

    shape: Literal["constant", "linear", "cosine"] = field("constant", "Between warm-up and cool-down; see `factor`.")
    warmup_steps: int = field(0, "Steps from almost nothing to the full rate.", ge=0, le=1_000_000)
    cooldown_share: float = field(
        0.0, "The last part of a constant run over which the rate falls to the floor.", ge=0, le=1
    )
    floor: float = field(0.0, "What linear, cosine and the cool-down end at, as a share of the rate.", ge=0, le=1)


class CheckpointConfig(StrictModel):
    """Choose when to write checkpoints and which to keep. One is always written at the end."""

    every_steps: int | None = field(100, "Steps between checkpoints.", unset="only by time", ge=1, le=1_000_000)
    every_seconds: float | None = field(None, "Seconds between checkpoints.", unset="only by steps", gt=0, le=1e6)
    keep_last: int = field(2, "How many of the latest are kept.", ge=1, le=1000)
    keep_every: int | None = field(
        None, "Those at multiples of so many steps are kept for good.", unset="none", ge=1, le=1_000_000
    )


class ReportConfig(StrictModel):
    """Choose what a run reports; every number also goes to ``metrics.jsonl`` in its folder."""

    log_every: int = field(1, "Steps between entries.", ge=1, le=100_000)
    held_out_every: int | None = field(
        100, "Steps between held-out losses.", unset="only at the end", ge=1, le=1_000_000
    )
    held_out_draws: int = field(2, "Times and noises per held-out clip, the same at every evaluation.", ge=1, le=1000)
    validate_every: int | None = field(None, "Steps between validation videos.", unset="none", ge=1, le=1_000_000)
    validate_on: str | None = field(
        None,
        "A dataset of prompts and pictures, or clips, that validation videos are made from.",
        unset="clips that are held out",
        min_length=1,
    )
    validate_clips: int = field(2, "How many of its clips, the first ones.", ge=1, le=64)
    tracker: Literal["auto", "tensorboard", "wandb", "none"] = field(
        "auto", "Where curves are drawn; auto: TensorBoard if it is installed."
    )


class ParallelConfig(StrictModel):
    """Choose how processes share the work. By default each holds the model and gradients are averaged."""

    fsdp: bool = field(False, "Shard weights, gradients and optimizer state over processes (FSDP2).")
    context_parallel: int = field(
        1, "Processes that share one clip's tokens (Ulysses), for clips too long for one card.", ge=1, le=64
    )
