"""Compare `pusa train estimate` with what PyTorch counts in a real step and what the paper's authors paid."""

import argparse
import importlib
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pusa import zoo
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.training.config import TrainConfig, config_from, load_config
from pusa.training.distributed import Processes
from pusa.training.estimate import GPUS, BaseModel, estimate, load_base, memory_of, paper_run, remedies, workloads
from pusa.training.flops import Workload, flops, kept_for_backward, memory
from pusa.training.model import kernels, make_optimizers, precision, prepare
from pusa.training.objective import add_noise, frame_errors, velocity_target, weighted_loss

MODEL = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 352,
    "num_layers": 3,
}
GRID, TEXT, CLIPS = (5, 16, 24), 16, 2
BASE = BaseModel(MODEL, text_tokens=TEXT)
WITHIN = 0.1


def config_of(kind: str, *, checkpointing: bool, dtype: str = "fp32", attention: str = "auto") -> TrainConfig:
    return config_from(
        {
            "model": {"dtype": dtype, "gradient_checkpointing": checkpointing, "attention": attention},
            "method": {"kind": kind, "rank": 8, "alpha": 8.0},
            "data": {"width": 8 * GRID[2], "height": 8 * GRID[1], "num_frames": 4 * GRID[0] - 3},
            "batch_size": CLIPS,
            "steps": 10,
        }
    )


def work_of(config: TrainConfig) -> Workload:
    """Build the model as the estimate does, for a CPU, whose RMS norm is the plain formula."""
    (work,) = workloads(config, BASE, 1)
    return replace(work, fused_norms=False)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive: now, and at most."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[storage] = None
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out


@dataclass
class Step:
    """One step of the trainer's parts on a small model."""

    config: TrainConfig

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        processes = Processes(0, 1, torch.device("cpu"))
        dtype = torch.bfloat16 if self.config.model.dtype == "bf16" else torch.float32
        model = PusaWanTransformer3DModel(**MODEL)
        if self.config.method.kind == "lora":
            for name, parameter in model.named_parameters():
                if set(model._keep_in_fp32_modules).isdisjoint(name.split(".")):
                    parameter.data = parameter.data.to(dtype)
        self.model, self.parameters = prepare(model, self.config, processes, [(16, *GRID)])

    def loss(self) -> Tensor:
        torch.manual_seed(1)
        clean, noise = (torch.randn(CLIPS, 16, *GRID) for _ in range(2))
        sigmas, text = torch.rand(CLIPS, GRID[0]), torch.randn(CLIPS, TEXT, MODEL["text_dim"])
        self.batch = clean, noise, sigmas, text  # is held by the trainer, too
        with precision(self.config, torch.device("cpu")):
            velocity = self.model(add_noise(clean, noise, sigmas), 1000 * sigmas, text, return_dict=False)[0]
        return weighted_loss(frame_errors(velocity, velocity_target(clean, noise)), sigmas, self.config.objective)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_has_the_operations_that_pytorch_counts(kind: str, checkpointing: bool) -> None:
    config = config_of(kind, checkpointing=checkpointing, attention="math")
    step = Step(config)
    with kernels(config, step.model), FlopCounterMode(display=False) as counter:
        loss = step.loss()
        forward = counter.get_total_flops()
        loss.backward()
    counted = flops(work_of(config))
    assert counted.forward == pytest.approx(forward, rel=0.01)
    assert counted.total == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert (counted.recompute > 0) == checkpointing


@pytest.mark.parametrize("rank", [512, None])
def test_the_14b_model_has_the_operations_and_parameters_that_pytorch_counts(rank: int | None) -> None:
    model, grid = {**zoo.ZOO["wan2.1-14b"].transformer, "num_layers": 2}, (21, 60, 104)
    config = config_from({"method": {"kind": "full" if rank is None else "lora"}})
    with torch.device("meta"):
        transformer = PusaWanTransformer3DModel(**model)
        if rank is not None:
            transformer.requires_grad_(False)
            transformer.add_adapter(LoraConfig(r=rank, target_modules=list(config.method.targets)))
        transformer.enable_gradient_checkpointing()
        transformer.train()
        x, times, text = torch.empty(1, 16, *grid), torch.empty(1, grid[0]), torch.empty(1, 512, 4096)
    work = Workload(model=model, grid=grid, rank=rank, math_attention=True)
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    assert work.trained_parameters == trained
    assert work.parameters == sum(p.numel() for name, p in transformer.named_parameters() if "lora_" not in name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(x, times, text, return_dict=False)[0].sum().backward()
    assert flops(work).total == pytest.approx(counter.get_total_flops(), rel=0.001)


@pytest.mark.parametrize("name", ["wan2.1-14b", "wan2.1-1.3b"])
def test_the_parameters_are_those_of_the_zoo(name: str) -> None:
    known = zoo.ZOO[name]
    assert Workload(model=known.transformer, grid=(1, 2, 2)).parameters == known.parameters["transformer"]


def test_fused_attention_computes_the_scores_again_in_its_backward() -> None:
    shape = (1, MODEL["num_attention_heads"], 480, MODEL["attention_head_dim"])
    work = Workload(model=MODEL, grid=GRID, text_tokens=0, rank=8)
    plain = Workload(model=MODEL, grid=GRID, text_tokens=0, rank=8, math_attention=True)
    extra = flops(work).backward - flops(plain).backward
    forward, backward = sdpa_flop_count(shape, shape, shape), sdpa_backward_flop_count(shape, shape, shape, shape)
    assert extra == MODEL["num_layers"] * (backward - 2 * forward)


def storages(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_memory_is_what_is_alive_in_a_real_step(kind: str, checkpointing: bool, dtype: str) -> None:
    config = config_of(kind, checkpointing=checkpointing, dtype=dtype)
    step, work = Step(config), work_of(config)
    live = LiveBytes([*step.model.parameters(), *step.model.buffers()])
    with kernels(config, step.model), live:
        loss = step.loss()
        kept = live.now
        live.peak = 0
        loss.backward()
        del loss
    expected = memory(work)
    assert kept_for_backward(work) == pytest.approx(kept, rel=WITHIN)
    assert expected.peak - expected.resident == pytest.approx(live.peak, rel=0.15)  # a moment, not a sum of parts

    trained = list(step.parameters.values())
    assert expected.gradients == pytest.approx(storages(p.grad for p in trained if p.grad is not None), rel=WITHIN)
    frozen = [p for p in step.model.parameters() if not p.requires_grad]
    assert expected.weights == pytest.approx(storages(iter(frozen or trained)), rel=WITHIN)
    assert expected.adapter == (pytest.approx(storages(iter(trained)), rel=WITHIN) if frozen else 0)
    (optimizer,) = make_optimizers(step.parameters, config.optimizer)
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert expected.optimizer == pytest.approx(storages(iter(states)), rel=WITHIN)


def test_the_memory_of_plain_attention_grows_with_the_square_of_the_tokens() -> None:
    config = config_of("lora", checkpointing=False, attention="math")
    step, work = Step(config), work_of(config)
    with kernels(config, step.model), LiveBytes([*step.model.parameters(), *step.model.buffers()]) as live:
        loss = step.loss()
    assert kept_for_backward(work) == pytest.approx(live.now, rel=WITHIN)
    assert kept_for_backward(work) > 1.5 * kept_for_backward(work_of(config_of("lora", checkpointing=False)))
    assert math.isfinite(float(loss.detach()))


def test_cards_that_share_everything_hold_a_share_each() -> None:
    config = load_config("wan2.1-14b-vta")
    base = load_base(config.model.source)
    one, eight = (memory_of(config, base, cards) for cards in (1, 8))
    for part in ("weights", "adapter", "gradients", "optimizer"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8, rel=1e-3)
    assert one.gathered == 0 < eight.gathered < one.weights / 4
    apart = load_config("wan2.1-14b-vta", ["parallel.fsdp=false"])
    assert memory_of(apart, base, 8).weights == one.weights


def test_context_parallelism_shares_tokens_and_work() -> None:
    config = load_config("wan2.1-14b-vta", ["parallel.context_parallel=4"])
    base = load_base(config.model.source)
    together = estimate(config, base, GPUS["h200"], cards=8)
    apart = estimate(load_config("wan2.1-14b-vta"), base, GPUS["h200"], cards=8)
    assert together.memory.activations < apart.memory.activations / 3
    assert together.step_seconds == pytest.approx(apart.step_seconds, rel=0.02)  # four passes of a quarter each
    with pytest.raises(ValueError) as error:
        estimate(load_config("wan2.1-14b-vta", ["parallel.context_parallel=16"]), base, GPUS["h200"], cards=16)
    assert str(error.value) == "context_parallel=16 does not divide the 40 attention heads"


def test_the_papers_run_costs_what_its_authors_say() -> None:
    run = paper_run(GPUS["h100"], cards=8, price=3.5)
    assert run.fits  # 8 cards of 80 GB
    assert 400 < (run.cost or 0) < 600
    assert 100 < run.gpu_hours < 150


def test_an_estimate_that_does_not_fit_names_what_makes_it_fit() -> None:
    config = load_config("wan2.1-14b-vta", ["model.gradient_checkpointing=false", "parallel.fsdp=false"])
    base = load_base(config.model.source)
    gpu = GPUS["h200"]
    assert not estimate(config, base, gpu, cards=8).fits
    ways = remedies(config, base, gpu, cards=8)
    assert ways[0].overrides == {"model.gradient_checkpointing": True}
    for way in ways:
        changed = load_config("wan2.1-14b-vta", _as_overrides(config, way.overrides))
        assert estimate(changed, base, gpu, cards=way.cards).memory.peak == way.peak <= gpu.usable_bytes


def _as_overrides(config: TrainConfig, overrides: Any) -> dict[str, Any]:
    before = {
        "model.gradient_checkpointing": config.model.gradient_checkpointing,
        "parallel.fsdp": config.parallel.fsdp,
    }
    return before | dict(overrides)


def test_where_one_knob_is_not_enough_several_are_named() -> None:
    config = load_config("wan2.1-14b-vta", ["model.gradient_checkpointing=false", "parallel.fsdp=false"])
    base = load_base(config.model.source)
    (way,) = remedies(config, base, GPUS["4090"], cards=1)
    assert {"model.gradient_checkpointing", "parallel.fsdp"} <= way.overrides.keys()
    assert way.peak <= GPUS["4090"].usable_bytes


def test_1_3b_fits_one_card_of_24_gb() -> None:
    config = load_config("wan2.1-1.3b-vta")
    found = estimate(config, load_base(config.model.source), GPUS["4090"])
    assert found.fits
    assert not estimate(
        load_config("wan2.1-1.3b-vta", ["model.gradient_checkpointing=false"]), load_base("wan2.1-1.3b"), GPUS["4090"]
    ).fits


def test_two_experts_cost_twice() -> None:
    one, two = (load_config(name) for name in ("wan2.1-14b-vta", "wan2.2-a14b-vta"))
    hours = [estimate(c, load_base(c.model.source), GPUS["h200"], cards=8).hours for c in (one, two)]
    assert hours[1] == pytest.approx(2 * hours[0])


def test_a_budget_of_seconds_is_kept() -> None:
    config = load_config("mini-vta")
    found = estimate(config, load_base(config.model.source), GPUS["4090"])
    assert found.hours * 3600 == pytest.approx(config.seconds)
    assert len(found.works) == len(config.data.lengths)


@contextmanager
def cli(*words: str) -> Iterator[Any]:
    from pusa.cli.train import estimate as command

    result = CliRunner().invoke(command, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    yield result


def test_the_command_says_it_in_words_and_in_json() -> None:
    with cli("wan2.1-14b-vta", "--gpu", "h200", "--count", "8", "--price", "3.5") as said:
        assert "900 steps of 8 clips" in said.output
        assert "fits      yes" in said.output
        assert "once more 1.81 PFLOP" in said.output
    with cli("mini-vta", "--gpu", "4090") as said:
        assert "steps of 8 to 16 clips" in said.output  # 80 latent frames of clips of 9, or of 5
        assert "once more" not in said.output
    with cli("wan2.1-14b-vta", "--gpu", "h200", "--count", "8", "--price", "3.5", "--json") as said:
        facts = json.loads(said.output)
    assert facts["fits"]
    assert facts["cost"] == pytest.approx(facts["gpu_hours"] * 3.5)
    with cli("wan2.1-14b-vta", "method.rank=256", "--set", "method.alpha=256", "--gpu", "4090") as said:
        assert "LoRA of rank 256" in said.output
        assert "fits      NO" in said.output
        assert "it would with" in said.output


def test_the_rate_of_this_processor_is_measured() -> None:
    with cli("mini-vta", "model.source=tiny", "--gpu", "cpu", "--json") as said:
        facts = json.loads(said.output)
    assert facts["fits"]
    assert facts["hours"] * 3600 == pytest.approx(720)


def test_an_unknown_card_is_refused_with_those_there_are() -> None:
    from pusa.cli.train import estimate as command

    result = CliRunner().invoke(command, ["mini-vta", "--gpu", "z9"])
    assert str(result.exception) == f"--gpu 'z9' is not known: take the nearest of {', '.join(GPUS)}, or cpu"


def test_an_estimate_needs_no_torch() -> None:
    code = (
        "import sys; from pusa.cli.train import estimate; "
        "estimate(['wan2.1-14b-vta', '--gpu', 'h200'], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---- benchmarks/train_gpu.py ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train_gpu() -> Any:
    return importlib.import_module("train_gpu")


def test_the_training_benchmark_rehearses_on_the_cpu(train_gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train_gpu.main(["--tiny", "--device", "cpu", "--steps", "2"])
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["outcome"], found["steps_run"], found["skipped"]) == ("done", 2, 0)
    assert (found["card"], found["layers"], found["of_layers"]) == ("cpu", 2, 2)
    assert found["share_of_matmul_rate"] > found["share_without_recompute"] > 0
    assert found["flops_per_second"] * found["seconds_per_step"] == pytest.approx(found["flops_per_step"])


def test_the_training_benchmark_ends_in_time_and_reports_too_little_memory(
    train_gpu: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_gpu.main(["--tiny", "--device", "cpu", "--steps", "100000", "--budget-seconds", "4"])
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["outcome"] == "out of time"
    assert stopped["steps_run"] < 100_000
    train_gpu.main(["--tiny", "--device", "cpu", "--budget-seconds", "0"])
    skipped = json.loads(capsys.readouterr().out)
    assert (skipped["outcome"], skipped["layers"]) == ("skipped", 0)
    assert skipped["why"] == "0 s left: too little time for a single layer"

    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 is small")

    monkeypatch.setattr(train_gpu, "prepare", too_large)
    train_gpu.main(["--tiny", "--device", "cpu"])
    last = json.loads(capsys.readouterr().out)
    assert (last["outcome"], last["error"]) == ("out of memory", "CUDA out of memory. Tried to allocate 9 GiB")


@pytest.mark.parametrize(
    ("card_bytes", "seconds", "limit"),
    [(200e9, 540, None), (200e9, 30, "time"), (80e9, 540, "memory"), (20e9, 5, "time")],
)
def test_the_training_benchmark_takes_as_many_layers_as_memory_and_time_allow(
    train_gpu: Any, monkeypatch: pytest.MonkeyPatch, card_bytes: float, seconds: float, limit: str | None
) -> None:
    options = argparse.Namespace(tiny=False, size="480p", rank=512, no_checkpointing=False, steps=2, layers=None)
    device = train_gpu.Device("cpu")
    monkeypatch.setattr(device, "total_bytes", lambda: int(card_bytes))
    rate = 7e14

    def fits(layers: int) -> bool:
        work = train_gpu.workload(options, device, layers)
        takes = train_gpu.expected_seconds(work, rate, options.steps)
        return train_gpu.memory(work).peak <= 0.92 * card_bytes and takes <= seconds

    layers, why = train_gpu.choose_layers(options, device, rate, seconds)
    assert why == limit
    assert layers == 0 or fits(layers)
    assert not fits(layers + 1) if limit else layers == 40
    options.layers = 3
    assert train_gpu.choose_layers(options, device, rate, seconds) == (3, "--layers")
