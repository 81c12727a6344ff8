"""Name and configure the VAEs of Wan in single files: Wan2.1's by `pusa.models.original`, Wan2.2's here."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pusa.models import original
from pusa.models.files import WrongArchitectureError
from pusa.models.original import KeyTable

_CHANNELS = 48
# Published with Wan2.2-TI2V-5B.
_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def _wan22_pairs() -> Iterator[tuple[str, str]]:
    yield "conv1.{p}", "quant_conv.{p}"
    yield "conv2.{p}", "post_quant_conv.{p}"
    yield "{side}.conv1.{p}", "{side}.conv_in.{p}"
    yield "{side}.head.0.{p}", "{side}.norm_out.{p}"
    yield "{side}.head.2.{p}", "{side}.conv_out.{p}"
    for name in ("norm", "to_qkv", "proj"):
        yield f"{{side}}.middle.1.{name}.{{p}}", f"{{side}}.mid_block.attentions.0.{name}.{{p}}"
    for name, other in _RESIDUAL.items():
        yield f"{{side}}.middle.0.{name}.{{p}}", f"{{side}}.mid_block.resnets.0.{other}.{{p}}"
        yield f"{{side}}.middle.2.{name}.{{p}}", f"{{side}}.mid_block.resnets.1.{other}.{{p}}"
    for side, way, blocks in (("encoder", "down", 2), ("decoder", "up", 3)):
        stage, other_stage = f"{side}.{way}samples.{{n}}.{way}samples", f"{side}.{way}_blocks.{{n}}"
        for block in range(blocks):
            for name, other in _RESIDUAL.items():
                yield f"{stage}.{block}.{name}.{{p}}", f"{other_stage}.resnets.{block}.{other}.{{p}}"
        for name in ("resample.1", "time_conv"):
            yield f"{stage}.{blocks}.{name}.{{p}}", f"{other_stage}.{way}sampler.{name}.{{p}}"


WAN22_VAE = KeyTable("the Wan2.2 VAE", _wan22_pairs())


def key_table(family: str) -> KeyTable:
    """Return the names of a VAE: of Wan2.1's or of Wan2.2's."""
    return WAN22_VAE if family == "wan2.2-vae" else original.VAE


def vae_config(family: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Derive the arguments of `AutoencoderKLWan` (original name -> shape).

    Raises:
        WrongArchitectureError: tensors of another model, or no whole one.
    """
    if family != "wan2.2-vae":
        return original.vae_config_from_keys(shapes)
    WAN22_VAE.to_diffusers(shapes)
    channels = shapes["conv2.weight"][0]
    if channels != _CHANNELS:
        raise WrongArchitectureError(f"this VAE has Wan2.2's layers and {channels} latent channels, not {_CHANNELS}")
    widest = shapes["decoder.conv1.weight"][0]
    if widest % 4:
        raise WrongArchitectureError(f"its decoder begins with {widest} channels, no multiple of 4")
    return {
        "base_dim": shapes["encoder.conv1.weight"][0],
        "decoder_base_dim": widest // 4,
        "z_dim": channels,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 16,
        "latents_mean": list(_MEAN),
        "latents_std": list(_STD),
    }
