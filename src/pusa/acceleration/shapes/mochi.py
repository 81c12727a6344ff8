"""Describe the parts of Mochi, Pusa V0.5's base: two streams of tokens that attend jointly, its VAE, T5-XXL."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from pusa.acceleration.shapes.common import PartShapes, TextShape, TransformerShape, VaeShape, itemsize
from pusa.defaults import ClipSize

_EMBEDDING_PARAMETERS = 32_128 * 4096  # T5-XXL's vocabulary
_LARGE_CONVOLUTION = 2 * 2**30  # bytes of its input, above which diffusers convolves in parts


@dataclass(frozen=True, kw_only=True)
class MochiTransformer(TransformerShape):
    """Describe `diffusers.MochiTransformer3DModel`.

    Attributes:
        text_width: channels of its text tokens.
        text_dim: channels of the text encoder's.
    """

    channels: int = 12
    text_width: int = 1536
    text_dim: int = 4096
    text_tokens: int = 256

    @classmethod
    def from_config(cls, config: Mapping[str, Any], parameters: int = 0) -> "MochiTransformer":
        return cls(
            width=config["num_attention_heads"] * config["attention_head_dim"],
            heads=config["num_attention_heads"],
            layers=config["num_layers"],
            channels=config.get("in_channels", 12),
            patch=config.get("patch_size", 2),
            text_width=config.get("pooled_projection_dim", 1536),
            text_dim=config.get("text_embed_dim", 4096),
            text_tokens=config.get("max_sequence_length", 256),
            parameters=parameters,
        )

    @property
    def _ffn(self) -> int:
        return 8 * self.width // 3  # of each of SwiGLU's two halves

    @property
    def _text_ffn(self) -> int:
        return 8 * self.text_width // 3

    @property
    def _visual(self) -> int:
        """Count the weights of a block that each visual token meets."""
        return 4 * self.width**2 + 3 * self.width * self._ffn

    @property
    def _text(self) -> int:
        """Count the weights of a block that each text token meets."""
        return 4 * self.width * self.text_width + 3 * self.text_width * self._text_ffn

    @property
    def block_parameters(self) -> int:
        return self._visual + self._text

    @property
    def full_block_parameters(self) -> int:
        """Count those of both streams' modulation, which is part of a norm in diffusers."""
        return 4 * self.width * (self.width + self.text_width)

    @property
    def largest_layer(self) -> int:
        return 2 * self.width * self._ffn

    @property
    def counted_others(self) -> int:
        time = self.width * (self.width + 256)
        pool = self.text_dim * (3 * self.text_dim + self.width)
        ends = 2 * self.patch**2 * self.channels * self.width + self.text_dim * self.text_width + 2 * self.width**2
        unused = 4 * self.width * self.text_width + 3 * self.text_width * self._text_ffn  # by the last block
        return time + pool + ends - unused

    def lora_bytes(self, rank: int) -> int:
        streams = ((self.width, self._ffn), (self.text_width, self._text_ffn))
        sides = sum(4 * (self.width + width) + (width + 2 * ffn) + (ffn + width) for width, ffn in streams)
        return 2 * rank * self.layers * sides

    def activation_bytes(
        self, tokens: int, *, dtype: str = "bfloat16", adapters: bool = False, quantised: bool = False
    ) -> int:
        """Compute as the base class says; the most is held where SwiGLU's halves are multiplied."""
        more = 2 * self._ffn * (adapters or quantised)  # the output of its first layer once more
        rotary = 4 * self.width  # cosine and sine, learned for each head
        return round(tokens * ((15.7 * self.width + more) * itemsize(dtype) + rotary))

    def flops(self, size: ClipSize) -> tuple[float, float]:
        tokens = self.tokens(size)
        modulation = 2 * size.shape[1] * 4 * self.width**2
        linear = self.layers * (2 * tokens * self._visual + 2 * self.text_tokens * self._text + modulation)
        attention = self.layers * 4 * (tokens + self.text_tokens) ** 2 * self.width
        return float(linear), float(attention)


@dataclass(frozen=True, kw_only=True)
class MochiVae(VaeShape):
    """Describe `diffusers.AutoencoderKLMochi`; the defaults are the published one's.

    Its encoder attends to all frames of a place, so a clip is encoded at once; its decoder is causal.

    Attributes:
        widths: channels of the decoder, from full resolution to that of latents.
        layers: residual blocks of each of these, and of the middle.
        spatial_steps, temporal_steps: factors of its upsampling, from full resolution on.
        encoder_base: channels of the encoder at full resolution.
    """

    channels: int = 12
    temporal: int = 6
    widths: tuple[int, ...] = (128, 256, 512, 768)
    layers: tuple[int, ...] = (3, 3, 4, 6, 3)
    spatial_steps: tuple[int, ...] = (2, 2, 2)
    temporal_steps: tuple[int, ...] = (1, 2, 3)
    encoder_base: int = 64
    parameters: int = 459_748_611

    @classmethod
    def from_config(cls, config: Mapping[str, Any], parameters: int = 0) -> "MochiVae":
        spatial = tuple(config.get("spatial_expansions", cls.spatial_steps))
        temporal = tuple(config.get("temporal_expansions", cls.temporal_steps))
        return cls(
            channels=config.get("latent_channels", 12),
            spatial=prod(spatial),
            temporal=prod(temporal),
            widths=tuple(config.get("decoder_block_out_channels", cls.widths)),
            layers=tuple(config.get("layers_per_block", cls.layers)),
            spatial_steps=spatial,
            temporal_steps=temporal,
            encoder_base=config.get("encoder_block_out_channels", (cls.encoder_base,))[0],
            parameters=parameters or cls.parameters,
        )

    @cached_property
    def _decoder_cache(self) -> float:
        """Count the channels that the causal convolutions keep of two frames, per pixel of the video."""
        kept, area = 0.0, 1
        for level, width in enumerate(self.widths):
            kept += 2 * self.layers[level] * width / area
            area *= self.spatial_steps[level] ** 2 if level < len(self.spatial_steps) else 1
        return 2 * (kept + 2 * self.layers[-1] * self.widths[-1] / area)

    def cache_bytes(self, height: int, width: int, dtype: str = "bfloat16") -> int:
        return round(self._decoder_cache * height * width * itemsize(dtype))

    def decode_bytes(self, height: int, width: int, dtype: str = "bfloat16") -> int:
        """Compute as the base class says; the most is held where frames of a latent one reach the full resolution."""
        at_work = 5.35 * self.temporal * self.widths[0] * height * width
        return self.cache_bytes(height, width, dtype) + round(at_work * itemsize(dtype))

    def encode_bytes(self, height: int, width: int, frames: int, dtype: str = "bfloat16") -> int:
        """Compute as the base class says; where convolutions run in parts, their output exists twice."""
        layer = self.encoder_base * height * width * frames * itemsize(dtype)
        copies = 7.0 if frames == 1 else 7.0 if layer > _LARGE_CONVOLUTION else 5.2
        return round(copies * layer)


def parts(config: Mapping[str, Any], parameters: Mapping[str, int], vae: Mapping[str, Any]) -> PartShapes:
    """Read the shapes of a model's parts."""
    return PartShapes(
        MochiTransformer.from_config(config, parameters.get("transformer", 0)),
        MochiVae.from_config(vae, parameters.get("vae", 0)),
        TextShape(parameters.get("text_encoder", 0), _EMBEDDING_PARAMETERS),
    )
