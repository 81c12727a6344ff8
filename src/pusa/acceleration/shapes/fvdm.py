"""Describe FVDM's parts: blocks that attend inside frames and along time by turns, an image VAE, no text encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pusa.acceleration.shapes.common import PartShapes, TextShape, TransformerShape, VaeShape, itemsize
from pusa.defaults import ClipSize


@dataclass(frozen=True, kw_only=True)
class FVDMTransformer(TransformerShape):
    """Describe `pusa.FVDMTransformer3DModel`."""

    channels: int = 4
    mlp_ratio: float = 4.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], parameters: int = 0) -> "FVDMTransformer":
        return cls(
            width=config["hidden_size"],
            heads=config["num_heads"],
            layers=config["depth"],
            channels=config.get("in_channels", 4),
            patch=config.get("patch_size", 2),
            mlp_ratio=config.get("mlp_ratio", 4.0),
            parameters=parameters,
        )

    @property
    def _ffn(self) -> int:
        return int(self.mlp_ratio * self.width)

    @property
    def block_parameters(self) -> int:
        return 4 * self.width**2 + 2 * self.width * self._ffn

    @property
    def full_block_parameters(self) -> int:
        """Count those of the modulation."""
        return 6 * self.width**2

    @property
    def largest_layer(self) -> int:
        return self.width * max(6 * self.width, self._ffn)

    @property
    def counted_others(self) -> int:
        return self.width * (256 + 3 * self.width + 3 * self.channels * self.patch**2)

    def lora_bytes(self, rank: int) -> int:
        return 2 * rank * self.layers * (6 * self.width + 2 * (self.width + self._ffn))

    def activation_bytes(
        self, tokens: int, *, dtype: str = "bfloat16", adapters: bool = False, quantised: bool = False
    ) -> int:
        """Compute as the base class says; the most is held inside the feed-forward."""
        inner = 2 + (adapters or quantised)  # tensors as wide as the feed-forward at once
        return round(tokens * itemsize(dtype) * (3 * self.width + inner * self._ffn))

    def flops(self, size: ClipSize) -> tuple[float, float]:
        tokens, frames = self.tokens(size), size.shape[1]
        linear = self.layers * 2 * (tokens * self.block_parameters + frames * self.full_block_parameters)
        attention = self.layers / 2 * 4 * tokens * self.width * (tokens / frames + frames)
        return float(linear), float(attention)


@dataclass(frozen=True, kw_only=True)
class ImageVae(VaeShape):
    """Describe `diffusers.AutoencoderKL`, which takes frame by frame; the defaults are Stable Diffusion's.

    Attributes:
        base: channels at full resolution.
    """

    channels: int = 4
    temporal: int = 1
    base: int = 128
    parameters: int = 83_653_863

    @classmethod
    def from_config(cls, config: Mapping[str, Any], parameters: int = 0) -> "ImageVae":
        widths = config.get("block_out_channels", (cls.base, 256, 512, 512))
        return cls(
            channels=config.get("latent_channels", 4),
            spatial=2 ** (len(widths) - 1),
            base=widths[0],
            parameters=parameters or cls.parameters,
        )

    def cache_bytes(self, height: int, width: int, dtype: str = "bfloat16") -> int:
        return 0

    def decode_bytes(self, height: int, width: int, dtype: str = "bfloat16") -> int:
        """Compute as the base class says; the most is held where twice the channels reach the full resolution."""
        return round(6.0 * self.base * height * width * itemsize(dtype))

    def encode_bytes(self, height: int, width: int, frames: int, dtype: str = "bfloat16") -> int:
        at_work = round(5.0 * self.base * height * width * itemsize(dtype))
        return self.clip_bytes(height, width, frames, dtype) + at_work


def parts(config: Mapping[str, Any], parameters: Mapping[str, int], vae: Mapping[str, Any]) -> PartShapes:
    """Read the shapes of a model's parts."""
    return PartShapes(
        FVDMTransformer.from_config(config, parameters.get("transformer", 0)),
        ImageVae.from_config(vae, parameters.get("vae", 0)),
        TextShape(0),
    )
