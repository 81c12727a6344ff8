"""A launcher that would wrap the model by itself is refused, with what to set instead."""

import pytest

from pusa.training.launch import launched


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "use FSDP2 instead: parallel.fsdp=true"),
        ("ACCELERATE_USE_FSDP", "the trainer shards by itself: set parallel.fsdp=true"),
    ],
)
def test_a_launcher_that_wraps_the_model_is_refused(
    variable: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError) as refused:
        launched()
    assert str(refused.value) == (
        f"accelerate is configured to wrap the model ({variable}): launch without it, and {remedy}"
    )


def test_alone_there_is_one_process_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = launched()
    assert (processes.rank, processes.world, processes.is_main, processes.data_parallel) == (0, 1, True, 1)
    assert processes.mean([1.0, 2.0]) == [1.0, 2.0]
    assert processes.agree(7) == 7
