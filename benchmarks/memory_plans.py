"""Measure how a 14B model runs on cards of 12, 16, 24 and 48 GB: peaks beside predicted ones, and seconds per step.

    python benchmarks/memory_plans.py                        # on one card of 80 GB or more, in 5 minutes
    python benchmarks/memory_plans.py --tiny --device cpu    # the same code with a toy, to rehearse

Nothing is downloaded: weights, latents and prompt embeddings are random. The process may take only as much of the card
as a smaller one has (`torch.cuda.set_per_process_memory_fraction`); `pusa.acceleration.plans` chooses for that card and
`pusa.acceleration.apply` carries it out. For each size of card a JSON line has the plan, the seconds of a step without
guidance, their ratio to those with all weights on the card, and the peak beside the predicted one; then a decoded clip
has the same. The whole card comes first. A plan that does not fit says so and the next one is tried. A toy fits any
card: a rehearsal carries out every way to offload it.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _card import GRIDS, TOY, TOY_GRIDS, Device, add_device_options, arguments_for, attempt, build, check_device, emit
from _common import WAN_14B
from diffusers import AutoencoderKLWan
from torch import Tensor

from pusa.acceleration import Card, LoadOptions, Machine, Plan, apply, plans
from pusa.acceleration.placement import remove
from pusa.models.vae import decode_chunks
from pusa.pipeline import PusaPipeline
from pusa.resources import free_memory_bytes
from pusa.scheduler import PusaFlowMatchEulerScheduler
from pusa.zoo import ZooModel, get

CARDS_GB = (48, 24, 16, 12)
GIB = 2**30
TOY_VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}


def toy_model() -> ZooModel:
    """Describe the toy as a model of the zoo, so that it gets plans, too."""
    with torch.device("meta"):
        parts = {"transformer": build(TOY, torch.device("meta")), "vae": AutoencoderKLWan(**TOY_VAE)}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    # As models of our own recipe, which have a folder, it runs in bf16.
    here = Path(__file__).parent
    return ZooModel("toy", "a toy", TOY, folder=here, parameters=counts, vae_config=TOY_VAE)


class Bench:
    """Hold one set of random weights in RAM, and try plans on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.is_toy = Device(options.device), options.tiny
        self.config, grids = (TOY, TOY_GRIDS) if options.tiny else (WAN_14B, GRIDS)
        self.grid = grids[options.size]
        self.model = toy_model() if options.tiny else get("wan2.1-14b")
        self.steps, self.text_tokens = options.steps, 16 if options.tiny else 512
        self.deadline = time.perf_counter() + options.budget_seconds
        emit(case="device", tiny=options.tiny, **self.device.description())
        began = time.perf_counter()
        # Made on the card, where random numbers are quick, and kept in RAM: every plan begins there.
        model = build(self.config, self.device.device)
        self.weights: dict[str, Tensor] = {name: value.cpu() for name, value in model.state_dict().items()}
        del model
        self.device.forget_peak()
        self.vae = AutoencoderKLWan(**(TOY_VAE if options.tiny else {})).eval()
        emit(case="weights", bytes=sum(w.nbytes for w in self.weights.values()), seconds=time.perf_counter() - began)
        self.resident_seconds: float | None = None

    def pipeline(self) -> PusaPipeline:
        """Make a pipeline on the CPU whose transformer shares the weights in RAM."""
        transformer = build({**self.config, "num_layers": 1}, torch.device("cpu"))
        rope = transformer.rope
        with torch.device("meta"):
            transformer = type(transformer)(**self.config)
        transformer.load_state_dict(self.weights, assign=True)
        transformer.rope = rope
        pipe = PusaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=self.vae,
            scheduler=PusaFlowMatchEulerScheduler(),
            transformer=transformer.eval(),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def choose(self, card_bytes: int) -> list[Plan]:
        capability = self.device.capability or (9, 0)
        machine = Machine((Card(card_bytes, self.device.name, capability),), free_memory_bytes(), 10**12)
        frames, height, width = self.grid
        size = 8 * width, 8 * height, 4 * frames - 3
        found = plans(self.model, size=size, machine=machine, options=LoadOptions(), guidance=True, lora_ranks={})
        if not self.is_toy:
            return found
        whole = found[0].parts["transformer"]
        ways = [replace(whole, offload=offload) for offload in ("none", "model", "blocks", "leaves", "disk")]
        return [replace(found[0], parts={**found[0].parts, "transformer": way}) for way in ways]

    def run(self, name: str, card_bytes: int) -> None:
        if self.device.is_cuda:
            total = self.device.total_bytes()
            assert total is not None
            torch.cuda.set_per_process_memory_fraction(min(1.0, card_bytes / total), self.device.device)
        for plan in self.choose(card_bytes):
            if self.is_toy:
                name = plan.summary
            if time.perf_counter() > self.deadline:
                emit(case=name, outcome="skipped", why="no time is left")
                return
            record = attempt(lambda plan=plan: self.measure(plan))
            transformer = plan.parts["transformer"]
            emit(
                case=name,
                card=self.device.name,
                card_bytes=card_bytes,
                plan=plan.summary,
                offload=transformer.offload,
                storage=transformer.storage,
                predicted_bytes=dict(plan.gpu_peak_bytes),
                predicted_speed=plan.relative_speed,
                **record,
            )
            if record["outcome"] == "done" and not self.is_toy:
                return

    def measure(self, plan: Plan) -> dict[str, Any]:
        """Denoise and decode by a plan: seconds and the peak of each stage."""
        pipe = self.pipeline()
        try:
            began = time.perf_counter()
            apply(pipe, plan, device=self.device.device)
            self.device.synchronize()
            applied = time.perf_counter() - began
            arguments = arguments_for(self.grid, self.text_tokens, self.config["text_dim"], self.device.device)
            latents = arguments["latents"]

            def denoise(steps: int) -> None:
                pipe(num_inference_steps=steps, guidance_scale=1.0, **arguments)

            denoise(1)  # loads kernels, and traces the order in which blocks are needed
            self.device.forget_peak()
            seconds = self.device.seconds(lambda: denoise(self.steps)) / self.steps
            peaks = {"denoise": self.device.peak_bytes()}
            self.device.forget_peak()
            latents = latents[:, :, :2] if self.is_toy else latents
            decode = self.device.seconds(lambda: [None for _ in decode_chunks(pipe.vae, latents)])
            peaks["decode"] = self.device.peak_bytes()
        finally:
            remove(pipe)
        if self.resident_seconds is None and plan.parts["transformer"].offload == "none":
            self.resident_seconds = seconds
        return {
            "seconds_to_apply": applied,
            "seconds_per_step": seconds,
            "speed_of_resident": self.resident_seconds / seconds if self.resident_seconds else None,
            "seconds_to_decode": decode,
            "peak_bytes": peaks,
        }


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Measure every size of card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_options(parser, budget=270.0)
    parser.add_argument("--size", choices=sorted(GRIDS), default="480p")
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed, after one that is not")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    torch.manual_seed(0)
    bench = Bench(options)
    bench.run("the whole card", bench.device.total_bytes() or 80 * GIB)
    for size_gb in () if options.tiny else CARDS_GB:
        bench.run(f"{size_gb} GB", size_gb * GIB)
    return 0


if __name__ == "__main__":
    sys.exit(main())
