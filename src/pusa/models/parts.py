"""Check, before anything large is read, that a model's parts are exactly their checkpoints and belong together.

Parts in diffusers layout are loaded here, too.
"""

import importlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights

from pusa.models import files
from pusa.models.bases import TRANSFORMER_CLASSES, WAN, Base, base_named
from pusa.models.files import PARTS, WrongArchitectureError
from pusa.models.fp8 import store_as_fp8
from pusa.models.streaming import LoadCounter, Places, fill, places
from pusa.models.tensors import load_tensors

Tensors = Mapping[str, tuple[Sequence[int], str]]  # key -> shape, dtype as in a safetensors header

STREAMED_CLASSES = (
    *TRANSFORMER_CLASSES,
    *("AutoencoderKLWan", "AutoencoderKLMochi", "AutoencoderKL"),
    *("UMT5EncoderModel", "T5EncoderModel"),
)

_SCALE = re.compile(
    r"(?:^|[._])(?:scale_weight|scale_input|weight_scale(?:_2|_inv)?|input_scale|scaled_fp8|comfy_quant|absmax|"
    r"quant_map|quant_state\S*|SCB)$"
)
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_DECODER = re.compile(r"^(?:decoder\.|lm_head\.)")  # of a whole UMT5 model, whose encoder alone is used
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
}


# ---- a part and its checkpoint ---------------------------------------------------------------------------------------


def check_checkpoints(folder: Path, *, skip: Collection[str] = (), variant: str | None = None) -> None:
    """Check each part of a complete folder in diffusers layout, by the headers of its files and its ``config.json``.

    Parts whose configuration declares a quantisation are left to the library that reads them.

    Raises:
        WrongArchitectureError: tensors are missing, left over, of another shape, or quantised.
    """
    index = files.read_json(folder / "model_index.json")
    for part in PARTS:
        config = files.read_json(folder / part / "config.json")
        if part in skip or not config or "quantization_config" in config or (index.get(part) or [None])[0] is None:
            continue
        paths = checkpoint_files(folder / part, part, variant)
        model = _empty_model(index[part][1], config)
        if model is not None and paths:
            check_tensors(model, tensors_in(paths), f"{folder.name}/{part}")


def check_tensors(model: torch.nn.Module, tensors: Tensors, where: str) -> None:
    """Check that a checkpoint has exactly the tensors of a model, which may be on the meta device.

    One of two tied weights is enough, and what the model's class ignores may be left over.

    Raises:
        WrongArchitectureError: see `check_checkpoints`.
    """
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    refuse_quantised(tensors, where)
    tied = _tied_weights(model)
    missing = [key for key in shapes if key not in tensors and tied.get(key) not in tensors]
    missing = [key for key in missing if not _is_ignored(model, "_keys_to_ignore_on_load_missing", key)]
    unexpected = [key for key in tensors if key not in shapes]
    unexpected = [key for key in unexpected if not _is_ignored(model, "_keys_to_ignore_on_load_unexpected", key)]
    if isinstance(model, transformers.UMT5EncoderModel | transformers.T5EncoderModel):
        unexpected = [key for key in unexpected if not _DECODER.search(key)]
    faults = [
        f"{len(keys)} {fault}: {keys[0]}" + (", ..." if len(keys) > 1 else "")
        for keys, fault in ((missing, "weights are in no file"), (unexpected, "tensors are left over"))
        if keys
    ]
    others = [key for key in shapes if key in tensors and list(tensors[key][0]) != shapes[key]]
    if others:
        shape, first = list(tensors[others[0]][0]), others[0]
        faults.append(f"{len(others)} have another shape (first: {first} is {shape}, not {shapes[first]})")
    if faults:
        raise WrongArchitectureError(
            f"{where} is not exactly its checkpoint: {'; '.join(faults)} (config.json and weights of "
            "different models, or a file that is not whole)"
        )


def refuse_quantised(tensors: Tensors, where: str) -> None:
    """Raise WrongArchitectureError for a checkpoint with scales, or with weights that are no floats."""
    scales = [key for key in tensors if _SCALE.search(key)]
    if scales:
        dtypes = {dtype for _, dtype in tensors.values()}
        kind = "fp8" if any(dtype.startswith("F8") for dtype in dtypes) else "int8" if "I8" in dtypes else "low-bit"
        raise WrongArchitectureError(
            f"{where} is scaled {kind}: {len(scales)} of its {len(tensors)} tensors hold scales (first: {scales[0]}), "
            "and its weights would be wrong without them: take the bf16, fp16 or fp32 files"
        )
    packed = [(key, dtype) for key, (_, dtype) in tensors.items() if dtype not in _FLOATS]
    if packed:
        raise WrongArchitectureError(
            f"{where} holds {len(packed)} quantised weights (first: {packed[0][0]}, {packed[0][1]}): take the bf16, "
            "fp16 or fp32 files"
        )


def tensors_in(paths: Iterable[Path]) -> dict[str, tuple[Sequence[int], str]]:
    """Read shape and dtype of all tensors in safetensors files and pickles; only old pickles are read whole."""
    found: dict[str, tuple[Sequence[int], str]] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            found |= {key: (entry["shape"], entry["dtype"]) for key, entry in files.safetensors_header(path).items()}
        else:
            found |= described(load_tensors(path))
    return found


def described(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[Sequence[int], str]]:
    """Return shape and dtype of tensors as `check_tensors` takes them."""
    return {key: (list(value.shape), _DTYPES.get(value.dtype, str(value.dtype))) for key, value in tensors.items()}


def checkpoint_files(folder: Path, part: str, variant: str | None) -> list[Path]:
    """List the files that diffusers, or transformers for the text encoder, reads a part from."""
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    pickle = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
    for name, suffix in ((stem, "safetensors"), (pickle, "bin")):
        for infix in dict.fromkeys((f".{variant}" if variant else "", "")):
            whole = folder / f"{name}{infix}.{suffix}"
            index = folder / f"{name}.{suffix}.index{infix}.json"
            if index.is_file() and not (part == "text_encoder" and whole.is_file()):
                return sorted({folder / shard for shard in files.read_json(index)["weight_map"].values()})
            if whole.is_file():
                return [whole]
    return []


def _empty_model(class_name: str, config: Mapping[str, Any]) -> torch.nn.Module | None:
    """Build a model without its weights; None for a class that neither library has."""
    base = base_named(class_name)
    if base is not None:
        library, stock_class = base.libraries["transformer"]
        cls: Any = getattr(importlib.import_module(library), stock_class)
    else:
        cls = getattr(transformers, class_name, None) or getattr(diffusers, class_name, None)
    if cls is None:
        return None
    with init_empty_weights():
        if hasattr(cls, "config_class"):
            return cls(cls.config_class.from_dict(dict(config)))
        return cls.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def _tied_weights(model: torch.nn.Module) -> dict[str, str]:
    tied = getattr(model, "_tied_weights_keys", None)
    pairs = dict(tied) if isinstance(tied, Mapping) else {}
    return pairs | {source: target for target, source in pairs.items()}


def _is_ignored(model: torch.nn.Module, attribute: str, key: str) -> bool:
    return any(re.search(pattern, key) for pattern in getattr(model, attribute, None) or ())


# ---- loading ---------------------------------------------------------------------------------------------------------


def streamed_files(folder: Path, *, skip: Collection[str] = (), variant: str | None = None) -> dict[str, list[Path]]:
    """List the weight files of the parts that `load_part` loads, in a complete folder in diffusers layout.

    Parts that declare a quantisation, and those of other classes than Wan's, are left to the library that has them.
    """
    index = files.read_json(folder / "model_index.json")
    found = {}
    for part in PARTS:
        if part not in skip and (index.get(part) or [None, None])[1] in STREAMED_CLASSES:
            paths = checkpoint_files(folder / part, part, variant)
            if paths and "quantization_config" not in files.read_json(folder / part / "config.json"):
                found[part] = paths
    return found


def empty_part(folder: Path, part: str, paths: Sequence[Path]) -> tuple[torch.nn.Module, Places]:
    """Build a part without its weights, checked before, and list them: arguments of `pusa.models.streaming.fill`."""
    class_name = files.read_json(folder / "model_index.json")[part][1]
    model = _empty_model(class_name, files.read_json(folder / part / "config.json"))
    assert model is not None
    return model, places(paths)


def load_part(
    folder: Path,
    part: str,
    paths: Sequence[Path],
    dtype: torch.dtype,
    *,
    device: "torch.device | str" = "cpu",
    counter: LoadCounter | None = None,
    keep_mapped: bool = False,
    as_fp8: bool = False,
) -> torch.nn.Module:
    """Load one part of a checked folder in diffusers layout from its `streamed_files`: see `fill`.

    Args:
        as_fp8: store its linear layers as fp8 (`pusa.models.fp8`) as they are read.
    """
    model, weights = empty_part(folder, part, paths)
    if as_fp8:
        store_as_fp8(model, dtype)
    fill(model, weights, dtype, device=device, counter=counter, keep_mapped=keep_mapped)
    if isinstance(model, transformers.PreTrainedModel):
        model.config._name_or_path = str(folder / part)
    elif isinstance(model, diffusers.ModelMixin):
        model.register_to_config(_name_or_path=str(folder / part))
    return model


# ---- parts that belong together --------------------------------------------------------------------------------------


def check_together(parts: Mapping[str, Any], boundary_ratio: float | None, base: Base = WAN) -> None:
    """Check that the configurations of a pipeline's parts fit each other.

    Args:
        parts: configuration of each part that is there (a mapping, or an object with attributes).
        boundary_ratio: where the second expert takes over.
        base: the kind of model that they are of.

    Raises:
        ValueError: two experts without a boundary, or one outside 0..1; different channels or text widths.
    """
    experts = [part for part in ("transformer", "transformer_2") if part in parts]
    if len(experts) == 2 and boundary_ratio is None:
        raise ValueError(
            "there are two transformers and no boundary_ratio, so the second would never run: give boundary_ratio "
            "(0.875 for Wan2.2's text-to-video experts), or leave transformer_2 out"
        )
    if boundary_ratio is not None and not 0 <= boundary_ratio <= 1:
        raise ValueError(f"boundary_ratio={boundary_ratio:g} is outside 0..1: it is a sigma (0.875), not a timestep")
    for name, other, what in _pairs(parts, experts, base):
        (part, value), (with_part, with_value) = name, other
        if None not in (value, with_value) and value != with_value:
            raise ValueError(
                f"{part} has {value} {what} and {with_part} has {with_value}: they are of different models"
            )


def check_experts(experts: Collection[str], boundary_ratio: float | None) -> None:
    """Raise ValueError unless a pipeline has the transformers that its boundary, or the lack of one, needs."""
    if boundary_ratio is None and "transformer" not in experts:
        raise ValueError("there is no `transformer`: give the pipeline one")
    absent = {"transformer", "transformer_2"} - set(experts)
    if boundary_ratio is not None and absent:
        raise ValueError(
            f"boundary_ratio={boundary_ratio:g} needs two transformers and {min(absent)} is not here: give it, or "
            "register_to_config(boundary_ratio=None) to run `transformer` alone"
        )


def _pairs(
    parts: Mapping[str, Any], experts: list[str], base: Base
) -> Iterator[tuple[tuple[str, Any], tuple[str, Any], str]]:
    for expert in experts:
        if "vae" in parts:
            latent = next(filter(None, (_value(parts["vae"], key) for key in ("z_dim", "latent_channels"))), None)
            yield (expert, base.channels(parts[expert])), ("vae", latent), "latent channels"
        if "text_encoder" in parts:
            width = expert, base.text_width(parts[expert])
            yield width, ("text_encoder", _value(parts["text_encoder"], "d_model")), "channels of text"
    if len(experts) == 2:
        for key in ("in_channels", "out_channels"):
            first, second = ((expert, _value(parts[expert], key)) for expert in experts)
            yield first, second, key.replace("_", " ")


def _value(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
