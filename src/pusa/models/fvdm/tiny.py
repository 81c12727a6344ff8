"""Build FVDM's parts at the smallest size, with random weights: they make noise, in milliseconds."""

from typing import Any

import torch
from diffusers import AutoencoderKL

from pusa.ddim import PusaDDIMScheduler
from pusa.models.fvdm.transformer import FVDMTransformer3DModel
from pusa.models.streaming import weight_dtype
from pusa.resources import DType, dtype_of

TRANSFORMER = {
    "input_size": 8,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 4,
    "num_heads": 3,
    "num_frames": 16,
}
VAE = {
    "block_out_channels": (8, 8, 8, 8),  # 8 x 8 pixels to a latent
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def components(*, dtype: DType = torch.float32, seed: int = 0, num_classes: int | None = None) -> dict[str, Any]:
    """Build transformer, image VAE and scheduler on the CPU; the caller's random state stays as it is.

    FVDM reads no text: tokenizer and text encoder are None. The zeros that a new network begins with are drawn, too, as
    it would predict nothing else.

    Args:
        num_classes: classes of a class-conditional network; None: it has none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FVDMTransformer3DModel(**TRANSFORMER, num_classes=num_classes)
        for name, parameter in transformer.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                torch.nn.init.normal_(parameter, std=0.1)
        models = {"transformer": transformer, "vae": AutoencoderKL(**VAE)}
    for part, model in models.items():
        for name, parameter in model.eval().named_parameters():
            parameter.data = parameter.to(weight_dtype(model, name, dtype_of(part, dtype)))
    return {**models, "tokenizer": None, "text_encoder": None, "scheduler": PusaDDIMScheduler()}
