"""Store the weights of linear layers as fp8, by diffusers' layerwise casting: each becomes full while it computes.

The hooks go on the modules of a model that is filled already, or of an empty one: then `pusa.models.streaming.fill`
rounds each weight as it is read, and memory never holds the model in full precision.
"""

import torch
from diffusers import ModelMixin
from diffusers.hooks import apply_layerwise_casting
from torch import nn

STORAGE = torch.float8_e4m3fn

# Of T5: its embeddings are looked up, not multiplied, and its blocks cast their input to the dtype of `wo` themselves.
_TEXT_ENCODER_SKIPS = ("shared", "embed_tokens", "norm", "relative_attention_bias", r"\bwo\b")


def store_as_fp8(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's linear layers to fp8, in place, and let them compute in `dtype`.

    Norms, embeddings, the head and LoRAs stay as they are. The model may be on the meta device.
    """
    if isinstance(model, ModelMixin):  # skips LoRAs, norms, embeddings and the head
        model.enable_layerwise_casting(STORAGE, dtype)
    else:
        apply_layerwise_casting(model, STORAGE, dtype, skip_modules_pattern=_TEXT_ENCODER_SKIPS)
