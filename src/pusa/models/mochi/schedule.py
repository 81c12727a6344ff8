"""Make Mochi's grid of sigmas."""

import torch
from torch import Tensor

THRESHOLD_NOISE = 0.025  # the first half of the steps is linear, and removes so much of the noise


def linear_quadratic(num_steps: int) -> Tensor:
    """Compute the sigmas of genmo's schedule: the first half of the steps is linear, the rest quadratic.

    Args:
        num_steps: 1 or more; the original cannot do 1, which is [1, 0] here.

    Returns:
        fp32 ``[num_steps + 1]`` on the CPU, falling from 1 (noise) to 0.

    Raises:
        ValueError: `num_steps` is below 1.
    """
    # Here, as its module is a whole pipeline, which every start would wait for.
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: give 1 or more")
    sigmas = linear_quadratic_schedule(num_steps, THRESHOLD_NOISE) if num_steps > 1 else [1.0]
    return torch.tensor([*sigmas, 0.0], dtype=torch.float32)
