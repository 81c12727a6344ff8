"""Two ranks make the video that one process makes, to the bit, for every task.

On CPU ranks with gloo. The test is rank 0; the other rank is a process that all tests share.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_samples import IMAGE, LAST, VIDEO, run, start

from pusa import zoo
from pusa.acceleration.decisions import LoadOptions
from pusa.acceleration.ranks import Ranks
from pusa.generate import generate, load_pipeline
from pusa.request import GenerationRequest

pytestmark = pytest.mark.slow  # each rank imports torch, diffusers and transformers

SMALL = {"width": 48, "height": 32}
TASKS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"conditions": [IMAGE]},
    "keyframes": {"conditions": [IMAGE, LAST]},
    "completion": {"conditions": [{**VIDEO, "positions": [0, 1, 2], "noise": [0.0, 0.3, 0.4]}]},
    "extension": {"task": "extend", "conditions": [VIDEO]},
    "transition": {"task": "transition", "conditions": [VIDEO, VIDEO]},
    "loop": {"task": "loop"},
    "long": {"frames": 33},
}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with start(2) as ranks:
        yield ranks


@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_make_every_task_equal_to_the_bit(task: str, files: Path, two: Ranks) -> None:
    asked = {**SMALL, **TASKS[task]}
    expected = run(files, "one", None, **asked)
    assert np.array_equal(run(files, "two", two, **asked), expected)


def test_two_ranks_make_a_video_of_the_embedded_model_equal_to_the_bit(files: Path, two: Ranks) -> None:
    if "mini" not in zoo.ZOO:
        pytest.skip("the weights of the embedded model are not in src/pusa/mini/weights")
    asked = {"model": "mini", "prompt": "a red apple", "steps": 2, "frames": 5, "conditions": [IMAGE]}
    expected = run(files, "one", None, **asked)
    found = run(files, "two", two, **asked)
    assert np.array_equal(found, expected)
    assert found.std() > 10  # a picture


def test_both_ranks_compute_one_pass_each(files: Path, two: Ranks) -> None:
    calls: list[int] = []
    pipe = load_pipeline("tiny", load=LoadOptions(gpus=2))
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        run(files, "shared", two)
    finally:
        handle.remove()
    assert len(calls) == 2  # one pass in each of two steps


def test_without_guidance_the_ranks_share_the_tokens(files: Path, two: Ranks) -> None:
    expected = run(files, "one", None, guidance=1.0)
    pipe = load_pipeline("tiny", load=LoadOptions(gpus=2))
    tokens: list[int] = []
    handle = pipe.transformer.blocks[1].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    try:
        found = run(files, "two", two, guidance=1.0)
    finally:
        handle.remove()
    assert tokens == [60, 60]  # of 120, in each of two steps
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_stopped_run_resumes_on_all_ranks_to_the_same_video(files: Path, two: Ranks) -> None:
    asked: dict[str, Any] = {**SMALL, "frames": 33, "steps": 3}
    expected = run(files, "whole", None, **asked)
    request = GenerationRequest(model="tiny", prompt="a cat", seed=0, **asked)
    steps: list[int] = []
    events = generate(
        request,
        files / "stopped",
        ranks=two,
        checkpoint=files / "state",
        checkpoint_every=1,
        stop=lambda: len(steps) >= 4,
    )
    for event in events:
        if event.kind == "step":
            steps.append(event.step)  # type: ignore[union-attr]
    assert steps[-1] < 6
    assert not (files / "stopped").exists()
    assert (files / "state").exists()
    resumed = run(files, "resumed", two, **asked, checkpoint=files / "state", checkpoint_every=1)
    assert np.array_equal(resumed, expected)


def test_a_faulty_request_leaves_the_ranks_in_order(files: Path, two: Ranks) -> None:
    with pytest.raises(ValueError, match="latent_index=99: this video has 5"):
        run(files, "bad", two, conditions=[{**IMAGE, "positions": [99]}])
    assert np.array_equal(run(files, "good", two, **SMALL), run(files, "alone", None, **SMALL))


def test_a_pipeline_of_the_caller_is_refused(files: Path, two: Ranks) -> None:
    request = GenerationRequest(model="tiny", prompt="a cat")
    with pytest.raises(ValueError, match="leave the pipeline out, or the ranks"):
        generate(request, files / "x.mp4", ranks=two, pipeline=load_pipeline("tiny"))
