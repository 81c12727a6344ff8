"""Compute how many bytes and operations the parts of a model need, from its entry or its configurations alone.

`pusa.acceleration.shapes` describes the parts of each base. Nothing here imports torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pusa.acceleration.shapes import parts_of
from pusa.acceleration.shapes.common import TextShape, TransformerShape, VaeShape
from pusa.defaults import ClipSize, clip_size

if TYPE_CHECKING:
    from pusa.zoo import ZooModel

Ranks = Mapping[str, int] | Sequence[int] | None

PUBLISHED_LORA_RANK = 512  # of Pusa V1.0
OWN_LORA_RANK = 32  # of the recipe in `pusa.training`
_LATENT_BYTES = 100_000_000  # latents, embeddings and the output of the other pass of guidance


@dataclass(frozen=True)
class ModelShapes:
    """The shapes of a model's parts.

    Attributes:
        experts: "transformer", and "transformer_2" where there are two.
        lora_ranks: expert -> rank of its LoRA.
    """

    experts: tuple[str, ...]
    transformer: TransformerShape
    vae: VaeShape
    text_encoder: TextShape
    lora_ranks: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> int:
        return len(self.experts) * self.transformer.total_parameters + self.text_encoder.parameters

    @property
    def latent_bytes(self) -> int:
        """Bytes of latents and embeddings while denoising."""
        return min(_LATENT_BYTES, 2 * self.parameters)

    def lora_bytes(self, expert: str) -> int:
        return self.transformer.lora_bytes(self.lora_ranks.get(expert, 0))


def shapes_of(model: "ZooModel", lora_ranks: Ranks = None) -> ModelShapes:
    """Read the shapes of a model's parts from its entry.

    Args:
        lora_ranks: expert -> rank, or the rank of each LoRA on every expert; None: those of the model's own Pusa LoRA.
    """
    transformer, vae, text = parts_of(model.transformer, model.parameters, _vae_config(model))
    experts = tuple(expert for expert in ("transformer", "transformer_2")[: model.experts])
    if lora_ranks is None:
        lora_ranks = own_lora_ranks(model)
    elif not isinstance(lora_ranks, Mapping):
        lora_ranks = dict.fromkeys(experts, sum(lora_ranks))
    return ModelShapes(experts, transformer, vae, text, lora_ranks)


def own_lora_ranks(model: "ZooModel", *, fast: bool = False) -> dict[str, int]:
    """Return expert -> rank of a model's own Pusa LoRA, with `fast` of its 4-step LoRA beside it, too."""
    own = PUBLISHED_LORA_RANK if model.folder is None else OWN_LORA_RANK
    ranks: dict[str, int] = {}
    for lora in filter(None, (model.lora, model.fast_lora if fast else None)):
        for expert in lora.files:
            ranks[expert] = ranks.get(expert, 0) + (lora.rank or own)
    return ranks


def _vae_config(model: "ZooModel") -> Mapping[str, Any]:
    if not model.vae_config and model.folder is not None:
        path = model.folder / "vae" / "config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return model.vae_config


def clip_of(model: "ZooModel", shapes: ModelShapes, size: "ClipSize | tuple[int, int, int] | None" = None) -> ClipSize:
    """Round a size (width, height, frames) to the model's grid; None: the model's default."""
    if isinstance(size, ClipSize):
        return size
    if size is not None and len(size) != 3:
        raise ValueError(f"size={size!r} has {len(size)} numbers: give width, height and frames: (832, 480, 81)")
    width, height, frames = size or (None, None, None)
    vae = shapes.vae
    patch = shapes.transformer.patch
    grid = {"channels": vae.channels, "patch": patch, "spatial_factor": vae.spatial, "temporal_factor": vae.temporal}
    return clip_size(model.defaults, height, width, frames, **grid)
