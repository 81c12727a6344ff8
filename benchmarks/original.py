"""Compare the denoising loop with the original's code and stock diffusers, adapter included: time and memory.

    python benchmarks/original.py --checkout FOLDER      # or PUSA_ORIGINAL=FOLDER: a clone of Yaofang-Liu/Pusa-VidGen
    python benchmarks/original.py --tiny                 # rehearses; without a checkout that row is missing

All run on the same random weights, adapter (rank 10 % of the width, as 512 of 5120), noise and steps, in one process on
the CPU, each in turn in every round; the least CPU time counts. The first latent frame is kept, as in image-to-video.

- original: its model and scheduler from the checkout, the adapter merged, as it does; the loop is that of its pipeline
  for several frames (two passes a step, one after the other), without what it prints. It needs the package einops.
- stock: `diffusers.WanPipeline`, one timestep for all frames, the same adapter attached, as `load_lora_weights` leaves
  it. It keeps no frame.
- pusa: the adapter beside the weights, merged, and merged with compiled blocks.

`difference` is of the latents to the original's, by their range: ours round timesteps to integers here, as it does.
Peak memory is what tensors held at most beyond the weights. Nothing of the original is copied or committed.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _card import TOY
from _common import SameSigmas, stock_twin, table
from _speed_subjects import MID, MID_GRID, MID_TEXT, random_adapter
from core import rows_of
from diffusers import WanPipeline
from torch import Tensor

from pusa.acceleration import compilation
from pusa.conditions import PusaCondition
from pusa.lora.operations import load_pusa
from pusa.models.original import transformer_to_original
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler

GUIDANCE, SHIFT, ALPHA = 3.0, 5.0, 1.4
GOALS = {"original, time": 1.3, "stock, time": 1.25, "original, memory": 0.5}


def import_original(checkout: Path) -> tuple[type, type]:
    """Import the original's transformer and scheduler from a checkout, without the rest of its package.

    Raises:
        FileNotFoundError: the folder is no checkout of it.
    """
    package = next((p for p in (checkout / "PusaV1" / "diffsynth", checkout / "diffsynth", checkout) if
                    (p / "models" / "wan_video_pusa.py").is_file()), None)  # fmt: skip
    if package is None:
        raise FileNotFoundError(f"{checkout} holds no PusaV1/diffsynth/models/wan_video_pusa.py: give a checkout")
    for name, folder in (("original", package), ("original.models", package / "models"),
                         ("original.schedulers", package / "schedulers")):  # fmt: skip
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]  # its own __init__ would import every model that it has
        sys.modules[name] = module
    model = importlib.import_module("original.models.wan_video_pusa").WanModelPusa
    return model, importlib.import_module("original.schedulers.flow_match_pusa_v2v").FlowMatchSchedulerPusaV2V


def original_loop(
    classes: tuple[type, type], model: PusaWanTransformer3DModel, call: dict[str, Any], known: Tensor
) -> Callable[[], Tensor]:
    """Return the original's loop on the weights of `model`, which has its adapter merged."""
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    theirs = classes[0](
        dim=width, in_dim=16, ffn_dim=config.ffn_dim, out_dim=16, text_dim=config.text_dim, freq_dim=config.freq_dim,
        eps=config.eps, patch_size=tuple(config.patch_size), num_heads=config.num_attention_heads,
        num_layers=config.num_layers, has_image_input=False,
    )  # fmt: skip
    state = {
        name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if "lora_" not in name
    }
    theirs.load_state_dict(transformer_to_original(state), assign=True)
    theirs.eval()

    def loop() -> Tensor:
        scheduler = classes[1](shift=SHIFT, sigma_min=0.0, extra_one_step=True)
        scheduler.set_timesteps(call["num_inference_steps"], shift=SHIFT)
        latents = call["latents"].clone()
        latents[:, :, 0] = known
        for time in scheduler.timesteps:
            times = time.view(1, 1).repeat(1, latents.shape[2])
            times[:, 0] = 0
            times = times.long().float()
            asked, free = (theirs(latents, times, call[name]) for name in ("prompt_embeds", "negative_prompt_embeds"))
            with contextlib.redirect_stdout(io.StringIO()):
                latents = scheduler.step(
                    free + GUIDANCE * (asked - free), times, latents,
                    cond_frame_latent_indices=[0], noise_multipliers={0: 0.0},
                )  # fmt: skip
        return latents

    return loop


def our_loop(model: PusaWanTransformer3DModel, call: dict[str, Any], known: Tensor) -> tuple[PusaPipeline, Any]:
    scheduler = PusaFlowMatchEulerScheduler(shift=SHIFT, reference_rounding=True)
    pipe = PusaPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    conditions = [PusaCondition(latents=known[0].unsqueeze(1), latent_index=0)]
    return pipe, lambda: pipe(conditions=conditions, guidance_scale=GUIDANCE, **call).frames


def variants_of(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Build the loops by name, each on weights of its own with the values of all others."""
    config, grid, text = (TOY, (3, 4, 4), 16) if options.tiny else (MID, MID_GRID, MID_TEXT)
    torch.manual_seed(0)
    first = PusaWanTransformer3DModel(**config).eval()
    width = config["num_attention_heads"] * config["attention_head_dim"]
    adapter = random_adapter(first, max(4, width // 10), folder / "adapter.safetensors")
    frames, height, width = grid
    call = {
        "height": 8 * height, "width": 8 * width, "num_frames": 4 * frames - 3,
        "num_inference_steps": options.steps,
        "prompt_embeds": torch.randn(1, text, config["text_dim"]),
        "negative_prompt_embeds": torch.randn(1, text, config["text_dim"]),
        "latents": torch.randn(1, 16, *grid), "output_type": "latent",
    }  # fmt: skip
    known = torch.randn(1, 16, height, width)

    def model() -> PusaWanTransformer3DModel:
        twin = PusaWanTransformer3DModel(**config).eval()
        twin.load_state_dict(first.state_dict())
        return twin

    variants: dict[str, Callable[[], Tensor]] = {}
    stock = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=SameSigmas(shift=SHIFT), transformer=stock_twin(model())
    )
    stock.set_progress_bar_config(disable=True)
    load_pusa(stock, adapter, alpha=ALPHA)
    variants["stock, adapter"] = lambda: stock(guidance_scale=GUIDANCE, **call).frames
    ways = {"pusa, adapter": (False, False), "pusa, merged": (True, False), "pusa, merged, compiled": (True, True)}
    for name, (merges, compiles) in ways.items():
        pipe, variants[name] = our_loop(model(), call, known)
        pipe.load_pusa(adapter, alpha=ALPHA)
        if merges:
            pipe.merge_lora()
        if compiles:
            compilation.compile_blocks(pipe)
        if merges and not compiles and options.checkout is not None:
            variants["original"] = original_loop(import_original(options.checkout), pipe.transformer, call, known)
    return variants


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Divide time and memory by those of the compiled loop, as the goals are stated."""
    by_name = {row["variant"]: row for row in rows}
    ours, found = by_name["pusa, merged, compiled"], {}
    for name, other in (("original", "original"), ("stock", "stock, adapter")):
        if other in by_name:
            found[f"{name}, time"] = by_name[other]["cpu_seconds"] / ours["cpu_seconds"]
            found[f"{name}, memory"] = ours["peak_bytes"] / by_name[other]["peak_bytes"]
    return found


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ.get("PUSA_ORIGINAL")
    parser.add_argument("--checkout", type=Path, default=Path(given) if given else None)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a toy, one round")
    options = parser.parse_args(arguments)
    if options.checkout is not None and importlib.util.find_spec("einops") is None:
        parser.error("the original needs the package einops: pip install einops")
    with tempfile.TemporaryDirectory(prefix="pusa-original-") as folder:
        variants = variants_of(options, Path(folder))
        latents = {name: variant() for name, variant in variants.items()}
        rows = rows_of(variants, 1 if options.tiny else options.rounds, "pusa, merged, compiled")
    reference = latents.get("original")
    for row in rows:
        if reference is not None and not row["variant"].startswith("stock"):
            gap = (latents[row["variant"]] - reference).abs().max() / (reference.max() - reference.min())
            row["difference"] = float(gap)
    cells = [
        [row["variant"], f"{row['cpu_seconds']:.3f}", f"{row['time_ratio']:.2f}x", f"{row['peak_bytes'] / 1e6:.1f}",
         f"{row['memory_ratio']:.2f}x", f"{row['difference']:.1e}" if "difference" in row else ""] for row in rows
    ]  # fmt: skip
    print(table(["", "CPU s", "time", "peak MB", "memory", "difference"], cells))
    found = ratios(rows)
    for name, goal in GOALS.items():
        if name in found:
            met = found[name] <= goal if name.endswith("memory") else found[name] >= goal
            print(f"{name}: {found[name]:.2f}x, goal {goal:g}x, {'met' if met else 'MISSED'}")
    print(json.dumps({"benchmark": "original", "steps": options.steps, "threads": torch.get_num_threads(),
                      "rows": rows, "ratios": found}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
