"""The numbers are the original's: recorded tensors are met within tolerance, as `benchmarks/parity.py` prints."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pusa.scheduler import PusaFlowMatchEulerScheduler

parity = importlib.import_module("parity")
recorded = importlib.import_module("_golden")


@pytest.fixture(scope="module")
def data(golden: Path) -> Any:
    return recorded.Golden(golden)


@pytest.mark.parametrize("check", recorded.CHECKS, ids=lambda c: f"{c.component}: {c.case}")
def test_meets_the_recorded_number(check: Any, data: Any) -> None:
    measured = check.measure(data)
    assert measured.error <= measured.tolerance


@pytest.mark.parametrize("departure", recorded.DEPARTURES, ids=lambda d: f"{d.component}: {d.case}")
def test_a_listed_departure_is_still_one(departure: Any, data: Any) -> None:
    assert departure.measure(data) > 1e-3  # or it belongs among the checks


def test_every_recorded_case_is_checked(golden: Path) -> None:
    cases = {word for c in recorded.CHECKS + recorded.DEPARTURES for word in (c.case, *c.case.split())}
    names = [path.stem.removeprefix("case_") for path in golden.glob("**/case_*.safetensors")]
    names += [path.stem.removeprefix("loop_") for path in golden.glob("**/loop_*.safetensors")]
    trajectories = [path.stem for path in golden.glob("**/trajectory_*")]
    names += [stem.removeprefix("trajectory_").rsplit("_", 1)[0] for stem in trajectories]
    names += [path.stem for path in golden.glob("keys/wan*.json")] + [
        path.stem for path in golden.glob("keys/umt5*.json")
    ]
    names += json.loads((golden / "scheduler/tables.json").read_text())["tables"]
    unchecked = {name for name in names if name.removesuffix("frames") not in cases}
    assert unchecked == {
        "multi_frame_activations",  # inside multi_frame, whose output is checked
        "multi_frame_bf16",  # the original keeps no part in fp32 there
        "10_shift5.0_denoise0.6",  # img2img strength, which nothing here has
    }


def test_a_wrong_number_is_seen(golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    check = next(c for c in recorded.CHECKS if c.case == "v2v_0.0_0.3_0.4_0.5 fp32")
    monkeypatch.setattr(recorded, "CHECKS", [check])
    monkeypatch.setattr(parity, "CHECKS", [check])
    monkeypatch.setattr(parity, "DEPARTURES", [])
    assert parity.main(["--golden", str(golden)]) == 0
    set_timesteps = PusaFlowMatchEulerScheduler.set_timesteps

    def slightly_wrong(scheduler: Any, *args: Any, noise_multipliers: Any, **options: Any) -> None:
        wrong = torch.as_tensor(noise_multipliers) * (1 - 1e-5)
        set_timesteps(scheduler, *args, noise_multipliers=wrong, **options)

    monkeypatch.setattr(PusaFlowMatchEulerScheduler, "set_timesteps", slightly_wrong)
    assert parity.main(["--golden", str(golden)]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["failed"] == ["sampler, sigmas per frame: v2v_0.0_0.3_0.4_0.5 fp32"]
