"""List Pusa V0.5: all of Mochi's transformer fine-tuned, and the other parts of Mochi."""

from pusa.models.bases.mochi import MochiBase
from pusa.models.catalogue.entry import ZooModel
from pusa.models.sources.published import PublishedFile

_PARAMETERS = {"text_encoder": 4_762_310_656, "transformer": 10_027_677_744, "vae": 459_748_611}
_WEIGHTS = PublishedFile("RaphaelLiu/Pusa-V0.5", "pusa_v0_dit.safetensors", 4 * _PARAMETERS["transformer"])
"""In the layout of genmo's own code. Its size is an upper bound: it may be in bf16, or in fp32 as Mochi's."""

MODELS = (
    ZooModel(
        name="pusa-v0.5",
        title="Pusa V0.5: Mochi 1 of genmo with a time for each frame, 10 billion parameters, 480p at 30 fps",
        transformer={
            "_class_name": "MochiTransformer3DModel",
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 48,
            "pooled_projection_dim": 1536,
            "in_channels": 12,
            "text_embed_dim": 4096,
        },
        defaults=MochiBase.defaults,
        hub_id="genmo/mochi-1-preview",
        parameters=_PARAMETERS,
        # The Hub has the text encoder in bf16 and the VAE in fp32.
        file_bytes={
            "text_encoder": 2 * _PARAMETERS["text_encoder"],
            "transformer": _WEIGHTS.size_bytes,
            "vae": 4 * _PARAMETERS["vae"],
        },
        weights={"transformer": _WEIGHTS},
    ),
)
