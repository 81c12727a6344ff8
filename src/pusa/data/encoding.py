"""Encode captions and clips with a model's text encoder and VAE, each loaded alone and only if needed."""

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
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pusa import zoo
from pusa.conditions import pixels
from pusa.data.dataset import DatasetWriter, without_padding
from pusa.defaults import GenerationDefaults
from pusa.events import Note, Report, Stage, Step
from pusa.media import to_uint8
from pusa.media.previews import spread
from pusa.models.text_encoder import identity_of_module
from pusa.models.vae import codec_of, decode_chunks, encode_video
from pusa.models.vaes.codec import VAE
from pusa.pipeline import PusaPipeline
from pusa.positions import frames_of, length_rule, nearest_of

T = TypeVar("T")

_SAME_ENCODER = 0.9  # least cosine between embeddings of one caption; another encoder's are unrelated
_PARTS = ("tokenizer", "text_encoder", "vae", "transformer", "transformer_2")


def check_clip_shape(sizes: Iterable[tuple[int, int]], lengths: Iterable[int], defaults: GenerationDefaults) -> None:
    """Raise ValueError unless a model with these defaults can make sizes (width, height) and lengths in frames."""
    multiple, factor = defaults.size_multiple, defaults.frames_per_latent
    for size in sizes:
        if any(side < multiple or side % multiple for side in size):
            sides = "x".join(str(nearest_of(side, multiple)) for side in size)
            raise ValueError(f"size {size[0]}x{size[1]}: sides are multiples of {multiple}; give {sides}")
    for count in lengths:
        if count < 1 or (count - 1) % factor:
            near = nearest_of(max(1, count), factor, 1)
            raise ValueError(f"frames={count}: a clip has {length_rule(factor)} frames; give {near}")


class StageProgress:
    """Report the steps of a stage and the time left, at the rate of this run.

    Args:
        done: steps that an earlier run did.
    """

    def __init__(self, report: Report, stage: str, steps: int, *, done: int = 0) -> None:
        self._report, self._stage, self._steps = report, stage, steps
        self._first_step = self._step = done
        self._began = monotonic()
        report(Stage(stage, steps))

    def advance(self, count: int = 1) -> None:
        """Report that `count` more steps are done."""
        self._step += count
        each_seconds = (monotonic() - self._began) / max(1, self._step - self._first_step)
        left = each_seconds * (self._steps - self._step)
        self._report(Step(self._step, self._steps, round(left, 1), self._stage))


def devices() -> list[torch.device]:
    """Return all GPUs, or the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]


def add_prompts(
    writer: DatasetWriter, captions: Iterable[str], report: Report, *, reference: tuple[str, Tensor] | None = None
) -> None:
    """Encode the captions, and the empty one, that `writer` lacks, each once and alone, as the pipeline does.

    Args:
        reference: a caption and its embeddings ``[L, D]`` of another source, to check that its text encoder is the
            same.

    Raises:
        ValueError: the folder was begun with another text encoder, or `reference` comes from another. Otherwise as
            `PusaPipeline.from_pretrained`.
    """
    missing = [caption for caption in dict.fromkeys(["", *captions]) if not writer.has_prompt(caption)]
    if not missing:
        return
    base = zoo.base_of(writer.facts.model)
    report(Stage("load the text encoder" if base.has_text else "load the transformer"))
    pipe = _load(writer.facts.model, *base.prompt_parts)
    if pipe.text_encoder is not None:
        writer.identify(text_encoder=identity_of_module(pipe.text_encoder, pipe.tokenizer))
        pipe.text_encoder.to(devices()[0])
    length = writer.facts.max_sequence_length
    if reference is not None:
        _check_text_encoder(pipe, length, *reference)
    progress = StageProgress(report, "encode captions", len(missing))
    cut = 0
    for caption in missing:
        embeds = encode_prompt(pipe, caption, length)
        writer.add_prompt(caption, embeds)
        is_full = base.has_text and bool(embeds[-1].ne(0).any())
        cut += is_full and len(pipe.tokenizer(caption)["input_ids"]) > length
        progress.advance()
    writer.flush()
    if cut:
        report(Note(f"{cut} captions have more than {length} tokens: the rest is cut"))


def _check_text_encoder(pipe: PusaPipeline, length: int, caption: str, embeds: Tensor) -> None:
    ours = without_padding(encode_prompt(pipe, caption, length)).float().cpu()
    if ours.shape != embeds.shape or cosine_similarity(ours, embeds.float()).mean() < _SAME_ENCODER:
        raise ValueError(
            f"the embeddings are not from this model's text encoder ({list(embeds.shape)} and {list(ours.shape)} for "
            f"{caption[:40]!r}): name the model that they were made with"
        )


@torch.no_grad()
def encode_prompt(pipe: PusaPipeline, text: str, max_sequence_length: int) -> Tensor:
    """Encode a prompt to embeddings ``[max_sequence_length, D]`` in the text encoder's dtype, fp32 without one."""
    embeds, _ = pipe.encode_prompt(
        [text],
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
        dtype=torch.float32 if pipe.text_encoder is None else pipe.text_encoder.dtype,
    )
    return embeds[0]


def load_vae(model: str) -> VAE:
    """Load a model's VAE alone, on the CPU."""
    return _load(model, "vae").vae


def _load(model: str, *parts: str) -> PusaPipeline:
    return PusaPipeline.from_pretrained(model, **dict.fromkeys(part for part in _PARTS if part not in parts))


def identity_of_vae(vae: VAE) -> str:
    """Hash a VAE: its normalisation, and the names, shapes and some values of its parameters."""
    digest = hashlib.sha256(json.dumps(codec_of(vae).normalisation(vae)).encode())
    for name, parameter in vae.named_parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
        digest.update(f"{name}:{list(parameter.shape)};".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def decode_spread(
    vae: VAE, latents: Tensor, count: int, write: Callable[[np.ndarray], object] = lambda frames: None
) -> tuple[list[int], np.ndarray]:
    """Decode latents ``[1, C, F, h, w]`` and keep at most `count` frames, evenly spread from the first to the last.

    Args:
        write: receives all frames in turn, uint8 ``[n, H, W, 3]``.

    Returns:
        The numbers of the frames that are kept, and these, uint8 ``[count, H, W, 3]``.
    """
    numbers = spread(frames_of(latents.shape[2], codec_of(vae).frames_per_latent(vae)), count)
    kept: list[np.ndarray] = []
    at = 0
    for chunk in decode_chunks(vae, latents):
        frames = to_uint8(chunk)
        write(frames)
        kept += [frames[number - at] for number in numbers if at <= number < at + len(frames)]
        at += len(frames)
    return numbers, np.stack(kept)


class ClipEncoder:
    """Encode clips on several devices, a VAE on each, while the caller fetches the next ones."""

    def __init__(self, vae: VAE, vae_devices: Sequence[torch.device]) -> None:
        self._free: queue.Queue[VAE] = queue.Queue()
        for number, device in enumerate(vae_devices):
            self._free.put((vae if number == 0 else copy.deepcopy(vae)).to(device))
        self._count = len(vae_devices)

    def encode(self, frames: np.ndarray) -> Tensor:
        """Encode uint8 frames ``[n, H, W, 3]`` to normalised latents, fp32 ``[C, F, h, w]`` on the CPU."""
        vae = self._free.get()
        try:
            return encode_video(vae, pixels(list(frames)))[0].cpu()
        finally:
            self._free.put(vae)

    def encode_all(self, clips: Iterable[tuple[T, np.ndarray]]) -> Generator[tuple[T, Tensor], None, None]:
        """Yield (name, latents) for (name, frames), in order, holding at most one clip more than there are devices."""
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
