"""Write models to folders: as Wan publishes them, and as a ``pusa.json`` describes them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pusa.models import files, original


def write_transformer(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, num_heads: int = 3) -> None:
    """Write tensors of a transformer with Wan's own names as its shards, with ``config.json``."""
    folder.mkdir(exist_ok=True)
    config = {"_class_name": "WanModel", "model_type": "t2v", "num_heads": num_heads}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        return
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def cached_snapshot(cache: Path, hub_id: str, revision: str = "abc123") -> Path:
    """Enter a repository with one revision into a local cache of the Hub; return where its files go, yet to be made."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    (repository / "snapshots").mkdir()
    return repository / "snapshots" / revision


def describe_model(folder: Path, **defaults: Any) -> str:
    """Describe a model with these defaults in a folder, without its weights; return its source."""
    folder.mkdir()
    (folder / "pusa.json").write_text(json.dumps({"title": "a model of tests", "defaults": defaults}))
    return str(folder)


def write_original(folder: Path, parts: dict[str, Any], *, shards: int = 2) -> Path:
    """Write the components of a pipeline in the layout of Wan2.1, the VAE and the text encoder as pickles."""
    tensors = original.transformer_to_original(parts["transformer"].state_dict())
    write_transformer(folder, {key: value.contiguous() for key, value in tensors.items()}, shards=shards)
    torch.save(original.vae_to_original(parts["vae"].state_dict()), folder / f"{files.ORIGINAL_VAE}.pth")
    text = original.text_encoder_to_original(parts["text_encoder"].state_dict())
    torch.save(text, folder / f"{files.ORIGINAL_TEXT_ENCODER}.pth")
    parts["tokenizer"].save_pretrained(folder / files.ORIGINAL_TOKENIZER)
    return folder
