"""Sample by Euler steps down a table with one column of sigmas per latent frame.

The whole method is the sigma table ``[N + 1, B, F]``: row k holds the sigma of each latent frame before step k. Frame f
follows ``x = (1 - sigma) * data + sigma * noise`` (flow matching); a step is ``x += (sigma_next - sigma) * velocity``
along each column on its own. Equal columns are text-to-video; a column of zeros is a frame that is kept; a noise
multiplier m scales a column (Pusa V1.0, arXiv 2507.16116, Algorithm 1 and appendix B).
"""

import json
import logging
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from pusa.models.mochi.schedule import linear_quadratic
from pusa.sigma_table import PusaSchedulerOutput, SigmaTableScheduler, check_start, check_table, over_latents
from pusa.waves import Turn, Wave

__all__ = [
    "PusaFlowMatchEulerScheduler",
    "PusaSchedulerOutput",
    "check_scheduler",
    "check_start",
    "check_table",
    "from_other",
    "shifted",
    "turn_sigmas",
    "wave_sigmas",
]

logger = logging.getLogger(__name__)


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """Shift sigmas towards high noise, as Wan does: ``shift * s / (1 + (shift - 1) * s)``; keeps 0 and 1."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def wave_sigmas(num_frames: int, num_inference_steps: int, *, delay: int = 1, shift: float = 5.0) -> Tensor:
    """Build a table in which each latent frame starts `delay` steps after the one before it.

    Early frames reach 0, and can be decoded, while later ones are still noise; with ``delay=0`` all columns are equal.
    (Rolling tables of this kind: Rolling Diffusion Models, arXiv 2402.09470.)

    Args:
        num_frames: latent frames F, at least 1.
        num_inference_steps: steps N that each frame takes, at least 1.
        delay: steps between the starts of neighbouring frames, at least 0.
        shift: flow shift of each column.

    Returns:
        fp32 ``[N + delay * (F - 1) + 1, F]``, from all 1 to all 0: the `frame_sigmas` of `set_timesteps`.

    Raises:
        ValueError: an argument is out of its range.
    """
    for name, value, least in (
        ("num_frames", num_frames, 1),
        ("num_inference_steps", num_inference_steps, 1),
        ("delay", delay, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value} is below {least}")
    wave = Wave(num_frames, num_inference_steps, delay)
    grid = shifted(torch.linspace(1, 0, num_inference_steps + 1), shift)
    return turn_sigmas(wave, Turn(0, num_frames, 0, wave.total_steps), grid)


def turn_sigmas(wave: Wave, turn: Turn, grid: Tensor) -> Tensor:
    """Build the table of one turn of a wave, fp32 ``[steps + 1, length]``; the columns of kept frames are 0.

    Columns of frames that do not move in the turn do not change at all.

    Args:
        grid: sigmas of one frame from its start to its end, ``[wave.steps + 1]``: a scheduler's `base_sigmas`.
    """
    rows = torch.arange(turn.first, turn.last + 1).unsqueeze(1)
    frames = range(turn.start, turn.start + turn.length)
    starts = torch.tensor([wave.starts.get(frame, -wave.steps) for frame in frames])  # kept: ended before step 0
    steps_taken = (rows - starts).clamp(0, wave.steps)  # [rows, length]
    return grid[steps_taken]


class PusaFlowMatchEulerScheduler(SigmaTableScheduler):
    """Sample by Euler steps of flow matching, with a sigma per step, sample and latent frame.

    `set_timesteps` fixes the table in fp32, and each step has its row. The original finds a step by its
    nearest timestep instead, which picks wrong ones above 50 steps and when every frame is conditioned.

    Args:
        num_train_timesteps: scale between sigma (0..1) and the timestep given to the model.
        shift: flow shift; the original uses 5 for Wan2.1 and Wan2.2 alike.
        solver_order: 1 is Euler. 2 corrects each step by the velocity of the one before it (Adams-Bashforth, its slope
            capped at that of equal steps): nearer the exact flow at 5 to 10 steps, see docs/solvers.md. A resumed run
            begins with an Euler step again, so only Euler resumes to the bit.
        reference_rounding: truncate the timesteps given to the model to integers, as the original's multi-frame and
            video-to-video pipelines do; for comparison with them only.
        sigma_grid: sigmas before the shift: "linear", or Mochi's "linear_quadratic".
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 5.0,
        solver_order: int = 1,
        reference_rounding: bool = False,
        sigma_grid: Literal["linear", "linear_quadratic"] = "linear",
    ) -> None:
        if sigma_grid not in ("linear", "linear_quadratic"):
            raise ValueError(f"sigma_grid={sigma_grid!r} is neither 'linear' nor 'linear_quadratic'")
        if not shift > 0:
            raise ValueError(f"shift={shift} is not above 0")
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order={solver_order} is neither 1 nor 2")
        self._velocity_before: Tensor | None = None

    def to_json_string(self) -> str:
        """Write the configuration under the nearest stock class, so that any diffusers program can load it."""
        config = json.loads(super().to_json_string())
        if config["sigma_grid"] == "linear_quadratic":
            config["invert_sigmas"] = True  # what that class calls timesteps of Mochi's
        for name in ("reference_rounding", "solver_order", "sigma_grid"):  # unknown to that class
            del config[name]
        return json.dumps({**config, "_class_name": FlowMatchEulerDiscreteScheduler.__name__}, indent=2) + "\n"

    def base_sigmas(self, num_inference_steps: int) -> Tensor:
        """Return the shifted grid of N steps, from 1 to 0: fp32 ``[N + 1]``."""
        is_linear = self.config.sigma_grid == "linear"
        sigmas = torch.linspace(1, 0, num_inference_steps + 1) if is_linear else linear_quadratic(num_inference_steps)
        return shifted(sigmas, self.config.shift)

    def _forget_steps(self) -> None:
        self._velocity_before = None

    def frame_timesteps(self, step_index: int) -> Tensor:
        """Return the model's timesteps ``[B, F]`` for step `step_index`: 1000 times that row of the table."""
        timesteps = super().frame_timesteps(step_index)
        return timesteps.trunc() if self.config.reference_rounding else timesteps

    def add_noise(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Mix each frame of ``clean`` with ``noise`` at its first sigma, to start sampling (exact at 0 and 1).

        Both are ``[B, C, F, H, W]``; a free frame, whose first sigma is 1, may hold anything finite in ``clean``.
        """
        sigma = over_latents(self.frame_sigmas[0]).to(noise.device)
        return (1 - sigma) * clean + sigma * noise

    def mix(self, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
        return (1 - sigma) * clean + sigma * noise

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> PusaSchedulerOutput | tuple[Tensor]:
        """Move every frame from its sigma to its next one.

        Args:
            model_output: velocity ``[B, C, F, H, W]``, any floating dtype.
            timestep: ``timesteps[k]`` of this step; ignored after `set_begin_index`, from which on steps are counted.
            sample: latents ``[B, C, F, H, W]`` before the step. Frames whose sigma stays are returned unchanged.
            return_dict: a `PusaSchedulerOutput` rather than a tuple of one.

        Raises:
            ValueError: `timestep` is not in this table, or all steps are done.
        """
        k = self._index_of(timestep)
        change = over_latents(self.frame_sigmas[k + 1] - self.frame_sigmas[k])
        velocity = model_output.float()
        if self.config.solver_order == 2:
            velocity, self._velocity_before = self._extrapolated(k, change, velocity), velocity
        prev_sample = (sample.float() + change * velocity).to(sample.dtype)
        self._step_index = k + 1
        return PusaSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _extrapolated(self, k: int, change: Tensor, velocity: Tensor) -> Tensor:
        """Extrapolate the velocity to the middle of the step by the step before; unchanged in a frame's first step."""
        if self._velocity_before is None or self._step_index != k:
            return velocity
        change_before = over_latents(self.frame_sigmas[k] - self.frame_sigmas[k - 1])
        ratio = torch.where(change_before == 0, 0.0, change / change_before).clamp(max=1)
        return velocity + ratio / 2 * (velocity - self._velocity_before)

    def denoised(self, step_index: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """Predict the clean latents at step `step_index`: move each frame down to sigma 0 at once."""
        return sample.float() - over_latents(self.frame_sigmas[step_index]) * model_output.float()


def from_other(scheduler: SchedulerMixin) -> SigmaTableScheduler:
    """Make a scheduler of this package in place of any other: with the shift of a flow-matching Euler one, else 5.

    A warning tells what another one would have done and this one does not.
    """
    if isinstance(scheduler, SigmaTableScheduler):
        return scheduler
    name, config = type(scheduler).__name__, scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        ours = PusaFlowMatchEulerScheduler(shift=config.shift)
        lost = sorted(option for option in _UNSUPPORTED if config.get(option))
        if lost:
            logger.warning("%s of %s is not supported here and has no effect", ", ".join(lost), name)
        return ours
    shift = config.get("flow_shift") or config.get("shift")
    theirs = f", not {shift:g}" if isinstance(shift, int | float) and shift != 5 else ""
    logger.warning(
        "%s has one sigma for all frames: PusaFlowMatchEulerScheduler takes its place, with shift 5%s (give one with "
        "shift=... for another)",
        *(name, theirs),
    )
    return PusaFlowMatchEulerScheduler()


_UNSUPPORTED = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)


def check_scheduler(scheduler: Any) -> None:
    """Raise TypeError for a scheduler that cannot sample with one sigma per latent frame."""
    if not isinstance(scheduler, SigmaTableScheduler):
        config = getattr(scheduler, "config", {})
        shift = config.get("flow_shift") or config.get("shift") or 5
        example = f"PusaFlowMatchEulerScheduler(shift={shift:g})" if isinstance(shift, int | float) else "one"
        raise TypeError(
            f"scheduler is a {type(scheduler).__name__}, which has one sigma for all frames; this pipeline needs one "
            f"per latent frame: give {example} (solver_order=2 for a second-order one)"
        )
