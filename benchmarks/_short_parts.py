"""Cases of the short run beside plain steps: an adapter, the VAE, and a model whose blocks wait in the CPU's memory."""

import gc
import itertools
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _card import TOY_GRIDS, only_blocks, relative_error
from _common import forward_flops
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from pusa.lora import merge_lora, unload_lora
from pusa.lora.adapters import attach
from pusa.lora.layouts import LoraFile, ModelGuess
from pusa.models.vae import decode_chunks
from pusa.positions import frames_of
from pusa.training.config import LORA_TARGETS

if TYPE_CHECKING:
    from _short import Short

RANK, TOY_RANK = 512, 8
ALPHA = 1.4
VAE_SEED, CARD_BYTES = 4, 24 * 10**9
TOY_VAE = {"base_dim": 8, "num_res_blocks": 1, "dim_mult": [1, 1, 1, 1]}
CLOSING_SECONDS = 1.0  # for reporting


# ---- an adapter ----------------------------------------------------------------------------------------------------


def random_lora(model: nn.Module, blocks: int, rank: int) -> LoraFile:
    """A LoRA on the layers that the released one adapts, made on the model's device in bf16."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and name.endswith(tuple(LORA_TARGETS)):
            like = {"device": module.weight.device, "dtype": torch.bfloat16}
            a, b = torch.empty(rank, module.in_features, **like), torch.empty(module.out_features, rank, **like)
            pairs[name] = a.normal_(std=0.01), b.normal_(std=0.01)
    guess = ModelGuess("Wan", 0, blocks)
    return LoraFile(Path("random"), "diffusers", guess, pairs, {}, [], has_alpha=False, metadata={})


def adapter_beside_merged(short: "Short") -> dict[str, Any]:
    """A forward at 480p of a tenth of the blocks with the adapter attached, and with it merged into the weights."""
    model, device = short.model, short.device
    count, rank = max(1, len(model.blocks) // 10), TOY_RANK if short.options.tiny else RANK
    model.set_attention_backend("native")
    inputs = short.inputs("480p", "frame")
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs[:] = model(*inputs, return_dict=False)

    with only_blocks(model, count):
        held, began = device.held_bytes(), time.perf_counter()
        lora = random_lora(model, count, rank)
        try:
            attach(None, model, lora, "random", ALPHA)
            device.synchronize()
            attached, attaching = device.held_bytes(), time.perf_counter() - began
            attached_seconds = device.median_seconds(forward, 3)
            peak, unmerged = device.peak_bytes(), outputs[0].float()
            began = time.perf_counter()
            merge_lora(model)
            device.synchronize()
            merging = time.perf_counter() - began
            merged_seconds = device.median_seconds(forward, 3)
        finally:
            unload_lora(model)
    difference = relative_error(outputs[0].float(), unmerged)
    return {
        "blocks": count,
        "rank": rank,
        "layers_adapted": len(lora.layers),
        "seconds": attached_seconds,
        "merged_seconds": merged_seconds,
        "times_as_long_as_merged": attached_seconds / merged_seconds,
        "attach_seconds": attaching,
        "merge_seconds": merging,
        "adapter_bytes": None if attached is None or held is None else attached - held,
        "peak_bytes": peak,
        "difference_from_merged": difference,
        "agrees": difference <= 0.05,
    }


# ---- the VAE -------------------------------------------------------------------------------------------------------


def decode(short: "Short", dtype: torch.dtype, at_most_seconds: float) -> dict[str, Any]:
    """Decode latents of 480p as users get it: a latent frame at a time, and as many of them as there is time for."""
    device, grid = short.device, short.grids["480p"]
    torch.manual_seed(VAE_SEED)
    with torch.device(device.device):
        vae = AutoencoderKLWan(**(TOY_VAE if short.options.tiny else {})).eval().to(dtype)
    latents = torch.randn(1, 16, *grid, device=device.device)
    for _ in decode_chunks(vae, latents[:, :, :2]):
        pass  # loads and chooses kernels
    device.forget_peak()
    held = device.held_bytes()
    began = time.perf_counter()
    moments, finite = [began], True
    end = began + min(at_most_seconds, short.left() - CLOSING_SECONDS)
    for frames in decode_chunks(vae, latents):
        device.synchronize()
        moments.append(time.perf_counter())
        finite = finite and bool(frames.isfinite().all())
        each = [b - a for a, b in itertools.pairwise(moments)]
        if moments[-1] + max(each) > end:
            break
    done = len(moments) - 1
    return {
        "outcome": "done" if done == grid[0] else "out of time",
        "latent_frames": done,
        "of_latent_frames": grid[0],
        "frames": frames_of(done, vae.config.scale_factor_temporal),
        "seconds": moments[-1] - began,
        "seconds_to_first_frame": each[0],
        "seconds_per_later_latent_frame": statistics.median(each[1:]) if done > 1 else None,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "finite": finite,
        **short.memory(held),
    }


# ---- a card of 24 GB -----------------------------------------------------------------------------------------------


def to_host(module: nn.Module, *, pinned: bool) -> None:
    """Move parameters to the CPU, into memory that the card can read by itself if `pinned`."""
    for parameter in module.parameters():
        host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=pinned)
        parameter.data = host.copy_(parameter.data)


def move_in_time(short: "Short") -> int:
    """Move blocks to pinned memory while there is time for it and for a forward of them; return how many."""
    blocks, began = short.model.blocks, time.perf_counter()
    forward = short.forward_seconds / len(blocks)
    for count, block in enumerate(blocks):
        spent = time.perf_counter() - began
        after = 1.5 * forward * (count + 1) + 2 + CLOSING_SECONDS  # the step, and before it the order of the blocks
        if count and spent / count + after > short.left():
            return count
        to_host(block, pinned=short.device.is_cuda)
    return len(blocks)


def streamed(short: "Short") -> dict[str, Any]:
    """One step on a card of which 24 GB may be used, each block fetched while the one before it computes.

    The model is given away: blocks for which there was no time are dropped, and the record says how many ran.
    """
    device, model, began = short.device, short.model, time.perf_counter()
    short.model.set_attention_backend(short.best)
    count = move_in_time(short)
    model.blocks = nn.ModuleList(list(model.blocks)[:count])
    gc.collect()  # whatever still holds weights of the dropped blocks, or the stock model on the same ones
    device.synchronize()
    moving = time.perf_counter() - began
    limit, total = CARD_BYTES, device.total_bytes()
    if total is not None:
        device.forget_peak()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device.device.index)
    try:
        model.enable_group_offload(
            onload_device=device.device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.is_cuda,
        )
        latents = torch.randn(1, 16, *TOY_GRIDS["480p"], device=device.device, dtype=torch.bfloat16)
        times = torch.full((1, latents.shape[2]), 500.0, device=device.device)
        model(latents, times, short.inputs("480p", "frame")[2], return_dict=False)  # its order of blocks is remembered
        whole = count == short.config["num_layers"]
        found = short.steps("480p", short.best, 1.0, warm_up=False, compare=whole)
    finally:
        if total is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, device.device.index)
        short.model = None
    grid = short.grids["480p"]
    flops = forward_flops(short.config | {"num_layers": count}, grid, short.text_tokens, grid[0])
    return {
        **found,
        **short.speed(flops, found["seconds_per_step"]),
        "blocks": count,
        "of_blocks": short.config["num_layers"],
        "limit_bytes": limit if total is not None else None,
        "streams": device.is_cuda,
        "move_seconds": moving,
    }
