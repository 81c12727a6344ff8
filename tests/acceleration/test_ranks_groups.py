"""Two and four ranks divide the tokens of a pass, and the video is that of one process within rounding.

On CPU ranks with gloo. The test is rank 0, and every test starts its own.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from gloo import all_gather_of_any_size
from rank_samples import IMAGE, run, start

from pusa.acceleration.decisions import Parallel

pytestmark = pytest.mark.slow  # each rank imports torch, diffusers and transformers


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    """Keep what one process makes of each case, once for all tests."""
    return {}


@pytest.mark.parametrize(
    "parallel",
    [Parallel(ulysses=2), Parallel(guidance=2, ulysses=2)],
    ids=["ulysses 2", "guidance 2 x ulysses 2"],
)
def test_divided_tokens_give_the_video_within_rounding(
    parallel: Parallel, files: Path, alone: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "all_gather", all_gather_of_any_size)
    cases: dict[str, dict[str, Any]] = {
        "even": {"conditions": [IMAGE]},  # 120 tokens, 24 to a frame: 2 ranks divide the third frame
        "uneven": {"width": 80, "height": 48},  # 75 tokens
        "long": {"frames": 33},
    }
    for name, asked in cases.items():
        if name not in alone:
            alone[name] = run(files, name, None, **asked)
    with start(parallel.ranks, parallel, module="gloo_follower") as ranks:
        for name, asked in cases.items():
            found = run(files, f"{name} shared", ranks, **asked)
            assert np.abs(found.astype(int) - alone[name]).max() <= 1, name
