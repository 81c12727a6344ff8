"""Check the UMT5 text encoder, and compute an identity of it that tells it from others."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import UMT5EncoderModel

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
