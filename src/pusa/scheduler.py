"""Sample by Euler steps down a table with one column of sigmas per latent frame.

The whole method is the sigma table ``[N + 1, B, F]``: row k holds the sigma of each latent frame before step k. Frame f
follows ``x = (1 - sigma) * data + sigma * noise`` (flow matching); a step is ``x += (sigma_next - sigma) * velocity``
along each column on its own. Equal columns are text-to-video; a column of zeros is a frame that is kept; a noise
multiplier m scales a column (Pusa V1.0, arXiv 2507.16116, Algorithm 1 and appendix B).
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from pusa.numerals import check_noise_multiplier

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
    rows = torch.arange(num_inference_steps + delay * (num_frames - 1) + 1).unsqueeze(1)
    steps_taken = (rows - delay * torch.arange(num_frames)).clamp(0, num_inference_steps)  # [rows, F]
    return shifted(torch.linspace(1, 0, num_inference_steps + 1), shift)[steps_taken]


@dataclass
class PusaSchedulerOutput(BaseOutput):
    """`prev_sample`: the latents after the step, ``[B, C, F, H, W]``, in the dtype of the latents before it."""

    prev_sample: Tensor


class PusaFlowMatchEulerScheduler(SchedulerMixin, ConfigMixin):
    """Flow-matching Euler sampler with a sigma per step, sample and latent frame.

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
    """

    config_name = "scheduler_config.json"
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 5.0,
        solver_order: int = 1,
        reference_rounding: bool = False,
    ) -> None:
        if not shift > 0:
            raise ValueError(f"shift={shift} is not above 0")
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order={solver_order} is neither 1 nor 2")
        self._velocity_before: Tensor | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.sigmas: Tensor
        self.timesteps: Tensor
        self.frame_sigmas: Tensor

    def to_json_string(self) -> str:
        """Write the configuration under the nearest stock class, so that any diffusers program can load it."""
        config = json.loads(super().to_json_string())
        for name in ("reference_rounding", "solver_order"):  # unknown to that class
            del config[name]
        return json.dumps({**config, "_class_name": FlowMatchEulerDiscreteScheduler.__name__}, indent=2) + "\n"

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        noise_multipliers: Tensor | None = None,
        frame_sigmas: Tensor | None = None,
    ) -> None:
        """Set the table and reset the step counter.

        Args:
            num_inference_steps: N, at least 1, for the shifted grid from 1 to 0; or give `frame_sigmas`.
            device: where `frame_sigmas` and `timesteps` live.
            noise_multipliers: ``[F]`` or ``[B, F]`` in 0..1, the factor of each column: 1 for a free frame, 0 for one
                kept exactly. None: every frame is free.
            frame_sigmas: any other table, ``[N + 1, F]`` or ``[N + 1, B, F]``, in 0..1 and never rising (see
                `wave_sigmas`); `noise_multipliers` scale it too. A last row above 0 leaves latents to continue from.

        Afterwards ``sigmas [N + 1]`` is the base grid (fp32, CPU), ``timesteps [N]`` is 1000 times it, and
        ``frame_sigmas`` the table ``[N + 1, B, F]``, with 1 for B or F where nothing distinguishes them.

        Raises:
            ValueError: a value is out of its range, a column rises, or not exactly one of `num_inference_steps` and
                `frame_sigmas` is given.
        """
        if (num_inference_steps is None) == (frame_sigmas is None):
            raise ValueError("give either num_inference_steps or frame_sigmas")
        if num_inference_steps is not None:
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps={num_inference_steps} is below 1")
            self.sigmas = shifted(torch.linspace(1, 0, num_inference_steps + 1), self.config.shift)
            table = self.sigmas.view(-1, 1, 1)
        else:
            table = _checked_table(frame_sigmas)
            self.sigmas = table.amax(dim=(1, 2))
        if noise_multipliers is not None:
            multipliers = _checked_multipliers(noise_multipliers)
            if any(a != b and 1 not in (a, b) for a, b in zip(table.shape[1:], multipliers.shape[1:], strict=True)):
                raise ValueError(
                    f"noise_multipliers of shape {list(multipliers.shape[1:])} do not fit frame_sigmas with rows of "
                    f"shape {list(table.shape[1:])} ([B, F])"
                )
            table = table * multipliers
        self.frame_sigmas = table.to(device)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self._step_index = self._begin_index = self._velocity_before = None

    def frame_timesteps(self, step_index: int) -> Tensor:
        """Return the model's timesteps ``[B, F]`` for step `step_index`: 1000 times that row of the table."""
        timesteps = self.frame_sigmas[step_index] * self.config.num_train_timesteps
        return timesteps.trunc() if self.config.reference_rounding else timesteps

    def finished_frames(self, step_index: int) -> int:
        """Count the leading latent frames that are clean, in every sample, after step `step_index`."""
        is_clean = (self.frame_sigmas[step_index + 1] == 0).all(dim=0)  # [F]
        return int(is_clean.cumprod(0).sum())

    def add_noise(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Mix each frame of ``clean`` with ``noise`` at its first sigma, to start sampling (exact at 0 and 1).

        Both are ``[B, C, F, H, W]``; a free frame, whose first sigma is 1, may hold anything finite in ``clean``.
        """
        sigma = _over_latents(self.frame_sigmas[0]).to(noise.device)
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
        change = _over_latents(self.frame_sigmas[k + 1] - self.frame_sigmas[k])
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
        change_before = _over_latents(self.frame_sigmas[k] - self.frame_sigmas[k - 1])
        ratio = torch.where(change_before == 0, 0.0, change / change_before).clamp(max=1)
        return velocity + ratio / 2 * (velocity - self._velocity_before)

    def denoised(self, step_index: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """Predict the clean latents at step `step_index`: move each frame down to sigma 0 at once."""
        return sample.float() - _over_latents(self.frame_sigmas[step_index]) * model_output.float()

    def _index_of(self, timestep: Tensor | float) -> int:
        steps = len(self.timesteps)
        if self._begin_index is not None:
            k = self._begin_index if self._step_index is None else self._step_index
            if k >= steps:
                raise ValueError(f"all {steps} steps are done: call set_timesteps to start again")
            return k
        # Without set_begin_index: look the timestep up. Where the table repeats it, prefer the step after the last one.
        matches = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not matches:
            raise ValueError(f"timestep={float(timestep):g} is none of the {steps} timesteps of this table")
        counted = self._step_index
        return matches[0] if counted is None or counted not in matches else counted

    @property
    def step_index(self) -> int | None:
        """Number of steps done, or None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """First step of sampling, or None before `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Count steps from `begin_index` on, without comparing timesteps (no device synchronisation)."""
        self._begin_index = begin_index
        self._step_index = self._velocity_before = None


def from_other(scheduler: SchedulerMixin) -> PusaFlowMatchEulerScheduler:
    """Make a scheduler of this package in place of any other: with the shift of a flow-matching Euler one, else 5.

    A warning tells what another one would have done and this one does not.
    """
    if isinstance(scheduler, PusaFlowMatchEulerScheduler):
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
    if not isinstance(scheduler, PusaFlowMatchEulerScheduler):
        config = getattr(scheduler, "config", {})
        shift = config.get("flow_shift") or config.get("shift") or 5
        example = f"PusaFlowMatchEulerScheduler(shift={shift:g})" if isinstance(shift, int | float) else "one"
        raise TypeError(
            f"scheduler is a {type(scheduler).__name__}, which has one sigma for all frames; this pipeline needs one "
            f"per latent frame: give {example} (solver_order=2 for a second-order one)"
        )


def check_table(
    scheduler: PusaFlowMatchEulerScheduler, table: Tensor, videos: int, frames: int, boundary_ratio: float | None
) -> None:
    """Check that a table ``[N + 1, F]`` or ``[N + 1, B, F]``, set in a scheduler, fits a call.

    Raises:
        ValueError: another number of videos or latent frames, or both experts of Wan2.2 at one step.
    """
    _, table_videos, table_frames = scheduler.frame_sigmas.shape
    if table_videos not in (1, videos):
        raise ValueError(f"frame_sigmas is for {table_videos} videos, this call makes {videos}")
    if table_frames not in (1, frames):
        raise ValueError(f"frame_sigmas has {table_frames} latent frames, this video has {frames}")
    if boundary_ratio is not None:
        scale = scheduler.config.num_train_timesteps
        rows, boundary = table[:-1].flatten(1) * scale, boundary_ratio * scale
        lowest = torch.where(rows > 0, rows, float(scale)).amin(1)  # finished frames need no expert
        if bool(((rows.amax(1) >= boundary) & (lowest < boundary)).any()):
            raise ValueError(
                "frame_sigmas has frames on both sides of the boundary between the two experts at one step: "
                "waves need a model with one transformer"
            )


def _over_latents(rows: Tensor) -> Tensor:
    return rows[:, None, :, None, None]  # [B, F] -> [B, 1, F, 1, 1]


def _checked_multipliers(multipliers: Tensor) -> Tensor:
    """Check noise multipliers and return them as fp32 ``[1, B, F]``."""
    multipliers = torch.as_tensor(multipliers, dtype=torch.float32).cpu()
    if multipliers.ndim not in (1, 2):
        raise ValueError(f"noise_multipliers of shape {list(multipliers.shape)}: give [F] or [B, F]")
    for value in multipliers.flatten().tolist():
        check_noise_multiplier(value)
    return multipliers.view(1, -1, multipliers.shape[-1])


def _checked_table(table: Tensor | None) -> Tensor:
    """Check a sigma table and return it as fp32 ``[N + 1, B, F]``."""
    table = torch.as_tensor(table, dtype=torch.float32).cpu()
    if table.ndim not in (2, 3) or table.shape[0] < 2:
        raise ValueError(f"frame_sigmas of shape {list(table.shape)}: give [N + 1, F] or [N + 1, B, F] with N >= 1")
    if table.ndim == 2:
        table = table.unsqueeze(1)
    if not bool(((table >= 0) & (table <= 1)).all()):
        raise ValueError("frame_sigmas has values outside 0..1")
    rises = (table.diff(dim=0) > 0).nonzero()
    if len(rises):
        step, _, frame = rises[0].tolist()
        raise ValueError(f"frame_sigmas rises at step {step} in latent frame {frame}: noise levels must never rise")
    return table
