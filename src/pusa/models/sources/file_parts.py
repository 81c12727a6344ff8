"""Load the parts of a pipeline from single files, each file once, and check that they are of the model asked for."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from pusa import resources
from pusa.models.bases import base_of_values
from pusa.models.files import WrongArchitectureError
from pusa.models.single_file.loading import load_single_file
from pusa.models.single_file.recognition import recognise
from pusa.models.single_file.text_encoder import load_tokenizer
from pusa.models.sources import configs
from pusa.models.sources.file_set import OPTIONS, component_of, part_in, transformer_config
from pusa.models.streaming import Devices, device_of
from pusa.models.vae import channels_last
from pusa.resources import DType


def parameter_counts(files: Mapping[str, Path]) -> dict[str, int]:
    """Count the parameters of each part, from the headers of the files."""
    return {part: part_in(recognise(path), part).parameters for part, path in files.items()}


def weight_bytes(
    files: Mapping[str, Path], dtype: DType, keep_quantized: bool | Collection[str] = False
) -> dict[str, int]:
    """Compute the memory that each part takes, from the headers of the files; arguments as `load_parts`."""
    kept = files if keep_quantized is True else keep_quantized or ()
    sizes = resources.weight_bytes(parameter_counts(files), dtype)
    return sizes | {part: part_in(recognise(files[part]), part).kept_bytes for part in files if part in kept}


def check_model(files: Mapping[str, Path], transformer: Mapping[str, Any], experts: int, name: str) -> None:
    """Check by headers alone that the parts in files are those of a published model.

    Args:
        files: part -> file, as `file_set.expand` returns them.
        transformer, experts: the model's configuration, and how many transformers it has.
        name: of the model, for messages.

    Raises:
        WrongArchitectureError: another width, number of blocks or of channels; or a second transformer too many.
    """
    if experts == 1 and "transformer_2" in files:
        raise WrongArchitectureError(
            f"{name} has one transformer and --transformer-2 {files['transformer_2'].name} is given: leave it out, or "
            "take --model wan2.2-a14b"
        )
    base = base_of_values(transformer)
    for part, path in files.items():
        file, where = recognise(path), f"{OPTIONS[part]} {path.name}"
        entry = part_in(file, part)
        if component_of(part) == "transformer" and not configs.fits(transformer_config(file) or {}, transformer):
            raise WrongArchitectureError(
                f"{where} has {entry.layers} blocks of width {entry.width} and {entry.in_channels} channels, and "
                f"{name} has {transformer['num_layers']} of {_width(transformer)} and {transformer['in_channels']}: "
                "give --model the name that fits, or leave it out"
            )
        if part == "vae" and entry.out_channels != base.channels(transformer):
            raise WrongArchitectureError(
                f"{where} is {entry.title} with {entry.out_channels} latent channels, and {name} has "
                f"{base.channels(transformer)}: give the other VAE"
            )
        if part == "text_encoder" and entry.family != base.text_encoder:
            raise WrongArchitectureError(f"{where} is {entry.title}, and {name} reads text with another: leave it out")
        if part == "text_encoder" and entry.width != base.text_width(transformer):
            raise WrongArchitectureError(
                f"{where} has {entry.width} channels of text, and {name} takes {base.text_width(transformer)}"
            )


def _width(transformer: Mapping[str, Any]) -> int:
    return transformer["num_attention_heads"] * transformer["attention_head_dim"]


def load_parts(
    files: Mapping[str, Path],
    *,
    dtype: DType,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    keep_quantized: bool | Collection[str] = False,
    device: Devices = "cpu",
    as_fp8: Collection[str] = (),
) -> dict[str, Any]:
    """Load parts from files.

    Args:
        files: part -> file; several parts may be in one.
        dtype: one for all, or by component with a "default".
        config: component -> arguments that tensors do not tell, for models of unpublished sizes.
        keep_quantized: as for `load_single_file`, of all parts or of those that are named.
        device: one for all parts, or by part (the CPU for others).
        as_fp8: parts that are stored as fp8 as they are read, as for `load_single_file`.

    Returns:
        Part -> module; and a tokenizer, if the text encoder's file has one.
    """
    parts: dict[str, Any] = {}
    for path in dict.fromkeys(files.values()):
        wanted = [part for part, other in files.items() if other == path]
        kept = wanted if keep_quantized is True else [part for part in wanted if part in (keep_quantized or ())]
        loaded = load_single_file(
            path,
            config=config,
            torch_dtype=_by_component(dtype, wanted),
            keep_quantized=[component_of(part) for part in kept],
            components=[component_of(part) for part in wanted],
            device={component_of(part): device_of(part, device) for part in wanted},
            as_fp8=[component_of(part) for part in wanted if part in as_fp8],
        )
        parts |= {part: loaded[component_of(part)] for part in wanted}
        if "text_encoder" in wanted and "tokenizer" in loaded:
            parts["tokenizer"] = loaded["tokenizer"]
    vae = parts.get("vae")
    if isinstance(vae, AutoencoderKLWan) and vae.dtype == torch.bfloat16:
        channels_last(vae)
    return parts


def _by_component(dtype: DType, parts: Collection[str]) -> DType:
    """Give a file's transformer the dtype of the expert that it is."""
    if not isinstance(dtype, Mapping):
        return dtype
    expert = next((part for part in parts if component_of(part) == "transformer"), "transformer")
    return {**dtype, **({"transformer": dtype[expert]} if expert in dtype else {})}


def tokenizer_in(files: Mapping[str, Path]) -> Any | None:
    """Load the tokenizer in the text encoder's file; None if it holds none that can be read."""
    return load_tokenizer(recognise(files["text_encoder"]))[0] if "text_encoder" in files else None
