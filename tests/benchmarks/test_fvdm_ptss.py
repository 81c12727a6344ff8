"""The benchmark of FVDM's p trains, makes clips of every task, and measures what it says."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

ptss: Any = importlib.import_module("fvdm_ptss")


def test_it_runs_for_each_p_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--steps", "2", "--batch", "2", "--clips", "4", "--tests", "3", "--sampling-steps", "2")
    network = ("--patch", "8", "--width", "32", "--depth", "2")
    ptss.main(["--p", "0", "1", *sizes, *network, "-o", str(tmp_path / "found.json"), "--work", str(tmp_path)])
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["results"]) == ["p 0", "p 1", "without a model"]
    assert found["results"]["p 1"]["steps"] == 2
    still, faded = (
        found["results"]["without a model"][task]["psnr_db"] for task in ("image to video", "interpolation")
    )
    assert faded > still > 5
    assert found["results"]["p 0"]["interpolation"]["psnr_db"] < faded  # it has learned nothing
    assert json.loads((tmp_path / "p-0" / "config.json").read_text())["objective"]["asynchronous"] == 0
    assert "without a model" in capsys.readouterr().out


def test_given_frames_are_kept_and_do_not_count() -> None:
    plan = ptss.Plan(1, None, 1, 1, 1, 2, patch=8, width=32, depth=2, seed=0)
    clips = torch.rand(2, 3, ptss.FRAMES, ptss.SIDE, ptss.SIDE) * 2 - 1
    made = ptss.make_clips(ptss.new_network(plan).eval(), clips, (0, 7), plan)
    assert torch.equal(made[:, :, [0, 7]], clips[:, :, [0, 7]])
    changed = clips.clone()
    changed[:, :, 0] = 0
    changed[:, :, 3] += 0.2
    assert ptss.psnr(changed, clips, (0,)) == pytest.approx(10 * math.log10(4 * 7 / 0.04), rel=1e-4)


def test_the_features_see_motion() -> None:
    moving = torch.rand(16, 3, ptss.FRAMES, ptss.SIDE, ptss.SIDE, generator=torch.Generator().manual_seed(0))
    still = moving[:, :, :1].expand_as(moving)
    assert ptss.simple_features(moving).shape == (16, 144)
    of_moving, of_still = ptss.simple_features(moving), ptss.simple_features(still)
    assert ptss.frechet_distance(of_moving, of_moving) == pytest.approx(0, abs=1e-6)
    assert ptss.frechet_distance(of_moving, of_still) > 1e-3
    assert not ptss.simple_features(still)[:, 96:].any()
