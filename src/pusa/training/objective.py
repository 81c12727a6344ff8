"""Compute the frame-aware loss: a noise level (sigma) for each latent frame, and the error of its prediction.

A clip of F latent frames has levels sigma in [0, 1]^F, 0 for data and 1 for noise. Frame f is mixed as
``x_f = (1 - sigma_f) * data_f + sigma_f * noise_f``; the target is ``noise - data``, whatever sigma is; the loss is the
squared error of the model's velocity at ``(x, sigma)`` (Pusa V1.0, arXiv 2507.16116, section 2.2, after FVDM's
vectorised timesteps, arXiv 2410.03160). Paper and released code differ in how sigma is drawn and how errors are
weighted; the defaults follow the code, which made the published weights.

That is flow matching, Wan's and Mochi's. A base (`pusa.models.bases`) says what its levels are, how noise is added and
what is predicted: for FVDM a DDPM with its noise as the target. Here is what all have in common.

Everything here is a pure function; what is random takes a generator and serves one clip.
"""

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Generator, Tensor

from pusa.models.bases import WAN, Base
from pusa.training.config import ObjectiveConfig

NUM_TRAIN_TIMESTEPS = 1000
LEVEL_BINS = 10
_WHOLE = (0.0, 1.0)

add_noise, velocity_target = WAN.add_noise, WAN.target  # of flow matching

NoiseRange = tuple[float, float]


# ---- noise levels --------------------------------------------------------------------------------------------------


@cache
def training_grid(shift: float, base: Base = WAN) -> Tensor:
    """Return the sigmas that a base is trained at, Wan's from 1 down to ``shift / (999 + shift)``: fp32 ``[1000]``."""
    return base.training_sigmas(shift)


def sample_sigmas(
    count: int, objective: ObjectiveConfig, generator: Generator, noise_range: NoiseRange = _WHOLE, base: Base = WAN
) -> Tensor:
    """Draw `count` independent levels: fp32 ``[count]``.

    "shifted" draws a uniform index into `training_grid`, as the released code does, so that at shift 5 half of the
    levels are above 5/6; "uniform" is the paper's U(0, 1).

    Args:
        noise_range: of an expert: its lower end belongs to it, its upper end to the next one (1 belongs to the last).

    Raises:
        ValueError: the grid has no level in the range.
    """
    low, high = noise_range
    if objective.distribution == "uniform":
        return low + (high - low) * torch.rand(count, generator=generator)
    grid = training_grid(objective.shift, base)
    grid = grid[(grid >= low) & ((grid < high) | (high == 1))]
    if not len(grid):
        raise ValueError(f"no level of the grid with shift {objective.shift:g} lies in the noise range {low}..{high}")
    return grid[torch.randint(len(grid), (count,), generator=generator)]


def independent_times(
    frames: int, objective: ObjectiveConfig, generator: Generator, noise_range: NoiseRange = _WHOLE, base: Base = WAN
) -> Tensor:
    """Draw a level for each frame: fp32 ``[frames]``.

    An expert is chosen by the noisiest frame (kept frames are less noisy than the others, in sampling), so with a lower
    end above 0 only one frame must reach the range, and a frame at random is drawn there if none has.
    """
    low, high = noise_range
    sigmas = sample_sigmas(frames, objective, generator, (0.0, high), base)
    if sigmas.max() < low:
        lifted = torch.randint(frames, (), generator=generator)
        sigmas[lifted] = sample_sigmas(1, objective, generator, noise_range, base)[0]
    return sigmas


def shared_time(
    frames: int, objective: ObjectiveConfig, generator: Generator, noise_range: NoiseRange = _WHOLE, base: Base = WAN
) -> Tensor:
    """Draw one level for all frames, as in plain text-to-video training: fp32 ``[frames]``."""
    return sample_sigmas(1, objective, generator, noise_range, base).expand(frames).clone()


def image_to_video_times(
    frames: int, objective: ObjectiveConfig, generator: Generator, noise_range: NoiseRange = _WHOLE, base: Base = WAN
) -> Tensor:
    """Draw one level for all frames but the first, which is clean: the paper's image-to-video baseline.

    A clip of one frame gets a level too: there would be nothing left to learn.
    """
    sigmas = shared_time(frames, objective, generator, noise_range, base)
    if frames > 1:
        sigmas[0] = 0
    return sigmas


def draw_sigmas(
    frames: int, objective: ObjectiveConfig, generator: Generator, noise_range: NoiseRange = _WHOLE, base: Base = WAN
) -> Tensor:
    """Draw the levels of one clip as the configuration says: fp32 ``[frames]``.

    With independent times, FVDM's probabilistic sampling (PTSS) comes first: with probability ``asynchronous`` they
    are independent, else shared. Pusa V1.0 uses 1. Last, ``clean_frames`` of the frames are set to 0, never all.
    """
    if objective.times == "scalar":
        draw = shared_time
    elif objective.times == "image_to_video":
        draw = image_to_video_times
    else:
        is_asynchronous = torch.rand((), generator=generator) < objective.asynchronous
        draw = independent_times if is_asynchronous else shared_time
    sigmas = draw(frames, objective, generator, noise_range, base)
    if objective.clean_frames > 0:
        clean = torch.rand(frames, generator=generator) < objective.clean_frames
        noisiest = int(sigmas.argmax())  # stays, so that a frame is left, and the expert the same
        clean[noisiest] = False
        sigmas = sigmas.masked_fill(clean, 0.0)
    return sigmas


# ---- loss -----------------------------------------------------------------------------------------------------------


def sigma_weights(sigmas: Tensor, shift: float) -> Tensor:
    """Weigh levels as the released code does ("bsmntw"); the result is shaped like `sigmas`.

    ``w(t) = (exp(-2 ((t - 500) / 1000)^2) - m) * 1000 / s`` with t = 1000 sigma, where m is the smallest value on the
    training grid (at t = 1000) and s the sum over the grid after subtracting it, so that the mean over a uniform index
    is 1. Highest in the middle, 0 for pure noise; at shift 5 up to 2.1.
    """
    lowest, scale = _weight_scale(shift)
    return (_bump(sigmas) - lowest) * scale


def _bump(sigmas: Tensor) -> Tensor:
    timesteps = NUM_TRAIN_TIMESTEPS * sigmas
    return torch.exp(-2 * ((timesteps - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)


@cache
def _weight_scale(shift: float) -> tuple[float, float]:
    grid = _bump(training_grid(shift))
    return float(grid.min()), float(NUM_TRAIN_TIMESTEPS / (grid - grid.min()).sum())


def frame_errors(velocity: Tensor, target: Tensor) -> Tensor:
    """Average the squared error of each frame: ``[B, C, F, h, w]`` twice -> fp32 ``[B, F]``."""
    return (velocity.float() - target.float()).square().mean(dim=(1, 3, 4))


def clip_losses(errors: Tensor, sigmas: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Reduce errors to the loss of each clip, ``[B]``: the mean over its frames with sigma > 0.

    With e_f the error of a frame and w_f its weight (`sigma_weights`), a clip counts

    - "per_sample": ``mean(e) * mean(w)``. The released code reduces the error over the whole tensor first and
      multiplies by the weights afterwards, so that no frame keeps its own; its batch is one clip per process.
    - "per_frame": ``mean(w * e)``.
    - "none": ``mean(e)``, the paper's loss.

    A clean frame (sigma 0) has the velocity of an unknown noise as its target: there is nothing to learn.

    Args:
        errors: ``[B, F]``, see `frame_errors`.
        sigmas: ``[B, F]``.
    """
    noisy = (sigmas > 0).to(errors)
    count = noisy.sum(dim=1).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return (values * noisy).sum(dim=1) / count  # [B]

    if objective.weighting == "none":
        return mean(errors)
    weights = sigma_weights(sigmas, objective.shift)
    if objective.weighting == "per_frame":
        return mean(weights * errors)
    return mean(errors) * mean(weights)


def weighted_loss(errors: Tensor, sigmas: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Return the loss of a batch, the mean of its clips' losses; see `clip_losses`."""
    return clip_losses(errors, sigmas, objective).mean()


# ---- errors by level and frame -----------------------------------------------------------------------------------


@dataclass
class LossBins:
    """Sum unweighted errors of noisy frames by noise level (ten equal parts of 0..1) and by latent frame.

    Errors that are not finite are left out: one bad clip would hide the others of a log entry.
    """

    frames: int
    sums: Tensor = field(init=False)  # [2, LEVEL_BINS + frames]: errors, how many

    def __post_init__(self) -> None:
        self.sums = torch.zeros(2, LEVEL_BINS + self.frames, dtype=torch.float64)

    def add(self, errors: Tensor, sigmas: Tensor) -> None:
        """Add errors and their sigmas, ``[B, F]`` each with F up to `frames`, on the CPU."""
        noisy = (sigmas > 0) & errors.isfinite()
        position = torch.arange(errors.shape[1]).expand_as(errors)[noisy]
        level = (sigmas[noisy] * LEVEL_BINS).long().clamp(max=LEVEL_BINS - 1)
        values = torch.stack([errors[noisy].double(), torch.ones(len(level), dtype=torch.float64)])
        self.sums.index_add_(1, level, values)
        self.sums.index_add_(1, LEVEL_BINS + position, values)

    def by_level(self) -> dict[str, float]:
        """Average errors by the lower end of their bin ("0.9": from 0.9 up); empty bins are left out."""
        return {f"{k / LEVEL_BINS:.1f}": mean for k, mean in enumerate(self._means()[:LEVEL_BINS]) if mean == mean}

    def by_frame(self) -> dict[str, float]:
        """Average errors by latent frame, from "0" on."""
        return {str(k): mean for k, mean in enumerate(self._means()[LEVEL_BINS:]) if mean == mean}

    def mean(self) -> float:
        """Average the errors of all frames; NaN if there are none."""
        total, count = self.sums[:, :LEVEL_BINS].sum(dim=1).tolist()
        return total / count if count else float("nan")

    def _means(self) -> list[float]:
        return (self.sums[0] / self.sums[1]).tolist()
