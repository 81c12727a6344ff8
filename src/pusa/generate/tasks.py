"""The tasks, each a few lines over one shape: frames that exist, latents decoded as they come, frames that exist.

None has a denoising loop of its own. What they continue they take over as latents where it was made here, and as
encoded frames where it is somebody's video.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pusa import loading, long_video, media
from pusa.conditions import PusaCondition, fit_image
from pusa.events import GenerationEvent, Report
from pusa.generate.checkpoint import Checkpoint
from pusa.generate.inputs import Input
from pusa.models.prompt_cache import PromptCache, default_folder, encode_prompts
from pusa.models.vae import DecodeMemoryError, decode_video
from pusa.pipeline import PusaPipeline
from pusa.positions import frames_of, latent_frames
from pusa.request import ResolvedRequest


@dataclass
class Film:
    """What a file shows: `before`, the decoded `pieces` without `skip` and `drop` frames at their ends, `after`.

    The skipped frames show the same moments as the last ones of `before`; those dropped as the first of `after`, or
    of the film itself if nothing comes after (a loop).
    """

    pieces: Iterable[Tensor]  # normalised latents [1, C, n, h, w], one stream
    before: Iterable[np.ndarray] = ()  # uint8 [H, W, 3]
    skip: int = 0
    drop: int = 0
    after: Iterable[np.ndarray] = ()


class Tasks:
    """A resolved request, its inputs and a pipeline; `film` starts the task. Reports steps, and previews if asked."""

    def __init__(
        self,
        request: ResolvedRequest,
        inputs: Sequence[Input],
        pipe: PusaPipeline,
        report: Report,
        *,
        max_sequence_length: int,
        preview_every: int = 0,
        preview_seconds: float = 0.0,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.request, self.inputs, self.pipe, self.report = request, inputs, pipe, report
        self.max_sequence_length = max_sequence_length
        self.preview_every, self.preview_seconds, self.previewed = preview_every, preview_seconds, float("-inf")
        self.generator = torch.Generator().manual_seed(request.seed)
        self.checkpoint = checkpoint
        if checkpoint is not None and checkpoint.generator_state is not None:
            self.generator.set_state(checkpoint.generator_state)
        self.window, self.overlap = latent_frames(request.window), latent_frames(request.overlap)
        self.windows_begun = self.steps_done = self.steps_taken_over = self.steps_in_all = 0
        self.began: float | None = None

    def film(self) -> Film:
        """Raises ValueError where inputs, places or lengths do not fit."""
        tasks = {"generate": self.generate, "extend": self.extend, "transition": self.transition, "loop": self.loop}
        return tasks[self.request.task]()

    def generate(self) -> Film:
        return Film(self._latents(latent_frames(self.request.frames), [self._condition(i) for i in self.inputs]))

    def extend(self) -> Film:
        """The end of the video is the beginning of the window; the file shows the video and what follows."""
        (given,) = self.inputs
        known = self._end_of(given)
        pieces = self._latents(latent_frames(self.request.frames), [known])
        return Film(pieces, before=self._all_frames(given), skip=self.request.overlap)

    def transition(self) -> Film:
        """The end of the first video and the beginning of the second are the two ends of one window."""
        request = self.request
        first, second = self.inputs
        joined = 4 * self.overlap  # at later places each latent frame holds four frames
        beginning = media.read_video(second.source, fps=request.fps, fit=self._size, max_frames=joined)
        self._check_length(second, len(beginning), joined)
        for _ in self._all_frames(second):
            pass  # it is shown after all else: better to find it damaged now
        known = [self._end_of(first), _at_the_end(beginning, second.spec.noise, second.spec.fit)]
        return Film(
            self._latents(latent_frames(request.frames), known),
            before=self._all_frames(first),
            skip=request.overlap,
            drop=joined,
            after=self._all_frames(second),
        )

    def loop(self) -> Film:
        """A clip, and a bridge that leads from its end to its beginning, in one stream of latents."""
        bridge_length = self.window - 2 * self.overlap
        clip_length = latent_frames(self.request.frames) - bridge_length
        conditions = [self._condition(i) for i in self.inputs]
        for condition in conditions:
            place = condition.latent_index
            if isinstance(place, int) and place >= clip_length:
                raise ValueError(
                    f"latent frame {place} of this loop is in the bridge from its end to its beginning: "
                    f"give a place in 0..{clip_length - 1}"
                )

        def pieces() -> Iterator[Tensor]:
            beginning = end = torch.empty(0)
            for piece in self._latents(clip_length, conditions, later_windows=1):
                beginning = piece[:, :, : self.overlap + 1] if beginning.ndim == 1 else beginning
                end = (piece if end.ndim == 1 else torch.cat([end, piece], 2))[:, :, -self.overlap :]
                yield piece
            first_frames = media.to_uint8(decode_video(self.pipe.vae, beginning))[: 4 * self.overlap]
            known = [PusaCondition(latents=end[0]), _at_the_end(first_frames, 0.0, "crop")]
            yield self._denoise(self.window, known)[:, :, self.overlap :]

        return Film(pieces(), drop=4 * self.overlap)

    # ---- what is known ----

    @property
    def _size(self) -> tuple[int, int]:
        return self.request.width, self.request.height

    def _condition(self, given: Input) -> PusaCondition:
        spec, request = given.spec, self.request
        assert spec.noise is not None
        places = [position.latent_index(request.frames, request.fps) for position in spec.positions]
        shared: dict[str, Any] = {"noise_multiplier": spec.noise, "encode": spec.encode, "fit": spec.fit}
        if spec.kind == "image":
            return PusaCondition(image=media.read_image(given.source), latent_index=places[0], **shared)
        needed = frames_of(max(places) + 1) if places else request.frames
        frames = media.read_video(given.source, fps=request.fps, fit=self._size, max_frames=needed)
        return PusaCondition(video=frames, latent_index=places or 0, **shared)

    def _end_of(self, given: Input) -> PusaCondition:
        count = self.request.overlap
        frames = media.read_video(given.source, fps=self.request.fps, fit=self._size, last_frames=count)
        self._check_length(given, len(frames), count)
        assert given.spec.noise is not None
        return PusaCondition(video=frames, noise_multiplier=given.spec.noise, fit=given.spec.fit)

    def _all_frames(self, given: Input) -> Iterator[np.ndarray]:
        for frame in media.iter_video(given.source, fps=self.request.fps, fit=self._size):
            yield np.asarray(fit_image(frame, *self._size, given.spec.fit))

    def _check_length(self, given: Input, frames: int, needed: int) -> None:
        if frames < needed:
            raise ValueError(
                f"{given.spec.file} has {frames} frames at {self.request.fps:g} fps, {needed} are taken over: "
                "give a longer video or a smaller overlap"
            )

    # ---- denoising ----

    def _latents(self, total: int, conditions: list[PusaCondition], later_windows: int = 0) -> Iterable[Tensor]:
        """The pieces of a video of `total` latent frames: one window at once, or a chain of them as they are taken."""
        if total <= self.window:
            self.steps_in_all = self.request.steps * (1 + later_windows)
            return [self._denoise(total, conditions)]
        covered = long_video.spans(total, self.window, self.overlap)
        self.steps_in_all = self.request.steps * (len(covered) + later_windows)
        return long_video.chain(covered, lambda span, known: self._denoise(span.length, known), conditions)

    @cached_property
    def _embeddings(self) -> dict[str, Any]:
        """Of both prompts, once for all windows; a pipeline without a text encoder takes them from the disk's cache."""
        request = self.request
        if self.pipe.text_encoder is None:
            positive, negative = encode_prompts(
                self.pipe,
                request.prompt,
                request.negative_prompt,
                cache=PromptCache(default_folder()),
                max_sequence_length=self.max_sequence_length,
                guidance_scale=request.guidance,
                load_text_encoder=partial(loading.load_text_encoder, request.model),
            )
        else:
            with torch.no_grad():
                positive, negative = self.pipe.encode_prompt(
                    request.prompt,
                    request.negative_prompt,
                    do_classifier_free_guidance=request.guidance > 1,
                    max_sequence_length=self.max_sequence_length,
                )
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def _denoise(self, length: int, conditions: list[PusaCondition]) -> Tensor:
        """The latents of one window, ``[1, C, length, h, w]``."""
        request = self.request
        reached, steps_reached = None, 0
        if self.checkpoint is not None:
            reached, steps_reached = self.checkpoint.reached(self.windows_begun)
        self.windows_begun += 1
        self.steps_done += steps_reached
        self.steps_taken_over += steps_reached
        if reached is not None and steps_reached == request.steps:
            return reached.to(self.pipe._execution_device)
        embeddings = self._embeddings
        if self.began is None:
            self.report(GenerationEvent(kind="stage", stage="denoise"))
            self.began = time.monotonic()
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
            latents=reached,
            start_step=steps_reached,
            output_type="latent",
            callback_on_step_end=self._after_step,
            callback_on_step_end_tensor_inputs=["latents", "denoised"],
            fps=request.fps,
        ).frames

    def _after_step(self, pipe: PusaPipeline, step: int, __: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        assert self.began is not None
        self.steps_done += 1
        if self.checkpoint is not None and self.checkpoint.keep(
            self.windows_begun - 1, tensors["latents"], step + 1, self.generator
        ):
            self.report(GenerationEvent(kind="checkpoint", step=self.steps_done, path=self.checkpoint.path))
        per_step_seconds = (time.monotonic() - self.began) / (self.steps_done - self.steps_taken_over)
        self.report(
            GenerationEvent(
                kind="step",
                stage="denoise",
                step=self.steps_done,
                steps=self.steps_in_all,
                seconds_left=per_step_seconds * (self.steps_in_all - self.steps_done),
            )
        )
        is_early = time.monotonic() - self.previewed < self.preview_seconds
        if self.preview_every and self.steps_done % self.preview_every == 0 and not is_early:
            self._preview(pipe, tensors["denoised"])
        return {}

    def _preview(self, pipe: PusaPipeline, denoised: Tensor) -> None:
        middle = denoised.shape[2] // 2
        try:
            frame = media.to_uint8(decode_video(pipe.vae, denoised[:, :, middle : middle + 1]))[0]
        except DecodeMemoryError:
            self.preview_every = 0
            self.report(GenerationEvent(kind="note", message="no previews: there is no memory for them"))
            return
        self.previewed = time.monotonic()
        self.report(GenerationEvent(kind="preview", stage="denoise", image=Image.fromarray(frame)))


def _at_the_end(frames: np.ndarray, noise: Any, fit: Any) -> PusaCondition:
    """Frames that follow the window's free part: four to a latent frame, as at any place but the first."""
    return PusaCondition(
        video=frames, latent_index=-(len(frames) // 4), noise_multiplier=noise, encode="repeat", fit=fit
    )
