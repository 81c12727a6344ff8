"""Two experts: each serves its own steps with its own guidance and LoRA alpha, as the recorded numbers show.

`tests/benchmarks/test_parity.py` compares every recorded case; here is what the original has no setting for, and proof
that a wrong expert's number would be seen.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

recorded = importlib.import_module("_golden")
checks = importlib.import_module("_wan22_checks")

LORA_CASE = "i2v_0.2_cfg1_lora_1.5_1.4_4steps"  # steps 0 and 1 are the high-noise expert's, 2 and 3 the other's


@pytest.fixture(scope="module")
def data(golden: Path) -> Any:
    return recorded.Golden(golden)


def test_each_expert_has_a_guidance_of_its_own(data: Any) -> None:
    case = "i2v_0.2_4steps"
    record, call = checks.request_of(data, case)
    pipe = checks.two_experts(data, reference_rounding=record["pipeline"] != "t2v")
    walked = checks.walk(pipe, **call, guidance_scale_2=1.5)
    theirs = data.tensors(f"wan22/case_{case}")["latents"]
    assert (torch.stack(walked.latents[:2]) - theirs[:2]).abs().max() < 2e-5  # guidance 3, as recorded
    assert (walked.latents[3] - theirs[3]).abs().max() > 0.1
    rest = call | {"guidance_scale": 1.5, "latents": walked.latents[1].unsqueeze(0)}
    assert torch.equal(checks.walk(pipe, **rest, start_step=2).latents[-1], walked.latents[-1])


@pytest.mark.parametrize(("alphas", "first_wrong_step"), [({"high": 1.4}, 0), ({"low": 1.5}, 2)])
def test_each_expert_has_an_alpha_of_its_own(data: Any, alphas: dict[str, float], first_wrong_step: int) -> None:
    _, call = checks.request_of(data, LORA_CASE)
    pipe = checks.two_experts(data, reference_rounding=True)
    theirs = data.tensors(f"wan22/case_{LORA_CASE}")["latents"]
    checks.load_loras(data, pipe, **({"high": 1.5, "low": 1.4} | alphas))
    wrong = (torch.stack(checks.walk(pipe, **call).latents) - theirs).abs().amax((1, 2, 3, 4))
    assert (wrong < 4e-5).tolist() == [step < first_wrong_step for step in range(4)]
    pipe.set_alpha({"transformer": 1.5, "transformer_2": 1.4})
    assert (torch.stack(checks.walk(pipe, **call).latents) - theirs).abs().max() < 4e-5
