"""What LoRA does to one transformer: PEFT adapters, exact rewriting of parameters, and whether a file fits at all.

Whatever a LoRA changes outside its two matrices (`diff`, `diff_b`), and everything once merged, is written as
`parameter = round_once(untouched + sum(alpha * difference))`, always from the untouched values kept on the CPU.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pusa.lora.layouts import LoraFile, Pair, fold

logger = logging.getLogger(__name__)

_MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Adapter:
    """What PEFT does not hold: strength, whole differences, and matrices the model's dtype would round."""

    alpha: float
    deltas: dict[str, Tensor] = field(default_factory=dict)
    exact: dict[str, Pair] = field(default_factory=dict)


@dataclass
class AdapterState:
    """Kept on a transformer; `untouched` holds on the CPU the original values of the parameters now rewritten."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    untouched: dict[str, Tensor] = field(default_factory=dict)
    merged: bool = False


# ---- does a file fit a model ---------------------------------------------------------------------------------------


def check_fits(model: Any, lora: LoraFile) -> None:
    """Raise unless every layer of the file has its place in the model."""
    made_for, width, blocks = lora.model, width_of(model), model.config.num_layers
    layers = sorted(lora.layers)
    if made_for.family != "Wan":
        raise ValueError(f"{lora.path.name} is a LoRA for {made_for}, not for Wan (one of its layers: {layers[0]})")
    if (made_for.width and made_for.width != width) or made_for.blocks > blocks:
        raise ValueError(
            f"this LoRA was made for a Wan model of width {made_for.width or 'unknown'} with {made_for.blocks} blocks; "
            f"this transformer has width {width} and {blocks} blocks ({lora.path.name})"
        )
    misfits = {layer: reason for layer in layers if (reason := _misfit(model, lora, layer))}
    if misfits and made_for.image_to_video:
        layer, reason = next(iter(misfits.items()))
        raise ValueError(
            f"{lora.path.name} was made for image-to-video Wan and this transformer is text-to-video: "
            f"{len(misfits)} of {len(layers)} layers do not match; first: {layer} ({reason})"
        )
    if misfits:
        layer, reason = next(iter(misfits.items()))
        raise ValueError(
            f"{len(layers) - len(misfits)} of {len(layers)} layers of {lora.path.name} match; "
            f"first unmatched: {layer} ({reason})"
        )
    if lora.strange:
        raise ValueError(
            f"{len(lora.strange)} keys of {lora.path.name} belong to no known LoRA layout; first: {lora.strange[0]!r}"
        )
    written = [*lora.deltas, *(f"{layer}.weight" for layer in lora.pairs if state_of(model).merged)]
    for name in written:
        _check_writable(model, name)
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        raise ValueError(
            "the attention projections are fused and would ignore a LoRA: call unfuse_qkv_projections first"
        )
    if model.config.in_channels != model.config.out_channels:
        logger.warning(
            "this transformer is image-to-video (%d channels in, %d out); Pusa is made for text-to-video Wan",
            *(model.config.in_channels, model.config.out_channels),
        )


def _misfit(model: Any, lora: LoraFile, layer: str) -> str:
    """Why a layer of the file does not fit the model; empty if it does."""
    try:
        module = _base(model, layer)
    except AttributeError:
        return "this transformer has no such layer"
    if layer in lora.pairs:
        a, b = lora.pairs[layer]
        if isinstance(module, nn.Linear):
            shape = torch.Size((module.out_features, module.in_features))
        elif isinstance(module, nn.Conv3d):
            shape = module.weight.shape
        else:
            return f"a {type(module).__name__} takes no LoRA"
        if module.weight.dtype.is_floating_point and module.weight.dtype.itemsize == 1:
            return f"stored as {module.weight.dtype}: load the LoRA first, then cast the weights"
        if (b.shape[0], a[0].numel()) != (shape[0], math.prod(shape[1:])):
            return f"B A is {b.shape[0]} x {a[0].numel()}, the weight {' x '.join(map(str, shape))}"
    for name in (f"{layer}.weight", f"{layer}.bias", f"{layer}.scale_shift_table".lstrip(".")):
        if name not in lora.deltas:
            continue
        parameter = getattr(module, name.rpartition(".")[2], None)
        if parameter is None or parameter.shape != lora.deltas[name].shape:
            own = "absent" if parameter is None else list(parameter.shape)
            return f"its {name.rpartition('.')[2]} is {own}, the difference {list(lora.deltas[name].shape)}"
    return ""


# ---- attached adapters ---------------------------------------------------------------------------------------------


def attach(pipeline: Any, model: Any, lora: LoraFile, adapter_name: str, alpha: float) -> None:
    if adapter_name in adapter_names(model):
        detach(model, adapter_name)
    state, active = state_of(model), _active(model)
    if lora.pairs:
        tensors: dict[str, Tensor] = {}
        for name, (a, b) in lora.pairs.items():
            kernel = _base(model, name).weight.shape[2:] if isinstance(_base(model, name), nn.Conv3d) else ()
            tensors[f"{name}.lora_A.weight"] = a.reshape(a.shape[0], -1, *kernel)
            tensors[f"{name}.lora_B.weight"] = b.reshape(b.shape[0], -1, *(1 for _ in kernel))
        owner = pipeline if isinstance(pipeline, DiffusionPipeline) else None  # lifts its offloading for the while
        with _quiet_peft(model):
            model.load_lora_adapter(
                tensors, prefix=None, adapter_name=adapter_name, low_cpu_mem_usage=True, _pipeline=owner
            )
    adapter = state.adapters[adapter_name] = Adapter(alpha, lora.deltas)
    _activate(model, [*active, adapter_name])
    for name, layer in lora_layers(model).items():
        layer.set_scale(adapter_name, alpha)
        if name in lora.pairs:
            held = layer.lora_A[adapter_name].weight.dtype
            if any(torch.promote_types(half.dtype, held) != held for half in lora.pairs[name]):
                adapter.exact[name] = lora.pairs[name]
    rewrite(model)
    if state.merged:
        enable(model, False)


def detach(model: Any, adapter_name: str) -> None:
    state, active = state_of(model), _active(model)
    state.adapters.pop(adapter_name, None)
    if adapter_name in getattr(model, "peft_config", {}):
        with _quiet_peft(model):
            model.delete_adapters(adapter_name)
        _activate(model, [name for name in active if name != adapter_name])
    rewrite(model)
    if not getattr(model, "peft_config", None) and lora_layers(model):
        model.unload_lora()
    state.merged = state.merged and bool(adapter_names(model))


def state_of(model: Any) -> AdapterState:
    if not hasattr(model, "_pusa_lora"):
        model._pusa_lora = AdapterState()
    return model._pusa_lora


def adapter_names(model: Any) -> list[str]:
    """Adapters attached by this module or by PEFT directly (stock `load_lora_weights`, `add_adapter`)."""
    return list(dict.fromkeys([*getattr(model, "peft_config", {}), *state_of(model).adapters]))


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _active(model: Any) -> list[str]:
    layers = lora_layers(model).values()
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def _activate(model: Any, names: list[str]) -> None:
    with _quiet_peft(model):
        for layer in lora_layers(model).values():
            layer.set_adapter(names)


def enable(model: Any, enabled: bool) -> None:
    with _quiet_peft(model):
        for layer in lora_layers(model).values():
            layer.enable_adapters(enabled)


@contextmanager
def _quiet_peft(model: nn.Module) -> Iterator[None]:
    """Without PEFT's warnings about several adapters, and without its side effect on `requires_grad`.

    PEFT freezes the base and makes adapters trainable; here what was trainable stays so, and what is new is frozen.
    """
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        try:
            yield
        finally:
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in trainable)


# ---- exact writing of parameters -----------------------------------------------------------------------------------


def plan_rewrite(model: Any, *, merged: bool) -> dict[str, list[tuple[float, Tensor | Pair]]]:
    """What to add to which parameter: strength and a whole difference, or A and B."""
    state = state_of(model)
    plan: dict[str, list[tuple[float, Tensor | Pair]]] = {}
    for name, layer in lora_layers(model).items() if merged else ():
        for adapter_name in layer.active_adapters:
            if adapter_name in layer.lora_A:
                strength = layer.scaling[adapter_name]
                plan.setdefault(f"{name}.weight", []).append((strength, matrices(model, name, adapter_name)))
                bias = layer.lora_B[adapter_name].bias
                if bias is not None:
                    plan.setdefault(f"{name}.bias", []).append((strength, bias))
    for adapter in state.adapters.values():
        for name, delta in adapter.deltas.items():
            plan.setdefault(name, []).append((adapter.alpha, delta))
    for name in plan:
        _check_writable(model, name)
    return plan


@torch.no_grad()
def rewrite(model: Any) -> None:
    """Bring every parameter to its untouched value plus what the adapters add now, rounded once."""
    state = state_of(model)
    plan = plan_rewrite(model, merged=state.merged)
    for name in state.untouched.keys() - plan.keys():
        _parameter(model, name).copy_(state.untouched.pop(name))
    for name, additions in plan.items():
        parameter = _parameter(model, name)
        if name not in state.untouched:
            state.untouched[name] = parameter.detach().to("cpu", copy=True)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        total = state.untouched[name].to(parameter.device, wide, copy=True)
        for strength, part in additions:
            if isinstance(part, tuple):
                a, b = (half.to(total).flatten(1) for half in part)  # [rank, in], [out, rank]
                part = (b @ a).view_as(total)
            total += strength * part.to(total)
        parameter.copy_(total)


def _check_writable(model: Any, name: str) -> None:
    parameter = _parameter(model, name)
    if type(parameter) is not nn.Parameter or parameter.dtype not in _MERGEABLE:
        kind = f"{type(parameter).__name__} of {parameter.dtype}"
        raise ValueError(
            f"{name} is a {kind}: quantised or sharded weights cannot be merged; keep the adapter attached"
        )
    if parameter.is_meta:
        raise ValueError(f"{name} is offloaded out of reach: merge before enabling sequential offloading")


def _base(model: Any, layer: str) -> Any:
    """A module of the stock model, under its LoRA wrapper if it has one."""
    module = model.get_submodule(layer)
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _parameter(model: Any, name: str) -> nn.Parameter:
    layer, _, own = name.rpartition(".")
    return getattr(_base(model, layer), own)


def matrices(model: Any, layer: str, adapter_name: str) -> Pair:
    """An adapter's A and B as its file has them."""
    wrapper = model.get_submodule(layer)
    if adapter_name in wrapper.lora_variant:
        raise ValueError(f"adapter {adapter_name!r} is no plain LoRA at {layer}: it cannot be merged or exported")
    adapter = state_of(model).adapters.get(adapter_name)
    if adapter and layer in adapter.exact:
        return adapter.exact[layer]
    return wrapper.lora_A[adapter_name].weight.detach(), wrapper.lora_B[adapter_name].weight.detach()


def contents(model: Any, adapter_name: str) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """An adapter at strength 1: matrices and whole differences, on the CPU or a GPU with float64."""
    adapter = state_of(model).adapters.get(adapter_name)
    pairs: dict[str, Pair] = {}
    deltas = dict(adapter.deltas) if adapter else {}
    for name, layer in lora_layers(model).items():
        if adapter_name not in layer.lora_A:
            continue
        a, b = matrices(model, name, adapter_name)
        rank = layer.r[adapter_name]
        scale = layer.lora_alpha[adapter_name] / (math.sqrt(rank) if layer.use_rslora[adapter_name] else rank)
        pairs[name] = (a.cpu(), fold(b, scale).cpu()) if a.is_mps else (a, fold(b, scale))
        bias = layer.lora_B[adapter_name].bias
        if bias is not None:
            deltas[f"{name}.bias"] = bias.detach().float() * scale
    return pairs, deltas


def width_of(model: Any) -> int:
    return model.config.num_attention_heads * model.config.attention_head_dim
