"""Keep the table of a sampler with one sigma per step, video and latent frame: checks, columns, counting of steps.

Row k of the table ``[N + 1, B, F]`` holds the sigma of each latent frame before step k, from 1, pure noise, down to 0,
clean. What a sigma means, and how a step follows from two rows, is the subclass's: flow matching in `pusa.scheduler`,
a DDPM in `pusa.ddim`.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from pusa.numerals import check_noise_multiplier


@dataclass
class PusaSchedulerOutput(BaseOutput):
    """Hold the latents after a step, ``[B, C, F, H, W]``, in the dtype of the latents before it."""

    prev_sample: Tensor


class SigmaTableScheduler(SchedulerMixin, ConfigMixin):
    """Sample down a table with a sigma per step, video and latent frame; subclasses say how.

    Attributes:
        sigmas: the base grid ``[N + 1]`` (fp32, CPU).
        timesteps: of the base grid, as the model takes them, ``[N]``.
        frame_sigmas: the table ``[N + 1, B, F]``, with 1 for B or F where nothing distinguishes them.
        highest_sigmas: the largest of each row ``[N + 1]`` (CPU): the base grid unless every frame is conditioned.
        moves: the frames that change in a step, in any video, ``[N, F]`` (bool, CPU).
    """

    config_name = "scheduler_config.json"
    order = 1
    init_noise_sigma = 1.0

    sigmas: Tensor
    timesteps: Tensor
    frame_sigmas: Tensor
    highest_sigmas: Tensor
    moves: Tensor
    _step_index: int | None = None
    _begin_index: int | None = None

    @abstractmethod
    def base_sigmas(self, num_inference_steps: int) -> Tensor:
        """Return the sigmas of a free frame over N steps, from 1 to 0: fp32 ``[N + 1]``."""

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Mix each frame of ``clean`` with ``noise``, both ``[B, C, F, H, W]``, at its first sigma."""

    @abstractmethod
    def mix(self, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Mix clean latents with noise, of any one shape, at one sigma 0..1; exact at 0 and 1."""

    @abstractmethod
    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> PusaSchedulerOutput | tuple[Tensor]:
        """Move every frame of ``sample [B, C, F, H, W]`` from its sigma to its next one."""

    @abstractmethod
    def denoised(self, step_index: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """Predict the clean latents ``[B, C, F, H, W]`` at step `step_index`."""

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
            num_inference_steps: N, at least 1, for the `base_sigmas`; or give `frame_sigmas`.
            device: where `frame_sigmas` and `timesteps` live.
            noise_multipliers: ``[F]`` or ``[B, F]`` in 0..1, the factor of each column: 1 for a free frame, 0 for one
                kept exactly. None: every frame is free.
            frame_sigmas: any other table, ``[N + 1, F]`` or ``[N + 1, B, F]``, in 0..1 and never rising (see
                `wave_sigmas`); `noise_multipliers` scale it too. A last row above 0 leaves latents to continue from.

        Raises:
            ValueError: a value is out of its range, a column rises, or not exactly one of `num_inference_steps` and
                `frame_sigmas` is given.
        """
        if (num_inference_steps is None) == (frame_sigmas is None):
            raise ValueError("give either num_inference_steps or frame_sigmas")
        if num_inference_steps is not None:
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps={num_inference_steps} is below 1")
            self.sigmas = self.base_sigmas(num_inference_steps)
            table = self.sigmas.view(-1, 1, 1)
        else:
            table = _checked_table(frame_sigmas)
            self.sigmas = self._rounded(table).amax(dim=(1, 2))
        if noise_multipliers is not None:
            multipliers = _checked_multipliers(noise_multipliers)
            if any(a != b and 1 not in (a, b) for a, b in zip(table.shape[1:], multipliers.shape[1:], strict=True)):
                raise ValueError(
                    f"noise_multipliers of shape {list(multipliers.shape[1:])} do not fit frame_sigmas with rows of "
                    f"shape {list(table.shape[1:])} ([B, F])"
                )
            table = table * multipliers
        self._use_table(self._rounded(table), device)
        self._step_index = self._begin_index = None
        self._forget_steps()

    def _rounded(self, table: Tensor) -> Tensor:
        """Round sigmas to those that the sampler knows; by default it knows all."""
        return table

    def _use_table(self, table: Tensor, device: str | torch.device | None) -> None:
        self.highest_sigmas = table.amax(dim=(1, 2))
        self.frame_sigmas = table.to(device)
        self.moves = (table[1:] != table[:-1]).any(dim=1)
        self.timesteps = self._timesteps_of(self.sigmas[:-1]).to(device)

    def _timesteps_of(self, sigmas: Tensor) -> Tensor:
        return sigmas * self.config.num_train_timesteps

    def frame_timesteps(self, step_index: int) -> Tensor:
        """Return the model's timesteps ``[B, F]`` for step `step_index`."""
        return self._timesteps_of(self.frame_sigmas[step_index])

    def _forget_steps(self) -> None:
        """Forget what was kept of the steps before; by default nothing is."""

    def finished_frames(self, step_index: int) -> int:
        """Count the leading latent frames that are clean, in every sample, after step `step_index`."""
        is_clean = (self.frame_sigmas[step_index + 1] == 0).all(dim=0)  # [F]
        return int(is_clean.cumprod(0).sum())

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
        """Return the number of steps done, or None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Return the first step of sampling, or None before `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Count steps from `begin_index` on, without comparing timesteps (no device synchronisation)."""
        self._begin_index = begin_index
        self._step_index = None
        self._forget_steps()


def check_start(table: Tensor, frames: int, noise_multipliers: Tensor | None) -> None:
    """Check that a table ``[N + 1, F]`` or ``[N + 1, B, F]`` starts free frames, multiplier 1, from pure noise.

    Args:
        frames: latent frames of the video.
        noise_multipliers: ``[B or 1, F]``; None: every frame is free.

    Raises:
        ValueError: one starts below 1, where nothing is known of it.
    """
    free = torch.ones(frames, dtype=torch.bool) if noise_multipliers is None else (noise_multipliers == 1).all(0)
    if bool((table[0].expand(*table.shape[1:-1], frames)[..., free] < 1).any()):
        raise ValueError("frame_sigmas starts below 1 where nothing is known: give latents and start_step to go on")


def check_table(
    scheduler: SigmaTableScheduler, table: Tensor, videos: int, frames: int, boundary_ratio: float | None
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
                "waves need a model with one transformer, this one needs --schedule even"
            )


def over_latents(rows: Tensor) -> Tensor:
    """Broadcast rows of a table over latents."""
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
