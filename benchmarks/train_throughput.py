"""Measure the speed of training and the share lost to waiting for data: clips/s of the trainer and of a bare loop.

A transformer of the embedded model's size is adapted on random latents read from a dataset on disk, in mini-vta's way.
Beside it, in turns, a bare loop of the same forward, backward, clipping and optimizer step on batches that lie in
memory: what the trainer costs over it is reading, noise, bookkeeping and the log. Checkpoints and evaluation are off.

Prints a table and one JSON line; `share_waiting` below 0.05 is the aim. For several processes:

    python benchmarks/train_throughput.py [--steps 20] [--rounds 3] [--toy]
    torchrun --nproc-per-node 2 benchmarks/train_throughput.py
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pusa.data.dataset import DatasetWriter, LatentDataset
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.training.batches import BatchPlan, Reader, generator_of
from pusa.training.config import TrainConfig, load_config
from pusa.training.distributed import Processes, connect_processes
from pusa.training.model import kernels, make_optimizers, precision, prepare
from pusa.training.objective import add_noise, frame_errors, velocity_target, weighted_loss
from pusa.training.reports import read_metrics
from pusa.training.trainer import train

MINI: dict[str, Any] = {
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 8,
}
TOY = {**MINI, "num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2}
SHAPE, CLIPS = (16, 9, 12, 12), 64  # 33 frames of 96 x 96 pixels
TOY_SHAPE = (16, 9, 4, 4)


def write_dataset(folder: Path, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    with DatasetWriter(folder, model="throughput", max_sequence_length=64) as writer:
        writer.add_prompt("", torch.randn(1, MINI["text_dim"], generator=generator))
        for index in range(CLIPS):
            caption = f"clip {index % 16}"
            if not writer.has_prompt(caption):
                writer.add_prompt(caption, torch.randn(9, MINI["text_dim"], generator=generator))
            latents = torch.randn(shape, generator=generator)
            height, width = (8 * side for side in shape[2:])
            writer.add(f"{index:03d}", latents, caption, fps=16, height=height, width=width, frames=4 * shape[1] - 3)


def make_model(config: dict[str, Any]) -> PusaWanTransformer3DModel:
    torch.manual_seed(0)
    return PusaWanTransformer3DModel(**config)


def by_trainer(config: TrainConfig, model: Any) -> tuple[float, float]:
    """Clips per second of all processes, and the share of time spent waiting; the first entry warms up."""
    folder = train(config, transformer=model)
    entries = [entry for entry in read_metrics(folder) if "loss" in entry][1:]
    seconds = entries[-1]["seconds"] - read_metrics(folder)[0]["seconds"]
    clips = entries[-1]["clips"] - read_metrics(folder)[0]["clips"]
    return clips / seconds, statistics.mean(entry["data_share"] for entry in entries)


def by_bare_loop(config: TrainConfig, model: Any, data: LatentDataset, processes: Processes, steps: int) -> float:
    """Clips per second of all processes on the same batches, made before."""
    plan, reader = BatchPlan(data.buckets, config, processes.data_parallel), Reader(data, config, (0.0, 1.0))
    model, parameters = prepare(model, config, processes, list(data.buckets))
    optimizers = make_optimizers(parameters, config.optimizer)
    batches = []
    for step in range(steps):
        made = plan.step(step)
        slots = made.slots(processes.data_rank, processes.data_parallel, 0)
        generators = [generator_of(config.seed, "train", step, slot) for slot in slots]
        clips = [made.clips[slot] for slot in slots]
        batches.append(reader.batch(clips, made.frames, generators, training=True, counted=len(clips)))
    seen, began = 0, 0.0
    for step, batch in enumerate(batches):
        if step == config.report.log_every:
            seen, began = 0, time.monotonic()
        x = add_noise(batch.latents, batch.noise, batch.sigmas)
        with kernels(config, model):
            with precision(config, processes.device):
                velocity = model(x, 1000 * batch.sigmas, batch.embeds, return_dict=False)[0]
            errors = frame_errors(velocity, velocity_target(batch.latents, batch.noise))
            loss = weighted_loss(errors, batch.sigmas, config.objective)
            loss.backward()
        processes.average([p.grad for p in parameters.values() if p.grad is not None], [float(loss.detach())])
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += batch.counted * processes.data_parallel
    return seen / (time.monotonic() - began)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of each measurement, after 5 to warm up")
    parser.add_argument("--rounds", type=int, default=3, help="trainer and bare loop take turns")
    parser.add_argument("--toy", action="store_true", help="a far smaller model, to see that the script works")
    parser.add_argument("--work", type=Path, help="an empty folder all processes see; default: a temporary one")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    processes = connect_processes()
    with tempfile.TemporaryDirectory() as temporary:
        names = [str(options.work or temporary)]
        if processes.world > 1:
            dist.broadcast_object_list(names)
        found = measure(Path(names[0]), options, processes)
        processes.wait()
    if processes.is_main:
        print(f"{'':<12}{'clips/s':>10}{'waiting for data':>20}")
        print(f"{'trainer':<12}{found['clips_per_second']:>10.2f}{100 * found['share_waiting']:>18.2f} %")
        print(f"{'bare loop':<12}{found['bare_clips_per_second']:>10.2f}")
        print(json.dumps({"benchmark": "train_throughput", **found}))
    if dist.is_initialized() and arguments is None:
        dist.destroy_process_group()


def measure(work: Path, options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    if processes.is_main:
        write_dataset(work / "clips", TOY_SHAPE if options.toy else SHAPE)
    processes.wait()
    shape = TOY if options.toy else MINI
    steps, data = options.steps + 5, LatentDataset(work / "clips")
    ours: list[tuple[float, float]] = []
    bare: list[float] = []
    for turn in range(options.rounds):
        config = load_config(
            "mini-vta",
            {
                "output": str(work / f"run-{turn}"),
                "data.folders": [str(work / "clips")],
                "data.held_out_share": 0.0,
                "steps": steps,
                "report.log_every": 5,
                "report.held_out_every": None,
                "report.tracker": "none",
                "checkpoint.every_steps": None,
                "checkpoint.every_seconds": None,
            },
        )
        ours.append(by_trainer(config, make_model(shape)))
        bare.append(by_bare_loop(config, make_model(shape), data, processes, steps))
    return {
        "clips_per_second": statistics.median(speed for speed, _ in ours),
        "share_waiting": statistics.median(share for _, share in ours),
        "bare_clips_per_second": statistics.median(bare),
        "speed_over_bare": statistics.median(speed / b for (speed, _), b in zip(ours, bare, strict=True)),
        "processes": processes.world,
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "model": "toy" if options.toy else "mini",
        "device": processes.device.type,
    }


if __name__ == "__main__":
    main()
