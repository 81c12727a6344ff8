"""Count floating-point operations and bytes of a pass through Wan's transformer, layer by layer.

Pure arithmetic: no torch, no GPU, no weights. Tests compare it with what PyTorch counts in real steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pusa.training.config import LORA_TARGETS

_FP32 = 4
_DEFAULTS = {  # of `diffusers.WanTransformer3DModel`
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "num_layers": 40,
    "text_dim": 4096,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": (1, 2, 2),
}


@dataclass(frozen=True)
class Linear:
    """Describe one matrix and how many rows are multiplied with it.

    `reads` names its input: "hidden" always needs a gradient, "frozen" only if all weights are trained (no
    layer before it has a LoRA), "data" never.
    """

    name: str
    rows: int
    fan_in: int
    fan_out: int
    reads: Literal["hidden", "frozen", "data"] = "hidden"

    @property
    def product(self) -> int:
        """Operations of the product with its weights, two per multiply-add."""
        return 2 * self.rows * self.fan_in * self.fan_out


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Describe one pass of one card through the transformer, and how often a step repeats it.

    Attributes:
        model: the transformer's configuration, as diffusers has it.
        grid: latent frames, height and width of a clip.
        text_tokens: length of the prompt embeddings, padding included.
        timesteps: embedded per clip; None: one per latent frame.
        clips: per card and pass.
        passes: per optimizer step (gradient accumulation).
        rank: of the LoRA; None trains all weights.
        targets: the LoRA's layers, by the end of their names.
        bf16: frozen weights and computation in bf16 (autocast), trained weights in fp32; else everything in fp32.
        checkpointing: keep what enters each block and compute the rest again.
        ema: a moving average of the trained weights is kept.
        states: numbers that the optimizer keeps per trained weight: AdamW 2, Muon 1.
        cards, fsdp, context_parallel: number of cards, True to shard weights and states over them, and how many of
            them share one clip's tokens.
        math_attention: attention by PyTorch's plain formula, which keeps the scores; fused kernels compute them again
            in the backward.
        fused_norms: RMS norm keeps its input alone, as on a GPU; the CPU's plain formula keeps more.
    """

    model: Mapping[str, Any]
    grid: tuple[int, int, int]
    text_tokens: int = 512
    timesteps: int | None = None
    clips: int = 1
    passes: int = 1
    rank: int | None = 512
    targets: Sequence[str] = LORA_TARGETS
    bf16: bool = True
    checkpointing: bool = True
    ema: bool = False
    states: int = 2
    cards: int = 1
    fsdp: bool = False
    context_parallel: int = 1
    math_attention: bool = False
    fused_norms: bool = True

    def __getitem__(self, name: str) -> Any:
        return self.model.get(name, _DEFAULTS[name])

    @property
    def width(self) -> int:
        return self["num_attention_heads"] * self["attention_head_dim"]

    @property
    def patch(self) -> int:
        """Latent values of one channel in a token."""
        time, height, width = self["patch_size"]
        return time * height * width

    @property
    def sequence(self) -> int:
        """Tokens of one clip."""
        time, height, width = (size // patch for size, patch in zip(self.grid, self["patch_size"], strict=True))
        return time * height * width

    @property
    def tokens(self) -> int:
        """Tokens of one card and pass."""
        return self.clips * self.sequence // self.context_parallel

    @property
    def text_rows(self) -> int:
        return self.clips * self.text_tokens

    @property
    def frame_rows(self) -> int:
        """Embedded timesteps of one card and pass."""
        return self.clips * (self.timesteps or self.grid[0] // self["patch_size"][0])

    @property
    def itemsize(self) -> int:
        """Bytes of one number in the computation."""
        return 2 if self.bf16 else _FP32

    @property
    def clips_per_step(self) -> int:
        return self.clips * self.passes * self.cards // self.context_parallel

    def rank_of(self, linear: Linear) -> int:
        """Return the LoRA's rank at a layer, 0 for a layer without one."""
        is_target = any(linear.name == t or linear.name.endswith(f".{t}") for t in self.targets)
        return (self.rank or 0) if is_target else 0

    def block(self, *, is_first: bool = False) -> list[Linear]:
        """List the matrices of one block."""
        width, ffn, tokens, text = self.width, self["ffn_dim"], self.tokens, self.text_rows
        return [
            *(
                Linear(f"attn1.to_{name}", tokens, width, width, reads="frozen" if is_first else "hidden")
                for name in "qkv"
            ),
            Linear("attn1.to_out.0", tokens, width, width),
            Linear("attn2.to_q", tokens, width, width),
            *(Linear(f"attn2.to_{name}", text, width, width, "frozen") for name in "kv"),
            Linear("attn2.to_out.0", tokens, width, width),
            Linear("ffn.net.0.proj", tokens, width, ffn),
            Linear("ffn.net.2", tokens, ffn, width),
        ]

    def outside(self) -> list[Linear]:
        """List the matrices before and after the blocks, the patch embedding among them."""
        width, times = self.width, self.frame_rows
        embedder = "condition_embedder"
        return [
            Linear("patch_embedding", self.tokens, self["in_channels"] * self.patch, width, "data"),
            Linear(f"{embedder}.time_embedder.linear_1", times, self["freq_dim"], width, "data"),
            Linear(f"{embedder}.time_embedder.linear_2", times, width, width, "frozen"),
            Linear(f"{embedder}.time_proj", times, width, 6 * width, "frozen"),
            Linear(f"{embedder}.text_embedder.linear_1", self.text_rows, self["text_dim"], width, "data"),
            Linear(f"{embedder}.text_embedder.linear_2", self.text_rows, width, width, "frozen"),
            Linear("proj_out", self.tokens, width, self["out_channels"] * self.patch),
        ]

    # ---- parameters ----

    @property
    def parameters(self) -> int:
        """Parameters of the transformer without a LoRA."""
        width = self.width
        matrices = [*self.outside(), *(linear for _ in range(self["num_layers"]) for linear in self.block())]
        norms = 4 * width + 2 * width  # of q and k in both attentions; before cross-attention
        tables = 2 * width + self["num_layers"] * (norms + 6 * width)
        return tables + sum((linear.fan_in + 1) * linear.fan_out for linear in matrices)

    @property
    def fp32_parameters(self) -> int:
        """Parameters that stay in fp32 when loading in bf16: time embedding, modulation tables, the affine norm."""
        width = self.width
        embedding = (self["freq_dim"] + 1 + width + 1) * width
        return embedding + 2 * width + self["num_layers"] * 8 * width

    @property
    def adapter_parameters(self) -> int:
        matrices = [*self.outside(), *(linear for _ in range(self["num_layers"]) for linear in self.block())]
        return sum(self.rank_of(linear) * (linear.fan_in + linear.fan_out) for linear in matrices)

    @property
    def trained_parameters(self) -> int:
        return self.parameters if self.rank is None else self.adapter_parameters

    @property
    def block_parameters(self) -> int:
        """Parameters of one block without its LoRA."""
        return sum((linear.fan_in + 1) * linear.fan_out for linear in self.block()) + 12 * self.width

    @property
    def block_adapter_parameters(self) -> int:
        return sum(self.rank_of(linear) * (linear.fan_in + linear.fan_out) for linear in self.block())


# ---- operations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Hold the operations of matrix products in one pass of one card; all others add a few per mille."""

    forward: int
    recompute: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.recompute + self.backward


def flops(work: Workload) -> Flops:
    """Count the operations of one pass.

    The backward of a trained matrix is two products, for its input and for its weights; a frozen one needs the first
    alone, and none if no layer before it is trained (the first block's q, k, v and layers that read the prompt).
    """
    blocks_forward = backward = 0
    for number in range(work["num_layers"]):
        for linear in work.block(is_first=number == 0):
            blocks_forward += linear.product + _adapter(work, linear)
            backward += _backward(work, linear)
        products = 2  # of attention: q k^T, and its softmax times v
        attention = products * 2 * work.tokens * work.width * (work.sequence + work.text_tokens)
        blocks_forward += attention
        backward += attention * 2 if work.math_attention else attention * 5 // 2
    around = sum(linear.product + _adapter(work, linear) for linear in work.outside())
    backward += sum(_backward(work, linear) for linear in work.outside())
    return Flops(blocks_forward + around, blocks_forward if work.checkpointing else 0, backward)


def _adapter(work: Workload, linear: Linear) -> int:
    """Count the forward operations of a layer's LoRA."""
    return 2 * linear.rows * work.rank_of(linear) * (linear.fan_in + linear.fan_out)


def _backward(work: Workload, linear: Linear) -> int:
    if work.rank is None:
        return linear.product * (1 if linear.reads == "data" else 2)
    rank = work.rank_of(linear)
    weights = _adapter(work, linear)
    inputs = 2 * linear.rows * rank * linear.fan_out  # to A's output; further only if the input needs a gradient
    if linear.reads == "hidden":
        inputs += linear.product + 2 * linear.rows * rank * linear.fan_in
    return weights + inputs


# ---- memory --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Hold the bytes on one card by purpose.

    `peak` is less than the sum: gradients are made while the activations kept for them are freed. Not counted: the
    driver, memory that the allocator cannot use, and the VAE and text encoder of validation.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    activations: int
    peak: int

    @property
    def resident(self) -> int:
        """Bytes in use through the whole step."""
        return self.weights + self.adapter + self.optimizer + self.ema


def memory(work: Workload) -> Memory:
    """Count the bytes on each card, by purpose and at the peak."""
    trained = work.trained_parameters
    frozen = 0 if work.rank is None else work.parameters
    shards = work.cards if work.fsdp else 1
    frozen_bytes = frozen * work.itemsize + (work.fp32_parameters * (_FP32 - work.itemsize) if frozen else 0)
    trained_bytes = -(-trained * _FP32 // shards)
    # FSDP2 gathers the layers around the blocks, the current block and the next one, and holds a block's gradients
    # until they are sharded.
    block_trained = work.block_parameters if work.rank is None else work.block_adapter_parameters
    block_frozen = 0 if work.rank is None else work.block_parameters * work.itemsize
    gathered = 2 * (block_frozen + block_trained * _FP32) + block_trained * _FP32
    around = sum(linear.fan_in * linear.fan_out for linear in work.outside())
    gathered += around * (_FP32 if work.rank is None else work.itemsize)

    gathered = gathered if shards > 1 else 0

    kept, at_work = kept_for_backward(work), working_bytes(work)
    resident = -(-frozen_bytes // shards) + trained_bytes * (1 + work.states + work.ema)
    if work.passes > 1:
        backward = kept + trained_bytes
    else:  # when its first block begins, or its last one
        layers = work["num_layers"]
        backward = max(kept, (kept + trained_bytes * (layers - 1)) // layers)
    return Memory(
        weights=-(-frozen_bytes // shards) if work.rank is not None else trained_bytes,
        adapter=0 if work.rank is None else trained_bytes,
        gradients=trained_bytes,
        optimizer=trained_bytes * work.states,
        ema=trained_bytes * work.ema,
        gathered=gathered,
        activations=kept + at_work,
        peak=resident + max(gathered + backward + at_work, trained_bytes),
    )


def kept_for_backward(work: Workload) -> int:
    """Count the bytes that a forward keeps for the backward."""
    layers = work["num_layers"]
    if work.checkpointing:  # the input of each block, and once for all blocks: the prompt, the modulation
        enters = layers * work.tokens * work.width * work.itemsize
        return enters + 6 * work.frame_rows * work.width * work.itemsize + saved_outside_blocks(work)
    first = 0 if work.rank is None else work.tokens * work.width * _FP32  # no layer before its first norm is trained
    return layers * saved_by_block(work) - first + saved_outside_blocks(work)


def working_bytes(work: Workload) -> int:
    """Count the bytes that the backward adds: a block's activations if checkpointed, and gradients of activations."""
    row = work.width * (_FP32 + work.itemsize) + work["ffn_dim"] * work.itemsize
    return work.tokens * row + (saved_by_block(work) if work.checkpointing else 0)


def saved_by_block(work: Workload) -> int:
    """Count the bytes that a block keeps for its backward, without parameters."""
    tokens, text, width, size = work.tokens, work.text_rows, work.width, work.itemsize
    trains_all = work.rank is None
    row = 3 * _FP32 + 3 * _FP32  # inputs of the norms: three of the residual stream; q, k and the cross-attention's q
    row += 3 * size  # outputs of the norms of the stream
    row += (4 + 2) * size  # q, k, v and result of self-attention; q and result of cross-attention
    if work.bf16 and work.fused_norms:
        row += 2 * size  # RMS norm gives fp32 under autocast, and attention's results follow it
    text_row = _FP32 + 2 * size  # k before its norm; k and v
    if trains_all:
        row += 3 * _FP32 + size  # scale and gate of the modulation are trained: both factors are kept
        if not work.fused_norms:
            row, text_row = row + 3 * _FP32, text_row + _FP32
    states = tokens * width * row + text * width * text_row + 2 * tokens * work["ffn_dim"] * size
    statistics = tokens * _FP32 * (2 * work["num_attention_heads"] + 3 * 2 + 3)
    modulation = 8 * work.frame_rows * width * _FP32
    halves = sum(linear.rows * work.rank_of(linear) for linear in work.block()) * size
    copies = 0  # of trained weights, as autocast makes them
    if work.bf16:
        copies = size * (work.block_parameters if trains_all else work.block_adapter_parameters)
    scores = 0
    if work.math_attention:
        scores = tokens * work["num_attention_heads"] * (work.sequence + work.text_tokens) * _FP32
    return states + statistics + modulation + halves + copies + scores


def saved_outside_blocks(work: Workload) -> int:
    """Count the bytes kept for the backward outside the blocks."""
    tokens, text, width, size = work.tokens, work.text_rows, work.width, work.itemsize
    shared = text * width * size + 2 * tokens // work.clips * work["attention_head_dim"] * _FP32  # prompt; rotary
    end = tokens * (width + 2) * _FP32 + work.frame_rows * width * _FP32
    clip = tokens * work.context_parallel * work["in_channels"] * work.patch * _FP32
    batch = 3 * clip + text * work["text_dim"] * _FP32  # latents, noise and the error; embeddings
    if work.rank is None:
        end += tokens * width * (_FP32 + size)
        shared += tokens * work["in_channels"] * work.patch * size
        shared += text * (work["text_dim"] + 2 * width) * size
        shared += work.frame_rows * (work["freq_dim"] + 4 * width) * _FP32
        if work.bf16:
            shared += sum(linear.fan_in * linear.fan_out for linear in work.outside()) * size
    return shared + end + batch
