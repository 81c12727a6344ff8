"""Build the models of a single file's components, empty, with the place of each of their tensors in the file."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, MochiTransformer3DModel, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from pusa.models import original
from pusa.models.files import WrongArchitectureError
from pusa.models.mochi.checkpoint import transformer_to_diffusers
from pusa.models.mochi.layout import config_from_keys
from pusa.models.parts import check_tensors
from pusa.models.single_file.quantisation import StoredTensor, stored_part
from pusa.models.single_file.recognition import Part, SingleFile
from pusa.models.single_file.text_encoder import text_encoder_config, to_transformers

Value = TypeVar("Value")
Config = dict[str, Any]

_TI2V_WIDTH = 3072


class UnknownHeadsError(WrongArchitectureError):
    """The width of a transformer does not tell its attention heads, and no configuration does."""


@dataclass(frozen=True)
class EmptyModel:
    """Hold a model on the meta device, and where its tensors are: name in its state dict -> place in the file."""

    model: nn.Module
    tensors: Mapping[str, StoredTensor]


def empty_model(file: SingleFile, part: Part, config: Config) -> EmptyModel:
    """Build the model of a component without its weights, and check that the file has exactly its tensors.

    Args:
        config: arguments of its class that tensors do not tell.

    Raises:
        WrongArchitectureError: a family that Pusa does not run, an unknown format, or tensors missing or left over.
    """
    if part.problem:
        raise WrongArchitectureError(part.problem)
    where = f"{part.title} in {file.path.name}"
    stored = stored_part(file.header, part.keys, (part.prefix,), where).tensors
    build = {"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae}[str(part.component)]
    try:
        model, tensors = build(part, stored, config)
    except KeyError as error:
        raise WrongArchitectureError(f"{where} is not whole: {error.args[0]} and perhaps more are missing") from error
    except UnknownHeadsError as error:
        raise UnknownHeadsError(f"{where}: {error}") from error
    except WrongArchitectureError as error:
        raise WrongArchitectureError(f"{where} is not exactly that: {error}") from error
    except (ArithmeticError, AssertionError, ValueError) as error:  # of the class, which cannot be built so
        raise WrongArchitectureError(f"{where} is not whole: its tensors have the sizes of no such model") from error
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: (_fit(tensor.header.shape, shapes.get(name)), "F32") for name, tensor in tensors.items()}
    check_tensors(model, found, where)
    return EmptyModel(model, tensors)


def _fit(shape: tuple[int, ...], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the model's shape for a tensor that differs from it by dimensions of size 1, which some writers drop."""
    if wanted is not None and [size for size in shape if size != 1] == [size for size in wanted if size != 1]:
        return wanted
    return shape


# ---- transformer -----------------------------------------------------------------------------------------------------


def _transformer(
    part: Part, stored: Mapping[str, StoredTensor], config: Config
) -> tuple[nn.Module, dict[str, StoredTensor]]:
    if part.family == "mochi":
        return _mochi_transformer(part, stored, config)
    wan = original.transformer_to_original(stored) if part.names == "diffusers" else dict(stored)
    shapes = {name: tensor.header.shape for name, tensor in wan.items()}
    patch = shapes["patch_embedding.weight"]
    if len(patch) != 5:
        wan["patch_embedding.weight"] = _reshaped(
            wan["patch_embedding.weight"], (part.width or 0, part.in_channels or 0, 1, 2, 2)
        )
        shapes["patch_embedding.weight"] = wan["patch_embedding.weight"].header.shape
    if part.family == "ti2v" and part.width != _TI2V_WIDTH and config.get("in_channels") != part.in_channels:
        raise WrongArchitectureError(
            f"TI2V-5B has a width of {_TI2V_WIDTH}, and this one {part.width}; give a config with in_channels and "
            "num_attention_heads for a model of another size"
        )
    heads = _heads(part.width or 0, config)
    model_config = original.config_from_keys(shapes, num_heads=heads) | config
    with init_empty_weights():
        model = WanTransformer3DModel(**model_config)
    return model, original.transformer_to_diffusers(wan)


def _mochi_transformer(
    part: Part, stored: Mapping[str, StoredTensor], config: Config
) -> tuple[nn.Module, dict[str, StoredTensor]]:
    shapes = {name: tensor.header.shape for name, tensor in stored.items()}
    with init_empty_weights():
        model = MochiTransformer3DModel(**config_from_keys(shapes, part.names) | config)
    if part.names == "genmo":
        return model, transformer_to_diffusers(stored, StoredTensor.take)
    return model, dict(stored)


def _heads(width: int, config: Config) -> int:
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    if heads is None and size is None and width % 128:
        raise UnknownHeadsError(
            f"a width of {width} is no multiple of 128, so its tensors do not tell the attention heads: give "
            "config={'num_attention_heads': ...}"
        )
    heads = heads or width // (size or 128)
    if heads * (size or width // heads) != width:
        raise WrongArchitectureError(
            f"{heads} heads of {size or width // heads} channels do not make a width of {width}"
        )
    return heads


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    return replace(tensor, header=replace(tensor.header, shape=shape))


# ---- text encoder and VAE --------------------------------------------------------------------------------------------


def _text_encoder(
    part: Part, stored: Mapping[str, StoredTensor], config: Config
) -> tuple[nn.Module, dict[str, StoredTensor]]:
    tensors = to_transformers(stored, part.names)
    umt5 = text_encoder_config({name: tensor.header.shape for name, tensor in tensors.items()}, config)
    with torch.device("meta"):
        return UMT5EncoderModel(umt5), tensors


def _vae(part: Part, stored: Mapping[str, StoredTensor], config: Config) -> tuple[nn.Module, dict[str, StoredTensor]]:
    table = original.WAN22_VAE if part.family == "wan2.2-vae" else original.VAE
    wan = table.to_original(stored) if part.names == "diffusers" else dict(stored)
    vae = original.vae_config_from_keys({name: tensor.header.shape for name, tensor in wan.items()})
    with init_empty_weights():
        return AutoencoderKLWan(**vae | config), table.to_diffusers(wan)


# ---- configurations --------------------------------------------------------------------------------------------------


def split_config(config: Mapping[str, Any] | None, file: SingleFile) -> dict[str, Config]:
    """Give each component its configuration.

    Args:
        config: fields of one component, or component -> fields. Names that begin with an underscore are ignored.

    Raises:
        ValueError: a field that no component in the file has.
    """
    if not config:
        return {}
    fields = {str(part.component): _fields(part) for part in file.parts if part.component}
    if set(config) <= {"transformer", "text_encoder", "vae"}:
        given = {name: dict(value) for name, value in config.items() if name in fields}
    else:
        plain = {name: value for name, value in config.items() if not name.startswith("_")}
        fits = [component for component, names in fields.items() if names >= plain.keys()]
        if not fits:
            best = max(fields, key=lambda component: len(fields[component] & plain.keys()), default="")
            unknown = sorted(plain.keys() - fields.get(best, set()))
            raise ValueError(
                f"config has {', '.join(unknown)}, which the {best or 'model'} in {file.path.name} does not take"
            )
        given = {fits[0]: plain}
    return {
        component: {name: _tuple(value) for name, value in values.items() if not name.startswith("_")}
        for component, values in given.items()
    }


def _fields(part: Part) -> set[str]:
    if part.component == "text_encoder":
        return set(UMT5Config().to_dict())
    transformer = MochiTransformer3DModel if part.family == "mochi" else WanTransformer3DModel
    cls: Callable[..., Any] = transformer if part.component == "transformer" else AutoencoderKLWan
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
