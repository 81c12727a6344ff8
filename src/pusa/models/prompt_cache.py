"""Prompt embeddings on disk, so that the text encoder (11 GB) is needed once per prompt and not once per run.

An entry is the embedding's rows up to the end of the text; those after it are zeros and are put back on reading.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 16


def default_folder() -> Path:
    """``prompts`` in the folder named by PUSA_CACHE, or in ``~/.cache/pusa``."""
    return Path(os.environ.get("PUSA_CACHE", "~/.cache/pusa")).expanduser() / "prompts"


class PromptNotCachedError(RuntimeError):
    """A prompt is not in the cache and there is no text encoder to compute it."""


def identity_of_files(folders: Iterable[Path]) -> str:
    """What tells one text encoder (with its tokenizer) from another, without reading all of it.

    Names, sizes, and 64 KiB from the beginning, the middle and the end of each file: the header of a safetensors file
    alone is the same for all fine-tunes of a model.

    Args:
        folders: files, or folders of which every file counts.
    """
    digest = hashlib.sha256()
    for folder in folders:
        paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
        for path in paths:
            size_bytes = path.stat().st_size
            digest.update(f"{path.name}:{size_bytes};".encode())
            with path.open("rb") as file:
                for start in (0, size_bytes // 2, max(0, size_bytes - _SAMPLE_BYTES)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def identity_of_module(text_encoder: torch.nn.Module, tokenizer: Any) -> str:
    """The same for a text encoder in memory: names, shapes and some values of its parameters, and the vocabulary."""
    digest = hashlib.sha256()
    for name, parameter in text_encoder.named_parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 256)]
        digest.update(f"{name}:{list(parameter.shape)};".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()


def prompt_key(identity: str, prompt: str, *, max_sequence_length: int, dtype: torch.dtype) -> str:
    """The name of an entry: prompts that Wan's cleaning makes equal (entities, white space) share one."""
    parts = [identity, prompt_clean(prompt), max_sequence_length, str(dtype)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class PromptCache:
    """A folder of embeddings. Several processes may share it: entries appear whole or not at all."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> Tensor | None:
        """The embedding ``[text, D]`` on the CPU, as it was put; None if it is not here."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                rows = file.get_tensor("prompt_embeds")  # [n, D]
                length = int(file.metadata()["max_sequence_length"])
        except SafetensorError as error:
            logger.warning("%s is damaged (%s): the prompt is encoded again", path, error)
            return None
        return torch.cat([rows, rows.new_zeros(length - rows.shape[0], rows.shape[1])])

    def put(self, key: str, prompt_embeds: Tensor) -> None:
        """Keep ``[text, D]``; the zero rows at its end are not stored."""
        self.folder.mkdir(parents=True, exist_ok=True)
        filled = prompt_embeds.ne(0).any(dim=1).nonzero()
        rows = prompt_embeds[: int(filled.max()) + 1 if len(filled) else 0].detach().cpu().clone()
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        try:
            save_file({"prompt_embeds": rows}, name, {"max_sequence_length": str(prompt_embeds.shape[0])})
            os.replace(name, self._path(key))
        except BaseException:
            os.unlink(name)
            raise


@torch.no_grad()
def encode_prompts(
    pipe: WanPipeline,
    prompt: str | list[str],
    negative_prompt: str | list[str] | None = None,
    *,
    cache: PromptCache,
    max_sequence_length: int = 512,
    guidance_scale: float = 3.0,
    load_text_encoder: Callable[[], torch.nn.Module] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Embeddings for a call of the pipeline; the text encoder runs only for what the cache does not hold.

    Prompts are encoded one by one, so that an embedding does not depend on its neighbours.

    Args:
        pipe: with its text encoder, or without (``text_encoder=None``) if everything is cached.
        prompt: one text or several.
        negative_prompt: one for all, or as many as prompts; None is the empty text.
        cache: where to look and to store.
        max_sequence_length: tokens; longer texts are cut, shorter ones padded with zero rows.
        guidance_scale: at 1 and below no negative prompt is needed.
        load_text_encoder: called at the first miss if `pipe` has no text encoder; the encoder is dropped afterwards.

    Returns:
        `prompt_embeds` and `negative_prompt_embeds`, each ``[B, text, D]`` on the pipeline's device; the latter is None
        without guidance.

    Raises:
        PromptNotCachedError: a prompt is not cached, and there is no text encoder.
        ValueError: the numbers of prompts and negative prompts differ.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives: list[str] = []
    if guidance_scale > 1:
        single = negative_prompt is None or isinstance(negative_prompt, str)
        negatives = [negative_prompt or ""] * len(prompts) if single else list(negative_prompt)  # type: ignore
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")

    dtype = (pipe.transformer if pipe.text_encoder is None else pipe.text_encoder).dtype
    identity = _identity(pipe)
    keys = {
        text: prompt_key(identity, text, max_sequence_length=max_sequence_length, dtype=dtype)
        for text in dict.fromkeys(prompts + negatives)
    }
    found = {text: embeds for text, key in keys.items() if (embeds := cache.get(key)) is not None}
    misses = [text for text in keys if text not in found]
    borrowed = None
    if misses and pipe.text_encoder is None:
        if load_text_encoder is None:
            raise PromptNotCachedError(
                f"{misses[0]!r} is not in the prompt cache and the pipeline has no text encoder: load it with its text "
                "encoder once, or run another prompt"
            )
        borrowed = load_text_encoder()
        pipe.register_modules(text_encoder=borrowed)
    try:
        for text in misses:
            embeds, _ = pipe.encode_prompt(
                [text], do_classifier_free_guidance=False, max_sequence_length=max_sequence_length, dtype=dtype
            )
            found[text] = embeds[0]
            cache.put(keys[text], embeds[0])
    finally:
        if borrowed is not None:
            pipe.register_modules(text_encoder=None)
    device = pipe._execution_device
    stacked = [torch.stack([found[text].to(device) for text in texts]) for texts in (prompts, negatives) if texts]
    return stacked[0], stacked[1] if negatives else None


def _identity(pipe: WanPipeline) -> str:
    known = getattr(pipe, "text_encoder_identity", None)  # set by `pusa.zoo.load_pipeline`
    if known is not None:
        return known
    if pipe.text_encoder is None:
        raise PromptNotCachedError("nothing tells which text encoder this pipeline had: load it with from_pretrained")
    return identity_of_module(pipe.text_encoder, pipe.tokenizer)
