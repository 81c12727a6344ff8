"""Define what plans ask of the parts of any base: their weights, what computing with them holds, and how long it takes.

The formulas of each base follow the moment at which a computation holds the most: tests compare them with traces of the
real modules. They count tensors; what kernels and the allocator take beside them is a reserve of
`pusa.acceleration.planning`. Nothing here imports torch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

from pusa.acceleration.decisions import Storage
from pusa.defaults import ClipSize

_GGUF_BYTES = 8.5 / 8  # Q8_0
BYTES_PER_WEIGHT: Mapping[str, float] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "fp8": 1,
    "int8": 1,
    "gguf": _GGUF_BYTES,
}
_TEXT_BLOCKS = 24  # of UMT5-XXL and T5-XXL
_TEXT_ACTIVATION_BYTES = 400_000_000  # scores of 64 heads over 512 tokens in fp32, a few times
_TILE, _TILE_STRIDE = 256, 192  # pixels, those of diffusers' VAEs


def itemsize(dtype: str) -> int:
    """Return the bytes of a number while computing."""
    return 4 if dtype == "float32" else 2


@dataclass(frozen=True, kw_only=True)
class TransformerShape(ABC):
    """Describe a transformer with a timestep per latent frame.

    Attributes:
        width: channels of its visual tokens.
        layers: its blocks.
        channels: of the latents.
        patch: latent pixels of a token's side.
        parameters: how many it has; 0: count them from the other values.
        shares_tokens: ranks can divide the tokens of a pass among them.
        stores_frames: a step can use the keys and values of frames of the step before: `pusa.models.frame_skipping`.
    """

    shares_tokens: ClassVar[bool] = False
    stores_frames: ClassVar[bool] = False

    width: int
    heads: int
    layers: int
    channels: int = 16
    patch: int = 2
    parameters: int = 0

    @property
    @abstractmethod
    def block_parameters(self) -> int:
        """Count the weights of a block's matrices that plans quantise."""

    @property
    def full_block_parameters(self) -> int:
        """Count the weights of a block that quantised plans keep in bf16, beside a few vectors."""
        return 0

    @property
    @abstractmethod
    def largest_layer(self) -> int:
        """Count the weights of the largest linear layer of a block."""

    @property
    @abstractmethod
    def counted_others(self) -> int:
        """Count the parameters outside the blocks' matrices, where `parameters` does not tell."""

    @cached_property
    def total_parameters(self) -> int:
        return self.parameters or self.layers * self._block + self.counted_others

    @cached_property
    def other_parameters(self) -> int:
        return max(self.total_parameters - self.layers * self._block, 0)

    @property
    def _block(self) -> int:
        return self.block_parameters + self.full_block_parameters

    @property
    def kept_in_fp32(self) -> int:
        """Count the weights outside the blocks' matrices that stay in fp32."""
        return 0

    def block_bytes(self, storage: Storage, file_bytes: int = 0) -> int:
        """Compute the bytes of one block; `file_bytes` as for `weight_bytes`."""
        if file_bytes:
            return round(file_bytes * self._block / self.total_parameters)
        full = self.full_block_parameters * itemsize(storage)
        return round(self.block_parameters * BYTES_PER_WEIGHT[storage]) + full

    def other_bytes(self, storage: Storage) -> int:
        """Compute the bytes of what is outside the blocks' matrices; quantised plans keep it in bf16."""
        if storage == "float32":
            return 4 * self.other_parameters
        return 2 * self.other_parameters + 2 * min(self.kept_in_fp32, self.other_parameters)

    def weight_bytes(self, storage: Storage, file_bytes: int = 0) -> int:
        """Compute the bytes of all weights: `file_bytes`, where they are kept as a file stores them."""
        if file_bytes:
            return file_bytes
        return self.layers * self.block_bytes(storage) + self.other_bytes(storage)

    @abstractmethod
    def lora_bytes(self, rank: int) -> int:
        """Compute the bytes of an adapter in bf16 on all linear layers of all blocks."""

    def tokens(self, size: ClipSize) -> int:
        """Count the tokens of a clip."""
        _, frames, height, width = size.shape
        return frames * (height // self.patch) * (width // self.patch)

    @abstractmethod
    def activation_bytes(
        self, tokens: int, *, dtype: str = "bfloat16", adapters: bool = False, quantised: bool = False
    ) -> int:
        """Compute the most that one forward pass of one sample holds beside the weights.

        Args:
            tokens: of this rank.
            adapters: LoRAs are attached, not merged: their output exists beside the layer's.
            quantised: layers quantise their input, which exists twice then.
        """

    def stored_frame_bytes(self, size: ClipSize, *, dtype: str = "bfloat16") -> int:
        """Compute the bytes of the keys and values of one latent frame in all layers: `pusa.models.frame_skipping`."""
        if not self.stores_frames:
            return 0
        _, _, height, width = size.shape
        return self.layers * 2 * (height // self.patch) * (width // self.patch) * self.width * itemsize(dtype)

    @abstractmethod
    def flops(self, size: ClipSize) -> tuple[float, float]:
        """Count the operations of one forward pass: those of linear layers, and those of attention."""


@dataclass(frozen=True, kw_only=True)
class VaeShape(ABC):
    """Describe a VAE that decodes latent frame by latent frame.

    Attributes:
        channels: of the latents.
        spatial, temporal: pixels and frames to a latent one.
    """

    channels: int
    spatial: int = 8
    temporal: int = 4
    parameters: int

    def weight_bytes(self, dtype: str) -> int:
        return self.parameters * itemsize(dtype)

    @abstractmethod
    def cache_bytes(self, height: int, width: int, dtype: str = "bfloat16") -> int:
        """Compute the bytes that an open stream of decoded frames keeps between latent frames."""

    @abstractmethod
    def decode_bytes(self, height: int, width: int, dtype: str = "bfloat16") -> int:
        """Compute the most that decoding latent frame by latent frame holds beside the weights, whatever the length."""

    def tiled_decode_bytes(self, height: int, width: int, frames: int, dtype: str = "bfloat16") -> int:
        """Compute the most that decoding in diffusers' tiles holds: all decoded tiles, and one at work or the result.

        Args:
            frames: of the video.
        """
        tile = self.decode_bytes(min(height, _TILE), min(width, _TILE), dtype)
        frame = 3 * itemsize(dtype) * frames
        tiles = frame * math.prod(
            sum(min(_TILE, side - start) for start in range(0, side, _TILE_STRIDE)) for side in (height, width)
        )
        return tiles + max(tile, 3 * frame * height * width)

    def clip_bytes(self, height: int, width: int, frames: int, dtype: str) -> int:
        """Compute the bytes of a clip on its way to the encoder."""
        return 3 * frames * height * width * itemsize(dtype)

    @abstractmethod
    def encode_bytes(self, height: int, width: int, frames: int, dtype: str = "bfloat16") -> int:
        """Compute the most that encoding a clip of some frames holds beside the weights, with the clip itself."""

    def tiled_encode_bytes(self, height: int, width: int, frames: int, dtype: str = "bfloat16") -> int:
        """Compute the most that encoding a clip tile by tile holds: a tile at work beside the clip."""
        tile = self.encode_bytes(min(height, _TILE), min(width, _TILE), frames, dtype)
        return self.clip_bytes(height, width, frames, dtype) + tile


@dataclass(frozen=True)
class TextShape:
    """Describe a text encoder; one without parameters is none.

    Attributes:
        embedding: weights of its vocabulary, its largest layer.
    """

    parameters: int
    embedding: int = 0

    def weight_bytes(self, dtype: str) -> int:
        return self.parameters * itemsize(dtype)

    def streamed_bytes(self, dtype: str) -> int:
        """Compute the bytes on a card if its layers, or blocks, come one after the other."""
        embedding = min(self.embedding, self.parameters)
        return (embedding + 2 * (self.parameters - embedding) // _TEXT_BLOCKS) * itemsize(dtype)

    def activation_bytes(self) -> int:
        return min(_TEXT_ACTIVATION_BYTES, 2 * self.parameters)


class PartShapes(NamedTuple):
    """Hold the shapes of the parts of one model."""

    transformer: TransformerShape
    vae: VaeShape
    text_encoder: TextShape
