"""The grid of sigmas is genmo's, to the bit."""

from collections.abc import Callable

import pytest
import torch

from pusa.models.mochi.schedule import linear_quadratic


def test_is_the_recorded_table_to_the_bit(golden_json: Callable) -> None:
    tables = golden_json("mochi/sampler/tables")
    recorded = {int(n): table["sigmas"] for n, table in tables["tables"].items() if "sigmas" in table}
    assert {2, 3, 64} <= recorded.keys()
    for steps, sigmas in recorded.items():
        ours = linear_quadratic(steps)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, torch.tensor(sigmas, dtype=torch.float32)), steps
    long, training = linear_quadratic(1000), tables["training_table_1000"]
    assert torch.equal(long[:8], torch.tensor(training["first"]))
    assert torch.equal(long[-8:], torch.tensor(training["last"]))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64])
def test_falls_from_one_to_zero(steps: int) -> None:
    sigmas = linear_quadratic(steps)
    assert (len(sigmas), sigmas[0], sigmas[-1]) == (steps + 1, 1, 0)
    assert (sigmas.diff() < 0).all()


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps=0: give 1 or more"):
        linear_quadratic(0)
