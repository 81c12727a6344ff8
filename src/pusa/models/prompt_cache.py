"""Keep prompt embeddings on disk, so that a prompt needs the text encoder (11 GB) once and not in every run.

An entry holds the embedding's rows up to the end of the text; the rows after it are zeros, and `PromptCache.get` puts
them back. `encode_prompts` loads the encoder at most once for all texts of a run, and computes where a plan says.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa.acceleration.decisions import PartPlan
from pusa.fsutil import cache_folder
from pusa.models.finite import NotFiniteError, is_finite
from pusa.models.text_encoder import identity_of_module, place_text_encoder, rest_text_encoder

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Name the cache's folder: ``prompts`` in that of PUSA_CACHE, or in ``~/.cache/pusa``."""
    return cache_folder() / "prompts"


class PromptNotCachedError(RuntimeError):
    """Neither the cache nor a text encoder has the embedding of a prompt."""


def prompt_key(identity: str, prompt: str, *, max_sequence_length: int, dtype: torch.dtype) -> str:
    """Name the cache entry of a prompt.

    Prompts that Wan's cleaning makes equal (entities, white space) share an entry.

    Args:
        identity: of the text encoder and its tokenizer, see `pusa.models.text_encoder`.
        max_sequence_length: tokens.
        dtype: of the text encoder.
    """
    parts = [identity, prompt_clean(prompt), max_sequence_length, str(dtype)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class PromptCache:
    """Store prompt embeddings in a folder. Processes may share it: entries appear whole or not at all."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> Tensor | None:
        """Read an embedding ``[text, D]`` to the CPU, equal to the one stored; None if the folder does not have it."""
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
        if not is_finite(rows):
            logger.warning("%s holds NaN or infinity: the prompt is encoded again", path)
            return None
        return torch.cat([rows, rows.new_zeros(length - rows.shape[0], rows.shape[1])])

    def put(self, key: str, prompt_embeds: Tensor) -> None:
        """Store an embedding ``[text, D]`` without the zero rows at its end."""
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
    plan: PartPlan | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor | None]:
    """Encode prompts for a call of the pipeline; the text encoder runs only for what the cache does not hold.

    The encoder takes one prompt at a time, so that an embedding does not depend on its neighbours.

    Args:
        pipe: with its text encoder, or without (``text_encoder=None``): then `load_text_encoder` is called for what is
            not cached.
        prompt: one text or several.
        negative_prompt: one for all, or as many as prompts; None is the empty text.
        cache: looked into first; new embeddings go there.
        max_sequence_length: tokens; longer texts are cut, shorter ones padded with zero rows.
        guidance_scale: at 1 and below no negative prompt is needed.
        load_text_encoder: returns a text encoder on the CPU for a `pipe` without one; called at most once.
        plan: how a loaded encoder computes, and if it stays for the next new prompt, as long as `pipe` lives. None: on
            the CPU, and dropped afterwards.
        device: where a loaded encoder computes; None: as in `plan`.
        progress: receives how much of the work is done, and its total: loading the encoder, and each text. It is not
            called if the cache has all texts.

    Returns:
        `prompt_embeds` and `negative_prompt_embeds`, each ``[B, text, D]`` on the pipeline's device; the latter is None
        without guidance.

    Raises:
        PromptNotCachedError: a prompt is not cached, and there is no text encoder.
        NotFiniteError: the text encoder has computed NaN or infinity.
        ValueError: the numbers of prompts and negative prompts differ.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives: list[str] = []
    if guidance_scale > 1:
        single = negative_prompt is None or isinstance(negative_prompt, str)
        negatives = [negative_prompt or ""] * len(prompts) if single else list(negative_prompt)  # type: ignore
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")

    dtype = _dtype(pipe, plan)
    identity = _identity(pipe)
    keys = {
        text: prompt_key(identity, text, max_sequence_length=max_sequence_length, dtype=dtype)
        for text in dict.fromkeys(prompts + negatives)
    }
    embeds_of = {text: embeds for text, key in keys.items() if (embeds := cache.get(key)) is not None}
    if misses := [text for text in keys if text not in embeds_of]:
        is_loaded_here = pipe.text_encoder is None
        if is_loaded_here and load_text_encoder is None:
            raise PromptNotCachedError(
                f"{misses[0]!r} is not in the prompt cache and the pipeline has no text encoder: load it with its text "
                "encoder once, or run another prompt"
            )
        total = len(misses) + is_loaded_here
        progress(0, total)
        with _text_encoder(pipe, load_text_encoder, plan, device):
            for number, text in enumerate(misses, start=int(is_loaded_here)):
                progress(number, total)
                embeds_of[text] = _encode(pipe, text, max_sequence_length, dtype)
                cache.put(keys[text], embeds_of[text])
        progress(total, total)
    device = pipe._execution_device
    stacked = [torch.stack([embeds_of[text].to(device) for text in texts]) for texts in (prompts, negatives) if texts]
    return stacked[0], stacked[1] if negatives else None


def _encode(pipe: WanPipeline, text: str, max_sequence_length: int, dtype: torch.dtype) -> Tensor:
    """Compute an embedding ``[text, D]`` on the CPU, where the cache and the next stage read it."""
    embeds, _ = pipe.encode_prompt(
        [text],
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
        device=torch.device("cpu"),
        dtype=dtype,
    )
    if not is_finite(embeds):
        raise NotFiniteError("the text_encoder has computed NaN or infinity: load it in bf16 or fp32", "text_encoder")
    return embeds[0]


@contextmanager
def _text_encoder(
    pipe: WanPipeline,
    load: Callable[[], torch.nn.Module] | None,
    plan: PartPlan | None,
    device: torch.device | str | None,
) -> Iterator[None]:
    """Give `pipe` a text encoder for a while: its own, the one that it kept, or one that is loaded now.

    A kept one is an attribute of `pipe` and no component, so that offloading and saving do not see it, and so that it
    ends with the pipeline.
    """
    if pipe.text_encoder is not None:
        yield
        return
    kept_plan, encoder = getattr(pipe, "kept_text_encoder", None) or (None, None)
    if encoder is None or kept_plan != plan:
        pipe.kept_text_encoder = encoder = None  # frees the old one before the next is read
        assert load is not None
        encoder = load()
    stays = False
    try:
        if plan is not None:
            place_text_encoder(encoder, plan, device)
        pipe.register_modules(text_encoder=encoder)
        yield
        if plan is not None and plan.when == "stay":
            rest_text_encoder(encoder, plan)
            stays = True
    finally:
        pipe.register_modules(text_encoder=None)
        pipe.kept_text_encoder = (plan, encoder) if stays else None
        del encoder
        if not stays and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the transformer needs it next


def _dtype(pipe: WanPipeline, plan: PartPlan | None) -> torch.dtype:
    """Choose the dtype of embeddings: the text encoder's, or else the one in which the transformer computes."""
    if pipe.text_encoder is not None:
        return pipe.text_encoder.dtype
    if plan is not None:
        return getattr(torch, plan.dtype)
    dtype = (pipe.transformer or pipe.transformer_2).dtype
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.bfloat16  # of quantised weights


def _identity(pipe: WanPipeline) -> str:
    identity = getattr(pipe, "text_encoder_identity", None)  # set by `pusa.loading.load_pipeline`
    if identity is not None:
        return identity
    if pipe.text_encoder is None:
        raise PromptNotCachedError("nothing tells which text encoder this pipeline had: load it with from_pretrained")
    return identity_of_module(pipe.text_encoder, pipe.tokenizer)
