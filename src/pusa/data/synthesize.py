"""Synthesize a dataset: let the base model generate the clips.

Pusa V1.0 was trained on such clips (arXiv 2507.16116): they hold nothing that the model does not know, so training
teaches it the vectorised time alone. The denoised latents are stored; nothing is decoded and encoded again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pusa import resources, zoo
from pusa.data.dataset import DatasetWriter
from pusa.data.encoding import StageProgress, add_prompts, check_clip_shape, identity_of_vae, load_vae
from pusa.events import Done, Events, Note, Report, Stage, as_events, report_until_stopped
from pusa.pipeline import PusaPipeline

_WAN_GUIDANCE = 5.0


@dataclass(frozen=True, kw_only=True)
class SynthesisSettings:
    """Choose how clips are generated; fields left open take the model's defaults.

    Attributes:
        model: a name of the zoo, a Hub id or a folder. No adapter is attached.
        size: (width, height) in pixels, multiples of 16.
        frames: length that the model makes, 4n + 1 for Wan.
        steps: of denoising; 50 are Wan's own for text-to-video. Few steps suit a Pusa model, not its base.
        guidance: scale; None: 5, Wan's own for text-to-video, or the default of a model in the package.
        shift: flow shift of the sampler.
        seed: clip k is made from seed + k.
        dtype: of the latents on disk.
    """

    model: str
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None
    steps: int = 50
    guidance: float | None = None
    shift: float | None = None
    negative_prompt: str | None = None
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16

    def resolved(self) -> "SynthesisSettings":
        """Fill the open fields from the model's defaults.

        Raises:
            ValueError: a size, length, number of steps or guidance is impossible.
        """
        defaults = zoo.defaults_of(self.model)
        width, height = self.size or (defaults.width, defaults.height)
        frames = self.frames or defaults.num_frames
        check_clip_shape([(width, height)], [frames], defaults)
        zoo_model = zoo.find(self.model)
        guidance = self.guidance or (defaults.guidance if zoo_model and zoo_model.is_ours else _WAN_GUIDANCE)
        if self.steps < 1 or guidance < 1:
            raise ValueError(f"steps={self.steps}, guidance={guidance:g}: both are 1 or more")
        return replace(
            self,
            size=(width, height),
            frames=frames,
            guidance=guidance,
            fps=float(self.fps or defaults.fps),
            shift=float(self.shift or defaults.shift),
            negative_prompt=defaults.negative_prompt if self.negative_prompt is None else self.negative_prompt,
        )

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["model"], values["dtype"]  # the dataset itself has them
        return {"made_by": "synthesize", **values}


def synthesize(
    prompts: Sequence[str],
    output: Path,
    settings: SynthesisSettings,
    *,
    count: int | None = None,
    part: tuple[int, int] = (1, 1),
    stop: Callable[[], bool] = lambda: False,
) -> Events:
    """Generate a dataset from prompts, or continue one.

    Args:
        prompts: clip k comes from prompt k, starting again after the last one.
        output: the dataset's folder; with several parts, each is a folder in it, and `LatentDataset` joins them.
        count: of clips, in all parts together; None: one for each prompt.
        part: (i, n) for the i-th of n machines, which makes every n-th clip.
        stop: called at every step; True ends the run, and finished clips are kept.

    Yields:
        Events, see `pusa.events`; the last is ``done`` with the folder, unless `stop` ended the run.

    Raises:
        ValueError: settings are impossible, or the folder was begun with others.
    """
    index, parts = part
    if not 1 <= index <= parts:
        raise ValueError(f"part {index}/{parts}: the first number is 1 to {parts}")
    if not prompts or (count is not None and count < 1):
        raise ValueError(f"{len(prompts)} prompts and count={count} make no clip")
    folder = output / f"part-{index}-of-{parts}" if parts > 1 else output
    numbers = range(index - 1, len(prompts) if count is None else count, parts)

    def run(report: Report) -> None:
        _synthesize(prompts, numbers, folder, settings.resolved(), report_until_stopped(report, stop))
        report(Done({"dataset": folder}))

    return as_events(run)


def _synthesize(
    prompts: Sequence[str], numbers: range, folder: Path, settings: SynthesisSettings, report: Report
) -> None:
    assert settings.size
    assert settings.frames
    assert settings.fps
    assert settings.negative_prompt is not None
    length = zoo.defaults_of(settings.model).max_sequence_length
    with DatasetWriter(
        folder,
        model=settings.model,
        max_sequence_length=length,
        settings=settings.as_json(),
        dtype=settings.dtype,
    ) as writer:
        wanted = {clip_id(settings, prompts[k % len(prompts)], k): k for k in numbers}
        missing = {name: k for name, k in wanted.items() if name not in writer}
        captions = [prompts[k % len(prompts)] for k in missing.values()]
        add_prompts(writer, [settings.negative_prompt, *captions], report)
        if missing:
            report(Stage("load the model"))
            writer.identify(vae=identity_of_vae(load_vae(settings.model)))
            pipe = load_base(settings)
            done = (len(wanted) - len(missing)) * settings.steps
            progress = StageProgress(report, "make clips", len(wanted) * settings.steps, done=done)
        for name, k in missing.items():
            caption = prompts[k % len(prompts)]
            embeds, negative = (_pad(writer.embeds(text), length) for text in (caption, settings.negative_prompt))
            latents = make_clip(pipe, settings, embeds, negative, seed=settings.seed + k, at_step=progress.advance)
            width, height = settings.size
            writer.add(
                name,
                latents,
                caption,
                fps=settings.fps,
                width=width,
                height=height,
                frames=settings.frames,
                source=f"prompt {k % len(prompts) + 1}, seed {settings.seed + k}",
            )
    report(Note(f"{len(writer)} clips in {folder}"))


def clip_id(settings: SynthesisSettings, prompt: str, number: int) -> str:
    """Make an id from the prompt, the number and all settings of a clip."""
    parts = [settings.model, settings.as_json(), prompt, number]
    return f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}-{number:06d}"


def load_base(settings: SynthesisSettings) -> PusaPipeline:
    """Load the transformers alone, without any adapter, on the GPU if there is one."""
    absent = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = PusaPipeline.from_pretrained(settings.model, shift=settings.shift, **absent)
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        experts = [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]
        sizes_bytes = [sum(p.numel() * p.element_size() for p in model.parameters()) for model in experts]
        if sum(sizes_bytes) < 0.8 * resources.gpu_memory_bytes():  # the rest is for activations
            pipe.to("cuda")
        else:
            resources.check_gpu(max(sizes_bytes), settings.model)
            pipe.enable_model_cpu_offload()
    return pipe


def make_clip(
    pipe: PusaPipeline,
    settings: SynthesisSettings,
    embeds: Tensor,
    negative_embeds: Tensor,
    *,
    seed: int,
    at_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Generate one clip by plain text-to-video, all latent frames at one time: fp32 latents ``[C, F, h, w]``.

    Args:
        settings: resolved.
        embeds, negative_embeds: ``[max_sequence_length, D]``.
        at_step: called after every step.
    """
    assert settings.size
    assert settings.frames
    assert settings.guidance

    def callback(*_: Any) -> dict[str, Any]:
        at_step()
        return {}

    width, height = settings.size
    return pipe(
        prompt_embeds=embeds[None],
        negative_prompt_embeds=negative_embeds[None],
        width=width,
        height=height,
        num_frames=settings.frames,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=callback,
    ).frames[0]


def _pad(embeds: Tensor, length: int) -> Tensor:
    """Pad embeddings ``[L, D]`` with zeros to ``[length, D]``, as the text encoder does."""
    return pad(embeds, (0, 0, 0, length - embeds.shape[0]))
