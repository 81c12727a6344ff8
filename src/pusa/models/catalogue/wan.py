"""List the models of Wan2.1 and Wan2.2 as they are published, and the Pusa LoRAs of those that have one."""

from collections.abc import Mapping
from typing import Any

from pusa.defaults import TI2V_DEFAULTS, WAN_DEFAULTS, FastSettings, GenerationDefaults
from pusa.models.catalogue.entry import LoraSource, ZooModel
from pusa.models.sources.published import PublishedFile

# Counted from the published shapes. The Hub holds fp32, 4 bytes each, except Wan2.2's text encoder (bf16).
_TEXT_ENCODER_PARAMETERS = 5_680_910_336
_VAE_PARAMETERS, _WAN22_VAE_PARAMETERS = 126_892_531, 704_688_668
_WAN = {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
_WAN_1B = {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_14B = {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_WAN_5B = {
    **_WAN,
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
}


_COMFY_WAN21, _COMFY_WAN22 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
_LIGHTNING = "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
_PUBLISHED_TEXT_ENCODER = {
    "float16": PublishedFile(
        _COMFY_WAN21, "split_files/text_encoders/umt5_xxl_fp16.safetensors", 2 * _TEXT_ENCODER_PARAMETERS
    ),
    "fp8": PublishedFile(
        _COMFY_WAN21,
        "split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        _TEXT_ENCODER_PARAMETERS + 256_384 * 4096,  # its embedding stays in fp16
    ),
}
_ITEMSIZES = {"bfloat16": 2, "float16": 2, "fp8": 1}


def _published(repository: str, parameters: int, **names: str) -> dict[str, PublishedFile]:
    """List the single files of a transformer: storage -> name without folder and suffix."""
    return {
        storage: PublishedFile(
            repository, f"split_files/diffusion_models/{name}.safetensors", _ITEMSIZES[storage] * parameters
        )
        for storage, name in names.items()
    }


def _wan(
    name: str,
    title: str,
    hub_id: str,
    transformer: Mapping[str, Any],
    experts: Mapping[str, int],
    *,
    text_encoder_itemsize: int = 4,
    vae: int = _VAE_PARAMETERS,
    defaults: GenerationDefaults = WAN_DEFAULTS,
    lora: LoraSource | None = None,
    fast_lora: LoraSource | None = None,
    published: Mapping[str, Mapping[str, PublishedFile]],
) -> ZooModel:
    parameters = {"text_encoder": _TEXT_ENCODER_PARAMETERS, **experts, "vae": vae}
    file_bytes = {part: 4 * count for part, count in parameters.items()}
    file_bytes["text_encoder"] = text_encoder_itemsize * _TEXT_ENCODER_PARAMETERS
    return ZooModel(
        name=name,
        title=title,
        transformer=transformer,
        defaults=defaults,
        hub_id=hub_id,
        parameters=parameters,
        file_bytes=file_bytes,
        lora=lora,
        fast_lora=fast_lora,
        published={"text_encoder": _PUBLISHED_TEXT_ENCODER, **published},
    )


MODELS = (
    _wan(
        "wan2.1-1.3b",
        "Wan2.1 text-to-video, 1.3 billion parameters, 480p; no Pusa adapter is published",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        _WAN_1B,
        {"transformer": 1_418_996_800},
        published={
            "transformer": _published(_COMFY_WAN21, 1_418_996_800, bfloat16="wan2.1_t2v_1.3B_bf16"),
        },
    ),
    _wan(
        "wan2.1-14b",
        "Wan2.1 text-to-video, 14 billion parameters, 480p and 720p: the base of Pusa V1.0",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        _WAN_14B,
        {"transformer": 14_288_491_584},
        defaults=GenerationDefaults(fast=FastSettings()),
        lora=LoraSource("RaphaelLiu/PusaV1", {"transformer": "pusa_v1.pt"}),
        # The original takes Wan2.2's low-noise file here, and names this one, made for Wan2.1, as the other choice.
        fast_lora=LoraSource(
            "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v",
            {"transformer": "loras/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"},
            rank=64,
            file_bytes=631_000_000,
        ),
        published={
            "transformer": _published(
                _COMFY_WAN21, 14_288_491_584, bfloat16="wan2.1_t2v_14B_bf16", fp8="wan2.1_t2v_14B_fp8_scaled"
            ),
        },
    ),
    _wan(
        "wan2.2-a14b",
        "Wan2.2 text-to-video, two experts of 14 billion parameters, for high and for low noise",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        _WAN_14B,
        {"transformer": 14_288_491_584, "transformer_2": 14_288_491_584},
        text_encoder_itemsize=2,
        defaults=GenerationDefaults(
            alpha={"transformer": 1.5, "transformer_2": 1.4}, boundary_ratio=0.875, fast=FastSettings()
        ),
        lora=LoraSource(
            "RaphaelLiu/Pusa-Wan2.2-V1",
            {"transformer": "high_noise_pusa.safetensors", "transformer_2": "low_noise_pusa.safetensors"},
        ),
        fast_lora=LoraSource(
            "lightx2v/Wan2.2-Lightning",
            {
                "transformer": f"{_LIGHTNING}/high_noise_model.safetensors",
                "transformer_2": f"{_LIGHTNING}/low_noise_model.safetensors",
            },
            rank=64,
            file_bytes=2 * 1_230_000_000,
        ),
        published={
            part: _published(
                _COMFY_WAN22,
                14_288_491_584,
                float16=f"wan2.2_t2v_{noise}_noise_14B_fp16",
                fp8=f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled",
            )
            for part, noise in (("transformer", "high"), ("transformer_2", "low"))
        },
    ),
    _wan(
        "wan2.2-ti2v-5b",
        "Wan2.2 text- and image-to-video, 5 billion parameters, 720p at 24 fps: follows an image at the first "
        "frame as it is; no Pusa adapter for other places is published",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        _WAN_5B,
        {"transformer": 4_999_787_712},
        text_encoder_itemsize=2,
        vae=_WAN22_VAE_PARAMETERS,
        defaults=TI2V_DEFAULTS,
        published={"transformer": _published(_COMFY_WAN22, 4_999_787_712, float16="wan2.2_ti2v_5B_fp16")},
    ),
)
