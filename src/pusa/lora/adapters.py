"""Attach LoRAs to one transformer as PEFT adapters, and rewrite its parameters exactly.

PEFT handles the pairs of matrices A and B. What a LoRA changes besides them (`diff`, `diff_b`), and all of it once
merged, becomes `parameter = round_once(untouched + sum(alpha * difference))`, always from the untouched values: read
again from the model's files, or from a copy on the CPU where no file has them.
"""

import logging
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pusa.lora.bases import base_of, compute_dtype_of, is_on_disk, parameter_of
from pusa.lora.layouts import LoraFile, Pair, fold, unknown_prefix
from pusa.models import bases
from pusa.models.streaming import WeightsChangedError, WeightSource, sources_of

logger = logging.getLogger(__name__)

_MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Adapter:
    """Parts of an adapter that PEFT does not hold.

    Attributes:
        alpha: LoRA alpha.
        deltas: parameter name -> difference that is not a pair of matrices.
        exact: module name -> pair that the model's dtype would round.
    """

    alpha: float
    deltas: dict[str, Tensor] = field(default_factory=dict)
    exact: dict[str, Pair] = field(default_factory=dict)


@dataclass(frozen=True)
class Untouched:
    """Hold a parameter as it was before a LoRA: its dtype, and its value on the CPU or where its value is on disk."""

    dtype: torch.dtype
    value: Tensor | WeightSource

    def check(self) -> None:
        """Raise WeightsChangedError if the value is in a file that is not the same any more."""
        if isinstance(self.value, WeightSource):
            self.value.check()

    def read(self) -> Tensor:
        """Return the value; raise as `check`."""
        return (self.value.read() if isinstance(self.value, WeightSource) else self.value).to(self.dtype)


Additions = list[tuple[float, Tensor | Pair]]  # (alpha, difference) or (alpha, (A, B))


@dataclass
class AdapterState:
    """Hold the LoRA state of a transformer.

    Attributes:
        untouched: rewritten parameters by name, as they were before.
        written: what was added to them; None for matrices, which would stay in memory wherever they were.
        merged: all active adapters are in the weights.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    untouched: dict[str, Untouched] = field(default_factory=dict)
    written: dict[str, list[tuple[float, Tensor | None]]] = field(default_factory=dict)
    merged: bool = False


# ---- check that a file fits a model ---------------------------------------------------------------------------------


def check_fits(model: Any, lora: LoraFile) -> None:
    """Check that every layer of a LoRA file fits the model.

    Raises:
        ValueError: another model's LoRA, layers or keys that do not fit, or weights that cannot be rewritten.
    """
    base = bases.base_of(model)
    guess, (width, blocks) = lora.model, base.size_of(model.config)
    layers = sorted(lora.layers)
    misfits = {layer: reason for layer in layers if (reason := _misfit(model, lora, layer))}
    if misfits and guess.family != base.name:  # layers of some names are in several models
        raise ValueError(
            f"{lora.path.name} is a LoRA for {guess}, not for {base.name} (one of its layers: {layers[0]})"
        )
    if (guess.width and guess.width != width) or guess.blocks > blocks:
        raise ValueError(
            f"this LoRA was made for a {guess.family} model of width {guess.width or 'unknown'} with {guess.blocks} "
            f"blocks; this transformer has width {width} and {blocks} blocks ({lora.path.name})"
        )
    if misfits and (guess.vace or guess.image_to_video):
        layer, reason = next(iter(misfits.items()))
        kind = "VACE" if guess.vace else "image-to-video Wan"
        fitting = lora.without_image_layers()
        way_out = any(_misfit(model, fitting, name) for name in fitting.layers)
        raise ValueError(
            f"{lora.path.name} was made for {kind} and this transformer is text-to-video: "
            f"{len(misfits)} of {len(layers)} layers do not match; first: {layer} ({reason})"
            + ("" if way_out else '; layers="fitting" (--lora-layers fitting) leaves those out')
        )
    prefix = next(filter(None, map(unknown_prefix, misfits)), "")
    if prefix:
        raise ValueError(
            f"{lora.path.name} has Wan's names behind the unknown prefix {prefix!r} in {len(misfits)} of {len(layers)} "
            f"layers (first: {next(iter(misfits))}): rename its keys, for diffusion_model. in place of {prefix}"
        )
    if misfits:
        layer, reason = next(iter(misfits.items()))
        raise ValueError(
            f"{len(layers) - len(misfits)} of {len(layers)} layers of {lora.path.name} match; "
            f"first unmatched: {layer} ({reason})"
        )
    if lora.unknown_keys:
        count, first = len(lora.unknown_keys), lora.unknown_keys[0]
        raise ValueError(f"{count} keys of {lora.path.name} belong to no known LoRA layout; first: {first!r}")
    rewritten = [*lora.deltas, *(f"{layer}.weight" for layer in lora.pairs if state_of(model).merged)]
    for name in rewritten:
        _check_writable(model, name)
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        raise ValueError(
            "the attention projections are fused and would ignore a LoRA: call unfuse_qkv_projections first"
        )
    channels = base.channels(model.config)
    if model.config.in_channels != channels:
        logger.warning(
            "this transformer is image-to-video (%d channels in, %d out); Pusa is made for text-to-video Wan",
            *(model.config.in_channels, channels),
        )


def _misfit(model: Any, lora: LoraFile, layer: str) -> str:
    """Explain why a layer of the file does not fit the model; empty if it does."""
    try:
        module = base_of(model, layer)
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
        dtype = module.weight.dtype
        if dtype.is_floating_point and dtype.itemsize == 1 and compute_dtype_of(module) is None:
            return f"stored as {dtype}, in which nothing computes: cast the weights with enable_layerwise_casting"
        if (b.shape[0], a[0].numel()) != (shape[0], math.prod(shape[1:])):
            return f"B A is {b.shape[0]} x {a[0].numel()}, the weight {' x '.join(map(str, shape))}"
    for name in (f"{layer}.weight", f"{layer}.bias", f"{layer}.scale_shift_table".lstrip(".")):
        if name not in lora.deltas:
            continue
        parameter = getattr(module, name.rpartition(".")[2], None)
        if parameter is None or _without_leading_ones(parameter) != _without_leading_ones(lora.deltas[name]):
            actual = "absent" if parameter is None else list(parameter.shape)
            return f"its {name.rpartition('.')[2]} is {actual}, the difference {list(lora.deltas[name].shape)}"
    return ""


def _without_leading_ones(tensor: Tensor) -> list[int]:
    """Return a shape without the 1s at its beginning, which converters drop from Wan's modulation ``[1, 6, D]``."""
    shape = list(tensor.shape)
    while shape[:1] == [1]:
        del shape[0]
    return shape


# ---- attached adapters ---------------------------------------------------------------------------------------------


def attach(pipeline: Any, model: Any, lora: LoraFile, adapter_name: str, alpha: float) -> None:
    """Attach a checked LoRA as an adapter, active and frozen; replace an adapter of this name."""
    if adapter_name in adapter_names(model):
        detach(model, adapter_name)
    state, active = state_of(model), _active(model)
    if lora.pairs:
        tensors: dict[str, Tensor] = {}
        for name, (a, b) in lora.pairs.items():
            kernel = base_of(model, name).weight.shape[2:] if isinstance(base_of(model, name), nn.Conv3d) else ()
            tensors[f"{name}.lora_A.weight"] = a.reshape(a.shape[0], -1, *kernel)
            tensors[f"{name}.lora_B.weight"] = b.reshape(b.shape[0], -1, *(1 for _ in kernel))
        owner = (
            pipeline if isinstance(pipeline, DiffusionPipeline) else None
        )  # PEFT suspends the offloading of the pipeline meanwhile
        with _quiet_peft(model):
            model.load_lora_adapter(
                tensors, prefix=None, adapter_name=adapter_name, low_cpu_mem_usage=True, _pipeline=owner
            )
        _set_dtypes(model, adapter_name, tensors)
    adapter = state.adapters[adapter_name] = Adapter(alpha, lora.deltas)
    _activate(model, [*active, adapter_name])
    for name, layer in lora_layers(model).items():
        layer.set_scale(adapter_name, alpha)
        if name in lora.pairs:
            dtype = layer.lora_A[adapter_name].weight.dtype
            if any(torch.promote_types(matrix.dtype, dtype) != dtype for matrix in lora.pairs[name]):
                adapter.exact[name] = lora.pairs[name]
    rewrite(model)
    if state.merged:
        enable(model, False)


def _set_dtypes(model: Any, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Hold an adapter in the dtype that its layer computes in, where that is not the dtype of the layer's weights.

    PEFT casts an adapter to the dtype of the weights beside it, and would round it to fp8.
    """
    for name, layer in lora_layers(model).items():
        dtype = compute_dtype_of(layer.get_base_layer())
        if dtype is not None and f"{name}.lora_A.weight" in tensors:
            for half in ("lora_A", "lora_B"):
                weight = getattr(layer, half)[adapter_name].weight
                weight.data = tensors[f"{name}.{half}.weight"].to(weight.device, dtype)


@contextmanager
def restored_on_failure(pipeline: Any, models: Iterable[Any]) -> Iterator[None]:
    """Put models and the pipeline's offloading back as they were, bit for bit, if the body raises.

    PEFT and diffusers change modules as they go and leave them half changed when they fail: this keeps, and puts back,
    every module's attributes and children. Parameters that were rewritten get their untouched values back.
    """
    models = list(models)
    parts = getattr(pipeline, "components", {}).values()
    roots = [*models, *(part for part in parts if isinstance(part, nn.Module))]
    modules = {id(module): module for root in roots for module in root.modules()}
    owners = [*modules.values(), *([pipeline] if isinstance(pipeline, DiffusionPipeline) else [])]
    states = [state_of(model) for model in models]  # made before they are kept, as an attribute of their models
    containers: list[Any] = [vars(owner) for owner in [*owners, *states]]
    containers += [v for owner in containers for v in owner.values() if type(v) in (dict, list, OrderedDict)]
    kept = [(container, copy(container)) for container in containers]
    trainable = {id(p) for model in models for p in model.parameters() if p.requires_grad}
    try:
        yield
    except BaseException:
        rewritten = [dict(state.untouched) for state in states]
        for container, before in kept:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)
        with torch.no_grad():
            for model, state, values in zip(models, states, rewritten, strict=True):
                for name in values.keys() - state.untouched.keys():
                    parameter_of(model, name).copy_(values[name].read())
                state.written.clear()  # whatever the failed attempt wrote, every parameter is written again
                rewrite(model)
                for parameter in model.parameters():
                    parameter.requires_grad_(id(parameter) in trainable)
        raise


def detach(model: Any, adapter_name: str) -> None:
    """Remove an adapter and restore the parameters that it changed.

    Raises:
        WeightsChangedError: their values are not in their file any more; before anything changes.
    """
    state, active = state_of(model), _active(model)
    for untouched in state.untouched.values():
        untouched.check()
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
    """Return the LoRA state of a transformer; create it on first use."""
    if not hasattr(model, "_pusa_lora"):
        model._pusa_lora = AdapterState()
    return model._pusa_lora


def adapter_names(model: Any) -> list[str]:
    """List the adapters attached by this module or by PEFT (stock `load_lora_weights`, `add_adapter`)."""
    return list(dict.fromkeys([*getattr(model, "peft_config", {}), *state_of(model).adapters]))


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    """Find PEFT's LoRA layers: module name -> layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _active(model: Any) -> list[str]:
    layers = lora_layers(model).values()
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def _activate(model: Any, names: list[str]) -> None:
    with _quiet_peft(model):
        for layer in lora_layers(model).values():
            layer.set_adapter(names)


def enable(model: Any, enabled: bool) -> None:
    """Switch all adapters on or off; after merging they are off."""
    with _quiet_peft(model):
        for layer in lora_layers(model).values():
            layer.enable_adapters(enabled)


@contextmanager
def _quiet_peft(model: nn.Module) -> Iterator[None]:
    """Suppress PEFT's warnings about several adapters and about merging, and undo its changes of `requires_grad`.

    PEFT freezes the base and makes adapters trainable; here trainable parameters stay so, and new ones are frozen.
    """
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # for PEFT's own merging
        try:
            yield
        finally:
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in trainable)


# ---- exact writing of parameters -----------------------------------------------------------------------------------


def plan_rewrite(
    model: Any, *, merged: bool, alphas: Mapping[str, float] = MappingProxyType({})
) -> dict[str, Additions]:
    """List what to add to each parameter, and check that those which change can be written.

    Args:
        merged: all of the active adapters, not only what PEFT does not hold.
        alphas: new ones of differences, by the adapter's name.

    Raises:
        ValueError: a parameter is quantised, sharded or offloaded.
        WeightsChangedError: the untouched weights are not in their file any more.
    """
    state = state_of(model)
    plan: dict[str, Additions] = {}
    for name, layer in lora_layers(model).items() if merged else ():
        for adapter_name in layer.active_adapters:
            if adapter_name in layer.lora_A:
                scaling = layer.scaling[adapter_name]
                plan.setdefault(f"{name}.weight", []).append((scaling, matrices(model, name, adapter_name)))
                bias = layer.lora_B[adapter_name].bias
                if bias is not None:
                    plan.setdefault(f"{name}.bias", []).append((scaling, bias))
    for adapter_name, adapter in state.adapters.items():
        for name, delta in adapter.deltas.items():
            plan.setdefault(name, []).append((alphas.get(adapter_name, adapter.alpha), delta))
    for name in _changing(state, plan):
        _check_writable(model, name)
        if name in state.untouched:
            state.untouched[name].check()
    return plan


def _changing(state: AdapterState, plan: dict[str, Additions]) -> list[str]:
    """List the parameters that a plan changes: all but those whose additions are the very differences in them."""

    def is_written(name: str) -> bool:
        now, before = plan.get(name, []), state.written.get(name, [])
        return len(now) == len(before) and all(
            new == old and isinstance(part, Tensor) and part is other
            for (new, part), (old, other) in zip(now, before, strict=True)
        )

    return [name for name in {**plan, **state.untouched} if not is_written(name)]


@torch.no_grad()
def rewrite(model: Any) -> None:
    """Set every parameter to its untouched value plus the current sum of the adapters, rounded once."""
    state = state_of(model)
    plan = plan_rewrite(model, merged=state.merged)
    for name in _changing(state, plan):
        parameter = parameter_of(model, name)
        if name not in plan:
            parameter.copy_(state.untouched[name].read())
            del state.untouched[name], state.written[name]
            continue
        if name not in state.untouched:
            state.untouched[name] = _untouched(model, name)
        untouched = state.untouched[name]
        wide = torch.promote_types(untouched.dtype, torch.float32)
        total = untouched.read().to(parameter.device, wide, copy=True)
        for alpha, part in plan[name]:
            if isinstance(part, tuple):
                a, b = (matrix.to(total).flatten(1) for matrix in part)  # [rank, in], [out, rank]
                part = (b @ a).view_as(total)
            total += alpha * part.to(total)
        if parameter.dtype not in _MERGEABLE:  # cast to fp8 after merging: as if merged anew, then cast
            total = total.to(untouched.dtype)
        parameter.copy_(total)
        state.written[name] = [(alpha, part if isinstance(part, Tensor) else None) for alpha, part in plan[name]]


def _untouched(model: Any, name: str) -> Untouched:
    """Describe a parameter that no LoRA has changed: by its place in a file, if the file still has this very value.

    One that was rounded to fp8 as it was read is untouched in the dtype that it was rounded from.
    """
    parameter = parameter_of(model, name)
    layer = base_of(model, name.rpartition(".")[0])
    dtype = parameter.dtype if parameter.dtype in _MERGEABLE else compute_dtype_of(layer)
    assert dtype is not None  # see `_check_writable`
    source = sources_of(model).get(name)
    if source is not None:
        with suppress(WeightsChangedError):
            stored = source.read().to(parameter.device, dtype)
            if torch.equal(stored.to(parameter.dtype).to(dtype), parameter.to(dtype)):
                return Untouched(dtype, source)
    return Untouched(dtype, parameter.detach().to("cpu", dtype, copy=True))


def _check_writable(model: Any, name: str) -> None:
    parameter = parameter_of(model, name)
    was_cast = name in state_of(model).untouched and parameter.dtype.is_floating_point  # after it was merged
    source, layer = sources_of(model).get(name), base_of(model, name.rpartition(".")[0])
    if source is not None and compute_dtype_of(layer) is not None:  # cast as it was read
        source.check()
        was_cast = True
    if type(parameter) is not nn.Parameter or (parameter.dtype not in _MERGEABLE and not was_cast):
        kind = f"{type(parameter).__name__} of {parameter.dtype}"
        if state_of(model).merged:
            raise ValueError(
                f"{name} is a {kind} with LoRAs merged into it: load the model again with another alpha, or without "
                "quantised weights, where alpha can change"
            )
        raise ValueError(
            f"{name} is a {kind}: quantised or sharded weights cannot be rewritten; keep the adapter attached, or load "
            "the model again, merge, and then quantise"
        )
    if is_on_disk(model, name):
        raise ValueError(
            f"{name} is kept on disk by group offloading, which would not see a change: call "
            "pusa.acceleration.placement.remove first, and apply the plan again afterwards"
        )
    if parameter.is_meta:
        raise ValueError(f"{name} is offloaded out of reach: merge before enabling sequential offloading")


def matrices(model: Any, layer: str, adapter_name: str) -> Pair:
    """Return an adapter's A and B at a layer, as in its file."""
    wrapper = model.get_submodule(layer)
    if adapter_name in wrapper.lora_variant:
        raise ValueError(f"adapter {adapter_name!r} is no plain LoRA at {layer}: it cannot be merged or exported")
    adapter = state_of(model).adapters.get(adapter_name)
    if adapter and layer in adapter.exact:
        return adapter.exact[layer]
    return wrapper.lora_A[adapter_name].weight.detach(), wrapper.lora_B[adapter_name].weight.detach()


def has_alpha(model: Any, adapter_name: str, alpha: float) -> bool:
    """Tell if an adapter has an alpha already, in all that it changes."""
    adapter = state_of(model).adapters.get(adapter_name)
    layers = [layer for layer in lora_layers(model).values() if adapter_name in layer.lora_A]
    is_set = all(layer.scaling[adapter_name] == alpha * _own_scale(layer, adapter_name) for layer in layers)
    return adapter is not None and adapter.alpha == alpha and is_set


def _own_scale(layer: LoraLayer, adapter_name: str) -> float:
    """Compute the factor of B A at alpha 1."""
    rank = layer.r[adapter_name]
    return float(layer.lora_alpha[adapter_name] / (math.sqrt(rank) if layer.use_rslora[adapter_name] else rank))


def contents(model: Any, adapter_name: str) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Return an adapter at alpha 1: its pairs and its differences, on the CPU or a GPU (not MPS, without float64)."""
    adapter = state_of(model).adapters.get(adapter_name)
    pairs: dict[str, Pair] = {}
    deltas = dict(adapter.deltas) if adapter else {}
    for name, layer in lora_layers(model).items():
        if adapter_name not in layer.lora_A:
            continue
        a, b = matrices(model, name, adapter_name)
        scale = _own_scale(layer, adapter_name)
        pairs[name] = (a.cpu(), fold(b, scale).cpu()) if a.is_mps else (a, fold(b, scale))
        bias = layer.lora_B[adapter_name].bias
        if bias is not None:
            deltas[f"{name}.bias"] = bias.detach().float() * scale
    return pairs, deltas
