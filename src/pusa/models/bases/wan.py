"""Describe Wan2.1 and Wan2.2 as a base: 4 frames to a latent one, timestep 1000 * sigma, the velocity noise - data."""

from typing import TYPE_CHECKING, Any

from pusa.defaults import TI2V_DEFAULTS, WAN_DEFAULTS, GenerationDefaults
from pusa.models.bases.base import Base, Config
from pusa.models.files import check_text_to_video

if TYPE_CHECKING:
    from torch import Tensor


class WanBase(Base):
    """Drive `PusaWanTransformer3DModel`, of every Wan text-to-video model."""

    name = "Wan"
    defaults = WAN_DEFAULTS
    transformer_classes = ("WanTransformer3DModel", "PusaWanTransformer3DModel")
    libraries = {  # noqa: RUF012
        "transformer": ("diffusers", "WanTransformer3DModel"),
        "transformer_2": ("diffusers", "WanTransformer3DModel"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    }
    pipeline_class = "WanPipeline"
    foreign_options = ()
    skips_frames = True
    conditions_note = (
        "no Pusa LoRA is loaded: unless one is merged into these weights, images and videos will not be followed "
        "well; --lora FILE adds one"
    )
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    is_estimated = True
    lora_layouts = ("comfyui", "diffusers", "original")

    def check_config(self, config: Config, where: str) -> None:
        check_text_to_video(config, where)

    def defaults_of(self, transformer: Config, vae: Config) -> GenerationDefaults:
        """Return Wan2.1's defaults, or TI2V-5B's for its VAE's pixels and channels."""
        is_ti2v = transformer.get("in_channels") == 48 and vae.get("scale_factor_spatial") == 16
        return TI2V_DEFAULTS if is_ti2v else self.defaults

    def channels(self, transformer: Config) -> int | None:
        return transformer.get("out_channels")  # its image-to-video models take more, and are refused elsewhere

    def patch(self, transformer: Config) -> tuple[int, int, int]:
        time, height, width = transformer["patch_size"]
        return time, height, width

    def text_width(self, transformer: Config) -> int | None:
        return transformer.get("text_dim")

    def adopt(self, transformer: Any) -> Any:
        from pusa.models.wan import PusaWanTransformer3DModel

        return PusaWanTransformer3DModel.from_wan(transformer)

    def timesteps_of(self, sigmas: "Tensor") -> "Tensor":
        return 1000 * sigmas

    def scheduler_for(self, scheduler: Any) -> Any:
        from pusa.scheduler import from_other

        return from_other(scheduler)
