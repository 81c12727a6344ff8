"""Begin a run from an adapter: one of Pusa's own files, that of a zoo model, or another run's result."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pusa import zoo
from pusa.lora.adapters import contents
from pusa.lora.layouts import Pair
from pusa.lora.operations import load_pusa, unload_lora
from pusa.training.config import Expert, TrainConfig

logger = logging.getLogger(__name__)

_NAME = "start"


def read_start(model: Any, config: TrainConfig, expert: Expert) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Read the adapter `config.start_from` at the strength it was trained at, checked against the model.

    Args:
        model: a Wan transformer without adapters; it is left as it was.

    Returns:
        Layer -> A ``[rank, in]`` and B ``[out, rank]``, and parameter -> difference; both empty without an adapter.

    Raises:
        FileNotFoundError, ValueError: there is no such adapter, it does not fit the model, or its layers or rank are
            not those that the run trains.
    """
    if config.start_from is None:
        return {}, {}
    parts = SimpleNamespace(**{expert: model})
    load_pusa(parts, {expert: _source(config.start_from, expert)}, alpha=1.0, adapter_name=_NAME)
    pairs, deltas = contents(model, _NAME)
    pairs = {
        name: (a.detach().float().cpu().clone(), b.detach().float().cpu().clone()) for name, (a, b) in pairs.items()
    }
    unload_lora(parts, adapter_name=_NAME)
    if config.method.kind == "lora":
        _check_trainable(config, pairs, deltas)
    return pairs, deltas


def _source(start_from: str, expert: Expert) -> str | Path:
    """Return the file of a zoo model's own adapter, and any other source as it is."""
    model = zoo.find(zoo.with_fallback(start_from))
    if model is None or model.family or Path(start_from).is_file():
        return start_from
    if model.lora is None:
        raise ValueError(f"start_from={start_from}: no adapter of this model is known; give a file or a run's folder")
    files = model.lora.fetch()
    if expert not in files:
        raise ValueError(f"start_from={start_from} has an adapter for {', '.join(files)}, and none for {expert}")
    return files[expert]


def _check_trainable(config: TrainConfig, pairs: dict[str, Pair], deltas: dict[str, Tensor]) -> None:
    method = config.method
    if deltas:
        raise ValueError(
            f"start_from={config.start_from} changes {len(deltas)} parameters (such as {next(iter(deltas))}) that no "
            "LoRA holds: take method.kind=full"
        )
    others = [name for name in pairs if not name.endswith(tuple(f".{target}" for target in method.targets))]
    if others:
        raise ValueError(
            f"start_from={config.start_from} adapts {len(others)} layers that this run does not train (such as "
            f"{others[0]}): add them to method.targets"
        )
    rank = max(a.shape[0] for a, _ in pairs.values())
    if rank > method.rank:
        raise ValueError(
            f"start_from={config.start_from} has rank {rank}, more than method.rank={method.rank}: set "
            f"method.rank={rank} and method.alpha={method.alpha * rank / method.rank:g}"
        )


@torch.no_grad()
def begin_lora(model: Any, adapter: str, pairs: dict[str, Pair], scale: float) -> None:
    """Set the matrices of an attached adapter so that ``scale * (B @ A)`` is what the pairs are.

    Of a larger rank, the further rows of A stay as they are drawn and meet zeros in B.
    """
    for name, (a, b) in pairs.items():
        layer, rank = model.get_submodule(name), a.shape[0]
        layer.lora_A[adapter].weight[:rank].copy_(a)
        layer.lora_B[adapter].weight[:, :rank].copy_(b / scale)
    if pairs:
        logger.info("the run goes on from an adapter of %d layers", len(pairs))


@torch.no_grad()
def begin_full(model: Any, pairs: dict[str, Pair], deltas: dict[str, Tensor]) -> None:
    """Add an adapter at strength 1 to fp32 weights."""
    for name, (a, b) in pairs.items():
        weight = model.get_submodule(name).weight
        weight += (b @ a.flatten(1)).reshape(weight.shape)
    for name, delta in deltas.items():
        model.get_parameter(name).add_(delta.float())
