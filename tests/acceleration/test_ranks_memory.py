"""Where memory runs out on one of several ranks, the run ends with the way out, and no file is left.

On CPU ranks with gloo. The test is rank 0, and every test starts its own.
"""

from pathlib import Path

import pytest
import torch
from memory_faults import run_out_of_memory
from rank_samples import run, start

from pusa import PusaWanTransformer3DModel
from pusa.acceleration.ranks import RankError

pytestmark = pytest.mark.slow  # each rank imports torch, diffusers and transformers

WAY_OUT = "give --gpus 1, where smaller plans take over, or --memory smallest"


def test_memory_that_runs_out_on_rank_0_tells_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out_of_memory(monkeypatch, PusaWanTransformer3DModel, "forward", call=2)
    with start(2) as ranks:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            run(tmp_path, "x", ranks)
        with pytest.raises(RankError, match="rank 0 of 2 has failed before: start the ranks again"):
            run(tmp_path, "y", ranks)
    assert str(caught.value).startswith("out of memory in step 2 of 2, at 96 x 64 and ")
    assert str(caught.value).endswith(f"; or {WAY_OUT}")
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_on_another_rank_names_it_and_tells_the_way_out(tmp_path: Path) -> None:
    with (
        start(2, module="memory_follower") as ranks,
        pytest.raises(RankError, match=f"^rank 1 of 2 has failed: out of memory: {WAY_OUT}$") as caught,
    ):
        run(tmp_path, "x", ranks)
    assert caught.value.rank == 1
    assert not list(tmp_path.iterdir())
