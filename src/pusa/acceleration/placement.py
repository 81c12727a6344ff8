"""Carry out a plan on a loaded pipeline, and undo it.

The order matters: LoRAs are merged into full weights, or into fp8 ones whose files have the full ones, then those are
stored in fewer bits, then blocks are compiled, then offloading hooks them, and the rest moves to its device. Weights
stay where they are until then: what was read to a card never passes through RAM. Promotion to per-frame timesteps came
first, in the pipeline's constructor.
"""

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pusa.acceleration import attention, compilation, offload, quantization
from pusa.acceleration.decisions import PartPlan, Plan
from pusa.lora.adapters import adapter_names, plan_rewrite, state_of
from pusa.lora.sources import EXPERTS
from pusa.models.streaming import WeightsChangedError
from pusa.models.vae import prepare_vae
from pusa.resources import ResourcesError

PARTS = ("text_encoder", *EXPERTS, "vae")


@dataclass
class _Applied:
    """Remember what `apply` has done to a pipeline."""

    plan: Plan
    folders: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)


def apply(pipe: Any, plan: Plan, *, device: str | torch.device = "cuda", disk_folder: Path | None = None) -> None:
    """Carry out a plan on a pipeline that has its LoRAs; one that was carried out before is undone first.

    Results do not depend on where weights are. Storing them in fewer bits rounds them, for good: such a pipeline cannot
    go back to a plan with full weights (see `can_apply`).

    Args:
        pipe: a `PusaPipeline` on the CPU or on the devices of `devices_to_load`, or one with a plan. Parts that it
            lacks are passed over.
        plan: of `pusa.acceleration.plan`.
        device: the accelerator that the plan means by "cuda".
        disk_folder: where weights go that the plan keeps on disk, until the plan is undone; None: ``offload`` in the
            folder of PUSA_CACHE, or in ~/.cache/pusa.

    Raises:
        ResourcesError: the plan says that nothing fits.
        TypeError: `plan` is no plan.
        ValueError: the pipeline's weights are in fewer bits already and the plan wants others; or the plan cannot be.
        RuntimeError: torchao, or the attention backend, is needed and is not installed.
        torch.OutOfMemoryError: the weights do not fit; `apply` a smaller plan, or `remove` this one.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}: give one of pusa.acceleration.plan(model, machine=...)")
    if plan.problem:
        raise ResourcesError(plan.problem)
    for name, part in plan.parts.items():
        if part.offload == "disk" and (part.storage == "int8" or (part.kept and part.storage == "fp8")):
            way_out = "keep it in RAM" if part.kept else "store it as fp8, or keep it in RAM"
            raise ValueError(f"the {name} cannot be kept on disk as {part.storage}: {way_out}")
    if reason := _obstacle(pipe, plan):
        raise ValueError(f"{reason}: load the model again for this plan")
    _undo(pipe)
    applied = pipe.applied_plan = _Applied(plan)
    parts = _parts(pipe, plan)
    accelerator = torch.device(device)
    for name, part in parts.items():
        module = getattr(pipe, name)
        if part.storage not in quantization.QUANTISED and quantization.storage_of(module) != part.storage:
            quantization.cast(module, getattr(torch, part.storage))
    _merge(pipe, plan)
    for name, part in parts.items():
        _prepare(name, getattr(pipe, name), part, plan, accelerator)
    if plan.attention:
        attention.apply(pipe, plan.attention)
    if plan.compile:
        compilation.compile_blocks(pipe)
    if plan.compile_decoder and "vae" in parts:
        compilation.compile_decoder(pipe.vae)
    if plan.parallel.shard:  # `parallel.enable` moves each rank's share
        parts = {name: part for name, part in parts.items() if name not in EXPERTS}
    for name, module in _modules(pipe).items():
        if name not in parts or not _is_whole_on_accelerator(parts[name]):
            module.to("cpu")
    _place(pipe, parts, accelerator, applied, disk_folder)


def remove(pipe: Any) -> None:
    """Undo a plan: bring all weights back to the CPU, without hooks.

    Weights in fewer bits stay so, and merged LoRAs stay merged (`unmerge_lora` restores them where weights are full).
    This works in the middle of a plan that has failed, too.
    """
    _undo(pipe)
    for module in _modules(pipe).values():
        module.to("cpu")


def discard(pipe: Any) -> None:
    """Take a pipeline's parts away from it, wherever their weights are, so that others can be read in their place."""
    _clear(pipe)
    pipe.register_modules(**dict.fromkeys(PARTS))


def _undo(pipe: Any) -> None:
    for module in _modules(pipe).values():
        offload.remove_offload(module)
        offload.unpark_adapters(module)
    compilation.remove(pipe)
    applied = getattr(pipe, "applied_plan", None)
    if applied is not None and applied.plan.attention:  # others are the caller's own choice
        attention.remove(pipe)
    _clear(pipe)


def _clear(pipe: Any) -> None:
    for folder in pipe.applied_plan.folders if getattr(pipe, "applied_plan", None) else ():
        folder.cleanup()
    pipe.applied_plan = None


def devices_to_load(plan: Plan, device: str | torch.device) -> dict[str, torch.device]:
    """Choose the parts that can be read straight to the accelerator: those that a plan keeps there as they are read.

    Args:
        device: the accelerator that the plan means by "cuda".
    """
    as_fp8 = parts_read_as_fp8(plan)
    return {
        name: device_for(part, torch.device(device))
        for name, part in plan.parts.items()
        if _is_whole_on_accelerator(part)
        and (part.storage in quantization.FULL or name in as_fp8)
        and not (plan.parallel.shard and name in EXPERTS)
    }


def parts_read_as_fp8(plan: Plan) -> list[str]:
    """List the transformers whose weights can be rounded to fp8 as they are read (see `pusa.models.fp8`).

    Cards that multiply in fp8 store weights in another way, with scales, which needs the full ones.
    """
    if plan.is_fast:
        return []
    return [name for name, part in plan.parts.items() if name in EXPERTS and part.storage == "fp8" and not part.kept]


def can_apply(pipe: Any, plan: Plan) -> bool:
    """Tell if `apply` can carry out a plan on a pipeline as it is, or if it must be loaded again first."""
    return not _obstacle(pipe, plan)


def is_alpha_frozen(pipe: Any) -> bool:
    """Tell if another alpha needs the model loaded again, as it is merged into weights that cannot be rewritten."""
    for name, model in _modules(pipe).items():
        if name in EXPERTS and adapter_names(model):
            try:
                another = dict.fromkeys(adapter_names(model), math.nan)  # equal to none
                plan_rewrite(model, merged=state_of(model).merged, alphas=another)
            except ValueError:  # they are int8, or on disk
                return True
    return False


def device_for(part: PartPlan, accelerator: torch.device) -> torch.device:
    """Return the device that a part computes on, where the plan's "cuda" is `accelerator`."""
    if part.device == "cpu":
        return torch.device("cpu")
    if accelerator.type != "cuda" or accelerator.index is not None:
        return accelerator
    return torch.device("cuda", part.card or torch.cuda.current_device())


def _is_whole_on_accelerator(part: PartPlan) -> bool:
    return part.device == "cuda" and part.offload == "none" and part.when == "stay"


def _modules(pipe: Any) -> Mapping[str, nn.Module]:
    found = {name: getattr(pipe, name, None) for name in PARTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def _parts(pipe: Any, plan: Plan) -> dict[str, PartPlan]:
    return {name: plan.parts[name] for name in _modules(pipe) if name in plan.parts}


def _obstacle(pipe: Any, plan: Plan) -> str:
    """Say why a plan needs weights that this pipeline does not have any more; empty if it does not."""
    for name, part in _parts(pipe, plan).items():
        module = getattr(pipe, name)
        storage = quantization.storage_of(module)
        if storage in quantization.QUANTISED and storage != part.storage:
            return f"the {name} is stored as {storage}, not as {part.storage}"
        if part.kept and storage not in quantization.QUANTISED:
            return f"the {name} is stored as {storage}, not as {part.storage} as its file has it"
        if part.storage == "float32" and storage in ("bfloat16", "float16"):
            return f"the {name} is stored as {storage}, not as float32"
        if name in EXPERTS and storage in quantization.QUANTISED and not _can_merge(module, plan.merge):
            state = "merged into" if state_of(module).merged else "attached beside"
            return f"the LoRAs of the {name} are {state} weights stored as {storage}"
    return ""


def _can_merge(model: Any, merged: bool) -> bool:
    """Tell if the LoRAs of a model in fewer bits are merged, or not, as wanted, or can be."""
    if not adapter_names(model) or state_of(model).merged == merged:
        return True
    try:
        plan_rewrite(model, merged=merged)
    except (ValueError, WeightsChangedError):
        return False
    return True


def _merge(pipe: Any, plan: Plan) -> None:
    models = [module for name, module in _modules(pipe).items() if name in EXPERTS and adapter_names(module)]
    if any(state_of(model).merged != plan.merge for model in models):
        (pipe.merge_lora if plan.merge else pipe.unmerge_lora)()
    for model in models if plan.merge else ():
        offload.park_adapters(model)


def _prepare(name: str, module: Any, part: PartPlan, plan: Plan, accelerator: torch.device) -> None:
    """Give a part's weights their storage and order."""
    device = device_for(part, accelerator)
    if part.storage in ("fp8", "int8") and quantization.storage_of(module) != part.storage:
        has_adapters = not plan.merge and name in EXPERTS and bool(adapter_names(module))
        is_fast = plan.is_fast and quantization.multiplies_in_8_bits(part.storage, device, has_adapters=has_adapters)
        place = device if part.offload == "none" and device.type == "cuda" else None
        quantization.quantize(module, part.storage, dtype=getattr(torch, part.dtype), is_fast=is_fast, device=place)
    if name == "vae":
        prepare_vae(module, part)


def _place(
    pipe: Any, parts: Mapping[str, PartPlan], accelerator: torch.device, applied: _Applied, disk_folder: Path | None
) -> None:
    turns = []
    uses_accelerator = any(part.device == "cuda" for part in parts.values())
    for name, part in parts.items():
        module, device = getattr(pipe, name), device_for(part, accelerator)
        if part.device == "cpu":
            if name == "text_encoder" and uses_accelerator:  # diffusers gives it inputs on the other parts' device
                offload.stay_on_cpu(module)
        elif part.offload == "none" and part.when == "prompt":
            offload.visit(module, device)  # the plan counts on its room once prompts are encoded
        elif part.offload == "none":
            module.to(device)
        elif part.offload == "model":
            turns.append((module, device))
        else:
            folder = None
            if part.offload == "disk":
                applied.folders.append(_new_folder(disk_folder, name))
                folder = Path(applied.folders[-1].name)
            offload.stream(module, part.offload, device, folder)
    offload.take_turns(turns)


def _new_folder(parent: Path | None, name: str) -> tempfile.TemporaryDirectory[str]:
    """Make an empty folder that is removed with the plan, or at the end of the process."""
    if parent is None:
        parent = Path(os.environ.get("PUSA_CACHE", "~/.cache/pusa")).expanduser() / "offload"
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f"{name}-", dir=parent, ignore_cleanup_errors=True)
