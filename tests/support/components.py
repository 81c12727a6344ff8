"""Make tiny components of diffusers and transformers with random weights, equal for equal seeds."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel


def make_transformer(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """A stock transformer: 3 heads of 32 (RoPE 12/10/10, uneven as in production), 2 layers, text width 48."""
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 48,
        "freq_dim": 64,
        "ffn_dim": 128,
        "num_layers": 2,
    }
    torch.manual_seed(seed)
    return WanTransformer3DModel(**{**config, **changes}).eval()


def make_vae(seed: int = 0, **changes: Any) -> AutoencoderKLWan:
    """Wan2.1's VAE with 8 channels at the top: 16 latent channels, 4 frames and 8 x 8 pixels per latent."""
    config: dict[str, Any] = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    torch.manual_seed(seed)
    return AutoencoderKLWan(**{**config, **changes}).eval()


def make_wan22_vae(seed: int = 0) -> AutoencoderKLWan:
    """A VAE in the style of Wan2.2 TI2V: residual up- and downsampling, pixels in patches of 2 x 2."""
    return make_vae(
        seed,
        dim_mult=[1, 2, 2],
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
    )


def make_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    """UMT5 of width 48 with 2 layers and 128 tokens."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=128,
        d_model=48,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,  # as in Wan's own configuration
    )
    return UMT5EncoderModel(config).eval()


def make_tokenizer() -> T5Tokenizer:
    """One token per printable ASCII character, within the text encoder's 128."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], extra_ids=0)
