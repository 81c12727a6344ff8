"""Load, scale, merge and export LoRAs on a pipeline.

`load_pusa` attaches a LoRA as a PEFT adapter. Its alpha is one number read at every forward, so it changes at once, and
going back to an alpha gives the same output bit for bit. Merging starts from the untouched weights and rounds once.
(Pusa's own loader adds to the weights at each call: a new alpha comes on top of the old one.)
"""

import logging
import math
import os
from collections.abc import Collection, Mapping
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from torch import nn

from pusa.lora.adapters import (
    Adapter,
    adapter_names,
    attach,
    check_fits,
    contents,
    detach,
    enable,
    has_alpha,
    lora_layers,
    plan_rewrite,
    restored_on_failure,
    rewrite,
    state_of,
)
from pusa.lora.layouts import Layout, LoraInfo, Pair, checked_layout, describe_lora, read_lora, write_lora
from pusa.lora.placement import Source, place_lora
from pusa.lora.ranks import ExportReport, reduce_file, reduce_pair, report_of
from pusa.lora.sources import EXPERTS
from pusa.models.bases import base_of

logger = logging.getLogger(__name__)

__all__ = [
    "ExportReport",
    "LoraInfo",
    "describe_lora",
    "export_lora",
    "load_pusa",
    "merge_lora",
    "reduce_file",
    "set_alpha",
    "unload_lora",
    "unmerge_lora",
]

Alpha = float | Mapping[str, float]

_PAIR_SUFFIXES = {"transformer": "_high_noise", "transformer_2": "_low_noise"}


def load_pusa(
    pipeline: Any,
    source: Source,
    *,
    alpha: Alpha = 1.4,
    adapter_name: str = "pusa",
    layers: Literal["all", "fitting"] = "all",
) -> int:
    """Attach a LoRA of any known layout (see `pusa.lora.layouts.read_lora`) as an adapter.

    Several LoRAs can be attached under different names (Pusa at 1.4, a 4-step LoRA at 1.0); a new one replaces that of
    its name. All files are read and checked before any is attached, and a failure leaves the model as it was.

    Args:
        pipeline: `PusaPipeline`, `WanPipeline`, or a transformer alone.
        source: a file, a folder, a Hub id (`owner/repo[/folder][/file]`), with a strength if wanted (`FILE@1.2`), or
            one of these per expert: `{"transformer": high, "transformer_2": low}` or `"high=FILE,low=FILE"`. In a
            folder, a high/low-noise pair goes to its experts. A single file goes to the expert that its name tells
            (`pusa.lora.sources.expert_of`), else to every expert.
        alpha: the factor in `weight + alpha * (B @ A)`; one number or one per expert. Pusa V1.0's default is 1.4. A
            strength in the source comes before it.
        adapter_name: name for `set_alpha` and `export_lora`.
        layers: "all" must fit; "fitting" leaves out those that only image-to-video models have.

    Returns:
        The number of layers adapted, over all experts.

    Raises:
        FileNotFoundError: there is no such file, folder or Hub repository.
        ValueError: the file is no LoRA, holds code, NaN or infinity, was made for another model, or matches it only in
            part.
    """
    models = _experts(pipeline)
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r} must be a name without dots")
    if layers not in ("all", "fitting"):
        raise ValueError(f"layers={layers!r} is neither 'all' nor 'fitting'")
    files = place_lora(models, source)
    wanted = alpha if isinstance(alpha, Mapping) else dict.fromkeys(files, alpha)
    strengths = {expert: file.strength for expert, file in files.items() if file.strength is not None}
    alphas = _per_expert({**wanted, **strengths}, files)
    if alphas.keys() != files.keys():
        raise ValueError(f"alpha names {', '.join(alphas)}; the LoRA goes to {', '.join(files)}")
    loras = {expert: read_lora(file.path, expert) for expert, file in files.items()}
    if layers == "fitting":
        loras = {expert: lora.without_image_layers() for expert, lora in loras.items()}
    for expert, lora in loras.items():
        check_fits(models[expert], lora)

    total = 0
    with restored_on_failure(pipeline, models.values()):
        for expert, lora in loras.items():
            attach(pipeline, models[expert], lora, adapter_name, alphas[expert])
            count = len(lora.layers)
            ranks = ", ".join(map(str, lora.ranks)) or "none"
            logger.info(
                "%s: %d of %d layers of %s adapted as %r (rank %s, alpha %g)%s",
                *(expert, count, count + len(lora.left_out), lora.path.name, adapter_name, ranks, alphas[expert]),
                files[expert].reason and f", {files[expert].reason}",
            )
            total += count
    return total


def set_alpha(pipeline: Any, alpha: Alpha, *, adapter_name: str = "pusa") -> None:
    """Change an adapter's alpha from the next forward on; other adapters keep theirs.

    After `merge_lora` this merges again from the untouched weights: slower, equally exact. Experts that have this
    alpha already stay as they are.

    Args:
        alpha: one number, or a number for each expert to change.

    Raises:
        ValueError: no such adapter, no such expert, or not a finite number.
    """
    models = {name: model for name, model in _experts(pipeline).items() if adapter_name in adapter_names(model)}
    if not models:
        raise _unknown_adapter(pipeline, adapter_name)
    alphas = {
        expert: value
        for expert, value in _per_expert(alpha, models).items()
        if not has_alpha(models[expert], adapter_name, value)
    }
    for expert, value in alphas.items():  # raises before anything changes
        plan_rewrite(models[expert], merged=state_of(models[expert]).merged, alphas={adapter_name: value})
    for expert, value in alphas.items():
        model = models[expert]
        for layer in lora_layers(model).values():
            layer.set_scale(adapter_name, value)
        state_of(model).adapters.setdefault(adapter_name, Adapter(value)).alpha = value
        rewrite(model)


def merge_lora(pipeline: Any) -> None:
    """Write all active adapters into the weights: a forward then takes as long as the base model's.

    The sum is computed in float32 from the untouched weights and rounded once. `set_alpha`, `load_pusa` and
    `unmerge_lora` keep working, and read the untouched weights again from the model's files, which must stay as they
    are. A copy stays on the CPU of those that no file has: a model made in memory, or changed since it was loaded. The
    adapters stay attached, switched off. Quantise after merging: `enable_layerwise_casting` keeps all this working.
    Weights that were read as fp8 (`pusa.models.fp8`) are merged as if they were read in full, merged and then cast.

    Raises:
        ValueError: no adapter is attached, or weights are quantised, sharded or offloaded out of reach.
        WeightsChangedError: weights that were read from a file are needed again, and the file has changed or is gone.
    """
    models = {name: model for name, model in _experts(pipeline).items() if adapter_names(model)}
    if not models:
        raise ValueError("no LoRA is attached: call load_pusa before merge_lora")
    for model in models.values():
        plan_rewrite(model, merged=True)
    for model in models.values():
        state_of(model).merged = True
        rewrite(model)
        enable(model, False)


def unmerge_lora(pipeline: Any) -> None:
    """Undo `merge_lora`: restore the untouched weights bit for bit, and switch the adapters on; raise as it does."""
    models = [model for model in _experts(pipeline).values() if state_of(model).merged]
    for model in models:
        plan_rewrite(model, merged=False)  # raises before anything changes
    for model in models:
        state_of(model).merged = False
        rewrite(model)
        enable(model, True)


def unload_lora(pipeline: Any, *, adapter_name: str | None = None) -> None:
    """Remove one adapter, or all of them; without any left the transformer is as it was, bit for bit.

    Raises:
        ValueError: there is no adapter of this name.
    """
    models = _experts(pipeline).values()
    if adapter_name is not None and not any(adapter_name in adapter_names(model) for model in models):
        raise _unknown_adapter(pipeline, adapter_name)
    for model in models:
        for name in adapter_names(model) if adapter_name is None else [adapter_name]:
            detach(model, name)


def export_lora(
    pipeline: Any,
    path: str | os.PathLike[str],
    *,
    layout: Layout | None = None,
    adapter_name: str = "pusa",
    rank: int | None = None,
) -> ExportReport:
    """Write an adapter as safetensors, at full or lower rank; alpha goes into the header, not into the matrices.

    Args:
        path: `NAME.safetensors`; two experts give `NAME_high_noise.safetensors` and `NAME_low_noise.safetensors`;
            `load_pusa` reads them from their folder.
        layout: "comfyui" (`diffusion_model.`, read by ComfyUI and diffusers, holds everything), "diffusers"
            (`transformer.`) or "original" (as `pusa_v1.pt`); the last two cannot hold every difference. None: "comfyui"
            of Wan, "diffusers" of other bases, whose names the other two do not have.
        adapter_name: as in `load_pusa`.
        rank: keep this many singular values per layer (the best approximation in the Frobenius norm); None keeps all.

    Raises:
        ValueError: no such adapter, a bad path, layout or rank, or differences that the layout cannot hold.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"path={str(path)!r} must end in .safetensors")
    models = {name: model for name, model in _experts(pipeline).items() if adapter_name in adapter_names(model)}
    if not models:
        raise _unknown_adapter(pipeline, adapter_name)
    base = base_of(next(iter(models.values())))
    layout = checked_layout(layout, base)
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is below 1")

    written: list[Path] = []
    lost: dict[str, list[float]] = {}  # layer -> squared norms of the change of B A and of B A
    ranks: set[int] = set()
    layers = 0
    for expert, model in models.items():
        full, deltas = contents(model, adapter_name)
        pairs: dict[str, Pair] = {}
        for name, pair in full.items():
            pairs[name], *lost[f"{expert}.{name}"] = reduce_pair(pair, rank)
        expert_rank = max((a.shape[0] for a, _ in pairs.values()), default=0)
        adapter, base = state_of(model).adapters.get(adapter_name), base_of(model)
        width, blocks = base.size_of(model.config)
        metadata = {
            "base": f"{base.name}, width {width}, {blocks} blocks",
            "rank": str(expert_rank),
            "alpha": str(adapter.alpha if adapter else 1.0),
            "layout": layout,
        }
        file = target.with_stem(target.stem + _PAIR_SUFFIXES[expert]) if len(models) > 1 else target
        write_lora(file, pairs, deltas, layout=layout, metadata=metadata)
        written.append(file)
        ranks.add(expert_rank)
        layers += len(pairs.keys() | {name.rpartition(".")[0] for name in deltas})
    return report_of(written, layers, max(ranks), lost)


# ---- experts and alphas ------------------------------------------------------------------------------------


def _experts(pipeline: Any) -> dict[str, Any]:
    parts = pipeline if not isinstance(pipeline, nn.Module) else SimpleNamespace(transformer=pipeline)
    named = {name: getattr(parts, name, None) for name in EXPERTS}
    models = {name: getattr(model, "_orig_mod", model) for name, model in named.items() if model is not None}
    if not models:
        raise TypeError(f"a {type(pipeline).__name__} has no transformer to adapt")
    return models


def _per_expert(alpha: Alpha, experts: Collection[str]) -> dict[str, float]:
    values = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(experts, alpha)
    if values.keys() - set(experts):
        raise ValueError(f"alpha names {', '.join(values)}; the LoRA is for {', '.join(experts)}")
    for value in values.values():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"alpha={value!r} is not a finite number")
    return {expert: float(value) for expert, value in values.items()}


def _unknown_adapter(pipeline: Any, adapter_name: str) -> ValueError:
    loaded = sorted({name for model in _experts(pipeline).values() for name in adapter_names(model)})
    return ValueError(f"no LoRA is attached as {adapter_name!r}; attached: {', '.join(loaded) or 'none'}")
