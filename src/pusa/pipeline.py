"""Denoise latents down a table with one sigma per latent frame, from conditions and prompts to frames."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    DiffusionPipeline,
    SchedulerMixin,
    WanPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import get_module_execution_device
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pusa.conditions import Conditions, Placement, place_for_prompts
from pusa.defaults import ClipSize, GenerationDefaults, clip_size
from pusa.lora import operations as lora
from pusa.lora.sources import EXPERTS
from pusa.models.bases import Base, base_of
from pusa.models.bases.transformers import Transformer
from pusa.models.finite import FiniteSteps, NotFiniteError, check_decoded, is_finite
from pusa.models.frame_skipping import FrameSchedule, frame_obstacle
from pusa.models.parts import PARTS, check_experts, check_together
from pusa.models.passes import LocalPasses, StepInputs, check_range, is_in_range
from pusa.models.text_encoder import check_text_encoder
from pusa.models.vae import codec_of, decode_chunks, decode_video, encode_video
from pusa.scheduler import check_scheduler, check_start, check_table

logger = logging.getLogger(__name__)


class PusaPipeline(WanPipeline):
    """`diffusers.WanPipeline` with conditions at any latent frame, through one timestep per latent frame.

    The constructor takes stock components, of Wan or of another base (`pusa.models.bases`): it turns transformers into
    the class of theirs that takes a timestep per latent frame, in place, and replaces other schedulers by the base's
    (Wan's: `PusaFlowMatchEulerScheduler` with the shift of a flow-matching Euler one, else the original's 5, and a
    warning); one assigned later must be such a one. `save_pretrained` writes a folder that plain diffusers loads too.

    Attributes:
        defaults: values for the arguments that a call leaves None: Wan's, or those of the model loaded.
        base: how this kind of transformer is driven.
        normalize_conditions: False gives the transformer pictures and videos as the VAE encodes them, as Pusa V0.5 was
            published; the result is decoded from normalised latents, so that a kept frame changes its colours.
        passes: runs the transformer; `pusa.acceleration.parallel.enable` shares the work among processes.
        frame_schedule: the latent frames that each step of the last call computes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        vae: AutoencoderKLWan | AutoencoderKLMochi | AutoencoderKL,
        scheduler: SchedulerMixin,
        transformer: Transformer | None = None,
        transformer_2: Transformer | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ):
        DiffusionPipeline.__init__(self)  # the constructor above knows Wan's VAE only
        self.base: Base = base_of(transformer or transformer_2)
        for expert in (transformer, transformer_2):
            if expert is not None:
                self.base.adopt(expert)
        if text_encoder is not None:
            check_text_encoder(text_encoder)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=self.base.scheduler_for(scheduler),
            transformer_2=transformer_2,
        )
        self.register_to_config(boundary_ratio=boundary_ratio, expand_timesteps=expand_timesteps)
        codec = None if vae is None else codec_of(vae)
        self.vae_scale_factor_temporal = codec.frames_per_latent(vae) if codec else self.base.defaults.frames_per_latent
        self.vae_scale_factor_spatial = codec.pixels_per_latent(vae) if codec else 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        self.normalize_conditions = True
        self.passes: LocalPasses = LocalPasses()
        self.frame_schedule = FrameSchedule()
        configs = self._configs()
        model = configs.get("transformer", configs.get("transformer_2", {}))
        self.defaults: GenerationDefaults = self.base.defaults_of(model, configs.get("vae", {}))
        check_together(configs, boundary_ratio, self.base)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            check_scheduler(value)
        super().__setattr__(name, value)

    def _configs(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in PARTS}
        return {name: part.config for name, part in found.items() if part is not None and hasattr(part, "config")}

    _callback_tensor_inputs = [*WanPipeline._callback_tensor_inputs, "denoised"]  # noqa: RUF012 (as in diffusers)

    # ---- loading, saving, adapters -----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> "PusaPipeline":
        """Load a pipeline with the `defaults` of its model, and attach the adapter in its folder ("mini" has one).

        Args:
            source: a name of the zoo (``pusa models`` lists them), a Hub id or a folder in diffusers layout, or a
                folder as Wan publishes it, or ComfyUI's folder of models.
            kwargs: as in `pusa.loading.load_pipeline`, such as ``files={"transformer": path, ...}`` for single files in
                place of the source's parts, and `diffusers.DiffusionPipeline.from_pretrained`.

        Raises:
            ValueError, FileNotFoundError: something is missing or does not fit; raised before anything large is read.
        """
        from pusa import loading, zoo  # here, as a pipeline made of parts needs no registry

        pipe = loading.load_pipeline(cls, source, **kwargs)
        model = zoo.find(source)
        if model is not None:
            pipe.defaults = model.defaults
            own = "transformer" not in kwargs and "transformer" not in (kwargs.get("files") or {})
            if model.lora is not None and model.is_ours and own:
                pipe.load_pusa(model.lora.fetch(), alpha=model.defaults.alpha)
        return pipe

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as in diffusers, under the names of stock classes, so that the folder loads without this package.

        Raises:
            ValueError: adapters are attached; their layers would make the folder unreadable.
        """
        if any(lora.adapter_names(model) for model in (self.transformer, self.transformer_2) if model is not None):
            raise ValueError("adapters are attached: export_lora saves them; unload_lora_weights, then save the base")
        super().save_pretrained(save_directory, *args, **kwargs)
        index_file = Path(save_directory) / "model_index.json"
        index = json.loads(index_file.read_text())
        index_file.write_text(json.dumps(self.base.saved_index(index), indent=2) + "\n")

    load_pusa = lora.load_pusa
    set_alpha = lora.set_alpha
    merge_lora = lora.merge_lora
    unmerge_lora = lora.unmerge_lora
    export_lora = lora.export_lora
    unload_lora_weights = lora.unload_lora

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if a guidance scale of any expert is above 1."""
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
        refresh_every: int = 1,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
    ) -> WanPipelineOutput:
        """Generate videos. Arguments that `diffusers.WanPipeline` has mean the same here.

        Arguments that are None have the value of `defaults`; Wan's are 832 x 480, 81 frames, 10 steps, guidance 3.

        Args:
            prompt: text, or one text per video; or give `prompt_embeds`.
            negative_prompt: what to avoid (Wan's: `pusa.defaults.WAN_NEGATIVE_PROMPT`); unused at guidance 1.
            conditions: a list of `PusaCondition` for every video, or one list per prompt.
            height, width: pixels; rounded to the nearest multiple of 16 (32 for TI2V-5B), with a warning.
            num_frames: rounded to whole latent frames, with a warning; n + 1 are 4n + 1 frames of Wan, 6n + 1 of Mochi.
            num_inference_steps: steps N of the shifted grid.
            guidance_scale: 1 switches classifier-free guidance, and the second pass, off.
            guidance_scale_2: for the low-noise expert of Wan2.2; `guidance_scale` if None.
            latents: ``[B, C, F, h, w]``: the noise to start from, or with `start_step` the latents after that step.
            callback_on_step_end_tensor_inputs: as in diffusers, and "denoised": the clean latents that the model
                expects at this step, for previews; changing them has no effect.
            output_type: "np" ``[B, frames, H, W, 3]`` in 0..1, "pt" ``[B, frames, 3, H, W]``, "pil", or "latent"
                (normalised ``[B, C, F, h, w]``, as `decode` and `PusaCondition` take).
            fps: frames per second; only positions of conditions in seconds depend on it.
            frame_sigmas: a table ``[N + 1, F]`` of sigmas instead of `num_inference_steps`; see
                `PusaFlowMatchEulerScheduler.set_timesteps` and `wave_sigmas`. Noise multipliers scale its columns.
            start_step: resume a call after this many steps, from `latents` that its callback saw: equal to the bit,
                where `frame_schedule.can_resume_at` is true.
            refresh_every: 1 computes every latent frame at every step. Else those that do not move (kept, finished, not
                begun yet) are computed at the steps that are multiples of this only: `models.frame_skipping`.
            guidance_start, guidance_stop: parts of the steps, 0..1, between which they are guided, as `start` and
                `stop` of diffusers' guiders; others are one pass.

        Returns:
            `WanPipelineOutput` with `frames`, or a tuple of them.

        Raises:
            ValueError, TypeError: an argument or a condition does not fit; see `PusaCondition` and `place`.
            NotFiniteError: NaN or infinity; it names the step and the transformer, the text encoder or the VAE.
            DecodeMemoryError: decoding ran out of memory; it carries the denoised latents.
        """
        # 1. Check inputs
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        size = self._resolve_size(height, width, num_frames)
        texts = prompt, negative_prompt, size.height, size.width, prompt_embeds, negative_prompt_embeds
        self.check_inputs(*texts, callback_on_step_end_tensor_inputs, guidance_scale_2)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        num_prompts = len(prompts) if prompts is not None else prompt_embeds.shape[0]  # type: ignore[union-attr]
        batch_size = num_prompts * num_videos_per_prompt
        shape, tensors = (batch_size, *size.shape), (latents, prompt_embeds, negative_prompt_embeds)
        self._check_call(shape, num_videos_per_prompt, output_type, *tensors, start_step)
        self._set_guidance(guidance_scale, guidance_scale_2, guidance_start, guidance_stop)
        self._attention_kwargs, self._interrupt = attention_kwargs, False

        # 2. Encode conditions
        placement = self._place_conditions(conditions, num_prompts, num_videos_per_prompt, size, fps)

        # 3. Encode prompts
        prompt_embeds, negative_prompt_embeds = self._encode_prompts(
            prompts, negative_prompt, prompt_embeds, negative_prompt_embeds, num_videos_per_prompt, max_sequence_length
        )

        # 4. Prepare the sigma table
        self._set_timesteps(num_inference_steps, frame_sigmas, placement, batch_size, size.shape[1], start_step)
        moves = self.scheduler.moves.expand(-1, size.shape[1])
        self.frame_schedule = FrameSchedule.of(moves, 1 if frame_obstacle(self) else refresh_every)

        # 5. Prepare latents
        latents = self.prepare_latents(
            batch_size, size.shape[0], size.height, size.width, size.num_frames,
            torch.float32, self._execution_device, generator, latents,
        )  # fmt: skip
        if start_step == 0:
            clean = torch.zeros_like(latents) if placement is None else placement.latents.to(latents)
            latents = self.scheduler.add_noise(clean, latents)

        # 6. Denoise
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        latents = self._denoise(latents, prompt_embeds, negative_prompt_embeds, start_step, *callback)

        # 7. Decode
        video = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def _denoise(
        self,
        latents: Tensor,  # [B, C, F, h, w], fp32
        prompt_embeds: Tensor,  # [B, text, D]
        negative_prompt_embeds: Tensor | None,  # [B, text, D]
        start_step: int,
        callback: Callable[..., dict[str, Any]] | None,
        callback_tensors: list[str],
    ) -> Tensor:
        """Walk down the sigma table from `start_step` to its last row; return the latents ``[B, C, F, h, w]``."""
        scheduler = self.scheduler
        scheduler.set_begin_index(start_step)
        self._num_timesteps = steps = len(scheduler.timesteps)
        tensors: dict[str, Any] = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        self._finite = FiniteSteps(start_step, steps)
        with self.passes.call(latents) as tensors["latents"], self.progress_bar(total=steps - start_step) as progress:
            for k in range(start_step, steps):
                if self.passes.is_stopped(self.interrupt):
                    break
                self._current_timestep = t = scheduler.timesteps[k]
                x = tensors["latents"]
                v = self._velocity(k, **tensors)
                tensors["latents"] = scheduler.step(v, t, x, return_dict=False)[0]
                self._finite.record(tensors["latents"], self._expert(k)[0])
                if callback is not None:
                    visible = dict(tensors)
                    if "denoised" in callback_tensors:
                        visible["denoised"] = scheduler.denoised(k, v, x)
                    changed = callback(self, k, t, {name: visible[name] for name in callback_tensors})
                    tensors |= {name: changed[name] for name in tensors.keys() & changed.keys()}
                progress.update()
        self._current_timestep = None
        self.check_finite()
        return tensors["latents"]

    def check_finite(self) -> None:
        """Raise NotFiniteError for the first step so far whose latents are not finite; it waits for the device."""
        self._finite.check()

    def _velocity(
        self, k: int, latents: Tensor, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None
    ) -> Tensor:
        """Predict the guided velocity at step k, ``[B, C, F, h, w]``."""
        expert, guidance = self._expert(k)
        model = getattr(self, expert)
        x = latents.to(get_module_execution_device(model), model.dtype)  # each expert may have a card of its own
        prompts: tuple[Tensor, ...] = (prompt_embeds,)
        is_guided = self.do_classifier_free_guidance and is_in_range(k, self._num_timesteps, *self._guidance_range)
        if negative_prompt_embeds is not None and guidance > 1 and is_guided:
            prompts = prompt_embeds, negative_prompt_embeds
        inputs = StepInputs(
            *(expert, k, self._num_timesteps, float(self.scheduler.sigmas[k])),
            latents=x,
            timesteps=self.base.timesteps(self.scheduler, k).expand(x.shape[0], x.shape[2]).to(x.device),  # [B, F]
            prompts=prompts,
            attention_kwargs=self._attention_kwargs,
            frames=self.frame_schedule.at(k),
        )
        v, *v_uncond = [velocity.to(latents.device) for velocity in self.passes.run(self, inputs)]
        return v_uncond[0] + guidance * (v - v_uncond[0]) if v_uncond else v

    def _expert(self, k: int) -> tuple[str, float]:
        """Choose the transformer and its guidance scale by the highest timestep of step k, as Wan2.2 does."""
        boundary, scale = self.config.boundary_ratio, self.scheduler.config.num_train_timesteps
        if boundary is None or float(self.scheduler.highest_sigmas[k] * scale) >= boundary * scale:
            return "transformer", self._guidance_scale
        return "transformer_2", self._guidance_scale_2

    @torch.no_grad()
    def encode_frames(self, video: Tensor) -> Tensor:
        """Encode frames ``[B, 3, n, H, W]`` in -1..1 to normalised latents; see `vae.encode_video`."""
        return encode_video(self.vae, video, normalize=self.normalize_conditions)

    def decode(self, latents: Tensor, output_type: str = "np") -> Any:
        """Decode normalised latents ``[B, C, F, h, w]`` to frames of `output_type`; see `vae.decode_video`."""
        return self.video_processor.postprocess_video(
            check_decoded(decode_video(self.vae, latents), latents), output_type=output_type
        )

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield frames ``[B, 3, n, H, W]`` in -1..1 as soon as they are decoded; see `vae.decode_chunks`."""
        return decode_chunks(self.vae, latents)

    # ---- preparation -------------------------------------------------------------------------------------------

    def _resolve_size(self, height: int | None, width: int | None, num_frames: int | None) -> ClipSize:
        """Fill in the size from `defaults`, and round it to whole patches and latent frames."""
        model = (self.transformer or self.transformer_2).config
        return clip_size(
            self.defaults, height, width, num_frames,
            channels=model.in_channels,
            patch=self.base.patch(model)[1],
            spatial_factor=self.vae_scale_factor_spatial,
            temporal_factor=self.vae_scale_factor_temporal,
        )  # fmt: skip

    def _check_call(
        self,
        shape: tuple[int, ...],
        num_videos_per_prompt: int,
        output_type: str,
        latents: Tensor | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        start_step: int,
    ) -> None:
        check_together(self._configs(), self.config.boundary_ratio, self.base)
        check_experts([name for name in EXPERTS if getattr(self, name) is not None], self.config.boundary_ratio)
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt={num_videos_per_prompt} is below 1")
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"output_type={output_type!r} is none of 'np', 'pt', 'pil', 'latent'")
        if start_step and latents is None:
            raise ValueError(f"start_step={start_step} needs the latents that were reached there")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {list(latents.shape)}: this call needs {list(shape)}")
        given = {"latents": latents, "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        if bad := next((name for name, value in given.items() if value is not None and not is_finite(value)), None):
            raise ValueError(f"{bad} holds NaN or infinity: give others")

    def _set_guidance(self, scale: float | None, scale_2: float | None, start: float = 0.0, stop: float = 1.0) -> None:
        check_range(start, stop)
        self._guidance_scale = self.defaults.guidance if scale is None else scale
        self._guidance_scale_2 = self._guidance_scale if scale_2 is None else scale_2
        self._guidance_range = start, stop

    def _place_conditions(
        self,
        conditions: Conditions | None,
        num_prompts: int,
        num_videos_per_prompt: int,
        size: ClipSize,
        fps: float | None,
    ) -> Placement | None:
        """Encode conditions to latents ``[B or 1, C, F, h, w]`` and noise multipliers ``[B or 1, F]``."""
        placement = place_for_prompts(
            conditions,
            num_prompts,
            num_videos_per_prompt,
            default_encode=self.defaults.encode,
            encode=self.encode_frames,
            shape=size.shape,
            num_frames=size.num_frames,
            height=size.height,
            width=size.width,
            fps=self.defaults.fps if fps is None else fps,
            factor=self.vae_scale_factor_temporal,
        )
        if placement is not None and not is_finite(placement.latents):
            raise NotFiniteError(
                "the latents of a condition hold NaN or infinity: load the VAE in fp32, or give others", "vae"
            )
        return placement

    def _set_timesteps(
        self,
        num_inference_steps: int | None,
        frame_sigmas: Tensor | None,
        placement: Placement | None,
        batch_size: int,
        frames: int,
        start_step: int,
    ) -> None:
        """Set the scheduler's table, and check that it fits this call.

        Raises:
            ValueError: see `check_table` and `check_start`; `start_step` is outside the table.
        """
        grid_steps = self.defaults.steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(
            grid_steps if frame_sigmas is None else None,
            self._execution_device,
            noise_multipliers=None if placement is None else placement.noise_multipliers,
            frame_sigmas=frame_sigmas,
        )
        if frame_sigmas is not None:
            table = torch.as_tensor(frame_sigmas).float()
            check_table(self.scheduler, table, batch_size, frames, self.config.boundary_ratio)
            if start_step == 0:
                check_start(table, frames, None if placement is None else placement.noise_multipliers)
        steps = len(self.scheduler.timesteps)
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step={start_step} is outside 0..{steps}")

    def _encode_prompts(
        self,
        prompts: list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        num_videos_per_prompt: int,
        max_sequence_length: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts to one row per video; repeat the rows of embeddings that the caller gives, too."""
        sources = prompt_embeds, negative_prompt_embeds
        encoded = self.encode_prompt(
            prompt=prompts,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length or self.defaults.max_sequence_length,
        )
        positive, negative = (
            embeds if source is None else source.to(self._execution_device).repeat_interleave(num_videos_per_prompt, 0)
            for embeds, source in zip(encoded, sources, strict=True)
        )
        if not all(is_finite(embeds) for embeds in (positive, negative) if embeds is not None):
            raise NotFiniteError(
                "the text_encoder has computed NaN or infinity: load it in bf16 or fp32", "text_encoder"
            )
        dtype = (self.transformer or self.transformer_2).dtype  # once: a new tensor at each step is a new prompt
        is_guided = negative is not None and self.do_classifier_free_guidance
        trimmed = self.base.trimmed
        return trimmed(positive).to(dtype), trimmed(negative).to(dtype) if is_guided else None

    def _get_t5_prompt_embeds(
        self, prompt: str | list[str], num_videos_per_prompt: int = 1, max_sequence_length: int = 512, **options: Any
    ) -> Tensor:
        """Encode texts by the base, for `encode_prompt`."""
        texts = [prompt] if isinstance(prompt, str) else prompt
        embeds = self.base.encode_texts(self, texts, max_sequence_length=max_sequence_length, **options)
        return embeds.repeat_interleave(num_videos_per_prompt, 0)
