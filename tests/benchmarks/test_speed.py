"""The benchmarks of speed rehearse every line they have, and compare like with like."""

import importlib
import json

import pytest

speed, changes, subjects, original, draft = map(
    importlib.import_module, ("speed", "_speed_changes", "_speed_subjects", "original", "draft")
)


@pytest.mark.slow  # it compiles
def test_every_change_is_rehearsed_and_undone(capsys: pytest.CaptureFixture[str]) -> None:
    toys = ("--tiny", "--compiler", "eager")  # the test below has the compiler that takes half a minute
    assert speed.main([*toys, "--task", "completion"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["line"]: row for row in record["rows"]}
    measured = {change.name for change in changes.CHANGES} - set(record["not_measured"])
    assert {"full computation", "all together", "all, fast", *measured} == set(rows)
    assert all(row["seconds"] > 0 and row["peak MB"] > 0 for row in rows.values())
    assert rows["merged adapter"]["PSNR"] > 60  # the same, but for rounding
    assert rows["fast"]["PSNR"] < rows["merged adapter"]["PSNR"]


@pytest.mark.slow  # it compiles
def test_the_loops_share_weights_noise_and_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    assert original.main(["--tiny"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [row["variant"] for row in record["rows"]]
    assert names == ["stock, adapter", "pusa, adapter", "pusa, merged", "pusa, merged, compiled"]
    assert {"stock, time", "stock, memory"} == set(record["ratios"])


def test_kept_motion_is_one_for_the_same_changes_and_none_for_others() -> None:
    import torch

    video = torch.randn(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    brighter = 0.5 * video + 0.2
    assert draft.kept_motion(video, brighter).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert draft.kept_motion(video, video.flip(0)).abs().max() < 0.5
