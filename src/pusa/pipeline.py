"""The denoising loop, and around it only what turns conditions into its start and its end into frames."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from pusa.conditions import Placement, PusaCondition, place
from pusa.lora import operations as lora
from pusa.models.defaults import GenerationDefaults
from pusa.models.text_encoder import check_text_encoder
from pusa.models.vae import decode_chunks, decode_video, encode_video
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.positions import latent_frames, nearest_of
from pusa.scheduler import PusaFlowMatchEulerScheduler

logger = logging.getLogger(__name__)

Conditions = Sequence[PusaCondition] | Sequence[Sequence[PusaCondition]]


class PusaPipeline(WanPipeline):
    """`diffusers.WanPipeline` with conditions at any latent frame, through one timestep per latent frame.

    Stock components are taken as they are: transformers become `PusaWanTransformer3DModel` in place, and any other
    scheduler is replaced by `PusaFlowMatchEulerScheduler` (with its shift if it is a flow-matching Euler one, with the
    original's 5 otherwise). `save_pretrained` writes a folder that plain diffusers loads too.
    """

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        transformer: WanTransformer3DModel | PusaWanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | PusaWanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ):
        for expert in (transformer, transformer_2):
            if expert is not None:
                PusaWanTransformer3DModel.from_wan(expert)
        if text_encoder is not None:
            check_text_encoder(text_encoder)
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=_pusa_scheduler(scheduler),
            transformer=transformer,
            transformer_2=transformer_2,
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )
        self.defaults = GenerationDefaults()
        """What a call does not say: size, length, steps, guidance, text length. Wan's, or those of the model loaded."""

    _callback_tensor_inputs = [*WanPipeline._callback_tensor_inputs, "denoised"]  # noqa: RUF012 (as in diffusers)

    # ---- loading, saving, adapters -----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> "PusaPipeline":
        """Load a pipeline, with the `defaults` of its model; an adapter that is part of it ("mini") is attached.

        Args:
            source: a name of the zoo (``pusa models`` lists them), a Hub id or a folder in diffusers layout, or a
                folder as Wan publishes it.
            kwargs: as in `diffusers.DiffusionPipeline.from_pretrained`.

        Raises:
            ValueError, FileNotFoundError: what is missing or does not fit, before anything large is read.
        """
        from pusa import loading, zoo  # the pipeline itself needs no registry

        pipe = loading.load_pipeline(cls, source, **kwargs)
        model = zoo.find(source)
        if model is not None:
            pipe.defaults = model.defaults
            if model.lora is not None and model.folder is not None and "transformer" not in kwargs:
                pipe.load_pusa(model.lora.fetch(), alpha=model.defaults.alpha)
        return pipe

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; the folder names stock classes only, so that it loads without this package.

        Raises:
            ValueError: adapters are attached; their layers would make the folder unreadable.
        """
        if any(lora.adapter_names(model) for model in (self.transformer, self.transformer_2) if model is not None):
            raise ValueError("adapters are attached: export_lora saves them; unload_lora_weights, then save the base")
        super().save_pretrained(save_directory, *args, **kwargs)
        index_file = Path(save_directory) / "model_index.json"
        index = json.loads(index_file.read_text())
        index["_class_name"] = WanPipeline.__name__
        index["scheduler"] = ["diffusers", FlowMatchEulerDiscreteScheduler.__name__]
        for name in ("transformer", "transformer_2"):
            if index.get(name, [None])[0]:
                index[name] = ["diffusers", WanTransformer3DModel.__name__]
        index_file.write_text(json.dumps(index, indent=2) + "\n")

    def load_pusa(self, source: lora.Source, *, alpha: lora.Alpha = 1.4, adapter_name: str = "pusa") -> int:
        """See `pusa.lora.load_pusa`."""
        return lora.load_pusa(self, source, alpha=alpha, adapter_name=adapter_name)

    def set_alpha(self, alpha: lora.Alpha, *, adapter_name: str = "pusa") -> None:
        """See `pusa.lora.set_alpha`."""
        lora.set_alpha(self, alpha, adapter_name=adapter_name)

    def merge_lora(self) -> None:
        """See `pusa.lora.merge_lora`."""
        lora.merge_lora(self)

    def unmerge_lora(self) -> None:
        """See `pusa.lora.unmerge_lora`."""
        lora.unmerge_lora(self)

    def unload_lora_weights(self) -> None:
        """Remove all adapters; see `pusa.lora.unload_lora`."""
        lora.unload_lora(self)

    def export_lora(self, path: str | Path, **kwargs: Any) -> lora.ExportReport:
        """See `pusa.lora.export_lora`."""
        return lora.export_lora(self, path, **kwargs)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether any expert is guided."""
        return max(self._guidance_scale, self._guidance_scale_2) > 1 if self._guidance_scale else False

    # ---- generation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (as in diffusers)
        max_sequence_length: int | None = None,
        *,
        conditions: Conditions | None = None,
        fps: float | None = None,
        frame_sigmas: Tensor | None = None,
        start_step: int = 0,
    ) -> WanPipelineOutput:
        """Generate videos. Arguments that `diffusers.WanPipeline` has mean the same here.

        What is None is taken from `defaults`: for Wan 832 x 480, 81 frames, 10 steps, guidance 3, 512 tokens of text.

        Args:
            prompt: text, or one text per video; or give `prompt_embeds`.
            negative_prompt: what to avoid (Wan's own is `pusa.models.defaults.WAN_NEGATIVE_PROMPT`); unused at guidance 1.
            conditions: what is known: a list of `PusaCondition` for every video, or one list per prompt.
            height, width: pixels; rounded to the multiple of 16 that is nearest (and said).
            num_frames: rounded to the nearest 4n + 1 (and said); latent frames are n + 1.
            num_inference_steps: steps N of the shifted grid.
            guidance_scale: 1 switches classifier-free guidance, and the second pass, off.
            guidance_scale_2: for the low-noise expert of Wan2.2; `guidance_scale` if None.
            latents: ``[B, C, F, h, w]``: the noise to start from, or with `start_step` the latents to go on with.
            callback_on_step_end_tensor_inputs: as in diffusers, and "denoised": the clean latents that the model
                expects at this step, for previews (only to look at).
            output_type: "np" ``[B, 4F - 3, H, W, 3]`` in 0..1, "pt" ``[B, 4F - 3, 3, H, W]``, "pil", or "latent"
                (normalised ``[B, C, F, h, w]``, what `decode` and `PusaCondition` take).
            fps: frames per second, only to place conditions that are given in seconds.
            frame_sigmas: a table ``[N + 1, F]`` of noise levels instead of `num_inference_steps`; see
                `PusaFlowMatchEulerScheduler.set_timesteps` and `wave_sigmas`. Noise multipliers scale its columns.
            start_step: go on after so many steps of the same call, with the `latents` that were reached there (a
                `callback_on_step_end` sees them); equal to the bit to the uninterrupted call.

        Returns:
            `WanPipelineOutput` with `frames`, or a tuple of them.

        Raises:
            ValueError, TypeError: an argument or a condition does not fit; see `PusaCondition` and `place`.
            DecodeMemoryError: decoding ran out of memory; it carries the denoised latents.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        own = self.defaults
        height, width = (
            self._rounded(name, getattr(own, name) if value is None else value)
            for name, value in (("height", height), ("width", width))
        )
        num_frames = self._rounded_frames(own.num_frames if num_frames is None else num_frames)
        num_inference_steps = own.steps if num_inference_steps is None else num_inference_steps
        guidance_scale = own.guidance if guidance_scale is None else guidance_scale
        max_sequence_length = own.max_sequence_length if max_sequence_length is None else max_sequence_length
        fps = own.fps if fps is None else fps
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            prompt_embeds,
            negative_prompt_embeds,
            callback_on_step_end_tensor_inputs,
            guidance_scale_2,
        )
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt={num_videos_per_prompt} is below 1")
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"output_type={output_type!r} is none of 'np', 'pt', 'pil', 'latent'")
        if start_step and latents is None:
            raise ValueError(f"start_step={start_step} needs the latents that were reached there")
        self._guidance_scale = guidance_scale
        self._guidance_scale_2 = guidance_scale if guidance_scale_2 is None else guidance_scale_2
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        device = self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else prompt
        num_prompts = len(prompts) if prompts is not None else prompt_embeds.shape[0]  # type: ignore[union-attr]
        batch_size = num_prompts * num_videos_per_prompt
        shape = self._latent_shape(height, width, num_frames)
        if latents is not None and tuple(latents.shape) != (batch_size, *shape):
            raise ValueError(f"latents of shape {list(latents.shape)}: this call needs {[batch_size, *shape]}")

        known = self._place_conditions(
            conditions,
            num_prompts,
            num_videos_per_prompt,
            shape,
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
        )
        prompt_embeds, negative_prompt_embeds = self._embeddings(
            prompts,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            num_videos_per_prompt,
            max_sequence_length,
        )
        self.scheduler.set_timesteps(
            num_inference_steps if frame_sigmas is None else None,
            device,
            noise_multipliers=None if known is None else known.noise_multipliers,
            frame_sigmas=frame_sigmas,
        )
        if frame_sigmas is not None:
            self._check_table(torch.as_tensor(frame_sigmas).float(), batch_size, shape[1], known, start_step)
        steps = len(self.scheduler.timesteps)
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step={start_step} is outside 0..{steps}")

        latents = self.prepare_latents(
            batch_size, shape[0], height, width, num_frames, torch.float32, device, generator, latents
        )
        if start_step == 0:
            clean = torch.zeros_like(latents) if known is None else known.latents.to(latents)
            latents = self.scheduler.add_noise(clean, latents)

        latents = self._denoise(
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            start_step,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        video = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def _denoise(
        self,
        latents: Tensor,  # [B, C, F, h, w], fp32
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None,
        start_step: int,
        callback: Callable[..., dict[str, Any]] | None,
        callback_tensors: list[str],
    ) -> Tensor:
        """Walk down the sigma table."""
        scheduler = self.scheduler
        scheduler.set_begin_index(start_step)
        self._num_timesteps = steps = len(scheduler.timesteps)
        tensors: dict[str, Any] = {
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        with self.progress_bar(total=steps - start_step) as progress:
            for k in range(start_step, steps):
                if self.interrupt:
                    break
                self._current_timestep = t = scheduler.timesteps[k]
                x = tensors["latents"]
                v = self._velocity(k, **tensors)
                tensors["latents"] = scheduler.step(v, t, x, return_dict=False)[0]
                if callback is not None:
                    seen = dict(tensors)
                    if "denoised" in callback_tensors:
                        seen["denoised"] = scheduler.denoised(k, v, x)
                    changed = callback(self, k, t, {name: seen[name] for name in callback_tensors})
                    tensors |= {name: changed[name] for name in tensors.keys() & changed.keys()}
                progress.update()
        self._current_timestep = None
        return tensors["latents"]

    def _velocity(
        self, k: int, latents: Tensor, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None
    ) -> Tensor:
        """The guided velocity at step k, ``[B, C, F, h, w]``."""
        sigma = float(self.scheduler.sigmas[k])
        model, guidance = self._expert(sigma)
        x = latents.to(model.dtype)
        timesteps = self.scheduler.frame_timesteps(k).expand(x.shape[0], x.shape[2])  # [B, F]

        def predict(name: str, text: Tensor) -> Tensor:
            with model.cache_context(name, step_index=k, sigma=sigma, num_inference_steps=self._num_timesteps):
                return model(
                    hidden_states=x,
                    timestep=timesteps,
                    encoder_hidden_states=text.to(x.dtype),
                    attention_kwargs=self._attention_kwargs,
                    return_dict=False,
                )[0]

        v = predict("cond", prompt_embeds)
        if negative_prompt_embeds is None or guidance <= 1 or not self.do_classifier_free_guidance:
            return v
        v_uncond = predict("uncond", negative_prompt_embeds)
        return v_uncond + guidance * (v - v_uncond)

    def _expert(self, sigma: float) -> tuple[PusaWanTransformer3DModel, float]:
        """The transformer for this noise level, and its guidance. Wan2.2 goes by the base level, not by the frame's."""
        boundary = self.config.boundary_ratio
        if boundary is None or sigma >= boundary:
            return self.transformer, self._guidance_scale
        return self.transformer_2, self._guidance_scale_2

    @torch.no_grad()
    def encode_frames(self, video: Tensor) -> Tensor:
        """Frames ``[B, 3, 4n + 1, H, W]`` in -1..1 to normalised latents; see `pusa.models.vae.encode_video`."""
        return encode_video(self.vae, video)

    def decode(self, latents: Tensor, output_type: str = "np") -> Any:
        """Normalised latents ``[B, C, F, h, w]`` to frames of `output_type`; see `pusa.models.vae.decode_video`."""
        return self.video_processor.postprocess_video(decode_video(self.vae, latents), output_type=output_type)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames ``[B, 3, n, H, W]`` in -1..1 as soon as they are decoded; see `pusa.models.vae.decode_chunks`."""
        return decode_chunks(self.vae, latents)

    # ---- preparation -------------------------------------------------------------------------------------------

    def _any_transformer(self) -> PusaWanTransformer3DModel:
        return self.transformer if self.transformer is not None else self.transformer_2

    def _rounded(self, name: str, value: int) -> int:
        multiple = self.vae_scale_factor_spatial * self._any_transformer().config.patch_size[1]
        return _rounded(name, value, multiple)

    def _rounded_frames(self, num_frames: int) -> int:
        return _rounded("num_frames", num_frames, self.vae_scale_factor_temporal, 1)

    def _latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        scale = self.vae_scale_factor_spatial
        frames = latent_frames(num_frames, self.vae_scale_factor_temporal)
        return self._any_transformer().config.in_channels, frames, height // scale, width // scale

    def _place_conditions(
        self,
        conditions: Conditions | None,
        num_prompts: int,
        num_videos_per_prompt: int,
        shape: tuple[int, int, int, int],
        **clip: Any,
    ) -> Placement | None:
        """Known latents ``[B or 1, C, F, h, w]`` and multipliers ``[B or 1, F]``."""
        if isinstance(conditions, PusaCondition):
            raise TypeError("conditions is one PusaCondition: give a list of them")
        if not conditions:
            return None
        per_prompt = not isinstance(conditions[0], PusaCondition)
        lists: list[Any] = list(conditions) if per_prompt else [conditions]
        lists = [[self._with_own_encoding(condition) for condition in one] for one in lists]
        if per_prompt and len(lists) != num_prompts:
            raise ValueError(f"{len(lists)} lists of conditions for {num_prompts} prompts: give one for each")
        placements = [
            place(one, encode=self.encode_frames, shape=shape, factor=self.vae_scale_factor_temporal, **clip)
            for one in lists
        ]
        repeats = num_videos_per_prompt if per_prompt else 1
        return Placement(
            latents=torch.stack([p.latents for p in placements]).repeat_interleave(repeats, 0),
            noise_multipliers=torch.stack([p.noise_multipliers for p in placements]).repeat_interleave(repeats, 0),
        )

    def _with_own_encoding(self, condition: PusaCondition) -> PusaCondition:
        if not isinstance(condition, PusaCondition) or condition.image is None or condition.encode is not None:
            return condition
        return replace(condition, encode=self.defaults.encode)

    def _check_table(
        self, levels: Tensor, batch_size: int, frames: int, known: Placement | None, start_step: int
    ) -> None:
        """Whether a table that a user gives is for this call."""
        _, table_videos, table_frames = self.scheduler.frame_sigmas.shape
        if table_videos not in (1, batch_size):
            raise ValueError(f"frame_sigmas is for {table_videos} videos, this call makes {batch_size}")
        if table_frames not in (1, frames):
            raise ValueError(f"frame_sigmas has {table_frames} latent frames, this video has {frames}")
        free = torch.ones(frames, dtype=torch.bool) if known is None else (known.noise_multipliers == 1).all(0)
        if self.config.boundary_ratio is not None:
            highest = levels.flatten(1).amax(1)[:-1]
            walking = torch.where(levels[:-1] > 0, levels[:-1], 1.0).flatten(1).amin(1)
            if bool(((highest >= self.config.boundary_ratio) & (walking < self.config.boundary_ratio)).any()):
                raise ValueError(
                    "frame_sigmas has frames on both sides of the boundary between the two experts at one step: "
                    "waves need a model with one transformer"
                )
        starts = levels[0].expand(*levels.shape[1:-1], frames)
        if bool((starts[..., free] < 1).any()) and start_step == 0:
            raise ValueError("frame_sigmas starts below 1 where nothing is known: give latents and start_step to go on")

    def _embeddings(
        self,
        prompts: list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        num_videos_per_prompt: int,
        max_sequence_length: int,
    ) -> tuple[Tensor, Tensor | None]:
        """One row per video; embeddings that are given are repeated for the videos of each prompt, as texts are."""
        given = prompt_embeds, negative_prompt_embeds
        positive, negative = self.encode_prompt(
            prompt=prompts,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        positive, negative = (
            embeds if source is None else source.to(self._execution_device).repeat_interleave(num_videos_per_prompt, 0)
            for embeds, source in zip((positive, negative), given, strict=True)
        )
        return positive, negative if self.do_classifier_free_guidance else None


def _rounded(name: str, value: int, multiple: int, offset: int = 0) -> int:
    if value < 1:
        raise ValueError(f"{name}={value} is below 1")
    rounded = nearest_of(value, multiple, offset)
    if rounded != value:
        rule = f"{multiple}n + {offset}" if offset else f"a multiple of {multiple}"
        logger.warning("%s=%d becomes %d: it must be %s", name, value, rounded, rule)
    return rounded


def _pusa_scheduler(scheduler: SchedulerMixin) -> PusaFlowMatchEulerScheduler:
    if isinstance(scheduler, PusaFlowMatchEulerScheduler):
        return scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return PusaFlowMatchEulerScheduler(shift=scheduler.config.shift)
    return PusaFlowMatchEulerScheduler()
