"""Plan the video of each task: existing frames, latents denoised window by window, existing frames.

No task has a denoising loop of its own. A window continues the latents of this run, or the encoded frames of a video
that the user gives.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pusa import loading, long_video, media
from pusa.acceleration import offload, step_cache
from pusa.acceleration.decisions import PartPlan
from pusa.acceleration.placement import device_for
from pusa.codes import CodedError
from pusa.conditions import PusaCondition, fit_image
from pusa.events import Checkpoint, Report, Stage, Step
from pusa.generate import drafts
from pusa.generate.checkpoint import DenoisingCheckpoint
from pusa.generate.inputs import Input, frames_used
from pusa.generate.progress import DenoisingProgress, Previews
from pusa.generate.waves import Table, WaveDenoiser
from pusa.models.finite import check_decoded
from pusa.models.frame_skipping import REFRESH_EVERY
from pusa.models.prompt_cache import PromptCache, default_folder, encode_prompts
from pusa.models.vae import DecodeError, DecodeMemoryError, decode_video, is_out_of_memory
from pusa.pipeline import PusaPipeline
from pusa.positions import Span, frames_of, latent_frames
from pusa.request import ResolvedRequest
from pusa.request.prompts import Story
from pusa.waves import wave_steps


@dataclass
class OutputPlan:
    """List the frames of the output: `before`, the decoded `pieces` without `skip` and `drop` frames, `after`.

    The first `skip` decoded frames show the same moments as the last frames of `before`; the last `drop` ones the same
    as the first frames of `after`, or of the video itself if `after` is empty (a loop).
    """

    pieces: Iterable[Tensor]  # normalised latents [1, C, n, h, w], one stream
    before: Iterable[np.ndarray] = ()  # uint8 [H, W, 3]
    skip: int = 0
    drop: int = 0
    after: Iterable[np.ndarray] = ()
    frames: int | None = None  # of the output; None: not known before its end


class Tasks:
    """Plan and denoise the video of a resolved request.

    Args:
        inputs: content of the request's conditions, in their order.
        report: receives events; raises to end the run.
        max_sequence_length: tokens of a prompt.
        previews: shows the video so far.
        checkpoint: holds the latents of an interrupted run, and receives those of this one.
        take_smaller_plan: makes `pipe` run in less memory, after it ran out in the place that is named; False: it
            cannot.
        text_encoder: how a text encoder that is loaded for new prompts runs; None: on the CPU, dropped afterwards.
        device: the accelerator that this plan means by "cuda".
        load_text_encoder: returns one, for a pipeline that has none; None: that of the request's model.
        computes_all: tells if every frame is computed at every step, for lack of memory, though the request does not
            ask for it.
    """

    def __init__(
        self,
        request: ResolvedRequest,
        inputs: Sequence[Input],
        pipe: PusaPipeline,
        report: Report,
        *,
        max_sequence_length: int,
        previews: Previews,
        checkpoint: DenoisingCheckpoint | None = None,
        take_smaller_plan: Callable[[str], bool] = lambda where: False,
        text_encoder: PartPlan | None = None,
        device: str = "cuda",
        load_text_encoder: Callable[[], torch.nn.Module] | None = None,
        computes_all: Callable[[], bool] = lambda: False,
    ) -> None:
        self.request, self.inputs, self.pipe, self.report = request, inputs, pipe, report
        self.max_sequence_length = max_sequence_length
        self.progress, self.previews = DenoisingProgress(report), previews
        self.generator = torch.Generator().manual_seed(request.seed)
        self.checkpoint = checkpoint
        self._take_smaller_plan = take_smaller_plan
        self._last_wave: WaveDenoiser | None = None
        self._reached: tuple[Tensor, int] | None = None  # latents and steps done of this window, to go on from
        self._steps_done = 0  # of this window
        self._computes_all = computes_all
        self._text_encoder = text_encoder
        self._device = torch.device(device)
        self._load_text_encoder = load_text_encoder or partial(loading.load_text_encoder, request.model)
        if checkpoint is not None and checkpoint.generator_state is not None:
            self.generator.set_state(checkpoint.generator_state)
        self.factor = factor = request.frames_per_latent
        if pipe.vae_scale_factor_temporal != factor:
            raise ValueError(
                f"{request.model} is taken for a model with {factor} frames to a latent frame, and its VAE makes one "
                f"of {pipe.vae_scale_factor_temporal}: say so in its pusa.json (frames_per_latent of its defaults)"
            )
        self.window, self.overlap = latent_frames(request.window, factor), latent_frames(request.overlap, factor)

    def plan(self) -> OutputPlan:
        """Plan the output; its latents are denoised as they are read.

        Raises ValueError if inputs, positions or lengths do not fit.
        """
        tasks = {"generate": self.generate, "extend": self.extend, "transition": self.transition, "loop": self.loop}
        return tasks[self.request.task]()

    def generate(self) -> OutputPlan:
        frames = self.request.frames
        conditions = [self._condition(i) for i in self._given]
        return OutputPlan(self._latents(latent_frames(frames, self.factor), conditions), frames=frames)

    def extend(self) -> OutputPlan:
        """Continue a video: its last frames condition the start of the window, and the output shows both."""
        (video,) = self._given
        pieces = self._latents(latent_frames(self.request.frames, self.factor), [self._end_condition(video)])
        return OutputPlan(pieces, before=self._all_frames(video), skip=self.request.overlap)

    def transition(self) -> OutputPlan:
        """Join two videos: the end of the first and the beginning of the second condition the ends of one window."""
        request = self.request
        first, second = self.inputs
        overlap_frames = self._shared_end
        beginning = media.read_video(second.source, fps=request.fps, fit=self._size, max_frames=overlap_frames)
        self._check_length(second, len(beginning), overlap_frames)
        for _ in self._all_frames(second):
            pass  # shown last: find a damaged file before denoising
        window_end = self._window_end_condition(beginning, second.condition.noise, second.condition.fit)
        return OutputPlan(
            self._latents(latent_frames(request.frames, self.factor), [self._end_condition(first), window_end]),
            before=self._all_frames(first),
            skip=request.overlap,
            drop=overlap_frames,
            after=self._all_frames(second),
        )

    def loop(self) -> OutputPlan:
        """Make a clip and a bridge from its end to its beginning, in one stream of latents."""
        clip_length = self.request.clip_length
        conditions = [self._condition(i) for i in self.inputs]
        for condition in conditions:
            index = condition.latent_index
            if isinstance(index, int) and index >= clip_length:
                raise CodedError(
                    "position_in_bridge",
                    f"latent frame {index} of this loop is in the bridge from its end to its beginning: "
                    f"give a place in 0..{clip_length - 1}",
                    latent=index,
                    last=clip_length - 1,
                )

        def pieces() -> Iterator[Tensor]:
            shown: list[Tensor] = []  # the first latent frames, as many as the bridge ends with and one more
            end = torch.empty(0)
            for piece in self._latents(clip_length, conditions, later_steps=self._bridge_steps):
                missing = self.overlap + 1 - sum(part.shape[2] for part in shown)
                shown += [piece[:, :, :missing]] if missing > 0 else []
                end = (piece if end.ndim == 1 else torch.cat([end, piece], 2))[:, :, -self.overlap :]
                yield piece
            beginning = torch.cat(shown, dim=2)
            try:
                decoded = check_decoded(decode_video(self.pipe.vae, beginning), beginning)
            except DecodeMemoryError:
                raise
            except RuntimeError as error:  # marked as one of decoding, as it comes while pieces are made
                raise DecodeError(str(error), beginning) from error
            first_frames = media.to_uint8(decoded)[: self._shared_end]
            ends = [PusaCondition(latents=end[0]), self._window_end_condition(first_frames, 0.0, "crop")]
            yield self._bridge(clip_length, ends)[:, :, self.overlap :]

        return OutputPlan(pieces(), drop=self._shared_end)

    @property
    def _shared_end(self) -> int:
        """Count the frames of the overlap at the end of a window, where no latent frame is the first."""
        return self.factor * self.overlap

    @property
    def _bridge_steps(self) -> int:
        steps, delay = self.request.steps, self.request.delay
        return steps if delay is None else wave_steps(self.request.bridge_length, steps, delay)

    def _bridge(self, clip_length: int, ends: list[PusaCondition]) -> Tensor:
        """Denoise the window of a loop's bridge, ``[1, C, window, h, w]``."""
        if self.request.delay is None:
            return self._denoise(Span(clip_length - self.overlap, self.window, self.overlap), ends)
        return torch.cat(list(self._wave(self.window, ends, first=clip_length - self.overlap).pieces()), dim=2)

    # ---- conditions ----

    @property
    def _size(self) -> tuple[int, int]:
        return self.request.width, self.request.height

    @property
    def _given(self) -> list[Input]:
        """Return the inputs that the request places, which is all but a draft."""
        return [entry for entry in self.inputs if entry.condition.kind != "draft"]

    @cached_property
    def _draft(self) -> drafts.Draft | None:
        """Read the draft that this video is the final of; None if there is none."""
        found = next((entry for entry in self.inputs if entry.condition.kind == "draft"), None)
        return None if found is None else drafts.read(found, self.request)

    def _condition(self, source: Input) -> PusaCondition:
        condition, request = source.condition, self.request
        clip = request.frames, request.fps, self.factor
        indices = [position.latent_index(*clip) for position in condition.positions]
        shared: dict[str, Any] = {
            "noise_multiplier": condition.noise,
            "encode": condition.encode,
            "fit": condition.fit,
        }
        if condition.kind == "image":
            return PusaCondition(image=source.read_image(), latent_index=indices[0], **shared)
        most_frames = frames_used(condition, request)
        frames = media.read_video(source.source, fps=request.fps, fit=self._size, max_frames=most_frames)
        return PusaCondition(video=frames, latent_index=indices or 0, **shared)

    def _end_condition(self, source: Input) -> PusaCondition:
        """Condition the start of a window on the last `overlap` frames of a video."""
        count = self.request.overlap
        frames = media.read_video(source.source, fps=self.request.fps, fit=self._size, last_frames=count)
        self._check_length(source, len(frames), count)
        return PusaCondition(video=frames, noise_multiplier=source.condition.noise, fit=source.condition.fit)

    def _window_end_condition(
        self, frames: np.ndarray, noise: float | list[float], fit: Literal["crop", "letterbox", "stretch"]
    ) -> PusaCondition:
        """Condition the end of a window on frames, `factor` to a latent frame, as everywhere but in the first one."""
        place = -(len(frames) // self.factor)
        return PusaCondition(video=frames, latent_index=place, noise_multiplier=noise, encode="repeat", fit=fit)

    def _all_frames(self, source: Input) -> Iterator[np.ndarray]:
        for frame in media.iter_video(source.source, fps=self.request.fps, fit=self._size):
            yield np.asarray(fit_image(frame, *self._size, source.condition.fit))

    def _check_length(self, source: Input, frames: int, needed: int) -> None:
        if frames < needed:
            raise CodedError(
                "video_too_short",
                f"{source.condition.file} has {frames} frames at {self.request.fps:g} fps, {needed} are taken over: "
                "give a longer video or a smaller overlap",
                name=Path(source.condition.file).name,
                frames=frames,
                fps=self.request.fps,
                needed=needed,
            )

    # ---- denoising ----

    def _latents(self, total: int, conditions: list[PusaCondition], later_steps: int = 0) -> Iterable[Tensor]:
        """Denoise a video of `total` latent frames: a wave, one window at once, or a chain of windows as they are read.

        Args:
            later_steps: steps of windows after this video.
        """
        steps = self.request.steps
        if self.request.delay is not None:
            wave = self._wave(total, conditions)
            self.progress.total_steps = wave.wave.total_steps + later_steps
            return wave.pieces()
        draft = drafts.follow(self._draft, conditions, total, self.request.fps, self.factor)
        if total <= self.window:
            self.progress.total_steps = steps + later_steps
            whole = Span(0, total, 0)
            return [self._denoise(whole, [*conditions, *draft(whole)])]
        spans = long_video.spans(total, self.window, self.overlap)
        self.progress.total_steps = steps * len(spans) + later_steps
        return long_video.chain(
            spans,
            lambda span, ends: self._denoise(span, [*ends, *draft(span)]),
            conditions,
            fps=self.request.fps,
            factor=self.factor,
        )

    def _wave(self, total: int, conditions: list[PusaCondition], first: int = 0) -> WaveDenoiser:
        """Prepare a wave; prompts take its latent frames for those from `first` on."""

        def denoise(middle: float, latents: Tensor, steps_done: int, table: Table) -> Tensor:
            return self._until_it_fits(self._story.at(first + middle), latents.shape[2], [], latents, steps_done, table)

        self._last_wave = WaveDenoiser(
            self.request,
            self.pipe,
            denoise,
            state=lambda: self._reached,
            total=total,
            conditions=conditions,
            window=self.window,
            history=self.overlap,
            progress=self.progress,
            generator=self.generator,
            checkpoint=self.checkpoint,
            shows_early=lambda: not offload.takes_turns(self.pipe.vae),
        )
        return self._last_wave

    def take_smaller_plan(self, where: str) -> bool:
        """Make the pipeline run in less memory; a wave goes on from its last step afterwards. False: it cannot."""
        if self._last_wave is not None:
            self._last_wave.suspend()
        return self._take_smaller_plan(where)

    @cached_property
    def _story(self) -> Story:
        return self.request.place_prompts()

    @cached_property
    def _embeddings(self) -> dict[str, dict[str, Any]]:
        """Encode all prompts once, by their texts; a pipeline without a text encoder reads the disk cache."""
        request = self.request
        texts = list(dict.fromkeys(self._story.texts))
        if self.pipe.text_encoder is None and self.pipe.base.has_text:
            positives, negatives = encode_prompts(
                self.pipe,
                texts,
                request.negative_prompt,
                cache=PromptCache(default_folder()),
                max_sequence_length=self.max_sequence_length,
                guidance_scale=request.guidance,
                load_text_encoder=self._load_text_encoder,
                plan=self._text_encoder,
                device=None if self._text_encoder is None else device_for(self._text_encoder, self._device),
                progress=self._report_encoding,
            )
            rows = positives.split(1)
            negative = None if negatives is None else negatives[:1]
        else:
            self.report(Stage("encode"))
            with torch.no_grad():
                rows, negative = [], None
                for text in texts:  # one by one, as an embedding may depend on its neighbours
                    positive, again = self.pipe.encode_prompt(
                        text,
                        request.negative_prompt,
                        do_classifier_free_guidance=request.guidance > 1 and negative is None,
                        max_sequence_length=self.max_sequence_length,
                    )
                    rows.append(positive)
                    negative = again if negative is None else negative
        return {
            text: {"prompt_embeds": row, "negative_prompt_embeds": negative}
            for text, row in zip(texts, rows, strict=True)
        }

    def _report_encoding(self, done: int, total: int) -> None:
        if not done and self._text_encoder is not None and self._text_encoder.device == "cuda":
            offload.end_turns(self.pipe.components.values())  # a run that was stopped has left its transformer there
        self.report(Step(done, total, stage="encode") if done else Stage("encode", total))

    def _denoise(self, span: Span, conditions: list[PusaCondition]) -> Tensor:
        """Denoise the latents of one window, ``[1, C, length, h, w]``, all frames by the same sigmas."""
        steps = self.request.steps
        latents, steps_done = None, 0
        if self.checkpoint is not None:
            latents, steps_done = self.checkpoint.resume(self.progress.windows_begun, steps)
        self.progress.begin_window(steps_done)
        if latents is not None and steps_done == steps:
            return latents.to(self.pipe._execution_device)
        return self._until_it_fits(self._story.of_window(span), span.length, conditions, latents, steps_done)

    def _until_it_fits(
        self,
        prompt: str,
        length: int,
        conditions: list[PusaCondition],
        latents: Tensor | None,
        steps_done: int,
        table: Table | None = None,
    ) -> Tensor:
        """Do the steps of a window that are left; where memory runs out, go on by smaller plans."""
        request = self.request
        noise_state, self._reached, self._steps_done = self.generator.get_state(), None, steps_done
        while True:
            try:
                return self._call(prompt, length, conditions, latents, steps_done, table)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # After the handler, as the exception holds the failed attempt's tensors until then.
            where = f"step {self._steps_done + 1} of {request.steps if table is None else table.steps}"
            if self._reached is not None:
                latents, steps_done = self._reached
            else:
                self.generator.set_state(noise_state)  # the noise of this window is drawn again
            self.progress.repeat(self._steps_done - steps_done)
            self._steps_done = steps_done
            if not self._take_smaller_plan(where):
                raise torch.OutOfMemoryError(
                    f"out of memory in {where}, at {request.width} x {request.height} and "
                    f"{frames_of(length, self.factor)} frames at once: ask for a smaller size, fewer frames or a "
                    "shorter window"
                )

    def _call(
        self,
        prompt: str,
        length: int,
        conditions: list[PusaCondition],
        latents: Tensor | None,
        steps_done: int,
        table: Table | None,
    ) -> Tensor:
        """Encode the prompts and conditions of a window and denoise it, from `latents` if they are given."""
        request = self.request
        embeddings = self._embeddings[prompt]
        self.previews.prepare(self.pipe)
        self.progress.begin_denoising()
        steps: dict[str, Any] = {"num_inference_steps": request.steps, "start_step": steps_done}
        if table is not None:  # after steps that are never done: latents that may be below pure noise go on from there
            rows = torch.cat([table.sigmas[:1]] * REFRESH_EVERY + [table.sigmas])  # as many as leave refreshes in place
            steps = {"frame_sigmas": rows, "start_step": steps_done + REFRESH_EVERY}
        return self.pipe(
            **embeddings,
            **steps,
            conditions=conditions,
            height=request.height,
            width=request.width,
            num_frames=frames_of(length, self.factor),
            guidance_scale=request.guidance,
            guidance_scale_2=None if self.pipe.config.boundary_ratio is None else request.guidance_2,
            generator=self.generator,
            latents=latents,
            guidance_start=request.guidance_start,
            guidance_stop=request.guidance_stop,
            refresh_every=1 if request.exact or self._computes_all() else REFRESH_EVERY,
            output_type="latent",
            callback_on_step_end=partial(self._after_step, table),
            callback_on_step_end_tensor_inputs=["latents", "denoised"],
            fps=request.fps,
        ).frames

    def _after_step(
        self, table: Table | None, pipe: PusaPipeline, step: int, __: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Any]:
        steps, of_window = (step + 1, self.request.steps) if table is None else (step + 1 - REFRESH_EVERY, table.steps)
        self._steps_done = steps
        steps_done = self.progress.count_step()
        shows = self.previews.is_due(steps_done)
        checkpoint = None
        is_resumable = step_cache.is_resumable(self.request.step_cache, step + 1, pipe.num_timesteps)
        if is_resumable and pipe.frame_schedule.can_resume_at(step + 1):
            self._reached, checkpoint = (tensors["latents"], steps), self.checkpoint
        if shows or (checkpoint is not None and checkpoint.is_due(steps, of_window)):
            pipe.check_finite()  # where the latents are copied anyway
        window = self.progress.windows_begun - 1
        if checkpoint is not None and checkpoint.save(window, tensors["latents"], steps, of_window, self.generator):
            self.report(Checkpoint(checkpoint.path, steps_done))
        self.progress.report_step()
        if shows:
            self.previews.show(pipe, tensors["denoised"])
        if table is not None:
            table.reached(tensors["latents"], steps)
        return {}
