"""Check a card and its software: attention kernels, rates, and that a small model is right on it.

    python benchmarks/card_machine.py                        # meant for 10 s on a card, and two compilations
    python benchmarks/card_machine.py --tiny --device cpu    # the same code, to rehearse

One line of JSON per check, each with the card's name, in this order: `machine`; `sdpa` (each of PyTorch's four
attention kernels, forward and backward); `attention` (each backend of diffusers); `bf16` and `fp8` products; `copy` and
`host to card`; `model` in fp32 and in bf16 against the CPU; `compiled model` against the CPU. A check that raises an
error says so on its line and the next one runs. What a machine lacks is `unavailable` or `skipped`. What would end
after `--budget-seconds` (35, counted from Python's start) is stopped, and the compilations come last. The exit code is
1 if a number is wrong or a check failed, else 0.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # kernels of the Hub are what is here already, or unavailable at once

import diffusers
import peft
import psutil
import torch
import transformers
from _card import (
    TOY,
    Device,
    Records,
    add_device_options,
    at_most,
    attempt,
    attend,
    check_device,
    matmul_rate,
    one_line,
    relative_error,
    seconds_of_process,
)
from _common import in_dtype
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pusa.models.wan import PusaWanTransformer3DModel

KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
ELSEWHERE = ("_native_npu", "_native_xla", "aiter_fa2_hub")  # for other makers' cards
TOLERANCE = {"attention": 0.02, "8-bit attention": 0.1, "fp8": 0.05, "fp32": 1e-4, "bf16": 0.03}  # of the norm


# ---- attention -----------------------------------------------------------------------------------------------------


def by_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention ``[B, S, heads, D]`` as it is written down."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


def by_kernel(kernel: str, *parts: Tensor) -> Tensor:
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in parts)).transpose(1, 2)


def is_lost(error: Exception) -> bool:
    """Tell whether the card itself failed: then nothing after it is to be believed."""
    return "CUDA error" in str(error)


def check_attention(device: Device, run: Callable[..., Tensor], tolerance: float) -> dict[str, Any]:
    """Forward, then backward, each against the formula in fp64; a kernel that is not here says why."""
    torch.manual_seed(0)
    drawn = torch.randn(3, 1, 256, 2, 128, device=device.device, dtype=torch.bfloat16)
    parts = [part.clone().requires_grad_() for part in drawn]
    exact = [part.double().cpu().requires_grad_() for part in drawn]
    right = by_formula(*exact)
    try:
        out = run(*parts)
    except (RuntimeError, ValueError, ImportError) as error:
        if is_lost(error):
            raise
        return {"outcome": "unavailable", "why": one_line(error)}
    found: dict[str, Any] = {"forward_error": relative_error(out, right), "backward": False}
    found["agrees"] = found["forward_error"] <= tolerance
    direction = torch.randn_like(out)
    right.backward(direction.double().cpu())
    try:
        out.backward(direction)
    except (RuntimeError, NotImplementedError) as error:
        if is_lost(error):
            raise
        return {**found, "why": one_line(error)}
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in parts]
    worst = max(relative_error(x, y.grad) for x, y in zip(gradients, exact, strict=True))
    return {**found, "backward": True, "backward_error": worst, "agrees": found["agrees"] and worst <= tolerance}


def attention_checks(device: Device) -> dict[str, Callable[[], dict[str, Any]]]:
    checks: dict[str, Callable[[], dict[str, Any]]] = {}
    for kernel in KERNELS:
        run = functools.partial(by_kernel, kernel)
        checks[f"sdpa, {kernel}"] = functools.partial(check_attention, device, run, TOLERANCE["attention"])
    for backend in AttentionBackendName:
        tolerance = TOLERANCE["8-bit attention" if "sage" in backend.value else "attention"]
        run = functools.partial(attend, backend.value)
        if backend.value not in ELSEWHERE:
            checks[f"attention, {backend.value}"] = functools.partial(check_attention, device, run, tolerance)
    return checks


# ---- rates ---------------------------------------------------------------------------------------------------------


def bf16_rate(device: Device, size: int) -> dict[str, Any]:
    return {"size": size, "flops_per_second": matmul_rate(device, size)}


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in fp8, and what each of them is to be multiplied with ``[rows, 1]``."""
    scale = x.float().abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def fp8_rate(device: Device, size: int, repeats: int = 50) -> dict[str, Any]:
    """Products of fp8 matrices with a scale for each row and column."""
    if not device.is_cuda or torch.cuda.get_device_capability(device.device) < (8, 9):
        return {"outcome": "skipped", "why": "fp8 products need a card of compute capability 8.9 or more"}
    a, b = torch.randn(2, size, size, device=device.device, dtype=torch.bfloat16)
    (a8, a_scale), (b8, b_scale) = to_fp8(a), to_fp8(b)  # b holds columns as rows

    def product() -> Tensor:
        return torch._scaled_mm(
            a8, b8.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )

    right = (a8[:64].float() * a_scale[:64]) @ (b8.float() * b_scale).t()
    error = relative_error(product()[:64], right)
    seconds = device.median_seconds(lambda: [product() for _ in range(repeats)], 3)
    rate = 2 * size**3 * repeats / seconds
    return {"size": size, "flops_per_second": rate, "relative_error": error, "agrees": error <= TOLERANCE["fp8"]}


def copy_rate(device: Device, size: int) -> dict[str, Any]:
    """Bytes read and written per second when the card's memory is copied to another place of it."""
    source = torch.randint(256, (size,), device=device.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = device.median_seconds(lambda: target.copy_(source), 10)
    return {"size_bytes": size, "bytes_per_second": 2 * size / seconds, "agrees": torch.equal(source, target)}


def host_rate(device: Device, size: int) -> dict[str, Any]:
    """Bytes per second from pinned memory, and how long it takes to get such memory: what streaming blocks lives on."""
    if not device.is_cuda:
        return {"outcome": "skipped", "why": "a CPU has no memory of its own beside the machine's"}
    began = time.perf_counter()
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    pinning = time.perf_counter() - began
    target = torch.empty(size, device=device.device, dtype=torch.uint8)
    there = device.median_seconds(lambda: target.copy_(source, non_blocking=True), 3)
    back = device.median_seconds(lambda: source.copy_(target, non_blocking=True), 3)
    return {
        "size_bytes": size,
        "bytes_per_second": size / there,
        "back_bytes_per_second": size / back,
        "pin_seconds": pinning,
    }


# ---- a small model -------------------------------------------------------------------------------------------------


class Small:
    """A model of two blocks with one clean frame and four at other times; the CPU's fp32 output is what is right."""

    def __init__(self, device: Device, compiler: str) -> None:
        self.device, self.compiler, self.compile_seconds = device, compiler, 0.0
        torch.manual_seed(0)
        self.model = PusaWanTransformer3DModel(**TOY).eval()
        self.latents, self.text = torch.randn(1, 16, 5, 16, 16), torch.randn(1, 16, TOY["text_dim"])
        self.times = torch.tensor([[0.0, 1000.0, 937.5, 333.25, 12.0]])
        self.right = self.velocity(self.model)

    def velocity(self, model: PusaWanTransformer3DModel) -> Tensor:
        device, dtype = model.device, model.dtype
        inputs = self.latents.to(device, dtype), self.times.to(device), self.text.to(device, dtype)
        return model(*inputs, return_dict=False)[0]

    def copy(self, name: str) -> PusaWanTransformer3DModel:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        return in_dtype(self.model, dtype).to(self.device.device)

    def compare(self, name: str, velocity: Tensor) -> dict[str, Any]:
        error = relative_error(velocity, self.right)
        return {"dtype": name, "difference_from_cpu_fp32": error, "agrees": error <= TOLERANCE[name]}

    @torch.no_grad()
    def eager(self, name: str) -> dict[str, Any]:
        return self.compare(name, self.velocity(self.copy(name)))

    @torch.no_grad()
    def compiled(self, name: str, left: float) -> dict[str, Any]:
        if left < self.compile_seconds:
            why = f"{left:.0f} s left, the compilation before took {self.compile_seconds:.0f} s"
            return {"outcome": "skipped", "dtype": name, "why": why}
        model = self.copy(name)
        eager = self.velocity(model)
        model.compile_repeated_blocks(fullgraph=True, backend=self.compiler)
        began = time.perf_counter()
        velocity = self.velocity(model)
        self.device.synchronize()
        self.compile_seconds = time.perf_counter() - began
        difference = relative_error(velocity, eager)
        return {
            "compiler": self.compiler,
            "compile_seconds": self.compile_seconds,
            "difference_from_eager": difference,
            **self.compare(name, velocity),
        }


# ---- the machine ---------------------------------------------------------------------------------------------------


def machine(device: Device) -> dict[str, Any]:
    """Describe what the figures of all scripts belong to."""
    found: dict[str, Any] = {
        **device.description(),
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
        "memory_of_machine_bytes": psutil.virtual_memory().total,
        "versions": {module.__name__: module.__version__ for module in (diffusers, transformers, peft)},
    }
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(device.device)
        driver = Path("/proc/driver/nvidia/version")
        found |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
            "driver_cuda": torch._C._cuda_getDriverVersion(),
            "driver": driver.read_text().splitlines()[0] if driver.is_file() else None,
            "sdpa_order": torch._C._get_sdp_priority_order(),
        }
    return found


def checks_of(device: Device, tiny: bool, compiler: str, deadline: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """List the checks in their order; those that take longest come last."""
    small = Small(device, compiler)
    size, memory = (64, 2**20) if tiny else (8192, 2**32)
    return {
        "machine": lambda: machine(device),
        **attention_checks(device),
        "bf16": lambda: bf16_rate(device, size),
        "fp8": lambda: fp8_rate(device, size),
        "copy": lambda: copy_rate(device, memory),
        "host to card": lambda: host_rate(device, memory // 4),
        "model, fp32": lambda: small.eager("fp32"),
        "model, bf16": lambda: small.eager("bf16"),
        "compiled model, bf16": lambda: small.compiled("bf16", deadline - time.perf_counter()),
        "compiled model, fp32": lambda: small.compiled("fp32", deadline - time.perf_counter()),
    }


def in_time(check: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    left = deadline - time.perf_counter()
    if left <= 0:
        return {"outcome": "skipped", "why": "the time is over"}
    with at_most(left):
        return check()


def main(arguments: list[str] | None = None, spent_seconds: float = 0.0) -> int:
    """Check everything, and return what the process exits with."""
    parser = argparse.ArgumentParser(description="What a card and its software can do, and whether it is right.")
    add_device_options(parser, budget=35.0)
    parser.add_argument("--compiler", default="inductor", help="of the compiled model, as torch.compile has it")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    deadline = time.perf_counter() + options.budget_seconds - spent_seconds
    device = Device(options.device)
    records = Records(device.name)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        for case, check in checks_of(device, options.tiny, options.compiler, deadline).items():
            began = time.perf_counter()
            found = attempt(functools.partial(in_time, check, deadline))
            records.add(case, **found, seconds_in_all=time.perf_counter() - began)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    failures = records.failures()
    records.add("end", outcome="failed" if failures else "done", wrong=failures)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(spent_seconds=seconds_of_process()))
