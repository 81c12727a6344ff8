"""Count the operations of a training step of the small model on a data-centre GPU, without one.

    python benchmarks/mini_counts.py [--teraflops 400] [--launch-microseconds 5]

A step of the base runs on PyTorch's meta device, which computes nothing and raises an error wherever the host would
have to wait (reading a number or a mask): if it runs, nothing in it waits. The script counts the operations of the
device, forward and backward, optimizers and moving average, and the floating-point operations of matrix products and
attention. Compiled blocks launch fewer. Gradient clipping, a handful of operations that this device lacks, is left out.

Rows: the first edition's model and batch with `torch.optim.Muon`, the same with all matrices of a shape at once, and
the model of `pusa mini train --budget card`. The last line predicts clips per second: the larger of launches times
their time and operations over the rate. Both rates are guesses until a GPU has been measured (`benchmarks/card.sh`).
"""

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from pusa.mini.recipe.base import BaseLoss, BaseObjective, BaseSchedule, TextToVideo
from pusa.mini.recipe.card import CARD_BUDGETS
from pusa.mini.recipe.clips import ClipCache, ClipPlan
from pusa.mini.recipe.muon import BatchedMuon

FIRST = {"heads": 8, "layers": 8, "head_channels": 32, "size": 96, "batch_tokens": 2880, "objective": BaseObjective()}


class Launches(TorchDispatchMode):
    """Count operations that occupy the device: views and new, empty tensors do not."""

    FREE = frozenset(
        (
            *("view", "_unsafe_view", "_reshape_alias", "reshape", "alias", "as_strided", "detach", "lift_fresh"),
            *("expand", "permute", "transpose", "t", "mT", "unsqueeze", "squeeze", "diagonal", "unfold"),
            *("slice", "select", "split", "split_with_sizes", "chunk", "unbind"),
            *("empty", "empty_like", "empty_strided", "new_empty"),
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ not in self.FREE
        return function(*args, **(kwargs or {}))


def meta_clips(size: int, frames: int, tokens: int = 40) -> ClipCache:
    """Make clips without content, with captions of `tokens` tokens."""
    latent_frames, side = (frames - 1) // 4 + 1, size // 8
    scenes = ClipPlan(clips=64, size=size, frames=frames, things=24).scenes(0)
    clips = ClipCache(
        torch.empty(64, 16, latent_frames, side, side, dtype=torch.bfloat16, device="meta"),
        torch.empty(64, latent_frames, side, side, dtype=torch.uint8, device="meta"),
        scenes,
    )
    clips.tokens = torch.empty(64, 8, tokens, dtype=torch.long, device="meta")
    return clips


def count_step(
    *,
    heads: int,
    layers: int,
    head_channels: int,
    size: int,
    batch_tokens: int,
    objective: BaseObjective,
    batched: bool,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> dict[str, Any]:
    """Count one step.

    Args:
        batched: Muon over all matrices of a shape at once.
        tokenizer: None: one is learned, which takes seconds.

    Returns:
        Launches by part, ``flops`` and ``clips`` of the step.

    Raises:
        RuntimeError: something in the step waits for the device.
    """
    model = TextToVideo(heads=heads, layers=layers, head_channels=head_channels, tokenizer=tokenizer).to("meta")
    clips = meta_clips(size, 33)
    schedule = BaseSchedule(batch_tokens=batch_tokens, short_share=0.0)
    loss_fn = BaseLoss(model, None, clips, schedule, objective, is_tokenised=True)
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon: Optimizer = BatchedMuon(matrices) if batched else torch.optim.Muon(matrices, adjust_lr_fn="original")
    others = [nn.Parameter(torch.zeros(p.shape)) for p in rest]  # fused AdamW does without the meta device
    for parameter in others:
        parameter.grad = torch.zeros_like(parameter)
    adam = torch.optim.AdamW(others, fused=True)

    def pass_through() -> Tensor:
        loss = loss_fn(0, 0.9)
        loss.backward()
        return loss

    parameters = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in parameters]

    def average() -> None:
        torch._foreach_lerp_(averages, parameters, 1e-3)  # as `get_ema_multi_avg_fn` does, where it may

    pass_through()
    muon.step()
    adam.step()  # their buffers are there
    model.zero_grad()
    counts: dict[str, Any] = {}
    with FlopCounterMode(display=False) as flops, Launches() as launches:
        pass_through()
    counts["forward and backward"], counts["flops"] = launches.count, flops.get_total_flops()
    for name, part in (("Muon", muon.step), ("AdamW", adam.step), ("average", average)):
        with Launches() as launches:
            part()
        counts[name] = launches.count
    counts["clips"] = batch_tokens // (9 * (size // 16) ** 2)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training step of the small model asks of a card.")
    parser.add_argument("--teraflops", type=float, default=400, help="a card's rate that is reached, in bf16")
    parser.add_argument("--launch-microseconds", type=float, default=5, help="of the host, for each operation")
    options = parser.parse_args()
    card = CARD_BUDGETS["card"]
    on_card = {
        "heads": card.heads,
        "layers": card.layers,
        "head_channels": card.head_channels,
        "size": card.size,
        "batch_tokens": card.schedule.batch_tokens,
        "objective": replace(card.objective),
    }
    cases = {
        "first edition, torch.optim.Muon": FIRST | {"batched": False},
        "first edition, batched Muon": FIRST | {"batched": True},
        "card": on_card | {"batched": True},
    }
    print("| step | forward and backward | Muon | AdamW and average | TFLOP | clips |")
    print("|---|---|---|---|---|---|")
    for name, case in cases.items():
        counts = count_step(**case)
        others = counts["AdamW"] + counts["average"]
        print(
            f"| {name} | {counts['forward and backward']} | {counts['Muon']} | {others} | {counts['flops'] / 1e12:.2f} "
            f"| {counts['clips']} |"
        )
    launches = counts["forward and backward"] + counts["Muon"] + others
    seconds = max(launches * options.launch_microseconds / 1e6, counts["flops"] / options.teraflops / 1e12)
    prediction = {
        "case": "card",
        "launches": launches,
        "flops": counts["flops"],
        "launch_seconds": launches * options.launch_microseconds / 1e6,
        "compute_seconds": counts["flops"] / options.teraflops / 1e12,
        "clips_per_second": round(counts["clips"] / seconds),
    }
    print(json.dumps(prediction))


if __name__ == "__main__":
    main()
