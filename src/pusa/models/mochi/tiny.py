"""Build Mochi's components of the real classes at the smallest size, with random weights; see `pusa.models.tiny`."""

from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel
from transformers import T5Config, T5EncoderModel

from pusa.models.tiny import tokenizer
from pusa.resources import DType, dtype_of

TEXT_DIM = 48
TRANSFORMER = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 3,
    "pooled_projection_dim": 24,
    "text_embed_dim": TEXT_DIM,
}
VAE = {  # 12 channels, 6 frames and 8 x 8 pixels per latent, as published; its norms have 32 groups
    "encoder_block_out_channels": (32, 32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
}


def text_encoder(dtype: torch.dtype = torch.float32) -> T5EncoderModel:
    """Build a T5 v1.1 encoder for the tokenizer of bytes."""
    config = T5Config(
        vocab_size=259,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return T5EncoderModel(config).to(dtype).eval()


def components(*, dtype: DType = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Build the arguments of a `MochiPipeline`, on the CPU; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = MochiTransformer3DModel(**TRANSFORMER)
        torch.nn.init.normal_(transformer.pos_frequencies)  # zeros otherwise, which tell no position from another
        vae = AutoencoderKLMochi(**VAE)
    models = {"transformer": transformer, "vae": vae}
    for part, model in models.items():
        for parameter in model.eval().parameters():
            parameter.data = parameter.to(dtype_of(part, dtype))
    return {
        **models,
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(dtype_of("text_encoder", dtype)),
        "scheduler": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    }
