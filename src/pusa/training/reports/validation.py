"""Generate validation videos from fixed prompts and clips, always with the same noise.

Tasks are the same at every validation, so that results can be compared: text-to-video from the prompt alone;
image-to-video from the clip's first latent frame; start-end from its first and last; extension from its first few.
Frames are kept exactly (noise multiplier 0). Only the model differs from one validation to the next.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pusa import media
from pusa.conditions import PusaCondition
from pusa.data.dataset import LatentDataset
from pusa.data.encoding import decode_spread
from pusa.lora.adapters import lora_layers
from pusa.media.previews import Strip, strip_sheet, write_picture
from pusa.models.bases import base_of
from pusa.positions import frames_of
from pusa.training.checkpoint import random_states, restore_random_states
from pusa.training.config import TrainConfig
from pusa.training.export import result_path
from pusa.training.model import ADAPTER, kernels, precision

logger = logging.getLogger(__name__)

Task = Literal["text-to-video", "image-to-video", "start-end", "extension"]
TASKS: tuple[Task, ...] = ("text-to-video", "image-to-video", "start-end", "extension")
VALIDATION_FOLDER = "validation"  # in a run's folder


@dataclass(frozen=True)
class ValidationSettings:
    """Choose how validation videos are sampled.

    Attributes:
        width, height, num_frames: of videos without latents; None: the pipeline's defaults.
        steps, guidance: of sampling; guidance 1 halves the time.
        alpha: strength of the adapter: 1 in training; Pusa V1.0 is used at 1.4.
        held: latent frames that the extension begins with: 4 as in the paper, half of a shorter clip.
        seed: of the noise; the same for all tasks and validations, another for each prompt.
        columns: frames of each video in the contact sheet.
    """

    tasks: tuple[Task, ...] = TASKS
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    steps: int = 10
    guidance: float = 3.0
    alpha: float = 1.0
    held: int = 4
    seed: int = 0
    fps: float = 16.0
    columns: int = 6


def validate(
    pipe: Any,
    folder: Path,
    *,
    step: int,
    prompts: Sequence[str],
    latents: Sequence[Tensor] | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    settings: ValidationSettings = ValidationSettings(),
    compute_context: Callable[[], AbstractContextManager[None]] = nullcontext,
    writes: bool = True,
) -> list[Path]:
    """Generate the videos of one validation.

    Args:
        pipe: a `PusaPipeline`.
        folder: gets ``step-00000100/1-text-to-video.mp4`` and so on, and the contact sheet ``step-00000100.jpg``.
        step: of the training.
        prompts: one for each clip.
        latents: normalised ``[C, F, h, w]``, one for each prompt: a picture's allow image-to-video, a clip's all tasks.
            None: text-to-video alone.
        prompt_embeds, negative_prompt_embeds: ``[n, L, D]`` and ``[1, L, D]``, where there is no text encoder.
        compute_context: entered around each call of the pipeline, for autocast; encoding and decoding, in the VAE's
            own dtype, stay outside.
        writes: False on all processes but one where several compute together.

    Returns:
        The videos, and the sheet last; empty where this process does not write.

    Raises:
        ValueError: a task or a number of inputs does not fit.

    Random states, the scheduler, the adapter's strength and the training mode are restored.
    """
    unknown = set(settings.tasks) - set(TASKS)
    if unknown or not settings.tasks:
        raise ValueError(f"tasks={list(settings.tasks)}: give some of {', '.join(TASKS)}")
    clips: list[Tensor | None] = [None] * len(prompts) if latents is None else list(latents)
    if len(clips) != len(prompts):
        raise ValueError(f"{len(clips)} latents for {len(prompts)} prompts: give one for each")
    rows: list[Strip] = []
    written: list[Path] = []
    place = folder / f"step-{step:08d}"
    with _evaluation_mode(pipe, settings.alpha), torch.no_grad():
        for number, (prompt, clip) in enumerate(zip(prompts, clips, strict=True)):
            text: dict[str, Any] = {"prompt": prompt, "negative_prompt": ""}
            if prompt_embeds is not None:
                embeds = prompt_embeds[number : number + 1]
                text = {"prompt_embeds": embeds, "negative_prompt_embeds": negative_prompt_embeds}
            arguments = text | _arguments(pipe, clip, settings, number)
            if writes and clip is not None and clip.shape[1] > 1:
                strip = _decode(pipe, clip[None], None, settings)
                rows.append(replace(strip, label=f"{number + 1}. {prompt} (the clip)"))
            for task in settings.tasks:
                conditions = _conditions(task, clip, settings)
                if conditions is None:
                    continue
                with compute_context():
                    generated = pipe(**arguments, conditions=conditions).frames
                if writes:
                    written.append(place / f"{number + 1}-{task}.mp4")
                    strip = _decode(pipe, generated, written[-1], settings)
                    held = {frame for c in conditions for frame in _frames_held(pipe, c, generated.shape[2])}
                    rows.append(replace(strip, label=f"{number + 1}. {prompt} ({task})", held=held))
    if not rows:
        return []
    picture = strip_sheet(rows, columns=settings.columns, title=f"step {step}; outlined frames were given")
    return [*written, write_picture(picture, folder / f"step-{step:08d}.jpg")]


@contextmanager
def _evaluation_mode(pipe: Any, alpha: float) -> Iterator[None]:
    """Evaluate at an adapter strength, without progress bars, and restore the pipeline and random states afterwards."""
    states, model, scheduler = random_states(), pipe.transformer, pipe.scheduler
    was_training, bars = model.training, getattr(pipe, "_progress_bar_config", {})
    layers = [layer for layer in lora_layers(model).values() if ADAPTER in layer.scaling]
    scalings = [layer.scaling[ADAPTER] for layer in layers]
    model.eval()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    for layer in layers:
        layer.set_scale(ADAPTER, alpha)
    try:
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling[ADAPTER] = scaling
        pipe.scheduler = scheduler
        pipe._progress_bar_config = bars
        model.train(was_training)
        restore_random_states(states)


def _arguments(pipe: Any, clip: Tensor | None, settings: ValidationSettings, number: int) -> dict[str, Any]:
    """Make the arguments of a call; a clip of more than one latent frame decides the size and length of the video."""
    size = {"width": settings.width, "height": settings.height, "num_frames": settings.num_frames}
    if clip is not None:
        size["height"], size["width"] = (pipe.vae_scale_factor_spatial * side for side in clip.shape[2:])
        if clip.shape[1] > 1:
            size["num_frames"] = frames_of(clip.shape[1], pipe.vae_scale_factor_temporal)
    return {
        **size,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "fps": settings.fps,
        "generator": torch.Generator().manual_seed(settings.seed + number),
        "output_type": "latent",
    }


def _conditions(task: Task, clip: Tensor | None, settings: ValidationSettings) -> list[PusaCondition] | None:
    """Make the conditions of a task; None if the clip does not allow it."""
    if task == "text-to-video":
        return []
    length = 0 if clip is None else clip.shape[1]
    if clip is None or (task != "image-to-video" and length < 2):
        return None
    first = PusaCondition(latents=clip[:, :1], latent_index=0)
    if task == "image-to-video":
        return [first]
    if task == "start-end":
        return [first, PusaCondition(latents=clip[:, -1:], latent_index="last")]
    return [PusaCondition(latents=clip[:, : max(1, min(settings.held, length // 2))], latent_index=0)]


def _frames_held(pipe: Any, condition: PusaCondition, length: int) -> range:
    """Return the numbers of the frames that a condition keeps in a video of `length` latent frames."""
    assert condition.latents is not None
    count = condition.latents.shape[1]
    start = length - count if condition.latent_index == "last" else 0
    factor = pipe.vae_scale_factor_temporal
    return range(frames_of(start, factor) if start else 0, frames_of(start + count, factor))


def _decode(pipe: Any, latents: Tensor, path: Path | None, settings: ValidationSettings) -> Strip:
    """Decode ``[1, C, F, h, w]``, write the video to `path` unless None, and return the frames for the sheet."""
    if path is None:
        numbers, frames = decode_spread(pipe.vae, latents, settings.columns)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = (pipe.vae_scale_factor_spatial * side for side in latents.shape[3:])
        with media.VideoWriter(path, width=width, height=height, fps=settings.fps) as writer:
            numbers, frames = decode_spread(pipe.vae, latents, settings.columns, writer.write)
    return Strip("", frames, numbers)


# ---- while training --------------------------------------------------------------------------------------------------


class Validator:
    """Validate while training: the `on_validate` of `pusa.training.trainer.train`.

    The clips are the first ones of ``report.validate_on``, or of the held-out ones. A picture gives text-to-video and
    image-to-video of the model's own length.

        train(config, dataset=data, on_validate=Validator(config, data))

    Prompts and clips come from the dataset, so no text encoder is loaded, and the empty caption is the negative prompt.
    The VAE is loaded at the first validation and stays on the card, which takes some gigabytes beside the training: it
    decodes a few frames at a time. With two experts each samples alone over all noise levels, although it was trained
    for a part of them: that shows whether it learns, not how good both are.

    Args:
        config: of the run.
        dataset: a `LatentDataset`, before it is split.
        folder: to write to; None: ``validation`` in the run's folder.
        settings: None: the sampling defaults of the model.

    Raises:
        ValueError: another VAE or text encoder made ``report.validate_on``. FileNotFoundError: it does not exist.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Any,
        *,
        folder: Path | None = None,
        settings: ValidationSettings | None = None,
    ) -> None:
        source = _validation_data(config, dataset)
        indices = sorted(range(len(source)), key=lambda index: (source.clips[index].latent_shape[1] == 1, index))
        self.config, self.folder = config, folder or config.folder / VALIDATION_FOLDER
        chosen = indices[: config.report.validate_clips]
        self._prompts = [source.clips[index].caption for index in chosen]
        self._latents = [source.latents(index) for index in chosen]
        self._embeds = torch.stack([_pad(source.embeds(i), source.max_sequence_length) for i in chosen])
        self._negative: Tensor | None = None
        self._settings = settings
        self._pipe: Any = None
        if settings is None or settings.guidance > 1:
            self._negative = _pad(source.empty_embeds, source.max_sequence_length)[None]

    def __call__(self, step: int, model: Any) -> Path | None:
        """Generate the videos of a step. Every process must call it; the first writes and returns the contact sheet."""
        device = next(model.parameters()).device
        pipe = self._load(model, device)
        settings = self._settings or _settings_of(pipe)
        written = validate(
            pipe,
            self._output_folder(),
            step=step,
            prompts=self._prompts,
            latents=[latents.to(device) for latents in self._latents],
            prompt_embeds=self._embeds.to(device),
            negative_prompt_embeds=None if self._negative is None else self._negative.to(device),
            settings=settings,
            compute_context=partial(self._compute_context, model, device),
            writes=not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0,
        )
        if not written:
            return None
        logger.info("step %d  %d videos, at a glance in %s", step, len(written) - 1, written[-1])
        return written[-1]

    @contextmanager
    def _compute_context(self, model: Any, device: torch.device) -> Iterator[None]:
        with kernels(self.config, model), precision(self.config, device):
            yield

    def _load(self, model: Any, device: torch.device) -> Any:
        if self._pipe is None:
            from pusa.pipeline import PusaPipeline

            base, absent = base_of(model), dict.fromkeys(("text_encoder", "tokenizer", "transformer_2"))
            scheduler = base.scheduler(self.config.resolved(base).objective.shift)
            parts = {"transformer": model, "scheduler": scheduler, "boundary_ratio": None}
            self._pipe = PusaPipeline.from_pretrained(self.config.model.source, **absent, **parts)
            self._pipe.vae.to(device)
        self._pipe.register_modules(transformer=model)
        return self._pipe

    def _output_folder(self) -> Path:
        experts = list(self.config.model.experts)
        if len(experts) == 1:
            return self.folder
        unfinished = [e for e in experts if not result_path(self.config.folder, self.config, e).exists()]
        return self.folder / (unfinished[0] if unfinished else experts[-1])


def _validation_data(config: TrainConfig, dataset: Any) -> Any:
    """Return the dataset whose first clips are validated on."""
    if config.report.validate_on is not None:
        data = LatentDataset(config.report.validate_on)
        dataset.check_compatible(data)
        return data
    training, held_out = dataset.split(config.data.held_out_share, config.seed)
    return held_out if len(held_out) else training


def _settings_of(pipe: Any) -> ValidationSettings:
    return ValidationSettings(steps=pipe.defaults.steps, guidance=pipe.defaults.guidance, fps=pipe.defaults.fps)


def _pad(embeds: Tensor, length: int) -> Tensor:
    return F.pad(embeds, (0, 0, 0, length - len(embeds)))
