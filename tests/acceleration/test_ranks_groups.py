"""Two and four ranks divide the tokens of a pass, and the video is that of one process within rounding.

On CPU ranks with gloo. The test is rank 0, and every test starts its own.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from gloo import all_gather_of_any_size
from rank_samples import IMAGE, run, start, write_inputs

from pusa.acceleration.decisions import Parallel

pytestmark = pytest.mark.slow  # each rank imports torch, diffusers and transformers


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which is the current one, with two pictures and a video."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "parallel",
    [Parallel(ulysses=2), Parallel(guidance=2, ulysses=2)],
    ids=["ulysses 2", "guidance 2 x ulysses 2"],
)
def test_divided_tokens_give_the_video_within_rounding(
    parallel: Parallel, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "all_gather", all_gather_of_any_size)
    cases: dict[str, dict[str, Any]] = {
        "even": {"conditions": [IMAGE]},  # 120 tokens, 24 to a frame: 2 ranks divide the third frame
        "uneven": {"width": 80, "height": 48},  # 75 tokens
        "long": {"frames": 33},
    }
    expected = {name: run(files, name, None, **asked) for name, asked in cases.items()}
    with start(parallel.ranks, parallel, module="gloo_follower") as ranks:
        for name, asked in cases.items():
            found = run(files, f"{name} shared", ranks, **asked)
            assert np.abs(found.astype(int) - expected[name]).max() <= 1, name
