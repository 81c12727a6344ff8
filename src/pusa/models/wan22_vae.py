"""Describe the VAE of Wan2.2 TI2V-5B: its names in Wan's own layout and in diffusers', and its configuration.

It takes pixels in patches of 2 x 2, has residual shortcuts around each stage, and makes 48 latent channels of 16 x 16
pixels and 4 frames.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Z_DIM = 48
SIGN = "decoder.upsamples.0.upsamples.0.residual.2.weight"  # no other VAE of Wan's has stages within stages

# Residual blocks of a stage; what changes the size comes after them, under the next number.
_ENCODER_BLOCKS, _DECODER_BLOCKS = 2, 3
_DIM_MULT = (1, 2, 4, 4)

# Mean and standard deviation of each latent channel, as published with Wan2.2 (wan/modules/vae2_2.py).
_MEAN = """
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891 0.1570 -0.0098 0.0375
    -0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899
    -0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573
    -0.0548 -0.1681 -0.0667
"""
_STD = """
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454 0.4978
    0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093
    0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
"""


def stage_pairs(residual: Mapping[str, str], resample: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of templates (Wan's own, diffusers') for the stages; all other names are the Wan2.1 VAE's.

    Args:
        residual: names inside a residual block, Wan's -> diffusers'.
        resample: names inside the layer that changes the size.
    """
    sides = (("encoder", "down", _ENCODER_BLOCKS), ("decoder", "up", _DECODER_BLOCKS))
    for side, way, blocks in sides:
        original, other = f"{side}.{way}samples.{{n}}.{way}samples", f"{side}.{way}_blocks.{{n}}"
        for block in range(blocks):
            for name, new in residual.items():
                yield f"{original}.{block}.{name}.{{p}}", f"{other}.resnets.{block}.{new}.{{p}}"
        for name in resample:
            yield f"{original}.{blocks}.{name}.{{p}}", f"{other}.{way}sampler.{name}.{{p}}"


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Derive the arguments of `AutoencoderKLWan` (original key -> shape, all of them there)."""
    base_dim, in_channels = shapes["encoder.conv1.weight"][:2]
    return {
        "base_dim": base_dim,
        "decoder_base_dim": shapes["decoder.conv1.weight"][0] // _DIM_MULT[-1],
        "z_dim": Z_DIM,
        "dim_mult": list(_DIM_MULT),
        "num_res_blocks": _ENCODER_BLOCKS,
        "is_residual": True,
        "in_channels": in_channels,
        "out_channels": in_channels,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
        "latents_mean": [float(text) for text in _MEAN.split()],
        "latents_std": [float(text) for text in _STD.split()],
    }
