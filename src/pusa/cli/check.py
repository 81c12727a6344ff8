"""Check a machine for `pusa check`: measure what it has, and try what the other commands need."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from pusa.cli.groups import Command, json_option
from pusa.errors import first_line

_COPY_BYTES = 256 * 2**20
_MATRIX = {"cpu": 384, "cuda": 8192}  # a CPU that emulates bf16 may reach 0.1 GFLOP/s
_LEAST_DISK_BYTES = 10**9
_RANKS_SECONDS = 300.0  # the longest wait for the other process, which loads all libraries
_ATTENTION = ("flash_attn", "flash_attn_interface", "sageattention", "xformers", "kernels")


@dataclass(frozen=True)
class Finding:
    """Hold one line of the check.

    Attributes:
        name: of what was looked at.
        value: what was found, for people.
        ok: False: a command of pusa will fail because of it.
        figures: the same for programs.
    """

    name: str
    value: str
    ok: bool = True
    figures: dict[str, Any] | None = None


@click.command(cls=Command)
@json_option
@click.option("--no-ranks", is_flag=True, help="Leave out the video that two processes make together (20 s).")
def check(as_json: bool, no_ranks: bool) -> int:
    """Test this machine in a minute: GPUs, links, memory, backends, speed, and two processes that share a video.

    The exit code is 1 if something that pusa needs does not work.
    """
    began, found = time.monotonic(), []
    for finding in findings(with_ranks=not no_ranks):
        found.append(finding)
        if not as_json:
            mark = "" if finding.ok else "FAILED: "
            click.echo(f"{finding.name:<18}{mark}{finding.value}")
    is_ok = all(finding.ok for finding in found)
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        click.echo(json.dumps({"ok": is_ok, "seconds": seconds, "findings": [asdict(one) for one in found]}))
    else:
        end = "everything works" if is_ok else "something does not work: see FAILED"
        click.echo(f"{end}{'' if _cards() else '; there is no GPU'} ({seconds:g} s)")
    return 0 if is_ok else 1


def findings(*, with_ranks: bool = True) -> Iterator[Finding]:
    """Look at one thing after another; what raises is a finding that is not ok."""
    looks: list[tuple[str, Callable[[], Finding]]] = [
        ("software", _software),
        ("GPUs", _gpus),
        ("links", _links),
        ("memory", _memory),
        ("disk", _disk),
        ("attention", _attention),
        ("quantisation", _quantisation),
        ("compile", _compile),
        ("speed", _speed),
    ]
    for name, look in looks + ([("ranks", _ranks)] if with_ranks else []):
        try:
            yield look()
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            yield Finding(name, f"{type(error).__name__}: {reason}", ok=False)


def _cards() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _software() -> Finding:
    import platform

    import diffusers
    import torch

    from pusa import __version__

    versions = {
        "pusa": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "cuda": torch.version.cuda,
    }
    return Finding(
        "software", ", ".join(f"{name} {version}" for name, version in versions.items() if version), True, versions
    )


def _gpus() -> Finding:
    import torch

    count = _cards()
    if not count:
        build = "" if torch.version.cuda else " (this build of PyTorch is for CPUs)"
        return Finding("GPUs", f"none{build}: everything runs on the CPU; leave --gpus out", True, {"count": 0})
    cards: list[dict[str, Any]] = []
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        torch.ones(8, device=f"cuda:{number}").sum().item()  # the driver works
        cards.append(
            {
                "name": properties.name,
                "memory_bytes": total,
                "free_bytes": free,
                "capability": [properties.major, properties.minor],
            }
        )
    lines = [
        f"{card['name']} ({card['free_bytes'] / 1e9:.0f} of {card['memory_bytes'] / 1e9:.0f} GB free, "
        f"{card['capability'][0]}.{card['capability'][1]})"
        for card in cards
    ]
    return Finding("GPUs", "; ".join(lines), True, {"count": count, "cards": cards})


def _links() -> Finding:
    import torch

    count = _cards()
    if not count:
        return Finding("links", "none: there is no GPU to copy to", True, {})
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    cards = [torch.empty(_COPY_BYTES, dtype=torch.uint8, device=f"cuda:{number}") for number in range(count)]
    from_ram = [_copy_rate(card, host) for card in cards]
    between = {
        f"{a} to {b}": {
            "peer_access": torch.cuda.can_device_access_peer(a, b),
            "gb_per_s": _copy_rate(cards[b], cards[a]),
        }
        for a in range(count)
        for b in range(count)
        if a != b
    }
    text = "from RAM " + ", ".join(f"{rate:.1f}" for rate in from_ram) + " GB/s"
    for pair, link in between.items():
        text += f"; {pair} {link['gb_per_s']:.1f} GB/s{'' if link['peer_access'] else ' (through RAM)'}"
    return Finding("links", text, True, {"from_ram_gb_per_s": from_ram, "between": between})


def _copy_rate(target: Any, source: Any) -> float:
    """Measure GB/s of the fastest of a few copies."""
    import torch

    best = float("inf")
    for _ in range(4):
        torch.cuda.synchronize(target.device)
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(target.device)
        best = min(best, time.perf_counter() - began)
    return round(source.numel() / best / 1e9, 2)


def _memory() -> Finding:
    import psutil

    from pusa.resources import free_memory_bytes, readable

    free, total = free_memory_bytes(), psutil.virtual_memory().total
    text = f"{readable(free)} of {readable(total)} free"
    return Finding("memory", text, True, {"free_bytes": free, "total_bytes": total})


def _disk() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    from pusa.resources import free_disk_bytes, readable

    free = free_disk_bytes(Path(HF_HUB_CACHE))
    text = f"{readable(free)} free for models in {HF_HUB_CACHE}"
    if free < _LEAST_DISK_BYTES:
        return Finding("disk", f"{text}: free some, or set HF_HOME to a larger disk", False, {"free_bytes": free})
    return Finding("disk", text, True, {"free_bytes": free})


def _attention() -> Finding:
    from diffusers.models.attention_dispatch import AttentionBackendName

    installed = [name for name in _ATTENTION if find_spec(name)]
    text = "PyTorch's own" + "".join(f", {name}" for name in installed)
    names = [backend.value for backend in AttentionBackendName]
    return Finding("attention", text, True, {"installed": installed, "known_to_diffusers": names})


def _quantisation() -> Finding:
    from importlib.metadata import version

    installed = {name: version(name) for name in ("torchao", "gguf") if find_spec(name)}
    missing = [name for name in ("torchao", "gguf") if name not in installed]
    text = ", ".join(f"{name} {number}" for name, number in installed.items()) or "none"
    return Finding("quantisation", text + (f"; without {', '.join(missing)}" if missing else ""), True, installed)


def _compile() -> Finding:
    import shutil

    import torch

    if not _cards():  # on a CPU, compiling one function takes up to a minute: look only for the compiler
        compiler = next((name for name in (os.environ.get("CXX", "g++"), "g++", "clang++") if shutil.which(name)), None)
        text = f"with {compiler}, not tried" if compiler else "not here: it needs g++ or clang++"
        return Finding("compile", text, True, {"compiler": compiler})
    began = time.perf_counter()
    try:
        x = torch.linspace(-1, 1, 64, device="cuda")
        compiled = torch.compile(lambda x: torch.nn.functional.gelu(x * 2 + 1))
        is_equal = torch.allclose(compiled(x), torch.nn.functional.gelu(x * 2 + 1), atol=1e-5)
    except Exception as error:  # everything else runs without it
        return Finding("compile", f"does not work here ({first_line(error)[:100]})", True, {"works": False})
    seconds = round(time.perf_counter() - began, 1)
    text = f"{'works' if is_equal else 'gives other numbers'} ({seconds:g} s for one function)"
    return Finding("compile", text, is_equal, {"works": is_equal, "seconds": seconds})


def _speed() -> Finding:
    import torch

    from pusa.resources import is_bf16_fast

    device = "cuda" if _cards() else "cpu"
    size = _MATRIX[device]
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(size, size, device=device, dtype=dtype)
        best = float("inf")
        for _ in range(4):
            began = time.perf_counter()
            y = x @ x
            float(y[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - began)
            if best > 1:
                break
        rates[str(dtype).removeprefix("torch.")] = float(f"{2 * size**3 / best / 1e12:.3g}")
    is_fast = is_bf16_fast(device)
    unit, factor = ("TFLOP/s", 1) if _cards() else ("GFLOP/s", 1000)
    text = (
        f"{rates['bfloat16'] * factor:.3g} {unit} in bf16, {rates['float32'] * factor:.3g} in fp32, "
        f"on the {'GPU' if _cards() else 'CPU'}"
    )
    return Finding(
        "speed",
        text + ("" if is_fast else ": bf16 is emulated"),
        True,
        {**{f"{name}_tflop_per_s": rate for name, rate in rates.items()}, "bf16_is_native": is_fast},
    )


def _ranks() -> Finding:
    from tempfile import TemporaryDirectory

    from pusa.acceleration.launch import launch
    from pusa.generate import generate
    from pusa.request import GenerationRequest

    request = GenerationRequest(model="tiny", prompt="a balloon", seed=0, steps=2, frames=5)
    device_type = "cuda" if _cards() > 1 else "cpu"
    began = time.perf_counter()
    with TemporaryDirectory() as folder, launch(2, device_type=device_type, timeout_seconds=_RANKS_SECONDS) as ranks:
        videos = []
        for name, together in (("two", ranks), ("one", None)):
            list(generate(request, Path(folder) / f"{name}.mp4", ranks=together, device=device_type))
            videos.append((Path(folder) / f"{name}.mp4").read_bytes())
    seconds, is_equal = round(time.perf_counter() - began, 1), videos[0] == videos[1]
    where = "GPUs" if device_type == "cuda" else "CPU processes"
    text = f"two {where} make {'the same video as' if is_equal else 'another video than'} one ({seconds:g} s)"
    return Finding("ranks", text, is_equal, {"device_type": device_type, "equal": is_equal, "seconds": seconds})
