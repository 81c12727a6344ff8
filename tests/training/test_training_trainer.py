"""Train a run, report on it, resume it after a stop to the same bits, and load its adapter."""

import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from training_samples import make_config, write_dataset

from pusa.data.dataset import LatentDataset
from pusa.lora import describe_lora, load_pusa
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.training import model as adapting
from pusa.training.checkpoint import checkpoints
from pusa.training.config import OptimizerConfig, ScheduleConfig, TrainConfig, load_config
from pusa.training.distributed import Processes
from pusa.training.export import export_run
from pusa.training.model import MovingAverage, lr_factor, make_optimizers
from pusa.training.reports import read_metrics
from pusa.training.trainer import TrainingStoppedError, train


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def configure(clips: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """``configure("name", steps=3)``: a run in a folder of its own."""
    return lambda name="run", **changes: make_config(clips, tmp_path / name, **changes)


@pytest.fixture
def run(configure: Callable[..., TrainConfig], tiny_transformer: Callable[..., Any]) -> Callable[..., Path]:
    """``run("name", steps=3)``: train the tiny transformer."""

    def train_it(name: str = "run", *, resume: bool = False, on_validate: Any = None, **changes: Any) -> Path:
        config = configure(name, **changes)
        return train(config, transformer=tiny_transformer(), resume=resume, on_validate=on_validate)

    return train_it


@pytest.fixture(scope="module")
def plain(clips: Path, tmp_path_factory: pytest.TempPathFactory, tiny_transformer: Callable[..., Any]) -> Path:
    """A finished run of six steps, with checkpoints at 4 and 6."""
    config = make_config(clips, tmp_path_factory.mktemp("runs") / "plain", checkpoint={"every_steps": 2})
    return train(config, transformer=tiny_transformer())


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder) if "loss" in entry]


def held_out(folder: Path) -> list[float]:
    return [entry["held_out_loss"] for entry in read_metrics(folder) if "held_out_loss" in entry]


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter.safetensors")


def are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def velocity(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(1, 16, 3, 4, 6, generator=generator), torch.randn(1, 8, 48, generator=generator)
    return model(x, torch.tensor([[0.0, 400.0, 900.0]]), text, return_dict=False)[0]


# ---- it learns -----------------------------------------------------------------------------------------------------


def test_held_out_loss_falls(run: Callable[..., Path]) -> None:
    folder = run(steps=40, report={"held_out_every": 20}, checkpoint={"every_steps": None})
    before, half, after = held_out(folder)
    assert after < half < before
    assert after < 0.9 * before


def test_the_adapted_model_begins_as_the_base(
    run: Callable[..., Path], tiny_transformer: Callable[..., WanTransformer3DModel]
) -> None:
    base = velocity(PusaWanTransformer3DModel.from_wan(tiny_transformer()))
    folder = run(steps=1, optimizer={"lr": 1e-30})
    model = PusaWanTransformer3DModel.from_wan(tiny_transformer())
    load_pusa(model, folder, alpha=1.0)
    torch.testing.assert_close(velocity(model), base)


def test_the_adapter_that_is_loaded_is_the_one_that_was_trained(
    configure: Callable[..., TrainConfig], tiny_transformer: Callable[..., WanTransformer3DModel]
) -> None:
    trained, fresh = tiny_transformer(), PusaWanTransformer3DModel.from_wan(tiny_transformer())
    folder = train(configure(method={"alpha": 8.0}), transformer=trained)
    base = velocity(fresh)
    assert load_pusa(fresh, folder, alpha=1.0) == 20  # of 20 layers: 10 in each of 2 blocks
    torch.testing.assert_close(velocity(fresh), velocity(trained), rtol=1e-5, atol=1e-6)
    assert (velocity(fresh) - base).abs().max() > 1e-3
    assert not trained.training


def test_the_adapter_says_what_it_is(plain: Path, clips: Path) -> None:
    info = describe_lora(plain / "adapter.safetensors")
    assert (info.ranks, info.layers) == ((4,), 20)
    metadata = info.metadata
    assert {name: metadata[name] for name in ("base", "rank", "lora_alpha", "alpha", "steps", "expert")} == {
        "base": "tiny",
        "rank": "4",
        "lora_alpha": "4",
        "alpha": "1.0",
        "steps": "6",
        "expert": "transformer",
    }
    assert metadata["data_hash"] == LatentDataset(clips).hash
    config = json.loads(metadata["config"])
    assert config["method"]["rank"] == 4
    assert config["data"]["folders"] == [clips.name]
    assert not any(str(folder) in value for value in metadata.values() for folder in (clips.parent, plain.parent))


def test_a_full_fine_tune_leaves_a_transformer_that_diffusers_loads(
    configure: Callable[..., TrainConfig], tiny_transformer: Callable[..., WanTransformer3DModel]
) -> None:
    trained = tiny_transformer()
    folder = train(configure(method={"kind": "full"}, optimizer={"lr": 1e-3}), transformer=trained)
    loaded = WanTransformer3DModel.from_pretrained(folder / "model" / "transformer")
    assert are_equal(loaded.state_dict(), trained.state_dict())
    assert not are_equal(loaded.state_dict(), tiny_transformer().state_dict())
    assert json.loads((folder / "run.json").read_text())["trained_parameters"] == loaded.num_parameters()


def test_two_experts_give_a_pair_that_loads_as_one(
    configure: Callable[..., TrainConfig], tiny_pipeline: Callable[..., Any]
) -> None:
    pipe = tiny_pipeline(experts=2)
    experts = {"transformer": [0.875, 1.0], "transformer_2": [0.0, 0.875]}
    config = configure(steps=3, model={"experts": experts})
    folder = train(config, transformer={name: getattr(tiny_pipeline(experts=2), name) for name in experts})
    assert pipe.load_pusa(folder, alpha=1.0) == 40
    for expert, is_high in (("transformer", True), ("transformer_2", False)):
        levels = {level for entry in read_metrics(folder / expert) for level in entry.get("error_by_level", ())}
        assert ("0.9" in levels) == is_high
        assert list(checkpoints(folder / expert)) == [3]
    high, low = (load_file(folder / f"adapter_{noise}_noise.safetensors") for noise in ("high", "low"))
    assert not are_equal(high, low)


def test_a_model_by_name_is_frozen_in_bf16_and_adapted_in_fp32(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pusa.training.trainer.is_bf16_fast", lambda _: True)
    seen: dict[str, Any] = {}

    def look(step: int, model: Any) -> None:
        for name, p in model.named_parameters():
            seen.setdefault((p.requires_grad, p.dtype), []).append(name)

    train(configure(steps=1, model={"dtype": "bf16"}, report={"validate_every": 1}), on_validate=look)
    assert {dtype for trained, dtype in seen if trained} == {torch.float32}
    assert any("to_q.base_layer" in name for name in seen[False, torch.bfloat16])
    assert all(
        "norm" in name or "time_embedder" in name or "scale_shift" in name for name in seen[False, torch.float32]
    )


def test_a_cpu_that_emulates_bf16_trains_in_fp32_with_a_warning(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pusa.training.trainer.is_bf16_fast", lambda _: False)
    seen: set[torch.dtype] = set()

    def look(_: int, model: Any) -> None:
        seen.update(p.dtype for p in model.parameters())

    folder = train(configure(steps=1, model={"dtype": "bf16"}, report={"validate_every": 1}), on_validate=look)
    assert seen == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["model"]["dtype"] == "fp32"
    assert "this CPU has no bf16 of its own: training in fp32" in caplog.text


@pytest.mark.parametrize("limit", [0.01, None])
def test_gradients_are_no_longer_than_the_limit(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, limit: float | None
) -> None:
    lengths: list[float] = []
    step = torch.optim.AdamW.step

    def look(optimizer: torch.optim.Optimizer, *words: Any) -> Any:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        lengths.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(optimizer, *words)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    folder = run(steps=2, optimizer={"max_gradient_norm": limit})
    told = [entry["gradient_norm"] for entry in read_metrics(folder) if "loss" in entry]
    assert min(told) > 0.015  # is that of the whole gradient
    assert lengths == pytest.approx(told if limit is None else [limit] * 2, rel=1e-4)


def test_muon_takes_the_matrices_and_adamw_the_rest(
    run: Callable[..., Path], tiny_transformer: Callable[..., WanTransformer3DModel]
) -> None:
    parameters = dict(tiny_transformer().named_parameters())
    muon, adamw = make_optimizers(parameters, OptimizerConfig(name="muon"))
    counts = [sum(p.numel() for group in o.param_groups for p in group["params"]) for o in (muon, adamw)]
    assert sum(counts) == sum(p.numel() for p in parameters.values())
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    folder = run(steps=20, optimizer={"name": "muon", "muon_lr": 0.02}, report={"held_out_every": 20})
    assert held_out(folder)[-1] < held_out(folder)[0]


# ---- the same however it is computed -------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bits_and_another_seed_another_run(run: Callable[..., Path], plain: Path) -> None:
    again, other = run("again"), run("other", seed=1)
    assert losses(again) == losses(plain)
    assert are_equal(adapter(again), adapter(plain))
    assert losses(other) != losses(plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1, "global_batch": 2},  # accumulated
        {"model": {"gradient_checkpointing": True}},
        {"model": {"attention": "math"}},
        {"data": {"workers": 3}},
    ],
    ids=["accumulation", "checkpointing", "plain attention", "threads"],
)
def test_the_losses_do_not_depend_on_how_they_are_computed(
    run: Callable[..., Path], plain: Path, changes: dict[str, Any]
) -> None:
    torch.testing.assert_close(losses(run(**changes)), losses(plain), rtol=1e-4, atol=1e-5)


def test_what_is_computed_again_is_computed_as_before(
    configure: Callable[..., TrainConfig], tiny_transformer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient checkpointing runs each block in the backward again: with the same attention, and without copies."""
    monkeypatch.setattr("pusa.training.trainer.is_bf16_fast", lambda _: True)
    model, seen = tiny_transformer(), []

    def look(*_: Any) -> None:
        layer = model.blocks[0].attn1.to_q
        seen.append((torch.backends.cuda.flash_sdp_enabled(), layer.cast_input_dtype_enabled))

    model.blocks[0].attn1.register_forward_hook(look)
    changes = {"dtype": "bf16", "attention": "math", "gradient_checkpointing": True}
    train(configure(steps=1, model=changes, data={"held_out_share": 0.0}), transformer=model)
    assert seen == [(False, False)] * 2
    assert torch.backends.cuda.flash_sdp_enabled()
    assert model.blocks[0].attn1.to_q.cast_input_dtype_enabled  # outside of autocast it is needed


def test_that_adapters_read_bf16_changes_no_bit(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT alone copies what an adapter reads to fp32, and autocast copies it back."""
    changes: dict[str, Any] = {"model": {"dtype": "bf16", "gradient_checkpointing": True}}
    without = run("without copies", **changes)
    monkeypatch.setattr(adapting, "disable_input_dtype_casting", lambda *_, **__: nullcontext())
    copied = run("with copies", **changes)
    assert losses(without) == losses(copied)
    assert are_equal(adapter(without), adapter(copied))


# ---- resuming ------------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(run: Callable[..., Path]) -> None:
    """By SIGTERM, as a cluster sends it; checkpoints in the middle of a log interval, with a moving average."""
    settings: dict[str, Any] = {
        "steps": 12,
        "ema_decay": 0.9,
        "checkpoint": {"every_steps": 100},
        "report": {"log_every": 4, "held_out_every": 6},
    }
    whole = run("whole", **settings)
    halted = whole.with_name("halted")

    def halt() -> None:
        while len(losses(halted)) < 1:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=halt)
    thread.start()
    with pytest.raises(TrainingStoppedError, match=r"stopped after step \d+, whose state is written"):
        run("halted", **settings)
    thread.join()
    reached = max(checkpoints(halted))
    assert 4 <= reached < 12
    run("halted", resume=True, **settings)
    assert losses(halted) == losses(whole)
    assert held_out(halted) == held_out(whole)
    assert are_equal(adapter(halted), adapter(whole))


def test_a_resumed_run_continues_every_random_state(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float, float]] = []
    step = torch.optim.AdamW.step

    def draw(optimizer: torch.optim.Optimizer, *words: Any) -> Any:
        drawn.append((float(torch.rand(())), float(np.random.random()), random.random()))
        return step(optimizer, *words)

    monkeypatch.setattr(torch.optim.AdamW, "step", draw)
    settings: dict[str, Any] = {"steps": 4, "checkpoint": {"every_steps": 2, "keep_last": 2}}
    folder = run("run", **settings)
    shutil.rmtree(checkpoints(folder)[4])
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    run("run", resume=True, **settings)
    assert len(set(drawn[:4])) == 4
    assert drawn[4:] == drawn[2:4]


def test_a_resumed_run_logs_no_step_twice(run: Callable[..., Path]) -> None:
    folder = run("run", steps=4)
    whole = losses(folder)
    metrics = folder / "metrics.jsonl"
    later = [{"step": step, "loss": 1.0} for step in (5, 6)]
    metrics.write_text(metrics.read_text() + "".join(json.dumps(e) + "\n" for e in later) + '{"step": 7, "los')
    (folder / "adapter.safetensors").unlink()
    run("run", resume=True, steps=6)
    steps = [entry["step"] for entry in read_metrics(folder) if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert losses(folder)[:4] == whole
    assert losses(folder)[4] != 1.0


def test_a_checkpoint_that_was_being_written_is_not_taken(run: Callable[..., Path], plain: Path) -> None:
    folder = run("run", steps=4, checkpoint={"every_steps": 2})
    unfinished = folder / "checkpoints" / "step-00000004"
    (unfinished / "state.json").unlink()  # is written last
    shutil.copytree(unfinished, folder / "checkpoints" / ".step-00000006.part")
    (folder / "adapter.safetensors").unlink()
    assert list(checkpoints(folder)) == [2]
    run("run", resume=True, steps=4, checkpoint={"every_steps": 2})
    assert losses(folder) == losses(plain)[:4]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_a_process_that_does_not_yet_see_the_checkpoint_goes_on_from_it(
    run: Callable[..., Path], plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shared file system the main process may list a folder that another machine still lists as empty."""
    folder = run("run", steps=4)
    (folder / "adapter.safetensors").unlink()
    monkeypatch.setattr("pusa.training.run.checkpoints", lambda _: {})
    monkeypatch.setattr(Processes, "agree", lambda _, value: 4 if value == -1 else value)
    run("run", steps=6, resume=True)
    assert losses(folder) == losses(plain)


def test_checkpoints_are_kept_by_the_rule(run: Callable[..., Path]) -> None:
    folder = run(steps=9, checkpoint={"every_steps": 2, "keep_last": 2, "keep_every": 4})
    assert list(checkpoints(folder)) == [4, 8, 9]  # 2 and 6 are gone


def test_more_steps_continue_a_finished_run_and_a_finished_one_is_left(
    run: Callable[..., Path], plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run("run", steps=4)
    stamp = (folder / "adapter.safetensors").stat().st_mtime_ns
    run("run", steps=4, resume=True)
    assert (folder / "adapter.safetensors").stat().st_mtime_ns == stamp
    run("run", steps=6, resume=True)
    assert "the configuration has changed since the run began: steps was 4 and is 6" in caplog.text
    assert are_equal(adapter(folder), adapter(plain))


def test_a_run_is_not_begun_over_another(plain: Path) -> None:
    with pytest.raises(ValueError) as refused:
        train(load_config(plain))
    assert str(refused.value) == f"{plain} holds a run already: go on with --resume, or give another name or output"


def test_a_checkpoint_of_another_method_is_refused(run: Callable[..., Path]) -> None:
    folder = run("run", steps=2)
    with pytest.raises(ValueError) as refused:
        run("run", steps=4, method={"rank": 8}, resume=True)
    assert "resume with the method it was begun with" in str(refused.value)
    assert list(checkpoints(folder)) == [2]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"rank": 8}}, "resume with the method it was begun with"),
        ({"method": {"kind": "full"}}, "it was written with other settings"),
        ({"method": {"targets": ["to_qq"]}}, "do not fit this model"),
        ({"data": {"folders": []}}, "data.folders is empty"),
        ({"data": {"folders": ["nowhere"]}}, "nowhere holds no dataset"),
        ({"report": {"tracker": "wandb"}}, "wandb is not installed"),
        ({"global_batch": 2, "parallel": {"context_parallel": 2}}, "context_parallel=2"),
    ],
)
def test_a_resume_that_is_refused_leaves_the_run_as_it_was(
    run: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    folder = run("run", steps=2)
    before = files(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("run", steps=4, resume=True, **changes)
    assert files(folder) == before


def test_a_run_goes_on_with_other_data_only_where_asked(
    run: Callable[..., Path],
    configure: Callable[..., TrainConfig],
    tiny_transformer: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = run("run", steps=2)
    before = files(folder)
    others = write_dataset(tmp_path / "others", seed=1, clips=9)
    config = configure("run", steps=4, data={"folders": [str(others)]})
    with pytest.raises(ValueError, match=r"up to step 2 .*--other-data"):
        train(config, transformer=tiny_transformer(), resume=True)
    assert files(folder) == before
    train(config, transformer=tiny_transformer(), resume=True, other_data=True)
    assert list(checkpoints(folder)) == [2, 4]


# ---- what goes wrong -----------------------------------------------------------------------------------------------


class WithBadClip:
    """A dataset in which one clip's latents are not numbers."""

    def __init__(self, data: LatentDataset, bad: int | None) -> None:
        self.data, self.bad = data, bad

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def latents(self, index: int) -> Tensor:
        latents = self.data.latents(index)
        return latents * math.nan if self.bad is None or index == self.bad else latents

    def split(self, share: float, seed: int = 0) -> tuple[Any, Any]:
        training, judged = self.data.split(share, seed)
        return WithBadClip(training, self.bad), judged


def test_steps_that_are_not_finite_are_skipped_and_reported(
    configure: Callable[..., TrainConfig],
    clips: Path,
    tiny_transformer: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = configure(steps=12, batch_size=1)
    folder = train(config, transformer=tiny_transformer(), dataset=WithBadClip(LatentDataset(clips), bad=3))
    entries = [entry for entry in read_metrics(folder) if "loss" in entry]
    assert entries[-1]["skipped"] == 2  # each of six clips is seen twice
    assert sum(entry["loss"] is None for entry in entries) == 2
    assert "is skipped: loss nan, gradient nan (clips 3)" in caplog.text
    assert all(tensor.isfinite().all() for tensor in adapter(folder).values())


def test_too_many_of_them_in_a_row_end_the_run(
    configure: Callable[..., TrainConfig], clips: Path, tiny_transformer: Callable[..., Any]
) -> None:
    config = configure(steps=12, max_nonfinite=2, report={"held_out_every": None})
    with pytest.raises(RuntimeError, match=r"3 steps in a row were not finite .* lower optimizer\.lr"):
        train(config, transformer=tiny_transformer(), dataset=WithBadClip(LatentDataset(clips), bad=None))


def test_what_cannot_work_is_refused_before_any_step(
    configure: Callable[..., TrainConfig], tiny_transformer: Callable[..., Any], tmp_path: Path
) -> None:
    for changes, message in (
        ({"method": {"targets": ["to_qq"]}}, "method.targets=to_qq do not fit this model"),
        ({"model": {"experts": {"transformer_2": [0.0, 0.875]}}}, "tiny has no transformer_2"),
        ({"data": {"folders": []}}, "data.folders is empty"),
        ({"parallel": {"context_parallel": 2}}, "context_parallel=2 does not divide the 1 processes"),
        ({"report": {"tracker": "wandb"}}, "report.tracker=wandb is not installed"),
    ):
        with pytest.raises(ValueError, match=message):
            train(configure(f"refused-{len(message)}", **changes))
    adapted = tiny_transformer()
    train(configure("first", steps=1), transformer=adapted)
    with pytest.raises(ValueError, match=r"has adapters already \(pusa\)"):
        train(configure("second", steps=1), transformer=adapted)


# ---- what it tells -------------------------------------------------------------------------------------------------


def test_metrics_hold_losses_by_level_and_frame_speed_and_time_lost(run: Callable[..., Path]) -> None:
    folder = run(steps=6, report={"log_every": 3, "held_out_every": 3})
    entries = read_metrics(folder)
    assert [(entry["step"], "loss" in entry) for entry in entries] == [
        (0, False),
        (3, True),
        (3, False),
        (6, True),
        (6, False),
    ]
    training, judged = entries[-2:]
    assert set(training["error_by_frame"]) == set(judged["held_out_error_by_frame"]) == {"0", "1", "2"}
    assert set(training["error_by_level"]) <= {f"0.{k}" for k in range(10)}
    assert training["clips"] == 12
    earlier = entries[1]
    seconds = training["seconds"] - earlier["seconds"]
    assert training["clips_per_second"] == pytest.approx((training["clips"] - earlier["clips"]) / seconds)
    assert 0 <= training["data_share"] < 1
    assert training["learning_rate"] == 1e-2
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["clips"], facts["held_out_clips"], facts["clips_per_step"]) == (6, 2, 2)


def test_validation_sees_the_averaged_weights_and_does_not_change_the_run(
    configure: Callable[..., TrainConfig], tiny_transformer: Callable[..., Any]
) -> None:
    seen: list[tuple[int, Tensor, bool]] = []

    def look(step: int, model: Any) -> None:
        torch.rand(7)
        name = "blocks.0.attn1.to_q.lora_B.pusa.weight"
        seen.append((step, model.get_parameter(name).detach().clone(), model.training or torch.is_grad_enabled()))

    settings: dict[str, Any] = {"ema_decay": 0.5, "report": {"validate_every": 2}, "checkpoint": {"every_steps": 2}}
    watched = train(configure("watched", **settings), transformer=tiny_transformer(), on_validate=look)
    alone = train(configure("alone", **settings), transformer=tiny_transformer())
    assert losses(watched) == losses(alone)
    assert [(step, trains) for step, _, trains in seen] == [(2, False), (4, False), (6, False)]
    averages = load_file(checkpoints(watched)[4] / "average-00001.safetensors")
    weights = load_file(checkpoints(watched)[4] / "weights-00001.safetensors")
    name = "blocks.0.attn1.to_q.lora_B.pusa.weight"
    assert torch.equal(seen[1][1], averages[name])
    assert not torch.equal(averages[name], weights[name])


def test_the_moving_average_forgets_quickly_at_first() -> None:
    """``average += (1 - decay) (weight - average)``, with decay at most ``(1 + n) / (10 + n)``."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage(torch.nn.Module(), {"w": weight}, decay=0.5)
    expected = 1.0
    for step in range(12):
        weight.data += 1
        average.update(step)
        expected += (1 - min(0.5, (1 + step) / (10 + step))) * (2.0 + step - expected)
        assert float(average.averages["w"]) == pytest.approx(expected)
    with average.applied():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 13


def test_the_result_is_the_moving_average(run: Callable[..., Path]) -> None:
    folder = run(steps=6, ema_decay=0.8)
    averages = load_file(checkpoints(folder)[6] / "average-00001.safetensors")
    found = adapter(folder)["diffusion_model.blocks.0.self_attn.q.lora_up.weight"]
    assert torch.equal(found, averages["blocks.0.attn1.to_q.lora_B.pusa.weight"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"warmup_steps": 2}, [0.5, 1, 1, 1, 1]),
        ({"cooldown_share": 0.5, "floor": 0.1}, [1, 1, 1, 0.55, 0.1]),
        ({"shape": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"shape": "cosine", "floor": 0.2}, [1, 0.2 + 0.8 * (0.5 + 0.5 * math.sqrt(0.5)), 0.6, 0.3172, 0.2]),
    ],
    ids=["constant", "warm-up", "cool-down", "linear", "cosine"],
)
def test_schedules(schedule: dict[str, Any], expected: list[float]) -> None:
    factors = [lr_factor(ScheduleConfig(**schedule), step, step / 4) for step in range(5)]
    assert factors == pytest.approx(expected, abs=1e-4)


def test_a_budget_of_seconds_ends_the_run(run: Callable[..., Path]) -> None:
    folder = run(seconds=2.0, schedule={"cooldown_share": 0.9}, checkpoint={"every_seconds": 0.4})
    last = [entry for entry in read_metrics(folder) if "loss" in entry][-1]
    assert 2.0 <= last["seconds"] < 10.0
    assert last["learning_rate"] < 0.8e-2  # near 0 if the machine does not halt before the last step
    assert len(checkpoints(folder)) == 2


# ---- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfyui"])
def test_every_layout_is_the_same_adapter(
    plain: Path, tiny_transformer: Callable[..., Any], tmp_path: Path, layout: Any
) -> None:
    outputs = []
    for source in (plain, export_run(plain, tmp_path / "out.safetensors", layout=layout)[0]):
        model = PusaWanTransformer3DModel.from_wan(tiny_transformer())
        load_pusa(model, source, alpha=1.4)
        outputs.append(velocity(model))
    assert torch.equal(*outputs)
    assert describe_lora(tmp_path / "out.safetensors").layout == layout


def test_an_export_can_be_scaled_narrowed_and_of_an_earlier_step(plain: Path, tmp_path: Path) -> None:
    folder = plain
    (scaled,) = export_run(folder, tmp_path / "scaled.safetensors", scale=1.4, dtype=torch.bfloat16)
    (earlier,) = export_run(folder, tmp_path / "earlier.safetensors", step=4)
    whole, up = adapter(folder), "diffusion_model.blocks.0.self_attn.q.lora_up.weight"
    torch.testing.assert_close(load_file(scaled)[up], (1.4 * whole[up]).bfloat16())
    weights = load_file(checkpoints(folder)[4] / "weights-00001.safetensors")
    assert torch.equal(load_file(earlier)[up], weights["blocks.0.attn1.to_q.lora_B.pusa.weight"])
    with safe_open(scaled, framework="pt") as file:
        assert file.metadata()["scale"] == "1.4"
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 3: there are 4, 6"):
        export_run(folder, tmp_path / "never.safetensors", step=3)
