"""Check the UMT5 text encoder, place it on a device, and compute an identity of it that tells it from others."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from transformers import UMT5EncoderModel

from pusa.acceleration.decisions import PartPlan

_SAMPLE_BYTES = 1 << 16


def check_text_encoder(text_encoder: UMT5EncoderModel) -> None:
    """Refuse a UMT5 encoder that reads prompts through an embedding other than the one in its file.

    Raises:
        RuntimeError: ``encoder.embed_tokens`` is not tied to ``shared``, as with transformers 5.0 (issue 43992): every
            prompt would become noise.
    """
    if text_encoder.encoder.embed_tokens.weight is not text_encoder.shared.weight:
        raise RuntimeError(
            "the text encoder's embeddings are not tied (encoder.embed_tokens is not shared), so prompts would be "
            "garbage: upgrade transformers (its issue 43992) and load again"
        )


def place_text_encoder(text_encoder: torch.nn.Module, plan: PartPlan, device: torch.device | str | None = None) -> None:
    """Put a text encoder where a plan says, before it encodes.

    Args:
        text_encoder: on the CPU, or where an earlier call has put it.
        plan: "none" and "model" move it whole; the other kinds of offloading keep it in RAM and copy one layer at a
            time, the next one while a layer computes.
        device: where it computes; None: as in `plan`.
    """
    if device is None:
        device = torch.device("cuda", plan.card) if plan.device == "cuda" else torch.device("cpu")
    device, dtype = torch.device(device), getattr(torch, plan.dtype)
    if next(text_encoder.parameters()).dtype != dtype:
        text_encoder.to(dtype)
    if plan.offload in ("none", "model"):
        text_encoder.to(device)
    elif not hasattr(text_encoder, "_diffusers_hook"):
        apply_group_offloading(
            text_encoder, onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda"
        )


def rest_text_encoder(text_encoder: torch.nn.Module, plan: PartPlan) -> None:
    """Move a text encoder that stays loaded off the card between prompts, if its plan says so."""
    if plan.offload == "model":
        text_encoder.to("cpu")


def identity_of_files(paths: Iterable[Path]) -> str:
    """Hash a text encoder and its tokenizer on disk, without reading all of them.

    Each file counts with its name, its size, and 64 KiB from its beginning, middle and end: the header of a safetensors
    file alone is the same for all fine-tunes of a model.

    Args:
        paths: files, or folders of which every file counts.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            size_bytes = file.stat().st_size
            digest.update(f"{file.name}:{size_bytes};".encode())
            with file.open("rb") as stream:
                for start in (0, size_bytes // 2, max(0, size_bytes - _SAMPLE_BYTES)):
                    stream.seek(start)
                    digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def identity_of_module(text_encoder: torch.nn.Module, tokenizer: Any) -> str:
    """Hash a text encoder in memory: names, shapes and some values of its parameters, and the vocabulary.

    Returns:
        SHA-256 in hexadecimal digits; another than that of the same model's files.
    """
    digest = hashlib.sha256()
    for name, parameter in text_encoder.named_parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 256)]
        digest.update(f"{name}:{list(parameter.shape)};".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()
