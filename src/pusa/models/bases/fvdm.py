"""Describe FVDM (arXiv 2410.03160) as a base: every frame its own latent, a network that predicts noise, no text.

A class-conditional model reads the number of a class as its prompt; no text is no class.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pusa.defaults import GenerationDefaults, check_class
from pusa.models.bases.base import Base, Config

if TYPE_CHECKING:
    from torch import Tensor

    from pusa.pipeline import PusaPipeline

CLASS_GUIDANCE = 7.0  # of the published class-conditional samples; the others have none


class FVDMBase(Base):
    """Drive `FVDMTransformer3DModel`."""

    name = "FVDM"
    defaults = GenerationDefaults(
        width=256, height=256, num_frames=16, fps=8.0, steps=50, guidance=1.0, shift=1.0, alpha=1.0,
        max_sequence_length=1, negative_prompt="", frames_per_latent=1, image_noise=(0.0,), video_noise=(0.0,),
        overlap=8, longest_window=16, has_shift=False, classes=0,
    )  # fmt: skip
    transformer_classes = ("FVDMTransformer3DModel",)
    libraries = {  # noqa: RUF012
        "transformer": ("pusa.models.fvdm.library", "FVDMTransformer3DModel"),
        "scheduler": ("pusa.models.fvdm.library", "PusaDDIMScheduler"),
    }
    pipeline_class = "PusaPipeline"
    step_cache_obstacle = "its blocks attend inside frames and along time by turns, and one tells little of the other"
    lora_targets = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    predicts = "noise"
    training = {"objective.asynchronous": 0.2, "objective.shift": 1.0, "objective.weighting": "none"}  # noqa: RUF012
    training_limits = {  # noqa: RUF012
        "objective.times": ("independent", "scalar"),
        "objective.distribution": ("shifted",),
        "objective.shift": (1.0,),
        "objective.clean_frames": (0.0,),
        "objective.weighting": ("none",),
    }

    def check_config(self, config: Config, where: str) -> None:
        """Accept every configuration: its class is of this project."""

    def defaults_of(self, transformer: Config, vae: Config) -> GenerationDefaults:
        """Return size, length and classes of the network's training; a chunk begins with half of the one before."""
        frames, side = transformer.get("num_frames", 16), transformer.get("input_size", 32)
        height, width = (side, side) if isinstance(side, int) else side
        pixels = 2 ** (len(vae.get("block_out_channels", range(4))) - 1)
        classes = transformer.get("num_classes") or 0
        return replace(
            self.defaults,
            width=pixels * width,
            height=pixels * height,
            size_multiple=pixels * transformer.get("patch_size", 2),
            num_frames=frames,
            longest_window=frames,
            overlap=max(1, frames // 2),
            guidance=CLASS_GUIDANCE if classes else self.defaults.guidance,
            classes=classes,
        )

    def patch(self, transformer: Config) -> tuple[int, int, int]:
        side = transformer["patch_size"]
        return 1, side, side

    def text_width(self, transformer: Config) -> int | None:
        return None

    def size_of(self, transformer: Config) -> tuple[int, int]:
        return transformer["hidden_size"], transformer["depth"]

    def adopt(self, transformer: Any) -> Any:
        return transformer

    def timesteps_of(self, sigmas: "Tensor") -> "Tensor":
        from pusa.models.fvdm.ddpm import timesteps_of

        return timesteps_of(sigmas)

    def text_inputs(self, embeds: "Tensor", like: "Tensor") -> dict[str, Any]:
        return {"class_labels": embeds[:, 0, 0].long().to(like.device)} if embeds.shape[2] else {}

    def prediction(self, output: "Tensor", channels: int) -> "Tensor":
        return output[:, :channels]  # the others are fractions of the variance, which DDIM does not need

    def training_sigmas(self, shift: float) -> "Tensor":
        """Return (t + 1) / 1000 for the timesteps t from 999 to 0."""
        import torch

        return torch.arange(1000, 0, -1) / 1000

    def add_noise(self, clean: "Tensor", noise: "Tensor", sigmas: "Tensor") -> "Tensor":
        from pusa.models.fvdm.ddpm import q_sample

        return q_sample(clean, noise, self.timesteps_of(sigmas).long())

    def target(self, clean: "Tensor", noise: "Tensor") -> "Tensor":
        return noise

    def further_loss(
        self, output: "Tensor", clean: "Tensor", noise: "Tensor", noisy: "Tensor", sigmas: "Tensor"
    ) -> "Tensor | float":
        """Return the variational bound, whose gradient reaches the variance alone."""
        from pusa.models.fvdm.ddpm import training_losses

        return training_losses(output, clean, noise, noisy, self.timesteps_of(sigmas).long()).vb

    def scheduler_for(self, scheduler: Any) -> Any:
        from pusa.ddim import PusaDDIMScheduler

        return scheduler if isinstance(scheduler, PusaDDIMScheduler) else PusaDDIMScheduler()

    def scheduler(self, shift: float | None = None) -> Any:
        """Make the published scheduler.

        Raises:
            ValueError: a shift; the respaced grid has none.
        """
        from pusa.ddim import PusaDDIMScheduler

        if shift not in (None, 1):
            raise ValueError(f"shift={shift:g}: {self.name} samples at evenly spaced timesteps, without a shift")
        return PusaDDIMScheduler()

    def with_shift(self, scheduler: Any, shift: float) -> Any:
        self.scheduler(shift)  # raises
        return scheduler

    def encode_texts(self, pipe: "PusaPipeline", texts: Sequence[str], **options: Any) -> "Tensor":
        """Read each text as the number of a class, ``[B, 1, 1]``, an empty one as none; ``[B, 1, 0]`` without classes.

        Raises:
            ValueError: the model has no classes, or not this one.
        """
        import torch

        count = pipe.transformer.config.num_classes or 0
        for text in texts:
            check_class("prompt", text, count)
        labels = [int(text) if text.strip() else count for text in texts][: len(texts) * bool(count)]
        rows = torch.tensor(labels, dtype=torch.float32, device=options.get("device"))
        return rows.view(len(texts), 1, 1 if count else 0)
