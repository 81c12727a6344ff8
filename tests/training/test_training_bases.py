"""Train tiny models of every base: recorded objectives, a loss that falls, a resumed run, results in a pipeline."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import fvdm_folder, mochi_folder, ti2v_components
from safetensors.torch import load_file
from torch import Tensor
from training_samples import TEXT_WIDTH, make_config, write_dataset

from pusa import PusaCondition, PusaPipeline
from pusa.models.bases import WAN, base_named
from pusa.models.fvdm import tiny as fvdm_tiny
from pusa.models.fvdm.checkpoint import load_checkpoint
from pusa.models.mochi import tiny as mochi_tiny
from pusa.models.mochi.transformer import PusaMochiTransformer3DModel
from pusa.training.checkpoint import checkpoints
from pusa.training.config import LORA_TARGETS, TrainConfig, load_config
from pusa.training.export import export_run
from pusa.training.objective import clip_losses, draw_sigmas, frame_errors, training_grid
from pusa.training.reports import read_metrics
from pusa.training.trainer import train

MOCHI, FVDM = base_named("MochiTransformer3DModel"), base_named("FVDMTransformer3DModel")
assert MOCHI is not None
assert FVDM is not None

CLASSES = 3
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "ti2v": ti2v_components,
    "mochi": mochi_tiny.components,
    "fvdm": fvdm_tiny.components,
    "fvdm with classes": lambda: fvdm_tiny.components(num_classes=CLASSES),
}
SHAPES = {"ti2v": (48, 3, 2, 4), "mochi": (12, 3, 4, 4), "fvdm": (4, 5, 8, 8), "fvdm with classes": (4, 5, 8, 8)}


def texts_of(name: str) -> dict[str, Tensor]:
    if name == "fvdm":
        return {"": torch.zeros(1, 0)}
    if name == "fvdm with classes":
        return {"": torch.tensor([[float(CLASSES)]]), **{str(k): torch.tensor([[float(k)]]) for k in range(CLASSES)}}
    empty = 1 if name == "ti2v" else 0  # Mochi's is no text at all
    return {"": torch.ones(empty, TEXT_WIDTH), "a boat": torch.randn(3, TEXT_WIDTH)}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Train a tiny model of a base on random clips: ``run("mochi", "first", steps=4, method={"kind": "full"})``."""

    def start(name: str, output: str, *, clips: int = 4, resume: bool = False, **changes: Any) -> Path:
        data = tmp_path / f"{name}-{clips}"
        if not data.exists():
            torch.manual_seed(0)
            write_dataset(data, clips=clips, shape=SHAPES[name], texts=texts_of(name))
        config = make_config(data, tmp_path / output, **{"data": {"held_out_share": 0.0}, **changes})
        return train(config, transformer=PARTS[name]()["transformer"], resume=resume)

    return start


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder) if "loss" in entry]


# ---- the same numbers as the originals -------------------------------------------------------------------------------


def test_mochi_is_trained_as_recorded(
    golden_tensors: Callable[[str], dict[str, Tensor]], golden_json: Callable[[str], Any]
) -> None:
    recorded = golden_tensors("mochi/training/objective")
    grid = training_grid(1.0, MOCHI)
    assert torch.equal(grid, recorded["training_table_1000"][:999])  # its trainer never draws the last two
    assert torch.equal(grid[recorded["table_index"]], recorded["sigma"])
    clean, noise, sigmas = recorded["z0_dit"], recorded["eps"], recorded["sigma"]
    noisy = MOCHI.add_noise(clean, noise, sigmas)
    torch.testing.assert_close(noisy, recorded["z_t_consistent"], rtol=0, atol=1e-6)
    torch.testing.assert_close(-MOCHI.target(clean, noise), recorded["target_consistent"], rtol=0, atol=1e-6)

    model = PusaMochiTransformer3DModel.from_config(golden_json("mochi/transformer/config")["diffusers"])
    model.load_state_dict(golden_tensors("mochi/transformer/weights_diffusers"))
    with torch.no_grad():
        output = model(
            noisy, recorded["text_features"], MOCHI.timesteps_of(sigmas), recorded["text_mask"], return_dict=False
        )[0]
    torch.testing.assert_close(output, recorded["pred_consistent"], rtol=0, atol=2e-5)  # of 4.4, on another CPU
    errors = frame_errors(MOCHI.prediction(output, 12), MOCHI.target(clean, noise))
    objective = config_for(MOCHI).objective
    torch.testing.assert_close(
        clip_losses(errors, sigmas, objective).mean()[None], recorded["loss_consistent"], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("case", ["equal", "i2v_frame0_zero", "all_unequal"])
def test_fvdm_is_trained_as_recorded(
    case: str, golden: Path, golden_tensors: Callable[[str], dict[str, Tensor]]
) -> None:
    recorded = golden_tensors("fvdm/q_sample_and_loss")
    clean, noise = (recorded[name].transpose(1, 2) for name in ("x_start", "noise"))  # [B, C, F, h, w]
    found = {name.removeprefix(f"{case}."): value for name, value in recorded.items() if name.startswith(f"{case}.")}
    sigmas = (found["t"] + 1) / 1000
    assert torch.isin(sigmas, training_grid(1.0, FVDM)).all()
    noisy = FVDM.add_noise(clean, noise, sigmas)
    torch.testing.assert_close(noisy, found["x_t"].transpose(1, 2), rtol=0, atol=1e-6)

    model = load_checkpoint(golden / "fvdm/weights_unconditional.safetensors", num_heads=3)
    with torch.no_grad():
        output = model(noisy, FVDM.timesteps_of(sigmas), return_dict=False)[0]
    errors = frame_errors(FVDM.prediction(output, 4), FVDM.target(clean, noise))
    mse = clip_losses(errors, sigmas, config_for(FVDM).objective)
    torch.testing.assert_close(mse, found["mse"], rtol=1e-5, atol=0)
    whole = mse + FVDM.further_loss(output, clean, noise, noisy, sigmas)
    torch.testing.assert_close(whole, found["loss"], rtol=1e-4, atol=0)


def test_the_levels_of_fvdm_are_its_thousand_timesteps() -> None:
    assert torch.equal(FVDM.timesteps_of(training_grid(1.0, FVDM)), torch.arange(999.0, -1, -1))


def test_a_frame_of_fvdm_has_its_own_time_in_a_fifth_of_the_clips() -> None:
    objective, generator = config_for(FVDM).objective, torch.Generator().manual_seed(0)
    draws = torch.stack([draw_sigmas(8, objective, generator, base=FVDM) for _ in range(1000)])
    shared = (draws == draws[:, :1]).all(dim=1).float().mean()
    assert shared == pytest.approx(0.8, abs=0.04)
    assert draws.mean() == pytest.approx(0.5, abs=0.02)


# ---- what a configuration leaves open --------------------------------------------------------------------------------


def config_for(base: Any, **objective: Any) -> TrainConfig:
    return TrainConfig.model_validate({"objective": objective}).resolved(base)


def test_unset_fields_are_those_of_the_base() -> None:
    wan, mochi, fvdm = (config_for(base) for base in (WAN, MOCHI, FVDM))
    assert wan.model_dump() == TrainConfig().model_dump()
    assert wan.method.targets == LORA_TARGETS
    assert LORA_TARGETS == ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")  # of the released ones
    assert mochi.method.targets == MOCHI.lora_targets
    assert (mochi.objective.shift, mochi.objective.weighting, mochi.objective.asynchronous) == (1, "none", 1)
    assert (fvdm.objective.shift, fvdm.objective.weighting, fvdm.objective.asynchronous) == (1, "none", 0.2)
    assert config_for(FVDM, asynchronous=1.0).objective.asynchronous == 1.0
    assert config_for(MOCHI, shift=2.0).objective.shift == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("weighting", "per_frame"), ("clean_frames", 0.1), ("times", "image_to_video"), ("shift", 3.0)],
)
def test_what_a_base_cannot_be_trained_with_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{field}={value}: FVDM is trained with"):
        config_for(FVDM, **{field: value})


@pytest.mark.parametrize(("name", "base"), [("pusa-v0.5", MOCHI), ("fvdm", FVDM)])
def test_the_ready_configurations_suit_their_base(name: str, base: Any) -> None:
    config = load_config(name)
    assert config.resolved(base).objective.model_dump() == config.model_copy().resolved(base).objective.model_dump()
    assert config.method.kind == "full"


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ti2v", "mochi", "fvdm", "fvdm with classes"])
def test_the_loss_of_one_clip_falls(name: str, run: Callable[..., Path]) -> None:
    found = losses(run(name, "run", clips=1, steps=30, method={"kind": "full"}, optimizer={"lr": 3e-3}))
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5])


@pytest.mark.parametrize("name", ["mochi", "fvdm with classes"])
def test_a_resumed_run_goes_on_to_the_bit(name: str, run: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {
        "steps": 4,
        "ema_decay": 0.9,
        "objective": {"caption_dropout": 0.5},
        "method": {"kind": "full"},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
    }
    whole = run(name, "whole", **settings)
    weights = "model/transformer/diffusion_pytorch_model.safetensors"
    expected = load_file(whole / weights)
    shutil.copytree(whole, whole.with_name("stopped"))
    stopped = whole.with_name("stopped")
    shutil.rmtree(checkpoints(stopped)[4])
    shutil.rmtree(stopped / "model")
    made = load_file(run(name, "stopped", resume=True, **settings) / weights)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], expected[key]) for key in expected)
    assert losses(stopped) == losses(whole)


@pytest.mark.parametrize(("name", "layers"), [("mochi", 34), ("fvdm", 16)])
def test_a_lora_of_any_base_goes_out_and_in(name: str, layers: int, run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run(name, "run", steps=2)
    exported = export_run(folder, tmp_path / "other.safetensors", layout="diffusers")[0]
    outputs = []
    for source in (folder, exported):
        pipe = PusaPipeline(**PARTS[name]())
        before = predicted(pipe, name)
        assert pipe.load_pusa(source, alpha=1.0) == layers
        outputs.append(predicted(pipe, name))
        assert not torch.equal(outputs[-1], before)
    assert torch.equal(*outputs)
    other = PusaPipeline(**PARTS["fvdm" if name == "mochi" else "mochi"]())
    with pytest.raises(
        ValueError, match=rf"is a LoRA for {name}, not for".replace("fvdm", "FVDM").replace("m", "[mM]")
    ):
        other.load_pusa(folder)


@torch.no_grad()
def predicted(pipe: PusaPipeline, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, *SHAPES[name], generator=generator)
    embeds = next(reversed(texts_of(name).values()))[None] if name == "fvdm" else torch.ones(1, 3, TEXT_WIDTH)
    times = pipe.base.timesteps_of(torch.full((1, latents.shape[2]), 0.5))
    arguments = pipe.base.text_inputs(embeds, latents)
    return pipe.transformer(hidden_states=latents, timestep=times, return_dict=False, **arguments)[0]


@pytest.mark.parametrize(("name", "write"), [("mochi", mochi_folder), ("fvdm", fvdm_folder)])
def test_all_weights_go_out_as_a_model_that_generates(name: str, write: Callable[[Path], Path], tmp_path: Path) -> None:
    source, data = write(tmp_path / "source"), tmp_path / "data"
    write_dataset(data, clips=4, shape=SHAPES[name], texts=texts_of(name))
    changes: dict[str, Any] = {"model": {"source": str(source)}, "method": {"kind": "full"}}
    config = make_config(data, tmp_path / "run", steps=2, ema_decay=0.5, **changes)
    folder = train(config)
    with pytest.raises(ValueError, match=r"give a new folder, not .*source"):
        export_run(folder, source)
    (target,) = export_run(folder, tmp_path / "model")
    pipe = PusaPipeline.from_pretrained(target)
    pipe.set_progress_bar_config(disable=True)
    trained = load_file(folder / "model/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, trained[key]) for key, value in pipe.transformer.state_dict().items())

    side = 8 * SHAPES[name][2]
    picture = np.full((side, side, 3), 0.5, dtype=np.float32)
    arguments: dict[str, Any] = {"num_frames": 7, "width": side, "height": side, "num_inference_steps": 2}
    condition = PusaCondition(image=picture, latent_index=0, noise_multiplier=0.0)
    video = pipe("", conditions=[condition], generator=torch.Generator().manual_seed(0), **arguments).frames
    assert np.shape(video) == (1, 7, side, side, 3)
    assert np.isfinite(video).all()
