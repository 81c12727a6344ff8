"""Plan the video of each task: existing frames, latents denoised window by window, existing frames.

No task has a denoising loop of its own. A window continues the latents of this run, or the encoded frames of a video
that the user gives.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pusa import loading, long_video, media
from pusa.acceleration import offload
from pusa.acceleration.decisions import PartPlan
from pusa.acceleration.placement import device_for
from pusa.conditions import PusaCondition, fit_image
from pusa.events import Checkpoint, Report, Stage, Step
from pusa.generate.checkpoint import DenoisingCheckpoint
from pusa.generate.inputs import Input, frames_used
from pusa.generate.progress import DenoisingProgress, Previews
from pusa.models.finite import check_decoded
from pusa.models.prompt_cache import PromptCache, default_folder, encode_prompts
from pusa.models.vae import DecodeError, DecodeMemoryError, decode_video, is_out_of_memory
from pusa.pipeline import PusaPipeline
from pusa.positions import frames_of, latent_frames
from pusa.request import ResolvedRequest


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
    ) -> None:
        self.request, self.inputs, self.pipe, self.report = request, inputs, pipe, report
        self.max_sequence_length = max_sequence_length
        self.progress, self.previews = DenoisingProgress(report), previews
        self.generator = torch.Generator().manual_seed(request.seed)
        self.checkpoint = checkpoint
        self._take_smaller_plan = take_smaller_plan
        self._reached: tuple[Tensor, int] | None = None  # latents and steps done of the window that is being denoised
        self._text_encoder = text_encoder
        self._device = torch.device(device)
        self._load_text_encoder = load_text_encoder or partial(loading.load_text_encoder, request.model)
        if checkpoint is not None and checkpoint.generator_state is not None:
            self.generator.set_state(checkpoint.generator_state)
        self.window, self.overlap = latent_frames(request.window), latent_frames(request.overlap)

    def plan(self) -> OutputPlan:
        """Plan the output; its latents are denoised as they are read.

        Raises ValueError if inputs, positions or lengths do not fit.
        """
        tasks = {"generate": self.generate, "extend": self.extend, "transition": self.transition, "loop": self.loop}
        return tasks[self.request.task]()

    def generate(self) -> OutputPlan:
        return OutputPlan(self._latents(latent_frames(self.request.frames), [self._condition(i) for i in self.inputs]))

    def extend(self) -> OutputPlan:
        """Continue a video: its last frames condition the start of the window, and the output shows both."""
        (video,) = self.inputs
        pieces = self._latents(latent_frames(self.request.frames), [self._end_condition(video)])
        return OutputPlan(pieces, before=self._all_frames(video), skip=self.request.overlap)

    def transition(self) -> OutputPlan:
        """Join two videos: the end of the first and the beginning of the second condition the ends of one window."""
        request = self.request
        first, second = self.inputs
        overlap_frames = 4 * self.overlap  # a latent frame holds four frames, except the first
        beginning = media.read_video(second.source, fps=request.fps, fit=self._size, max_frames=overlap_frames)
        self._check_length(second, len(beginning), overlap_frames)
        for _ in self._all_frames(second):
            pass  # shown last: find a damaged file before denoising
        window_end = _window_end_condition(beginning, second.condition.noise, second.condition.fit)
        return OutputPlan(
            self._latents(latent_frames(request.frames), [self._end_condition(first), window_end]),
            before=self._all_frames(first),
            skip=request.overlap,
            drop=overlap_frames,
            after=self._all_frames(second),
        )

    def loop(self) -> OutputPlan:
        """Make a clip and a bridge from its end to its beginning, in one stream of latents."""
        bridge_length = self.window - 2 * self.overlap
        clip_length = latent_frames(self.request.frames) - bridge_length
        conditions = [self._condition(i) for i in self.inputs]
        for condition in conditions:
            index = condition.latent_index
            if isinstance(index, int) and index >= clip_length:
                raise ValueError(
                    f"latent frame {index} of this loop is in the bridge from its end to its beginning: "
                    f"give a place in 0..{clip_length - 1}"
                )

        def pieces() -> Iterator[Tensor]:
            beginning = end = torch.empty(0)
            for piece in self._latents(clip_length, conditions, later_windows=1):
                beginning = piece[:, :, : self.overlap + 1] if beginning.ndim == 1 else beginning
                end = (piece if end.ndim == 1 else torch.cat([end, piece], 2))[:, :, -self.overlap :]
                yield piece
            try:
                decoded = check_decoded(decode_video(self.pipe.vae, beginning), beginning)
            except DecodeMemoryError:
                raise
            except RuntimeError as error:  # marked as one of decoding, as it comes while pieces are made
                raise DecodeError(str(error), beginning) from error
            first_frames = media.to_uint8(decoded)[: 4 * self.overlap]
            ends = [PusaCondition(latents=end[0]), _window_end_condition(first_frames, 0.0, "crop")]
            yield self._denoise(self.window, ends)[:, :, self.overlap :]

        return OutputPlan(pieces(), drop=4 * self.overlap)

    # ---- conditions ----

    @property
    def _size(self) -> tuple[int, int]:
        return self.request.width, self.request.height

    def _condition(self, source: Input) -> PusaCondition:
        condition, request = source.condition, self.request
        indices = [position.latent_index(request.frames, request.fps) for position in condition.positions]
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

    def _all_frames(self, source: Input) -> Iterator[np.ndarray]:
        for frame in media.iter_video(source.source, fps=self.request.fps, fit=self._size):
            yield np.asarray(fit_image(frame, *self._size, source.condition.fit))

    def _check_length(self, source: Input, frames: int, needed: int) -> None:
        if frames < needed:
            raise ValueError(
                f"{source.condition.file} has {frames} frames at {self.request.fps:g} fps, {needed} are taken over: "
                "give a longer video or a smaller overlap"
            )

    # ---- denoising ----

    def _latents(self, total: int, conditions: list[PusaCondition], later_windows: int = 0) -> Iterable[Tensor]:
        """Denoise a video of `total` latent frames: one window at once, or a chain of windows as they are read."""
        if total <= self.window:
            self.progress.total_steps = self.request.steps * (1 + later_windows)
            return [self._denoise(total, conditions)]
        spans = long_video.spans(total, self.window, self.overlap)
        self.progress.total_steps = self.request.steps * (len(spans) + later_windows)
        return long_video.chain(spans, lambda span, ends: self._denoise(span.length, ends), conditions)

    @cached_property
    def _embeddings(self) -> dict[str, Any]:
        """Encode both prompts once for all windows; a pipeline without a text encoder reads the disk cache."""
        request = self.request
        if self.pipe.text_encoder is None:
            positive, negative = encode_prompts(
                self.pipe,
                request.prompt,
                request.negative_prompt,
                cache=PromptCache(default_folder()),
                max_sequence_length=self.max_sequence_length,
                guidance_scale=request.guidance,
                load_text_encoder=self._load_text_encoder,
                plan=self._text_encoder,
                device=None if self._text_encoder is None else device_for(self._text_encoder, self._device),
                progress=self._report_encoding,
            )
        else:
            self.report(Stage("encode"))
            with torch.no_grad():
                positive, negative = self.pipe.encode_prompt(
                    request.prompt,
                    request.negative_prompt,
                    do_classifier_free_guidance=request.guidance > 1,
                    max_sequence_length=self.max_sequence_length,
                )
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def _report_encoding(self, done: int, total: int) -> None:
        if not done and self._text_encoder is not None and self._text_encoder.device == "cuda":
            offload.end_turns(self.pipe.components.values())  # a run that was stopped has left its transformer there
        self.report(Step(done, total, stage="encode") if done else Stage("encode", total))

    def _denoise(self, length: int, conditions: list[PusaCondition]) -> Tensor:
        """Denoise the latents of one window, ``[1, C, length, h, w]``."""
        request = self.request
        latents, steps_done = None, 0
        if self.checkpoint is not None:
            latents, steps_done = self.checkpoint.resume(self.progress.windows_begun)
        self.progress.begin_window(steps_done)
        if latents is not None and steps_done == request.steps:
            return latents.to(self.pipe._execution_device)
        noise_state, self._reached = self.generator.get_state(), None
        while True:
            try:
                return self._call(length, conditions, latents, steps_done)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # After the handler, as the exception holds the failed attempt's tensors until then.
            if self._reached is not None:
                latents, steps_done = self._reached
            else:
                self.generator.set_state(noise_state)  # the noise of this window is drawn again
            where = f"step {steps_done + 1} of {request.steps}"
            if not self._take_smaller_plan(where):
                raise torch.OutOfMemoryError(
                    f"out of memory in {where}, at {request.width} x {request.height} and {frames_of(length)} frames "
                    "at once: ask for a smaller size, fewer frames or a shorter window"
                )

    def _call(self, length: int, conditions: list[PusaCondition], latents: Tensor | None, steps_done: int) -> Tensor:
        """Encode the prompts and conditions of a window and denoise it, from `latents` if `steps_done` is not 0."""
        request = self.request
        embeddings = self._embeddings
        self.previews.prepare(self.pipe)
        self.progress.begin_denoising()
        return self.pipe(
            **embeddings,
            conditions=conditions,
            height=request.height,
            width=request.width,
            num_frames=frames_of(length),
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            guidance_scale_2=None if self.pipe.config.boundary_ratio is None else request.guidance_2,
            generator=self.generator,
            latents=latents,
            start_step=steps_done,
            output_type="latent",
            callback_on_step_end=self._after_step,
            callback_on_step_end_tensor_inputs=["latents", "denoised"],
            fps=request.fps,
        ).frames

    def _after_step(self, pipe: PusaPipeline, step: int, __: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        self._reached = tensors["latents"], step + 1
        steps_done = self.progress.count_step()
        shows = self.previews.is_due(steps_done)
        if shows or (self.checkpoint is not None and self.checkpoint.is_due(step + 1)):
            pipe.check_finite()  # where the latents are copied anyway
        if self.checkpoint is not None and self.checkpoint.save(
            self.progress.windows_begun - 1, tensors["latents"], step + 1, self.generator
        ):
            self.report(Checkpoint(self.checkpoint.path, steps_done))
        self.progress.report_step()
        if shows:
            self.previews.show(pipe, tensors["denoised"])
        return {}


def _window_end_condition(
    frames: np.ndarray, noise: float | list[float], fit: Literal["crop", "letterbox", "stretch"]
) -> PusaCondition:
    """Condition the end of a window on frames, four to a latent frame, as everywhere but in the first one."""
    return PusaCondition(
        video=frames, latent_index=-(len(frames) // 4), noise_multiplier=noise, encode="repeat", fit=fit
    )
