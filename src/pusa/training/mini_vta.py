"""Stage 3: vectorised timestep adaptation (VTA): a LoRA that teaches the model one time per latent frame.

As in Pusa V1.0 (arXiv 2507.16116): every frame's time is drawn on its own, without any synchronous sample, from the
shifted grid that sampling uses; nothing shows the model an image to be continued.
"""

from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from pusa.lora import export_lora
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.scheduler import shifted
from pusa.training.mini_base import SHIFT, Latents, TextToVideo, velocity_loss
from pusa.training.mini_loop import fit, rank, warm_then_cool, world_size

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
_CAPTION_DROP = 0.2  # more than the base: an image alone must be enough
_BATCH_FRAMES = 36


def train_vta(base: TextToVideo, data: Latents, checkpoint: Path, lora: Path, *, seconds: float) -> None:
    """Adapt `base`, whose weights stay as they are, on from `checkpoint` if there, and write the LoRA to `lora`."""
    torch.manual_seed(0)
    base.requires_grad_(False)
    transformer = PusaWanTransformer3DModel.from_wan(base.transformer)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), adapter_name="pusa")
    adapted = [p for p in transformer.parameters() if p.requires_grad]

    def loss_of(seed: int, progress: float) -> Tensor:
        torch.manual_seed(seed)
        longest = data.latents.shape[2]
        frames = longest if seed // world_size() % 2 else (longest + 1) // 2
        clean, texts = data.sample(max(1, _BATCH_FRAMES // frames), frames)
        sigma = shifted(torch.rand(len(clean), frames), SHIFT)  # [B, F]
        return velocity_loss(transformer, clean, sigma, base.embed(texts, drop=_CAPTION_DROP))

    fit(
        loss_of,
        transformer,
        [torch.optim.AdamW(adapted, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)],
        seconds=seconds,
        schedule=warm_then_cool(30, 0.5, floor=0.02),
        checkpoint=checkpoint,
    )
    if rank() == 0:
        export_lora(transformer, lora)
