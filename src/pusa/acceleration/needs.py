"""Compute how many bytes and operations each part of a model needs, from its shapes alone.

The formulas follow the moment at which a computation holds the most: `tests/acceleration/test_traces.py` compares them
with traces of the real modules. They count tensors; what kernels and the allocator take beside them is a reserve of
`pusa.acceleration.planning`. Nothing here imports torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pusa.acceleration.decisions import Storage
from pusa.defaults import ClipSize, clip_size

if TYPE_CHECKING:
    from pusa.zoo import ZooModel

Ranks = Mapping[str, int] | Sequence[int] | None

TEXT_TOKENS = 512
PUBLISHED_LORA_RANK = 512  # of Pusa V1.0
OWN_LORA_RANK = 32  # of the recipe in `pusa.training`
_EMBEDDING_PARAMETERS = 256_384 * 4096  # UMT5-XXL's vocabulary: its largest layer
_TEXT_BLOCKS = 24
_TEXT_ACTIVATION_BYTES = 400_000_000  # scores of 64 heads over 512 tokens in fp32, a few times
_LATENT_BYTES = 100_000_000  # latents, embeddings and the output of the other pass of guidance
_TILE, _TILE_STRIDE = 256, 192  # pixels, those of diffusers' VAE
_GGUF_BYTES = 8.5 / 8  # Q8_0


@dataclass(frozen=True)
class TransformerShape:
    """A Wan transformer.

    Attributes:
        parameters: how many it has; 0: count them from the other values.
    """

    width: int
    heads: int
    ffn: int
    layers: int
    channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    parameters: int = 0

    @property
    def block_parameters(self) -> int:
        """Two attentions of four square layers and the feed-forward's two, which LoRAs adapt and plans quantise."""
        return 8 * self.width**2 + 2 * self.width * self.ffn

    @property
    def largest_layer(self) -> int:
        """Weights of the largest linear layer of a block."""
        return self.width * max(self.width, self.ffn)

    @cached_property
    def total_parameters(self) -> int:
        others = self.width * (6 * self.width + 2 * self.width + self.text_dim + self.freq_dim + 8 * self.channels)
        return self.parameters or self.layers * self.block_parameters + others

    @cached_property
    def other_parameters(self) -> int:
        return max(self.total_parameters - self.layers * self.block_parameters, 0)

    @property
    def _kept_in_fp32(self) -> int:
        return self.width * (self.width + self.freq_dim) + self.layers * 8 * self.width

    def block_bytes(self, storage: Storage, file_bytes: int = 0) -> int:
        """Compute the bytes of one block; `file_bytes` as for `weight_bytes`."""
        if file_bytes:
            return round(file_bytes * self.block_parameters / self.total_parameters)
        return round(self.block_parameters * _BYTES_PER_WEIGHT[storage])

    def other_bytes(self, storage: Storage) -> int:
        """Compute the bytes of what is outside the blocks' matrices; quantised plans keep it in bf16."""
        if storage == "float32":
            return 4 * self.other_parameters
        return 2 * self.other_parameters + 2 * min(self._kept_in_fp32, self.other_parameters)

    def weight_bytes(self, storage: Storage, file_bytes: int = 0) -> int:
        """Compute the bytes of all weights: `file_bytes`, where they are kept as a file stores them."""
        if file_bytes:
            return file_bytes
        return self.layers * self.block_bytes(storage) + self.other_bytes(storage)

    def lora_bytes(self, rank: int) -> int:
        """Compute the bytes of an adapter in bf16 on all linear layers of all blocks."""
        return 2 * rank * self.layers * (8 * 2 * self.width + 2 * (self.width + self.ffn))

    def tokens(self, size: ClipSize, patch: int = 2) -> int:
        """Count the tokens of a clip."""
        _, frames, height, width = size.shape
        return frames * (height // patch) * (width // patch)

    def activation_bytes(
        self, tokens: int, *, dtype: str = "bfloat16", adapters: bool = False, quantised: bool = False
    ) -> int:
        """Compute the most that one forward pass of one sample holds beside the weights.

        The most is held either where a block's input is normalised and modulated in fp32, or inside its feed-forward.

        Args:
            tokens: of this rank.
            adapters: LoRAs are attached, not merged: their output exists beside the layer's.
            quantised: layers quantise their input, which exists twice then.
        """
        itemsize = 4 if dtype == "float32" else 2
        inner = 2 + (adapters or quantised)  # tensors as wide as the feed-forward at once
        per_channel = max(22.0, itemsize * (3 + inner * self.ffn / self.width))
        rotary = 2 * 4 * self.width // self.heads  # cosine and sine of a token
        return round(tokens * (self.width * per_channel + rotary))

    def flops(self, tokens: int) -> tuple[float, float]:
        """Count the operations of one forward pass: those of linear layers, and those of attention."""
        text = 2 * 2 * TEXT_TOKENS * self.layers * 2 * self.width**2  # keys and values of the prompt
        attention1 = 2 * tokens * (4 * self.width**2 + 2 * self.width * self.ffn)
        linear = self.layers * (attention1 + 2 * tokens * 2 * self.width**2) + text
        attention = self.layers * 4 * tokens * self.width * (tokens + TEXT_TOKENS)
        return float(linear), float(attention)


_BYTES_PER_WEIGHT: Mapping[str, float] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "fp8": 1,
    "int8": 1,
    "gguf": _GGUF_BYTES,
}


@dataclass(frozen=True)
class VaeShape:
    """Wan's causal VAE; the defaults are Wan2.1's.

    Attributes:
        base, decoder_base: channels at full resolution of encoder and decoder (`decoder_base` 0: the same).
        residual: blocks with shortcuts over up- and downsampling, as in Wan2.2's.
        patch: pixels of a side that become channels before the encoder.
        spatial, temporal: pixels and frames to a latent one.
    """

    base: int = 96
    decoder_base: int = 0
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    channels: int = 16
    residual: bool = False
    patch: int = 1
    spatial: int = 8
    temporal: int = 4
    parameters: int = 126_892_531

    @classmethod
    def from_config(cls, config: Mapping[str, Any], parameters: int = 0) -> "VaeShape":
        """Read the values of a configuration of `diffusers.AutoencoderKLWan`."""
        return cls(
            base=config.get("base_dim", 96),
            decoder_base=config.get("decoder_base_dim") or 0,
            multipliers=tuple(config.get("dim_mult", (1, 2, 4, 4))),
            res_blocks=config.get("num_res_blocks", 2),
            channels=config.get("z_dim", 16),
            residual=bool(config.get("is_residual")),
            patch=config.get("patch_size") or 1,
            spatial=config.get("scale_factor_spatial", 8),
            temporal=config.get("scale_factor_temporal", 4),
            parameters=parameters or cls.parameters,
        )

    def weight_bytes(self, dtype: str) -> int:
        return self.parameters * _itemsize(dtype)

    @cached_property
    def _decoder_cache(self) -> float:
        """Channels that the causal convolutions keep of two frames, per pixel of the decoder's largest resolution."""
        base = self.decoder_base or self.base
        widths = [base * m for m in (self.multipliers[-1], *reversed(self.multipliers))]
        levels = len(widths) - 1
        kept = 4 * widths[0] / 4 ** (levels - 1)  # the middle
        for level, width in enumerate(widths[1:]):
            first = widths[level] // (2 if level and not self.residual else 1)
            kept += (first + (2 * self.res_blocks + 1) * width) / 4 ** (levels - 1 - level)
        return 2 * (kept + widths[-1])  # and the last convolution

    @cached_property
    def _encoder_cache(self) -> float:
        widths = [self.base * m for m in (1, *self.multipliers)]
        kept = 4 * widths[-1] / 4 ** (len(self.multipliers) - 1)
        for level, width in enumerate(widths[1:]):
            kept += (widths[level] + (2 * self.res_blocks - 1) * width) / 4**level
        return 2 * (kept + 3 * self.patch**2)

    def cache_bytes(self, height: int, width: int, dtype: str = "bfloat16") -> int:
        """Compute the bytes that an open stream of decoded frames keeps between latent frames."""
        return round(self._decoder_cache * height * width / self.patch**2 * _itemsize(dtype))

    def decode_bytes(self, height: int, width: int, dtype: str = "bfloat16") -> int:
        """Compute the most that decoding latent frame by latent frame holds beside the weights, whatever the length.

        The most is held where the four frames of the second latent frame on reach the full resolution.
        """
        base = self.decoder_base or self.base
        reached = base * (self.multipliers[1] if self.residual else 1)
        copies = 6.5 if dtype == "float32" else 7.0  # bf16 is upsampled in fp32
        at_work = copies * self.temporal * reached * height * width / self.patch**2
        return self.cache_bytes(height, width, dtype) + round(at_work * _itemsize(dtype))

    def tiled_decode_bytes(self, height: int, width: int, frames: int, dtype: str = "bfloat16") -> int:
        """Compute the most that decoding in diffusers' tiles holds: all decoded tiles, and one at work or the result.

        Args:
            frames: of the video.
        """
        tile = self.decode_bytes(min(height, _TILE), min(width, _TILE), dtype)
        frame = 3 * _itemsize(dtype) * frames
        tiles = frame * math.prod(
            sum(min(_TILE, side - start) for start in range(0, side, _TILE_STRIDE)) for side in (height, width)
        )
        return tiles + max(tile, 3 * frame * height * width)

    def encode_bytes(self, height: int, width: int, frames: int, dtype: str = "bfloat16") -> int:
        """Compute the most that encoding a clip of some frames holds beside the weights, with the clip itself."""
        clip = 3 * frames * height * width * (2 if self.patch > 1 else 1)
        if frames == 1:
            at_work = (12.0 if self.residual else 10.0) * self.base
        else:
            copies = (8.2 if self.residual else 6.2) - (0.5 if dtype == "float32" else 0)
            at_work = self._encoder_cache + copies * self.temporal * self.base
        return round((clip + at_work * height * width / self.patch**2) * _itemsize(dtype))

    def tiled_encode_bytes(self, height: int, width: int, frames: int, dtype: str = "bfloat16") -> int:
        """Compute the most that encoding a clip tile by tile holds: a tile at work beside the clip."""
        clip = 3 * frames * height * width * (2 if self.patch > 1 else 1) * _itemsize(dtype)
        return clip + self.encode_bytes(min(height, _TILE), min(width, _TILE), frames, dtype)


WAN22_VAE = VaeShape(
    base=160, decoder_base=256, channels=48, residual=True, patch=2, spatial=16, parameters=704_688_668
)


@dataclass(frozen=True)
class TextShape:
    """A text encoder."""

    parameters: int

    def weight_bytes(self, dtype: str) -> int:
        return self.parameters * _itemsize(dtype)

    def streamed_bytes(self, dtype: str) -> int:
        """Compute the bytes on a card if its layers, or blocks, come one after the other: the embedding is largest."""
        embedding = min(_EMBEDDING_PARAMETERS, self.parameters)
        return (embedding + 2 * (self.parameters - embedding) // _TEXT_BLOCKS) * _itemsize(dtype)

    def activation_bytes(self) -> int:
        return min(_TEXT_ACTIVATION_BYTES, 2 * self.parameters)


@dataclass(frozen=True)
class ModelShapes:
    """The shapes of a model's parts.

    Attributes:
        experts: "transformer", and "transformer_2" where there are two.
        lora_ranks: expert -> rank of its LoRA.
    """

    experts: tuple[str, ...]
    transformer: TransformerShape
    vae: VaeShape
    text_encoder: TextShape
    lora_ranks: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> int:
        return len(self.experts) * self.transformer.total_parameters + self.text_encoder.parameters

    @property
    def latent_bytes(self) -> int:
        """Bytes of latents and embeddings while denoising."""
        return min(_LATENT_BYTES, 2 * self.parameters)

    def lora_bytes(self, expert: str) -> int:
        return self.transformer.lora_bytes(self.lora_ranks.get(expert, 0))


def shapes_of(model: "ZooModel", lora_ranks: Ranks = None) -> ModelShapes:
    """Read the shapes of a model's parts from its entry.

    Args:
        lora_ranks: expert -> rank, or the rank of each LoRA on every expert; None: those of the model's own Pusa LoRA.
    """
    config = model.transformer
    width = config["num_attention_heads"] * config["attention_head_dim"]
    channels = config.get("in_channels", 16)
    transformer = TransformerShape(
        width=width,
        heads=config["num_attention_heads"],
        ffn=config.get("ffn_dim", 4 * width),
        layers=config["num_layers"],
        channels=channels,
        text_dim=config.get("text_dim", 4096),
        freq_dim=config.get("freq_dim", 256),
        parameters=model.parameters.get("transformer", 0),
    )
    experts = tuple(expert for expert in ("transformer", "transformer_2")[: model.experts])
    if lora_ranks is None:
        rank = PUBLISHED_LORA_RANK if model.folder is None else OWN_LORA_RANK
        lora_ranks = dict.fromkeys(model.lora.files, rank) if model.lora else {}
    elif not isinstance(lora_ranks, Mapping):
        lora_ranks = dict.fromkeys(experts, sum(lora_ranks))
    text = TextShape(model.parameters.get("text_encoder", 0))
    return ModelShapes(experts, transformer, _vae_of(model, channels), text, lora_ranks)


def _vae_of(model: "ZooModel", channels: int) -> VaeShape:
    parameters = model.parameters.get("vae", 0)
    config = model.vae_config
    if not config and model.folder is not None and (path := model.folder / "vae" / "config.json").is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
    if not config and channels == WAN22_VAE.channels:
        return WAN22_VAE
    return VaeShape.from_config(config, parameters)


def clip_of(model: "ZooModel", shapes: ModelShapes, size: "ClipSize | tuple[int, int, int] | None" = None) -> ClipSize:
    """Round a size (width, height, frames) to the model's grid; None: the model's default."""
    if isinstance(size, ClipSize):
        return size
    width, height, frames = size or (None, None, None)
    vae = shapes.vae
    grid = {"channels": vae.channels, "patch": 2, "spatial_factor": vae.spatial, "temporal_factor": vae.temporal}
    return clip_size(model.defaults, height, width, frames, **grid)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
