"""The benchmark scripts run as documented, and what they count and compare is what they say."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
common, core, gpu, overfit, throughput = map(
    importlib.import_module, ("_common", "core", "gpu", "overfit", "train_throughput")
)

CAPTURE = pytest.CaptureFixture[str]


@pytest.mark.parametrize("path", ["scalar", "frame", "token"])
def test_the_flop_formula_counts_what_pytorch_counts(path: str) -> None:
    grid, tokens = (3, 8, 12), 72
    with torch.device("meta"):
        model = gpu.PusaWanTransformer3DModel(**gpu.TOY)
        latents, text, times = torch.empty(1, 16, *grid), torch.empty(1, 16, 64), torch.empty(1, 3)
    timestep = common.timesteps_for(path, times, tokens)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, timestep, text, return_dict=False)
    assert common.forward_flops(gpu.TOY, grid, 16, timestep.numel()) == counter.get_total_flops()


@pytest.mark.parametrize(("size", "petaflop"), [("480p", 1.678), ("720p", 6.523)])
def test_a_14b_forward_costs_what_the_published_shapes_give(size: str, petaflop: float) -> None:
    flops = common.forward_flops(common.WAN_14B, gpu.GRIDS[size], text_tokens=512)
    assert flops / 1e15 == pytest.approx(petaflop, rel=1e-3)


def test_the_stock_twin_uses_the_same_memory() -> None:
    model = gpu.build(gpu.TOY, torch.device("cpu"))
    twin = common.stock_twin(model)
    assert type(twin) is WanTransformer3DModel
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert {name: p.data_ptr() for name, p in ours.items()} == {name: p.data_ptr() for name, p in theirs.items()}


def test_built_weights_have_the_dtypes_that_loading_gives(tmp_path: Path) -> None:
    built = gpu.build(gpu.TOY, torch.device("cpu"))
    built.save_pretrained(tmp_path)
    loaded = gpu.PusaWanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {n: t.dtype for n, t in built.named_parameters()} == {n: t.dtype for n, t in loaded.named_parameters()}
    for name, buffer in loaded.named_buffers():
        assert torch.equal(built.get_buffer(name), buffer)


def lines(capsys: CAPTURE) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_gpu_benchmark_rehearses_on_the_cpu(capsys: CAPTURE) -> None:
    gpu.main(["--tiny", "--device", "cpu"])
    records = lines(capsys)
    cases = [r for r in records if "steps" in r]
    assert [(r["outcome"], r["steps_run"]) for r in cases] == [("done", case.steps) for case in gpu.CASES]
    assert all(0 < r["seconds_per_step"] <= r["seconds"] and r["share_of_matmul_rate"] > 0 for r in cases)
    fp32, bf16, kept = (r for r in records if r["case"] == "numerics")
    assert fp32["frame_minus_token_of_range"] < 1e-5
    assert fp32["frame_minus_scalar_of_range"] < 1e-5
    assert bf16["frame_equals_token"]
    assert kept["noise_multiplier_0_is_kept"]


def test_the_gpu_benchmark_keeps_its_time_budget(capsys: CAPTURE) -> None:
    gpu.main(["--tiny", "--device", "cpu", "--budget-seconds", "0"])
    assert {r["outcome"] for r in lines(capsys) if "steps" in r} == {"skipped"}


def test_the_gpu_benchmark_reports_running_out_of_memory(capsys: CAPTURE, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 is small")

    bench = gpu.Bench(gpu.argparse.Namespace(device="cpu", tiny=True, budget_seconds=60.0, attention=None))
    monkeypatch.setattr(bench.model, "forward", too_large)
    bench.run(gpu.Case("480p", "frame", steps=2))
    last = lines(capsys)[-1]
    assert (last["outcome"], last["error"]) == ("out of memory", "CUDA out of memory. Tried to allocate 9 GiB")


def test_one_timestep_per_frame_costs_no_memory_and_no_matrix_products(capsys: CAPTURE) -> None:
    core.main(["--size", "tiny", "--rounds", "1"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    forward = summary["forward"]
    _, frame, token = forward["fp32"]["paths"]
    assert frame["memory_ratio"] < 1.05 < 2 < token["memory_ratio"]
    assert forward["flops"]["frame"] < 1.04 * forward["flops"]["scalar"]  # 5 timesteps embedded for 80 tokens
    assert forward["bf16"]["frame_minus_token"] == 0
    assert summary["loop"]["difference"] < 1e-5
    assert max(row["memory_ratio"] for row in summary["conditions"]) < 1.01


def test_the_throughput_benchmark_says_how_long_training_waits_for_data(capsys: CAPTURE) -> None:
    throughput.main(["--toy", "--steps", "5", "--rounds", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["clips_per_second"] > 0
    assert found["speed_over_bare"] > 0
    assert 0 <= found["share_waiting"] < 1


@pytest.mark.slow
def test_vta_goes_on_from_a_first_frame_and_the_same_training_with_one_time_per_clip_cannot(tmp_path: Path) -> None:
    """The benchmark of overfitting, shortened; only the first frame says where the clip is."""
    found = overfit.measure(tmp_path, base_steps=500, steps=400)["psnr_db"]
    wrong, still = found["another place"], found["the first frame, standing still"]
    assert found["base + VTA"] > max(wrong, still) + 2
    assert found["base + VTA"] > found["base + scalar time"] + 3
    assert found["base + scalar time"] < max(wrong, still) + 0.5  # no better than not knowing
    assert found["base + VTA, another first frame"] < wrong + 0.5  # it does look at the frame that it is given
