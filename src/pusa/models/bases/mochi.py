"""Describe Mochi, the base of Pusa V0.5: 6 frames to a latent one, timestep 1000 * (1 - sigma), the velocity negated.

Its sigmas are linear at first and quadratic then, without a shift, and an empty prompt is no text at all.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pusa.defaults import GenerationDefaults
from pusa.models.bases.base import Base, Config

if TYPE_CHECKING:
    from torch import Tensor

    from pusa.pipeline import PusaPipeline


class MochiBase(Base):
    """Drive `PusaMochiTransformer3DModel`."""

    name = "Mochi"
    defaults = GenerationDefaults(
        width=848, height=480, num_frames=163, fps=30.0, steps=30, guidance=4.5, shift=1.0, alpha=1.0,
        max_sequence_length=256, negative_prompt="", frames_per_latent=6, overlap=19,
        # Of the README's examples, for a start and an end, and for an extension; its scripts have others by default.
        image_noise=(0.3, 0.7), video_noise=(0.1, 0.2, 0.3, 0.4),
    )  # fmt: skip
    transformer_classes = ("MochiTransformer3DModel", "PusaMochiTransformer3DModel")
    libraries = {  # noqa: RUF012
        "transformer": ("diffusers", "MochiTransformer3DModel"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    }
    pipeline_class = "MochiPipeline"
    conditions_note = (
        "images and videos are followed well by Pusa's weights only, such as those of pusa-v0.5: Mochi's own were "
        "trained with one time for all frames"
    )
    text_encoder = "t5"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    training = {"objective.shift": 1.0, "objective.weighting": "none"}  # noqa: RUF012
    training_limits = {"objective.weighting": ("none",)}  # noqa: RUF012

    def check_config(self, config: Config, where: str) -> None:
        """Accept every configuration: there is no Mochi with other inputs."""

    def patch(self, transformer: Config) -> tuple[int, int, int]:
        side = transformer["patch_size"]
        return 1, side, side

    def text_width(self, transformer: Config) -> int | None:
        return transformer.get("text_embed_dim")

    def adopt(self, transformer: Any) -> Any:
        from pusa.models.mochi.transformer import PusaMochiTransformer3DModel

        return PusaMochiTransformer3DModel.from_mochi(transformer)

    def timesteps(self, scheduler: Any, step: int) -> "Tensor":
        return self.timesteps_of(scheduler.frame_sigmas[step])

    def timesteps_of(self, sigmas: "Tensor") -> "Tensor":
        return 1000 * (1 - sigmas)  # in fp32, as in training; 1000 - 1000 * sigma differs in the last bits

    def prediction(self, output: "Tensor", channels: int) -> "Tensor":
        return -output  # data - noise

    def training_sigmas(self, shift: float) -> "Tensor":
        """Return the grid of 1000 steps without its last level, which the published trainer never draws."""
        from pusa.models.mochi.schedule import linear_quadratic
        from pusa.scheduler import shifted

        return shifted(linear_quadratic(1000)[:999], shift)

    def scheduler_for(self, scheduler: Any) -> Any:
        """Keep a scheduler of ours; any other, as Mochi's own in diffusers, becomes the published one."""
        from pusa.scheduler import PusaFlowMatchEulerScheduler

        return scheduler if isinstance(scheduler, PusaFlowMatchEulerScheduler) else self.scheduler()

    def scheduler(self, shift: float | None = None) -> Any:
        from pusa.scheduler import PusaFlowMatchEulerScheduler

        return PusaFlowMatchEulerScheduler(shift=1.0 if shift is None else shift, sigma_grid="linear_quadratic")

    def encode_texts(self, pipe: "PusaPipeline", texts: Sequence[str], **options: Any) -> "Tensor":
        """Encode texts as for any base, an empty one to zeros, which the transformer takes for no text."""
        import torch

        embeds = super().encode_texts(pipe, texts, **options)
        is_text = torch.tensor([bool(text.strip()) for text in texts], device=embeds.device)
        return torch.where(is_text.view(-1, 1, 1), embeds, 0)

    def trimmed(self, embeds: "Tensor") -> "Tensor":
        """Cut the zeros after the longest text, so that a single prompt needs no mask in attention."""
        filled = embeds.ne(0).any(dim=2).any(dim=0).nonzero()
        return embeds[:, : int(filled.max()) + 1 if len(filled) else 0]
