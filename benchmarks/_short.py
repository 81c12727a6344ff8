"""The short run of `gpu.py`: every question about 14B on one card, once, the most important ones first.

Weights are random and made on the card. Each case is one JSON line with the card's name; a table of all lines comes
last. A case begins only if it will end in time by what was measured before, an alarm stops one that does not, and what
was not run says why. The plan for 170 s on an H100 (calculated, 4.6 s for a forward at 480p; nothing of it is
measured), in the order in which the cases come:

| case | forwards | beside them, s | ends at, s |
|---|---|---|---|
| Python, imports, CUDA | | 15 | 15 |
| matmul, model: 28.6 GB of weights | | 4 | 19 |
| 480p per frame, then per token | 1 + 1, warmed up with one block | 2 | 31 |
| attention at 480p, one call of each backend | | 3 | 34 |
| 480p step, without and with guidance: native | 1 + 2 | | 48 |
| the same: the fastest other backend | 1 + 2 of about 3.6 s | | 60 |
| rank-512 adapter on 4 of the 40 blocks, beside its weights merged | 8 of 1/10 | 8 | 72 |
| 720p step without guidance, fastest backend | 1 of about 12 s | | 84 |
| VAE decode at 480p, at most 8 s in bf16 and 5 s in fp32 of the 81 frames | | 14 | 98 |
| 480p compiled: compiling, then a step without guidance | 1 of about 3.3 s | 20 to 30 | 122 to 132 |
| with guidance, if 12 s remain after it | 2 | | 129 to 139 |
| other attention backends, if 30 s remain after them | 1 + 2 | | |
| 24 GB: blocks from pinned memory; as many of the 40 as can be pinned in the time left | 1 | 10 to 25 | 168 |

Compiling comes late because it takes longest and its time is the least certain; only the stream of blocks is behind
it, which ends by giving the model away. In 145 s everything but the last lines' options still fits.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _card import (
    GRIDS,
    TOY,
    TOY_GRIDS,
    Device,
    Records,
    arguments_for,
    at_most,
    attempt,
    attend,
    build,
    make_pipeline,
    matmul_rate,
    only_blocks,
    relative_error,
    why_unavailable,
)
from _common import WAN_14B, forward_flops, stock_twin, timesteps_for
from _short_parts import adapter_beside_merged, decode, streamed
from _short_table import markdown
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor

from pusa.conditions import PusaCondition

BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "sage", "xformers")
"""Backends of diffusers whose memory does not grow with the square of 32,760 tokens and that need no download."""
QUANTISED = ("sage",)
PATHS = ("480p, per frame", "480p, per token")
COMPILED = ("compile", "480p, compiled", "480p, compiled, guidance")
CASES = (
    "card",
    "matmul",
    "model",
    *PATHS,
    *(f"attention, {name}" for name in BACKENDS),
    *(f"480p, {name}{guided}" for name in BACKENDS for guided in ("", ", guidance")),
    "adapter, rank 512",
    "720p",
    "VAE decode, bf16",
    "VAE decode, fp32",
    *COMPILED,
    "480p, 24 GB",
)
"""Every case, whatever the card and the time: each is reported once."""

TABLE_SECONDS = 2.0  # kept for printing
OTHER = {"compile": 30.0, "adapter": 8.0, "stream": 9.0}  # seconds beside forwards, as planned
DECODE_SECONDS = {"bf16": 8.0, "fp32": 5.0}  # after which the next latent frame is left out
PATHS_TOLERANCE = 0.02  # of the velocity's range, bf16: embedding 32,760 times may choose another kernel than 21
STEP_TOLERANCE = 0.05  # of the velocity's norm, bf16, 40 blocks: another order of sums in each of them
QUANTISED_TOLERANCE = 0.2


def graphs_so_far() -> int:
    """Count what this process has compiled."""
    from torch._dynamo.utils import counters  # takes seconds to import, which only this case is to pay

    return counters["stats"]["unique_graphs"]


class Short:
    """The cases in the order of their worth, on one model, within a time budget."""

    def __init__(self, options: argparse.Namespace, spent_seconds: float = 0.0) -> None:
        self.deadline = time.perf_counter() + options.budget_seconds - spent_seconds - TABLE_SECONDS
        self.options, self.spent_seconds = options, spent_seconds
        self.device = Device(options.device)
        self.records = Records(self.device.name)
        self.config, self.grids = (TOY, TOY_GRIDS) if options.tiny else (WAN_14B, GRIDS)
        self.text_tokens = 16 if options.tiny else 512
        self.model: Any = None
        self.rate = 0.0  # of matrix products; 0 until it is known
        self.forward_seconds = 0.0  # at 480p; 0 until it is known
        self.velocities: dict[str, Tensor] = {}
        self.kernels: dict[str, float] = {}  # seconds of a call of each attention backend that works
        self.errors: dict[str, str] = {}  # why each of the others does not
        self.graphs = 0  # compiled before this run
        self.step_seconds: dict[str, float] = {}  # of an eager step at 480p with each backend that may serve the rest

    # ---- one case ----

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def flops(self, size: str, timesteps: int | None = None) -> int:
        grid = self.grids[size]
        return forward_flops(self.config, grid, self.text_tokens, timesteps or grid[0])

    def expected(self, forwards: float, wide: float, other: float) -> float:
        """Guess the seconds of a case: `forwards` at 480p, `wide` ones at 720p, and what is beside them."""
        if not self.device.is_cuda:
            return 0.0  # a toy on a CPU has no plan
        one = self.forward_seconds or (self.flops("480p") / (0.45 * self.rate) if self.rate else 5.0)
        return one * (forwards + wide * self.flops("720p") / self.flops("480p")) + other

    def do(
        self,
        case: str,
        run: Callable[[], dict[str, Any]],
        *,
        forwards: float = 0.0,
        wide: float = 0.0,
        other: float = 1.0,
        keep: float = 0.0,
        unless: str | None = None,
        **described: Any,
    ) -> dict[str, Any]:
        """Run a case and report it; or say why not: `unless`, or the time it needs and the time to `keep` after it."""
        left, needed = self.left(), self.expected(forwards, wide, other)
        if unless is None and needed + (keep if self.device.is_cuda else 0.0) >= left:
            unless = f"{max(left, 0):.0f} s left, it needs about {needed:.0f} s"
            unless += f" and {keep:.0f} s are kept for what follows" if keep else ""
        if unless is not None:
            return self.records.add(case, **described, outcome="skipped", why=unless)

        def limited() -> dict[str, Any]:
            with at_most(left), torch.no_grad():
                return run()

        self.device.forget_peak()
        began = time.perf_counter()
        found = attempt(limited)
        return self.records.add(case, **described, **found, seconds_in_all=time.perf_counter() - began)

    def without_model(self) -> str | None:
        return "the model was not built" if self.model is None else None

    def memory(self, held: int | None) -> dict[str, Any]:
        peak = self.device.peak_bytes()
        return {
            "peak_bytes": peak,
            "peak_beyond_weights_bytes": None if peak is None or held is None else peak - held,
            "reserved_bytes": self.device.reserved_bytes(),
        }

    def speed(self, flops: int, seconds: float) -> dict[str, Any]:
        rate = flops / seconds
        return {
            "flops": flops,
            "flops_per_second": rate,
            "share_of_matmul_rate": rate / self.rate if self.rate else None,
        }

    # ---- the model, and its two ways to take times ----

    def begin(self) -> None:
        self.records.add(
            "card",
            **self.device.description(),
            tiny=self.options.tiny,
            budget_seconds=self.options.budget_seconds,
            spent_seconds=self.spent_seconds,
        )
        self.do("matmul", self.measure_rate)
        self.do("model", self.build_model, other=4.0, layers=self.config["num_layers"])

    def measure_rate(self) -> dict[str, Any]:
        self.rate = matmul_rate(self.device, 64 if self.options.tiny else 8192)
        return {"dtype": "bf16", "flops_per_second": self.rate}

    def build_model(self) -> dict[str, Any]:
        self.model = build(self.config, self.device.device)
        self.device.synchronize()
        parameters = list(self.model.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
            **self.memory(0),
        }

    def inputs(self, size: str, path: str) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, times and text, the same at every call; the first frame is clean, the others are noisier in turn."""
        grid, device = self.grids[size], self.device.device
        torch.manual_seed(1)
        latents = torch.randn(1, 16, *grid, device=device, dtype=torch.bfloat16)
        text = torch.randn(1, self.text_tokens, self.config["text_dim"], device=device, dtype=torch.bfloat16)
        times = torch.linspace(0, 1000, grid[0], device=device).unsqueeze(0)
        return latents, timesteps_for(path, times, grid[0] * grid[1] * grid[2] // 4), text

    def path(self, path: str) -> dict[str, Any]:
        """One forward, after one of a single block that loads and chooses the kernels."""
        self.model.set_attention_backend("native")
        model = self.model if path == "frame" else stock_twin(self.model)
        inputs, held = self.inputs("480p", path), self.device.held_bytes()
        with only_blocks(model, 1):
            model(*inputs, return_dict=False)
        self.device.forget_peak()

        def forward() -> None:
            self.velocities[path] = model(*inputs, return_dict=False)[0]

        seconds = self.device.seconds(forward)
        found = {"seconds": seconds, **self.speed(self.flops("480p", inputs[1].numel()), seconds), **self.memory(held)}
        if path == "frame":
            self.forward_seconds = seconds
        elif "frame" in self.velocities:
            found |= self.comparison()
        return found

    def comparison(self) -> dict[str, Any]:
        frame, token = (self.velocities.pop(path).float() for path in ("frame", "token"))
        difference = float((frame - token).abs().max() / (frame.max() - frame.min()))
        return {
            "equals_per_frame": torch.equal(frame, token),
            "difference_of_range": difference,
            "agrees": difference <= PATHS_TOLERANCE,
        }

    # ---- attention ----

    def attention(self, name: str) -> dict[str, Any]:
        """One call at 480p, against fp32 for 64 of its queries; a backend that cannot run here is not at fault."""
        reason = why_unavailable(name, self.device.device)
        if reason is not None:
            self.errors[name] = reason
            return {"outcome": "unavailable", "why": reason}
        grid, heads = self.grids["480p"], self.config["num_attention_heads"]
        tokens, depth = grid[0] * grid[1] * grid[2] // 4, self.config["attention_head_dim"]
        torch.manual_seed(2)
        q, k, v = torch.randn(3, 1, tokens, heads, depth, device=self.device.device, dtype=torch.bfloat16)
        found = attend(name, q, k, v)[:, :64]
        seconds = self.device.median_seconds(lambda: attend(name, q, k, v), 3)
        few, keys, values = (x.float().transpose(1, 2) for x in (q[:, :64], k, v))
        right = ((few @ keys.transpose(2, 3) / depth**0.5).softmax(-1) @ values).transpose(1, 2)
        error = relative_error(found, right)
        self.kernels[name] = seconds
        return {
            "seconds": seconds,
            **self.speed(4 * tokens**2 * heads * depth, seconds),
            "relative_error": error,
            "agrees": error <= (0.1 if name in QUANTISED else 0.02),
        }

    @property
    def best(self) -> str:
        """The backend of the fastest step so far that computes in bf16 and gives the right numbers."""
        return min(self.step_seconds, key=self.step_seconds.__getitem__, default="native")

    # ---- steps ----

    def steps(
        self, size: str, backend: str, guidance: float, *, warm_up: bool = True, compare: bool = True
    ) -> dict[str, Any]:
        """One step of `PusaPipeline` with a clean first frame, as in image-to-video."""
        self.model.set_attention_backend(backend)
        pipe = make_pipeline(self.model, "frame")
        torch.manual_seed(3)
        arguments = arguments_for(self.grids[size], self.text_tokens, self.config["text_dim"], self.device.device)
        known = torch.randn(16, 1, *self.grids[size][1:], device=self.device.device)
        arguments["conditions"] = [PusaCondition(latents=known, latent_index=0)]
        if warm_up:
            with only_blocks(self.model, 1):
                pipe(num_inference_steps=1, guidance_scale=1.0, **arguments)
        held, noise = self.device.held_bytes(), arguments["latents"].clone()
        self.device.forget_peak()
        results = []

        def step() -> None:
            results.append(pipe(num_inference_steps=1, guidance_scale=guidance, **arguments).frames)

        seconds = self.device.seconds(step)
        flops = self.flops(size) * (2 if guidance > 1 else 1)
        found = {"attention": backend, "seconds_per_step": seconds, "guidance": guidance}
        found |= self.speed(flops, seconds) | self.memory(held)
        velocity = (noise - results[0])[:, :, 1:].cpu()  # of the free frames: the known one does not move
        found["finite"] = bool(velocity.isfinite().all())
        if compare and size == "480p" and guidance == 1:
            found |= self.beside_native(velocity, backend)
        return found

    def beside_native(self, velocity: Tensor, backend: str) -> dict[str, Any]:
        """Compare a velocity with the one of plain attention, eager, in memory: the first that comes here."""
        native = self.velocities.setdefault("native", velocity)
        if native is velocity:
            return {}
        difference = relative_error(velocity, native)
        tolerance = QUANTISED_TOLERANCE if backend in QUANTISED else STEP_TOLERANCE
        return {"difference_from_native": difference, "agrees": difference <= tolerance}

    def backend(self, name: str, keep: float = 0.0) -> None:
        unless = self.without_model()
        if unless is None and name not in self.kernels:
            unless = self.errors.get(name, "its attention was not measured")
        for guided, guidance, forwards in (("", 1.0, 1.1), (", guidance", 3.0, 2.1)):
            found = self.do(
                f"480p, {name}{guided}",
                lambda guidance=guidance: self.steps("480p", name, guidance),
                forwards=forwards,
                keep=keep,
                unless=unless,
            )
            if guidance == 1 and found["outcome"] == "done" and found.get("agrees", True) and name not in QUANTISED:
                self.step_seconds[name] = found["seconds_per_step"]

    # ---- compiled ----

    def compile(self) -> dict[str, Any]:
        """Compile the block: in the first forward of one."""
        self.graphs = graphs_so_far()
        self.model.set_attention_backend(self.best)
        self.model.compile_repeated_blocks(fullgraph=True, backend=self.options.compiler)
        inputs = self.inputs("480p", "frame")
        with only_blocks(self.model, 1):
            seconds = self.device.seconds(lambda: self.model(*inputs, return_dict=False))
        return {"attention": self.best, "compiler": self.options.compiler, "seconds": seconds}

    def compiled(self) -> dict[str, Any]:
        found = self.steps("480p", self.best, 1.0)
        eager = self.step_seconds.get(self.best)
        speed = eager / found["seconds_per_step"] if eager else None
        return {**found, "times_as_fast_as_eager": speed, "graphs": graphs_so_far() - self.graphs}

    def try_compiled(self) -> None:
        compiling, without, guided = COMPILED
        first = self.do(compiling, self.compile, other=OTHER["compile"], keep=5.0, unless=self.without_model())
        unless = None if first["outcome"] == "done" else f"compiling: {first['outcome']}"
        self.do(without, self.compiled, forwards=1.0, unless=unless)
        keep = OTHER["stream"] + 3.0
        self.do(guided, lambda: self.steps("480p", self.best, 3.0), forwards=2.0, keep=keep, unless=unless)
        if self.model is not None:
            for block in self.model.blocks:
                block._compiled_call_impl = None
            torch._dynamo.reset()

    # ---- all of it ----

    def run(self) -> int:
        """Report every case and print the table; 1 if one failed or its numbers do not agree, else 0."""
        with attention_backend(AttentionBackendName.NATIVE):  # and back to what it was before
            self.run_cases()
        print("\n" + markdown(self.records.found), flush=True)
        return 1 if self.records.failures() else 0

    def run_cases(self) -> None:
        self.begin()
        for case, path in zip(PATHS, ("frame", "token"), strict=True):
            self.do(case, lambda path=path: self.path(path), forwards=1.3, other=1.0, unless=self.without_model())
        for name in BACKENDS:
            self.do(f"attention, {name}", lambda name=name: self.attention(name))
        others = sorted((n for n in BACKENDS if n != "native"), key=lambda n: self.kernels.get(n, float("inf")))
        self.backend("native")
        self.backend(others[0])
        self.do(
            "adapter, rank 512",
            lambda: adapter_beside_merged(self),
            forwards=1.0,
            other=OTHER["adapter"],
            unless=self.without_model(),
        )
        self.do("720p", lambda: self.steps("720p", self.best, 1.0), wide=1.1, unless=self.without_model())
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            most = DECODE_SECONDS[name] if self.device.is_cuda else 60.0
            self.do(f"VAE decode, {name}", lambda dtype=dtype, most=most: decode(self, dtype, most), other=most)
        self.try_compiled()
        for name in others[1:]:
            self.backend(name, keep=30.0)
        self.do("480p, 24 GB", lambda: streamed(self), forwards=0.5, other=OTHER["stream"], unless=self.without_model())
