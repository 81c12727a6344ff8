"""Load single files in ComfyUI's layouts as modules."""

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import UMT5EncoderModel

from pusa import resources
from pusa.models.bases import base_of
from pusa.models.files import WrongArchitectureError
from pusa.models.fp8 import STORAGE, store_as_fp8
from pusa.models.single_file.components import EmptyModel, UnknownHeadsError, empty_model, split_config
from pusa.models.single_file.kept import can_keep, keep
from pusa.models.single_file.recognition import Part, SingleFile, recognise
from pusa.models.single_file.tensors import TensorReader
from pusa.models.single_file.text_encoder import load_tokenizer
from pusa.models.streaming import Devices, bytes_in_ram, device_of, weight_dtype
from pusa.models.text_encoder import check_text_encoder
from pusa.resources import DType

logger = logging.getLogger(__name__)


class Components(dict[str, Any]):
    """Map names in a pipeline to the components of a file; `notes` says, for people, what was left out and why."""

    def __init__(self, components: Mapping[str, Any], notes: tuple[str, ...] = ()) -> None:
        super().__init__(components)
        self.notes = notes


def load_single_file(
    path: str | Path,
    config: Mapping[str, Any] | None = None,
    torch_dtype: "DType | None" = None,
    *,
    keep_quantized: bool | Collection[str] = False,
    components: Collection[str] | None = None,
    device: Devices = "cpu",
    as_fp8: Collection[str] = (),
) -> Components:
    """Load the models in a safetensors or GGUF file as ComfyUI's users have it.

    bf16, fp16, fp32, fp8 (plain, or scaled by tensor or by row, in the layouts of 2025 and later), int8 and GGUF, with
    or without prefixes; names of Wan, genmo, diffusers, transformers and llama.cpp. Weights are exactly
    float32(stored) * float32(scale), or a GGUF's values in fp32, rounded once to the dtype. Memory holds the result and
    one tensor more.

    Args:
        path: a file of a transformer, a text encoder or a VAE, or of several (an all-in-one checkpoint).
        config: what tensors do not tell, as arguments of `WanTransformer3DModel`, `MochiTransformer3DModel`,
            `UMT5Config` or `AutoencoderKLWan`, or component -> arguments. Real models need none: their heads have 128
            channels. Where it is for one component of several, a transformer whose heads stay unknown is left out, with
            a note.
        torch_dtype: one for all, or by component with a "default". None: as elsewhere in Pusa: fp32 for files below a
            billion parameters, otherwise bf16 with the VAE in fp32. In bf16 and fp16 what diffusers keeps in fp32
            (time embedding, norms, modulation) stays so.
        keep_quantized: keep the matrices of linear layers as they are stored (fp8, int8, GGUF) and compute each at
            its use, rounded to the dtype: of all components, or of those that are named. Needs
            ``pip install "pusa[quant]"``.
        components: those to load, of several in the file; None: all.
        device: where the weights go as they are read: one for all, or by component (the CPU for others).
        as_fp8: components whose linear layers are stored as fp8 (`pusa.models.fp8`) as they are read; without effect
            on those that `keep_quantized` keeps.

    Returns:
        Component -> module, for inference: "transformer" (a `PusaWanTransformer3DModel` or a
        `PusaMochiTransformer3DModel`), "text_encoder", "vae"; and "tokenizer" if the file holds one that can be read.
        Attribute `notes` says what was left out.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: cut short, or no file of weights.
        WrongArchitectureError: another family (image-to-video, VACE, ...), a format that would be read wrongly
            (nvfp4, mxfp8, ...), tensors missing or left over; it names them.
        ValueError: `config` has fields that nothing in the file takes, the file lacks one of `components`, or
            `torch_dtype` is no floating type of torch.
        ResourcesError: not enough memory.
    """
    for given in torch_dtype.values() if isinstance(torch_dtype, Mapping) else (torch_dtype,):
        if given is not None and not (isinstance(given, torch.dtype) and given.is_floating_point):
            raise ValueError(f"torch_dtype={given!r} is no floating type: give torch.bfloat16, for one")
    file = recognise(path)
    parts = _parts(file, components)
    configs = split_config(config, file)
    empty, notes = _empty_models(file, parts, configs)
    kept = set(empty) if keep_quantized is True else set(keep_quantized or ())
    counts = {part: sum(p.numel() for p in each.model.parameters()) for part, each in empty.items()}
    dtype = resources.default_dtype(sum(counts.values())) if torch_dtype is None else torch_dtype
    as_fp8 = set(as_fp8) - kept
    need = _bytes_in_memory(file, counts, dtype, kept)
    resources.check_ram(bytes_in_ram(need, device, as_fp8), file.path.name)
    loaded: dict[str, Any] = {}
    with TensorReader(file.header) as reader:
        for component, each in empty.items():
            part_dtype = resources.dtype_of(component, dtype)
            if component in as_fp8:
                store_as_fp8(each.model, part_dtype)
            place = device_of(component, device)
            loaded[component] = _load(each, reader, part_dtype, place, keep_quantized=component in kept)
            if component == "transformer":
                loaded[component] = base_of(each.model).adopt(each.model)
    if "text_encoder" in loaded:
        tokenizer, note = load_tokenizer(file)
        if tokenizer is None:
            notes.append(note)
        else:
            loaded["tokenizer"] = tokenizer
    for note in notes:
        logger.warning("%s", note)
    return Components(loaded, tuple(notes))


def _parts(file: SingleFile, components: Collection[str] | None) -> list[Part]:
    """Choose what to load of a file, and refuse what cannot be."""
    parts = list(file.parts)
    if components is not None and not file.is_lora:
        parts = [part for part in file.parts if part.component in components]
        if missing := sorted(set(components) - {str(part.component) for part in parts}):
            raise ValueError(f"components={missing}: {file.path.name} holds {file.title}")
    is_all = len(parts) == len(file.parts)
    if problem := file.problem if is_all else next((part.problem for part in parts if part.problem), ""):
        raise WrongArchitectureError(problem if file.parts else f"{file.path.name}: {problem}")
    if not parts or len({part.component for part in parts} - {None}) != len(parts):
        raise WrongArchitectureError(f"{file.path.name} holds {file.title}: one model of each kind can be loaded")
    return parts


def _empty_models(
    file: SingleFile, parts: Iterable[Part], configs: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, EmptyModel], list[str]]:
    empty, notes = {}, []
    for part in parts:
        component = str(part.component)
        try:
            empty[component] = empty_model(file, part, configs.get(component, {}))
        except UnknownHeadsError as error:
            if component in configs or not configs:
                raise
            notes.append(f"left out: {error}")
    return empty, notes


def _bytes_in_memory(
    file: SingleFile, counts: Mapping[str, int], dtype: DType, kept: Collection[str]
) -> dict[str, int]:
    sizes = {str(part.component): part.kept_bytes for part in file.parts if part.component in kept}
    return {**resources.weight_bytes(counts, dtype), **{name: sizes[name] for name in counts if name in sizes}}


def _load(
    empty: EmptyModel,
    reader: TensorReader,
    dtype: torch.dtype,
    device: "torch.device | str",
    *,
    keep_quantized: bool,
) -> nn.Module:
    """Fill a model tensor by tensor."""
    model = empty.model
    state = {}
    sources = model.__dict__.setdefault("_pusa_weights", {})  # see `pusa.models.streaming.sources_of`
    for name, parameter in model.state_dict().items():
        tensor = empty.tensors.get(name)
        if tensor is None:
            continue  # checked before: it is tied to another
        own_dtype = weight_dtype(model, name, dtype)
        if keep_quantized and own_dtype == dtype and can_keep(model, name, tensor):
            keep(model, name, tensor, reader, dtype)
        else:
            value = reader.read(tensor, own_dtype).to(device).reshape(parameter.shape)
            state[name] = value.to(STORAGE) if parameter.dtype == STORAGE else value
            if (source := reader.source_of(tensor)) is not None and tensor.header.shape == tuple(parameter.shape):
                sources[name] = source
    model.load_state_dict(state, strict=False, assign=True)
    if isinstance(model, UMT5EncoderModel):
        model.encoder.embed_tokens.weight = model.shared.weight
        check_text_encoder(model)
    empty_names = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty_names and str(device) != "meta":
        raise RuntimeError(f"{len(empty_names)} weights were not filled (first: {empty_names[0]})")
    return model.to(device).eval()
