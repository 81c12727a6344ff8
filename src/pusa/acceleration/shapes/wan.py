"""Describe Wan's parts: one stream of tokens with cross-attention to the text, a causal VAE, UMT5-XXL."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from pusa.acceleration.shapes.common import PartShapes, TextShape, TransformerShape, VaeShape, itemsize
from pusa.defaults import ClipSize

TEXT_TOKENS = 512
_EMBEDDING_PARAMETERS = 256_384 * 4096  # UMT5-XXL's vocabulary


@dataclass(frozen=True, kw_only=True)
class WanTransformer(TransformerShape):
    """Describe a Wan transformer."""

    shares_tokens: ClassVar[bool] = True
    stores_frames: ClassVar[bool] = True

    ffn: int
    text_dim: int = 4096
    freq_dim: int = 256

    @classmethod
    def from_config(cls, config: Mapping[str, Any], parameters: int = 0) -> "WanTransformer":
        """Read the values of a configuration of `diffusers.WanTransformer3DModel`."""
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return cls(
            width=width,
            heads=config["num_attention_heads"],
            ffn=config.get("ffn_dim", 4 * width),
            layers=config["num_layers"],
            channels=config.get("in_channels", 16),
            text_dim=config.get("text_dim", 4096),
            freq_dim=config.get("freq_dim", 256),
            parameters=parameters,
        )

    @property
    def block_parameters(self) -> int:
        """Count those of two attentions of four square layers and of the feed-forward, which LoRAs adapt, too."""
        return 8 * self.width**2 + 2 * self.width * self.ffn

    @property
    def largest_layer(self) -> int:
        return self.width * max(self.width, self.ffn)

    @property
    def counted_others(self) -> int:
        return self.width * (6 * self.width + 2 * self.width + self.text_dim + self.freq_dim + 8 * self.channels)

    @property
    def kept_in_fp32(self) -> int:
        return self.width * (self.width + self.freq_dim) + self.layers * 8 * self.width

    def lora_bytes(self, rank: int) -> int:
        return 2 * rank * self.layers * (8 * 2 * self.width + 2 * (self.width + self.ffn))

    def activation_bytes(
        self, tokens: int, *, dtype: str = "bfloat16", adapters: bool = False, quantised: bool = False
    ) -> int:
        """Compute as the base class says.

        The most is held either where a block's input is normalised and modulated in fp32, or inside its feed-forward.
        """
        inner = 2 + (adapters or quantised)  # tensors as wide as the feed-forward at once
        per_channel = max(22.0, itemsize(dtype) * (3 + inner * self.ffn / self.width))
        rotary = 2 * 4 * self.width // self.heads  # cosine and sine of a token
        return round(tokens * (self.width * per_channel + rotary))

    def flops(self, size: ClipSize) -> tuple[float, float]:
        tokens = self.tokens(size)
        text = 2 * 2 * TEXT_TOKENS * self.layers * 2 * self.width**2  # keys and values of the prompt
        attention1 = 2 * tokens * (4 * self.width**2 + 2 * self.width * self.ffn)
        linear = self.layers * (attention1 + 2 * tokens * 2 * self.width**2) + text
        attention = self.layers * 4 * tokens * self.width * (tokens + TEXT_TOKENS)
        return float(linear), float(attention)


@dataclass(frozen=True, kw_only=True)
class WanVae(VaeShape):
    """Describe Wan's causal VAE; the defaults are Wan2.1's.

    Attributes:
        base, decoder_base: channels at full resolution of encoder and decoder (`decoder_base` 0: the same).
        residual: blocks with shortcuts over up- and downsampling, as in Wan2.2's.
        patch: pixels of a side that become channels before the encoder.
    """

    base: int = 96
    decoder_base: int = 0
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    channels: int = 16
    residual: bool = False
    patch: int = 1
    parameters: int = 126_892_531

    @classmethod
    def from_config(cls, config: Mapping[str, Any], parameters: int = 0) -> "WanVae":
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

    @cached_property
    def _decoder_cache(self) -> float:
        """Count the channels that causal convolutions keep of 2 frames, per pixel of the decoder's full resolution."""
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
        return round(self._decoder_cache * height * width / self.patch**2 * itemsize(dtype))

    def decode_bytes(self, height: int, width: int, dtype: str = "bfloat16") -> int:
        """Compute as the base class says; the most is held where frames of a latent one reach the full resolution."""
        base = self.decoder_base or self.base
        reached = base * (self.multipliers[1] if self.residual else 1)
        copies = 6.5 if dtype == "float32" else 7.0  # bf16 is upsampled in fp32
        at_work = copies * self.temporal * reached * height * width / self.patch**2
        return self.cache_bytes(height, width, dtype) + round(at_work * itemsize(dtype))

    def clip_bytes(self, height: int, width: int, frames: int, dtype: str) -> int:
        return super().clip_bytes(height, width, frames, dtype) * (2 if self.patch > 1 else 1)  # patches are a copy

    def encode_bytes(self, height: int, width: int, frames: int, dtype: str = "bfloat16") -> int:
        if frames == 1:
            at_work = (12.0 if self.residual else 10.0) * self.base
        else:
            copies = (8.2 if self.residual else 6.2) - (0.5 if dtype == "float32" else 0)
            at_work = self._encoder_cache + copies * self.temporal * self.base
        work = round(at_work * height * width / self.patch**2 * itemsize(dtype))
        return self.clip_bytes(height, width, frames, dtype) + work


WAN22_VAE = WanVae(base=160, decoder_base=256, channels=48, residual=True, patch=2, spatial=16, parameters=704_688_668)


def parts(config: Mapping[str, Any], parameters: Mapping[str, int], vae: Mapping[str, Any]) -> PartShapes:
    """Read the shapes of a model's parts; a model of 48 latent channels without a VAE's configuration has Wan2.2's."""
    transformer = WanTransformer.from_config(config, parameters.get("transformer", 0))
    is_wan22 = not vae and transformer.channels == WAN22_VAE.channels
    return PartShapes(
        transformer,
        WAN22_VAE if is_wan22 else WanVae.from_config(vae, parameters.get("vae", 0)),
        TextShape(parameters.get("text_encoder", 0), _EMBEDDING_PARAMETERS),
    )
