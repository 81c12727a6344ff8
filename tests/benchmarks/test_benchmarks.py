"""The benchmark scripts run as documented, and what they count and compare is what they say."""

import argparse
import contextlib
import importlib
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

common, core, gpu, overfit, throughput, short, parts, machine, card, short_table = map(
    importlib.import_module,
    (
        "_common",
        "core",
        "gpu",
        "overfit",
        "train_throughput",
        "_short",
        "_short_parts",
        "card_machine",
        "_card",
        "_short_table",
    ),
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
    rate = next(r["flops_per_second"] for r in records if r["case"] == "matmul")
    for r in cases:
        assert len(r["seconds_of_steps"]) == r["steps"]
        assert r["seconds_per_step"] == statistics.median(r["seconds_of_steps"])
        assert r["share_of_matmul_rate"] == pytest.approx(r["flops_per_second"] / rate)
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


# ---- the short run for a card ---------------------------------------------------------------------------------------

TINY = ["--tiny", "--device", "cpu"]
Run = tuple[int, list[dict[str, Any]], list[str]]  # exit code, records, lines of the table


def read(out: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Records, then after an empty line the table."""
    before, _, table = out.partition("\n\n")
    return [json.loads(line) for line in before.splitlines()], table.splitlines()


@pytest.fixture(scope="module")
def short_run() -> Run:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = gpu.main(["--short", *TINY, "--compiler", "eager", "--budget-seconds", "600"])
    return code, *read(out.getvalue())


def bench(seconds: float = 60.0) -> Any:
    return short.Short(argparse.Namespace(device="cpu", tiny=True, budget_seconds=seconds, compiler="eager"))


def test_a_short_run_reports_every_promised_case_once(short_run: Run) -> None:
    code, records, _ = short_run
    assert code == 0
    assert sorted(r["case"] for r in records) == sorted(short.CASES)
    assert {r["card"] for r in records} == {"cpu"}
    outcomes = {r["case"]: r["outcome"] for r in records if r["case"] != "card"}
    lacking = [r for r in records if r["case"] != "card" and r["outcome"] != "done"]
    assert all(r["outcome"] in ("skipped", "unavailable") and r["why"] for r in lacking)
    assert {outcomes[f"attention, {name}"] for name in ("_native_cudnn", "flash", "sage")} == {"unavailable"}
    absent = {r["case"].removeprefix("attention, ") for r in lacking if r["case"].startswith("attention, ")}
    rest = {case for case in short.CASES if case.split(", ")[1:2] and case.split(", ")[1] in absent}
    assert {r["case"] for r in lacking} == rest


def test_a_short_run_finds_that_the_two_ways_to_take_times_agree(short_run: Run) -> None:
    found = {r["case"]: r for r in short_run[1]}
    token = found["480p, per token"]
    assert (token["equals_per_frame"], token["difference_of_range"], token["agrees"]) == (True, 0, True)
    assert token["flops"] > found["480p, per frame"]["flops"]
    assert found["480p, compiled"]["graphs"] == 1
    assert found["480p, compiled"]["agrees"]
    assert found["480p, 24 GB"]["difference_from_native"] == 0
    assert 0 < found["adapter, rank 512"]["difference_from_merged"] < 0.05  # merged weights are rounded once more
    assert (found["VAE decode, fp32"]["frames"], found["VAE decode, fp32"]["finite"]) == (9, True)
    assert found["480p, native, guidance"]["flops"] == 2 * found["480p, native"]["flops"]


def test_a_short_run_fails_when_the_two_ways_disagree(monkeypatch: pytest.MonkeyPatch, capsys: CAPTURE) -> None:
    def late(path: str, times: torch.Tensor, tokens: int) -> torch.Tensor:
        return common.timesteps_for(path, times + (200 if path == "token" else 0), tokens)

    monkeypatch.setattr(short, "timesteps_for", late)
    run = bench()
    run.begin()
    for case, path in zip(short.PATHS, ("frame", "token"), strict=True):
        run.do(case, lambda path=path: run.path(path))
    last = lines(capsys)[-1]
    assert not last["equals_per_frame"]
    assert last["difference_of_range"] > 0.02
    assert run.records.failures() == ["480p, per token"]


def test_the_table_of_a_short_run_has_a_row_for_each_record(short_run: Run) -> None:
    _, records, table = short_run
    head, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table]
    assert head == list(short_table.COLUMNS)
    assert len(rows) == len(records)
    for record, cells in zip(records, rows, strict=True):
        assert cells[:2] == [record["case"], record["card"]]
        assert record.get("outcome", "") in cells[2:3] or record["case"] == "card"
        seconds = record.get("seconds_per_step", record.get("seconds"))
        if seconds is not None:
            assert float(cells[3]) == pytest.approx(seconds, rel=1e-3)
        if record.get("why"):
            assert record["why"].replace("|", "/") in cells[-1]


def test_a_short_run_whose_time_is_over_skips_everything_and_says_why() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert gpu.main(["--short", *TINY, "--budget-seconds", "0"]) == 0
    records, table = read(out.getvalue())
    assert sorted(r["case"] for r in records) == sorted(short.CASES)
    cases = [r for r in records if r["case"] != "card"]
    assert {r["outcome"] for r in cases} == {"skipped"}
    assert all(r["why"] for r in cases)
    assert {r["why"] for r in cases if r["case"].startswith("VAE")} == {"0 s left, it needs about 0 s"}
    assert len(table) == len(records) + 2


def test_a_case_that_fails_is_reported_and_the_next_one_runs(capsys: CAPTURE) -> None:
    run = bench()

    def broken() -> dict[str, Any]:
        raise RuntimeError("no such\nkernel")

    def too_large() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 is small")

    for name, piece in (("broken", broken), ("large", too_large), ("fine", lambda: {"seconds": 1.0})):
        run.do(name, piece)
    first, second, third = lines(capsys)
    assert (first["outcome"], first["error"]) == ("failed", "RuntimeError: no such kernel")
    assert (second["outcome"], second["error"]) == ("out of memory", "CUDA out of memory. Tried to allocate 9 GiB")
    assert (third["outcome"], third["card"]) == ("done", "cpu")
    assert run.records.failures() == ["broken"]


def test_a_case_that_takes_too_long_is_stopped(capsys: CAPTURE) -> None:
    run = bench()
    run.deadline = time.perf_counter() + 0.2
    began = time.perf_counter()
    run.do("slow", lambda: time.sleep(30) or {})
    assert time.perf_counter() - began < 5
    assert lines(capsys)[-1]["outcome"] == "out of time"


def test_decoding_stops_after_the_frames_for_which_there_was_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench()
    monkeypatch.setattr(run, "left", lambda: 0.0)
    found = parts.decode(run, torch.float32, at_most_seconds=60)
    assert (found["outcome"], found["latent_frames"], found["frames"]) == ("out of time", 1, 1)
    assert found["of_latent_frames"] == 3


def test_blocks_that_could_not_be_pinned_in_time_are_left_out_and_not_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: CAPTURE
) -> None:
    run = bench()
    run.begin()
    run.do("native", lambda: run.steps("480p", "native", 1.0))
    whole = lines(capsys)[-1]
    monkeypatch.setattr(parts, "move_in_time", lambda _: 1)
    run.do("24 GB", lambda: parts.streamed(run))
    (found,) = lines(capsys)
    assert (found["outcome"], found["blocks"], found["of_blocks"]) == ("done", 1, 2)
    assert "agrees" not in found
    assert found["flops"] < whole["flops"]
    assert run.model is None


# ---- what a card can do ---------------------------------------------------------------------------------------------


def test_the_check_of_a_machine_rehearses_on_the_cpu(capsys: CAPTURE) -> None:
    assert machine.main([*TINY, "--compiler", "eager", "--budget-seconds", "600"]) == 0
    records = {r["case"]: r for r in lines(capsys)}
    assert {r["card"] for r in records.values()} == {"cpu"}
    for case in ("sdpa, MATH", "sdpa, FLASH_ATTENTION", "attention, native"):
        assert records[case]["agrees"]
        assert records[case]["backward"]
        assert 0 < records[case]["backward_error"] < 0.02
    for case in ("sdpa, CUDNN_ATTENTION", "attention, _native_cudnn", "attention, _flash_3", "attention, sage_hub"):
        assert records[case]["outcome"] == "unavailable"
        assert records[case]["why"].startswith("RuntimeError: ")
    assert {records[case]["outcome"] for case in ("fp8", "host to card")} == {"skipped"}
    for case in ("model, fp32", "model, bf16", "compiled model, bf16", "compiled model, fp32"):
        assert records[case]["agrees"]
    assert 0 < records["model, bf16"]["difference_from_cpu_fp32"] < 0.03
    assert records["end"]["wrong"] == []


def test_the_check_of_a_machine_finds_wrong_numbers(monkeypatch: pytest.MonkeyPatch, capsys: CAPTURE) -> None:
    device = machine.Device("cpu")
    wrong = machine.check_attention(device, lambda q, k, v: v + 0 * q, tolerance=0.02)
    assert not wrong["agrees"]
    scaled = machine.check_attention(device, lambda q, k, v: Doubled.apply(machine.by_formula(q, k, v)), 0.02)
    assert scaled["forward_error"] < 0.02 < scaled["backward_error"]
    assert not scaled["agrees"]
    monkeypatch.setattr(machine, "checks_of", lambda *_: {"copy": lambda: wrong, "nothing": lambda: 1 / 0})
    assert machine.main(TINY) == 1
    _, broken, end = lines(capsys)
    assert (broken["outcome"], broken["error"]) == ("failed", "ZeroDivisionError: division by zero")
    assert end["wrong"] == ["copy", "nothing"]


class Doubled(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


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
    throughput.main(["--toy", "--steps", "2", "--rounds", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    ratio = found["clips_per_second"] / found["bare_clips_per_second"]
    assert found["speed_over_bare"] == pytest.approx(ratio, rel=0.01)
    assert 0 <= found["share_waiting"] < 1


@pytest.mark.slow
def test_vta_goes_on_from_a_first_frame_and_the_same_training_with_one_time_per_clip_cannot(tmp_path: Path) -> None:
    """The benchmark of overfitting, shortened; only the first frame says where the clip is."""
    found = overfit.measure(tmp_path, base_steps=250, steps=350, lr=5e-3)["psnr_db"]
    wrong, still = found["another place"], found["the first frame, standing still"]
    assert found["base + VTA"] > max(wrong, still) + 2
    assert found["base + VTA"] > found["base + scalar time"] + 3
    assert found["base + scalar time"] < max(wrong, still) + 0.5  # no better than not knowing
    assert found["base + VTA, another first frame"] < wrong + 0.5  # it does look at the frame that it is given
