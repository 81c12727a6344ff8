"""Helpers of the scripts for a card: its name and memory, clocks, models made on it, and records that come at once.

Imports nothing beyond torch, diffusers and this project's own modules, so that a card's machine needs no more.
"""

import argparse
import contextlib
import json
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from _common import WAN_14B, SameSigmas, is_kept_in_fp32, stock_twin
from diffusers import WanPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn

from pusa.models.wan import PusaWanTransformer3DModel
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler

TOY = WAN_14B | {"num_attention_heads": 2, "ffn_dim": 512, "num_layers": 2, "text_dim": 64}
GRIDS = {"480p": (21, 60, 104), "720p": (21, 90, 160)}  # latent frames, height, width of 81 frames
TOY_GRIDS = {"480p": (3, 8, 8), "720p": (3, 8, 12)}


def emit(**record: Any) -> None:
    print(json.dumps(record), flush=True)


def add_device_options(parser: argparse.ArgumentParser, budget: float | None = None) -> None:
    """Add what all scripts for a card take."""
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy model and toy videos")
    if budget is not None:
        parser.add_argument("--budget-seconds", type=float, default=budget, help="begin nothing that would end later")


def check_device(parser: argparse.ArgumentParser, name: str) -> None:
    """End the program with one line where there is no such device."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device: rehearse with --tiny --device cpu")


def seconds_of_process() -> float:
    """Tell how long this process has been running: Python's start and the imports count, too."""
    return time.time() - psutil.Process().create_time()


class Device:
    """Time and memory of a card; of a CPU, where no peak is known."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.is_cuda = self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_properties(self.device).name if self.is_cuda else "cpu"

    def description(self) -> dict[str, Any]:
        if not self.is_cuda:
            return {"device": "cpu", "torch": torch.__version__, "threads": torch.get_num_threads()}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }

    @property
    def capability(self) -> tuple[int, int] | None:
        return torch.cuda.get_device_capability(self.device) if self.is_cuda else None

    def total_bytes(self) -> int | None:
        return torch.cuda.get_device_properties(self.device).total_memory if self.is_cuda else None

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.is_cuda else None

    def reserved_bytes(self) -> int | None:
        """Tell the most that the allocator took from the card, gaps between tensors included."""
        return torch.cuda.max_memory_reserved(self.device) if self.is_cuda else None

    def held_bytes(self) -> int | None:
        return torch.cuda.memory_allocated(self.device) if self.is_cuda else None

    def seconds(self, run: Callable[[], Any]) -> float:
        if not self.is_cuda:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def median_seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Give the median of `repeats` runs, after one that is not timed."""
        run()
        return statistics.median(self.seconds(run) for _ in range(repeats))


# ---- records -------------------------------------------------------------------------------------------------------


class OutOfTime(BaseException):
    """The time that a piece of work had is over; no `except Exception` of a library in between holds it up."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block when `seconds` are over (in the main thread; elsewhere nothing interrupts)."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, ring)
    other, began = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))[0], time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(other - (time.monotonic() - began), 0.001) if other else 0)
        signal.signal(signal.SIGALRM, handler)


def one_line(error: BaseException) -> str:
    """Say what went wrong in one line; the allocator's advice is left out."""
    text = " ".join(str(error).partition(". GPU")[0].split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do a piece of work and say how it ended: an error becomes the record's outcome, and its trace goes to stderr."""
    try:
        return {"outcome": "done"} | run()
    except OutOfTime as error:
        return {"outcome": "out of time", "error": str(error)}
    except torch.OutOfMemoryError as error:
        return {"outcome": "out of memory", "error": str(error).partition(". GPU")[0]}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"outcome": "failed", "error": one_line(error)}


@dataclass
class Records:
    """Collect records, and print each as a line of JSON with the card's name as soon as it is known."""

    card: str
    found: list[dict[str, Any]] = field(default_factory=list)

    def add(self, case: str, **fields: Any) -> dict[str, Any]:
        record = {"case": case, "card": self.card, **fields}
        self.found.append(record)
        emit(**record)
        return record

    def failures(self) -> list[str]:
        """Name the cases that raised an error, or whose numbers do not agree."""
        return [
            r["case"] for r in self.found if r.get("outcome") == "failed" or False in (r.get("agrees"), r.get("finite"))
        ]


def relative_error(found: Tensor, right: Tensor) -> float:
    """The norm of the difference over that of what is right; NaN where there is one."""
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    return float((found - right).norm() / right.norm())


# ---- what runs on the card -----------------------------------------------------------------------------------------


def matmul_rate(device: Device, size: int, repeats: int = 50) -> float:
    """FLOP per second of bf16 products of square random matrices (zeros would let the card clock higher)."""
    a, b = torch.randn(2, size, size, device=device.device, dtype=torch.bfloat16)
    out = torch.empty_like(a)

    def products() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    products()
    return 2 * size**3 * repeats / device.seconds(products)


def attend(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention ``[B, S, heads, D]`` by a backend of diffusers.

    Raises:
        RuntimeError, ValueError, ImportError: this backend does not run here.
    """
    with attention_backend(AttentionBackendName(name)):
        return dispatch_attention_fn(query, key, value)


def why_unavailable(name: str, device: torch.device) -> str | None:
    """Say why a backend of diffusers cannot run here, tried on a small tensor; None where it can."""
    q, k, v = torch.randn(3, 1, 64, 2, 128, device=device, dtype=torch.bfloat16)
    try:
        attend(name, q, k, v)
    except (RuntimeError, ValueError, ImportError) as error:
        if "CUDA error" in str(error):  # the card's state is lost, whatever caused it
            raise
        return one_line(error)
    return None


def build(config: dict[str, Any], device: torch.device) -> PusaWanTransformer3DModel:
    """Random weights made on the device, in the dtypes that loading with ``torch_dtype=bfloat16`` gives."""
    with torch.device("meta"):
        model = PusaWanTransformer3DModel(**config)
    state = {}
    for name, parameter in model.named_parameters():
        dtype = torch.float32 if is_kept_in_fp32(model, name) else torch.bfloat16
        tensor = torch.empty(parameter.shape, device=device, dtype=dtype)
        is_norm = "norm" in name and name.endswith("weight")
        state[name] = tensor.fill_(1) if is_norm else tensor.normal_(std=0.02)
    model.load_state_dict(state, assign=True)
    model.rope = WanRotaryPosEmbed(config["attention_head_dim"], config["patch_size"], 1024).to(device)
    return model.eval()


@contextlib.contextmanager
def only_blocks(model: PusaWanTransformer3DModel, count: int) -> Iterator[None]:
    """Leave the first blocks alone in the model: all are alike, so they warm up or stand for the whole."""
    blocks = model.blocks
    model.blocks = nn.ModuleList(list(blocks)[:count])
    try:
        yield
    finally:
        model.blocks = blocks


def make_pipeline(model: PusaWanTransformer3DModel, path: str) -> WanPipeline:
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    if path == "frame":
        pipe: WanPipeline = PusaPipeline(**parts, scheduler=PusaFlowMatchEulerScheduler(), transformer=model)
    else:
        pipe = WanPipeline(
            **parts,
            scheduler=SameSigmas(shift=5.0),
            transformer=stock_twin(model),
            expand_timesteps=path == "token",
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments_for(grid: Sequence[int], text_tokens: int, text_dim: int, device: torch.device) -> dict[str, Any]:
    frames, height, width = grid
    text = torch.randn(2, 1, text_tokens, text_dim, device=device, dtype=torch.bfloat16)
    return {
        "height": 8 * height,
        "width": 8 * width,
        "num_frames": 4 * frames - 3,
        "prompt_embeds": text[0],
        "negative_prompt_embeds": text[1],
        "latents": torch.randn(1, 16, *grid, device=device),
        "output_type": "latent",
    }
