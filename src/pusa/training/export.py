"""Write the result of a run (an adapter, or a whole transformer) and export adapters in other layouts."""

import json
import math
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from torch.distributed.tensor import DTensor

from pusa import __version__, zoo
from pusa.lora.layouts import Layout, Pair, checked_layout, read_lora, write_lora
from pusa.models.bases import base_of
from pusa.models.files import read_json
from pusa.models.streaming import weight_dtype
from pusa.training.checkpoint import Tensors, checkpoints, read_state
from pusa.training.config import Expert, TrainConfig, load_config, public_name
from pusa.training.model import ADAPTER

_SUFFIXES = {"transformer": "_high_noise", "transformer_2": "_low_noise"}
_MATRICES = (f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")


def result_path(folder: Path, config: TrainConfig, expert: Expert) -> Path:
    """Return the path of a run's result: an adapter file, or the folder of a transformer in diffusers layout."""
    if config.method.kind == "full":
        return folder / "model" / expert
    return _with_expert(folder / "adapter.safetensors", config, expert)


def write_result(
    folder: Path,
    model: Any,
    parameters: Mapping[str, Tensor],
    *,
    config: TrainConfig,
    expert: Expert,
    step: int,
    data_hash: str,
    writes: bool,
) -> Path:
    """Write the result. Every process must call it, as sharded tensors are gathered; one `writes`."""
    path = result_path(folder, config, expert)
    is_lora = config.method.kind == "lora"
    dtype = torch.float32 if is_lora or config.model.dtype == "fp32" else torch.bfloat16
    gathered_tensors = {}
    for name, tensor in parameters.items():
        gathered = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        if writes:
            gathered_tensors[name] = gathered.to("cpu", weight_dtype(model, name, dtype)).clone()  # not a view of more
    if not writes:
        return path
    if is_lora:
        metadata = adapter_metadata(config, expert, step=step, data_hash=data_hash)
        layout = checked_layout(None, base_of(model))
        write_lora(path, pairs_of(gathered_tensors.items(), config), {}, layout=layout, metadata=metadata)
        return path
    part = path.with_name(f"{path.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    kept = model.state_dict().keys()  # some keep tables beside their parameters
    gathered_tensors |= {name: table.cpu().clone() for name, table in model.named_buffers() if name in kept}
    save_torch_state_dict(gathered_tensors, part, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
    model.save_config(part)
    if path.exists():
        path.rename(path.with_name(f"{path.name}.before-step-{step}"))
    part.rename(path)
    return path


def pairs_of(tensors: Iterable[tuple[str, Tensor]], config: TrainConfig) -> dict[str, Pair]:
    """Pair the matrices A and B by layer, B times alpha / rank: strength 1 is the adapter as trained."""
    halves: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, tensor in tensors:
        for half, suffix in zip(halves, _MATRICES, strict=True):
            if name.endswith(suffix):
                half[name.removesuffix(suffix)] = tensor
    scale = config.method.alpha / config.method.rank
    return {layer: (a, halves[1][layer] * scale) for layer, a in halves[0].items()}


def adapter_metadata(config: TrainConfig, expert: Expert, *, step: int, data_hash: str) -> dict[str, str]:
    """Make the header of an adapter file: as `export_lora` writes it, with ``alpha`` 1.0 as trained, and the run.

    The file will be shared, so folders of this machine are left out.
    """
    return {
        "base": public_name(config.model.source),
        "expert": expert,
        "noise_range": json.dumps(config.model.experts[expert]),
        "rank": str(config.method.rank),
        "lora_alpha": f"{config.method.alpha:g}",
        "alpha": "1.0",
        "steps": str(step),
        "data_hash": data_hash,
        "config": json.dumps(config.shareable()),
        "trained_with": f"pusa {__version__}",
    }


def export_run(
    run: str | Path,
    output: str | Path,
    *,
    layout: Layout | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    step: int | None = None,
) -> list[Path]:
    """Write a run's adapter in another layout.

    Args:
        run: the run's folder.
        output: ``NAME.safetensors``; two experts give ``NAME_high_noise`` and ``NAME_low_noise``. Of a full fine-tune
            a new folder, for a whole model in diffusers layout: its transformers, and the other parts of its base.
        layout: "original" (as ``pusa_v1.pt``), "diffusers" or "comfyui"; None: "comfyui", for other bases than Wan
            "diffusers", the only one they have.
        scale: multiplies the adapter: 1.4 makes strength 1 what alpha 1.4 was.
        dtype: of the matrices; None: fp32, as trained.
        step: of a checkpoint to export instead of the result; its moving average, if it has one.

    Returns:
        The files, or the folder.

    Raises:
        FileNotFoundError, ValueError: there is no run, no result or no such checkpoint, or an argument is wrong.
    """
    folder, target = Path(run), Path(output)
    config = load_config(folder)
    if config.method.kind == "full":
        return [_export_model(folder, target, config)]
    if target.suffix != ".safetensors":
        raise ValueError(f"output={str(output)!r} must end in .safetensors")
    chosen = checked_layout(layout, zoo.base_of(config.model.source))
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale={scale:g} must be a finite number other than 0")
    written = []
    for expert in config.model.experts:
        pairs, metadata = _read_adapter(folder, config, expert, step)
        scaled = {layer: (a.to(dtype or a.dtype), (b * scale).to(dtype or b.dtype)) for layer, (a, b) in pairs.items()}
        path = _with_expert(target, config, expert)
        write_lora(path, scaled, {}, layout=chosen, metadata={**metadata, "scale": f"{scale:g}", "layout": chosen})
        written.append(path)
    return written


def _export_model(folder: Path, target: Path, config: TrainConfig) -> Path:
    """Write the transformers of a full fine-tune, and the other parts of its base, as a model's folder."""
    from pusa.pipeline import PusaPipeline

    if target.suffix == ".safetensors" or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ValueError(
            f"{folder} is a full fine-tune, whose transformers lie in {folder / 'model'}: to write a whole model, give "
            f"a new folder, not {target}"
        )
    paths = {expert: result_path(folder, config, expert) for expert in config.model.experts}
    if missing := [path for path in paths.values() if not path.is_dir()]:
        raise FileNotFoundError(f"{missing[0]} is not there: the run is not finished")
    library, name = zoo.base_of(config.model.source).libraries["transformer"]
    stock: Any = getattr(import_module(library), name)
    dtype = torch.float32 if config.model.dtype == "fp32" else torch.bfloat16
    trained = {expert: stock.from_pretrained(path, torch_dtype=dtype) for expert, path in paths.items()}
    PusaPipeline.from_pretrained(config.model.source, **trained).save_pretrained(target)
    source = zoo.find(config.model.source)
    card = {} if source is None or source.folder is None else read_json(source.folder / zoo.CARD_FILE)
    if card:
        described = {key: value for key, value in card.items() if key != "lora"}  # that was the base's
        (target / zoo.CARD_FILE).write_text(json.dumps(described, indent=2) + "\n")
    return target


def _read_adapter(
    folder: Path, config: TrainConfig, expert: Expert, step: int | None
) -> tuple[dict[str, Pair], dict[str, str]]:
    expert_folder = config.expert_folder(folder, expert)
    if step is None:
        path = result_path(folder, config, expert)
        if not path.is_file():
            steps = ", ".join(map(str, checkpoints(expert_folder)))
            raise FileNotFoundError(
                f"{folder} has no {path.name}: the run is not finished" + (f"; give a step: {steps}" if steps else "")
            )
        lora = read_lora(path)
        return lora.pairs, lora.metadata
    found = checkpoints(expert_folder)
    if step not in found:
        raise FileNotFoundError(
            f"{expert_folder} has no checkpoint of step {step}: there are {', '.join(map(str, found)) or 'none'}"
        )
    weights, averages = Tensors(found[step], "weights"), Tensors(found[step], "average")
    tensors = averages if any(True for _ in averages) else weights
    data_hash = read_state(found[step])["data_hash"]
    metadata = adapter_metadata(config, expert, step=step, data_hash=data_hash)
    return pairs_of(((name, tensors[name]) for name in tensors), config), metadata


def _with_expert(path: Path, config: TrainConfig, expert: Expert) -> Path:
    return path.with_stem(path.stem + _SUFFIXES[expert]) if len(config.model.experts) > 1 else path
