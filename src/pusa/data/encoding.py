"""The parts of a model that make a dataset: text encoder, then VAE, each loaded alone and only if it is needed."""

import copy
import hashlib
import json
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pusa.conditions import pixels
from pusa.data.dataset import DatasetWriter, without_padding
from pusa.events import Event, Note, Report, RunEnded, Stage, Step
from pusa.models.prompt_cache import identity_of_module
from pusa.models.vae import encode_video
from pusa.pipeline import PusaPipeline

T = TypeVar("T")

_SAME_ENCODER = 0.9  # cosine between embeddings of one caption; those of another encoder are unrelated
_TEXT_PARTS, _MODEL_PARTS = ("tokenizer", "text_encoder"), ("transformer", "transformer_2")


def stopping(report: Report, stop: Callable[[], bool]) -> Report:
    """A report that ends the run where `stop` says so."""

    def report_or_stop(event: Event) -> None:
        if stop():
            raise RunEnded
        report(event)

    return report_or_stop


class Progress:
    """Steps of a stage, with the time left from the rate of this run. `done`: what an earlier run did."""

    def __init__(self, report: Report, stage: str, steps: int, *, done: int = 0) -> None:
        self._report, self._stage, self._steps = report, stage, steps
        self._before = self._step = done
        self._began = monotonic()
        report(Stage(stage, steps))

    def advance(self, count: int = 1) -> None:
        self._step += count
        each_seconds = (monotonic() - self._began) / max(1, self._step - self._before)
        left = each_seconds * (self._steps - self._step)
        self._report(Step(self._step, self._steps, round(left, 1), self._stage))


def devices() -> list[torch.device]:
    """All GPUs, or the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]


def add_prompts(
    writer: DatasetWriter, captions: Iterable[str], report: Report, *, like: tuple[str, Tensor] | None = None
) -> None:
    """Encode the captions, and the empty one, that `writer` has not yet, each once and alone, as the pipeline does.

    Args:
        like: a caption and its embeddings ``[L, D]`` from elsewhere, which must be from the same text encoder.

    Raises:
        ValueError: the folder was begun with another text encoder, or `like` was; or what
            `PusaPipeline.from_pretrained` raises.
    """
    missing = [caption for caption in dict.fromkeys(["", *captions]) if not writer.has_prompt(caption)]
    if not missing:
        return
    report(Stage("load the text encoder"))
    pipe = PusaPipeline.from_pretrained(writer.facts.model, vae=None, **dict.fromkeys(_MODEL_PARTS))
    writer.identify(text_encoder=identity_of_module(pipe.text_encoder, pipe.tokenizer))
    pipe.text_encoder.to(devices()[0])
    length = writer.facts.max_sequence_length
    if like is not None:
        _check_alike(pipe, length, *like)
    progress = Progress(report, "encode captions", len(missing))
    cut = 0
    for caption in missing:
        embeds = encode_prompt(pipe, caption, length)
        writer.add_prompt(caption, embeds)
        cut += bool(embeds[-1].ne(0).any()) and len(pipe.tokenizer(caption)["input_ids"]) > length
        progress.advance()
    writer.flush()
    if cut:
        report(Note(f"{cut} captions have more than {length} tokens: the rest is cut"))


def _check_alike(pipe: PusaPipeline, length: int, caption: str, embeds: Tensor) -> None:
    ours = without_padding(encode_prompt(pipe, caption, length)).float().cpu()
    if ours.shape != embeds.shape or cosine_similarity(ours, embeds.float()).mean() < _SAME_ENCODER:
        raise ValueError(
            f"the embeddings are not from this model's text encoder ({list(embeds.shape)} and {list(ours.shape)} for "
            f"{caption[:40]!r}): name the model that they were made with"
        )


@torch.no_grad()
def encode_prompt(pipe: PusaPipeline, text: str, max_sequence_length: int) -> Tensor:
    """``[max_sequence_length, D]`` in the text encoder's dtype."""
    embeds, _ = pipe.encode_prompt(
        [text],
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
        dtype=pipe.text_encoder.dtype,
    )
    return embeds[0]


def load_vae(model: str) -> AutoencoderKLWan:
    """The VAE alone, on the CPU."""
    return PusaPipeline.from_pretrained(model, **dict.fromkeys((*_TEXT_PARTS, *_MODEL_PARTS))).vae


def identity_of_vae(vae: AutoencoderKLWan) -> str:
    """What tells one VAE from another: how it normalises, and names, shapes and some values of its parameters."""
    digest = hashlib.sha256(json.dumps([vae.config.latents_mean, vae.config.latents_std]).encode())
    for name, parameter in vae.named_parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
        digest.update(f"{name}:{list(parameter.shape)};".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class ClipEncoder:
    """A VAE on each device; clips are encoded on whichever is free, while the caller fetches the next ones."""

    def __init__(self, vae: AutoencoderKLWan, on: Sequence[torch.device]) -> None:
        self._free: queue.Queue[AutoencoderKLWan] = queue.Queue()
        for number, device in enumerate(on):
            self._free.put((vae if number == 0 else copy.deepcopy(vae)).to(device))
        self._count = len(on)

    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 frames [4n + 1, H, W, 3] to normalised latents, fp32 ``[C, n + 1, h, w]`` on the CPU."""
        vae = self._free.get()
        try:
            return encode_video(vae, pixels(list(frames)))[0].cpu()
        finally:
            self._free.put(vae)

    def encoded(self, clips: Iterable[tuple[T, np.ndarray]]) -> Generator[tuple[T, Tensor], None, None]:
        """Yield (name, latents) for (name, frames), in order; one clip more than there are devices is held."""
        pending: deque[tuple[T, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(self._count, thread_name_prefix="pusa-encode") as pool:
            try:
                for name, frames in clips:
                    pending.append((name, pool.submit(self.encode, frames)))
                    while len(pending) > self._count:
                        first, future = pending.popleft()
                        yield first, future.result()
                for first, future in pending:
                    yield first, future.result()
            finally:
                for _, future in pending:
                    future.cancel()
