"""Compute FVDM's diffusion, a DDPM with one timestep per frame: noising, posterior and loss (arXiv 2410.03160).

1000 steps t with linear variances; a frame at step t is ``sqrt(ab_t) * clean + sqrt(1 - ab_t) * noise``, with ab
(alpha-bar) falling from 0.9999 at t = 0 to 0.00004 at t = 999. The network predicts the noise and, between its bounds,
the log variance of the step back. Coefficients are computed in fp64 and used in fp32, as in the published code.

Latents are ``[B, C, F, H, W]``, timesteps ``t`` int ``[B, F]``, 0..999.
"""

from dataclasses import dataclass
from functools import cache
from math import log, pi, sqrt
from typing import Literal

import torch
from torch import Generator, Tensor

NUM_TRAIN_TIMESTEPS = 1000
_BETAS = 1e-4, 0.02

# ---- schedule ------------------------------------------------------------------------------------------------------


@cache
def betas() -> Tensor:
    """Return the variances of the 1000 steps, linear from 1e-4 to 0.02: fp64 ``[1000]``."""
    return torch.linspace(*_BETAS, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)


@cache
def alphas_cumprod() -> Tensor:
    """Return alpha-bar, the share of the data's variance that is left after each step: fp64 ``[1000]``."""
    return (1 - betas()).cumprod(0)


def timesteps_of(sigmas: Tensor) -> Tensor:
    """Return the timesteps t of sigmas, (t + 1) / 1000, in their dtype and shape; 0 also for sigma 0, clean frames."""
    return ((sigmas * NUM_TRAIN_TIMESTEPS).round() - 1).clamp(min=0)


def timestep_map(respacing: str) -> list[int]:
    """List the timesteps that a respaced sampler visits, rising.

    Args:
        respacing: "50" for 50 timesteps at even distances from 0 to 999, rounded (FVDM samples so); "ddim50" for every
            20th from 0 on, as far as there is a whole stride that gives so many.

    Raises:
        ValueError: no such number of steps, or no whole stride gives it.
    """
    text = respacing.removeprefix("ddim")
    if not text.isdecimal() or not 1 <= int(text) <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"respacing={respacing!r}: give a number of steps from 1 to {NUM_TRAIN_TIMESTEPS}, such as '50' or 'ddim50'"
        )
    count = int(text)
    if text != respacing:
        for stride in range(1, NUM_TRAIN_TIMESTEPS + 1):
            steps = range(0, NUM_TRAIN_TIMESTEPS, stride)
            if len(steps) == count:
                return list(steps)
        raise ValueError(f"respacing={respacing!r}: no whole stride gives {count} of 1000 steps: leave 'ddim' out")
    stride_length = (NUM_TRAIN_TIMESTEPS - 1) / (count - 1) if count > 1 else 1.0
    steps_taken, place = [], 0.0
    for _ in range(count):  # added up, not multiplied: the published rounding
        steps_taken.append(round(place))
        place += stride_length
    return steps_taken


@dataclass(frozen=True)
class _Coefficients:
    """Hold what depends on t alone: fp64 ``[1000]`` each."""

    clean: Tensor
    noise: Tensor
    clean_of_noisy: Tensor
    clean_of_noise: Tensor
    posterior_of_clean: Tensor
    posterior_of_noisy: Tensor
    log_variance_least: Tensor
    log_variance_most: Tensor


@cache
def _coefficients() -> _Coefficients:
    beta, bar = betas(), alphas_cumprod()
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    variance = beta * (1 - before) / (1 - bar)
    return _Coefficients(
        clean=bar.sqrt(),
        noise=(1 - bar).sqrt(),
        clean_of_noisy=(1 / bar).sqrt(),
        clean_of_noise=(1 / bar - 1).sqrt(),
        posterior_of_clean=beta * before.sqrt() / (1 - bar),
        posterior_of_noisy=(1 - before) * (1 - beta).sqrt() / (1 - bar),
        log_variance_least=torch.cat([variance[1:2], variance[1:]]).log(),  # 0 at t = 0, whose logarithm is not finite
        log_variance_most=beta.log(),
    )


def _at(values: Tensor, t: Tensor) -> Tensor:
    """Take values at timesteps ``[B, F]``, for latents: fp32 ``[B, 1, F, 1, 1]``."""
    return values.to(t.device)[t].float()[:, None, :, None, None]


# ---- noising and prediction ----------------------------------------------------------------------------------------


def q_sample(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mix each frame of `clean` with `noise` at its timestep."""
    found = _coefficients()
    return _at(found.clean, t) * clean + _at(found.noise, t) * noise


def predict_clean(noisy: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the clean latents that `noisy` and its (predicted) noise belong to."""
    found = _coefficients()
    return _at(found.clean_of_noisy, t) * noisy - _at(found.clean_of_noise, t) * noise


def posterior(clean: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step back from `noisy`, given the clean latents: mean, and log variance ``[B, 1, F, 1, 1]``.

    At t = 0, where the variance is 0, the log variance is that of t = 1.
    """
    found = _coefficients()
    mean = _at(found.posterior_of_clean, t) * clean + _at(found.posterior_of_noisy, t) * noisy
    return mean, _at(found.log_variance_least, t)


# ---- loss ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """Hold the terms of a batch, fp32 ``[B]`` each.

    Attributes:
        loss: their sum, to be averaged over the batch.
        mse: squared error of the noise.
        vb: variational bound in bits per value, whose gradient reaches the variance only; 0 where none is predicted.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor


def training_losses(prediction: Tensor, clean: Tensor, noise: Tensor, noisy: Tensor, t: Tensor) -> Losses:
    """Compute the loss of a network's prediction: the mean over all values, no weight by frame or timestep.

    Args:
        prediction: ``[B, C, F, H, W]``, the noise; or ``[B, 2 C, F, H, W]``, the noise and the variance's place.
        clean, noise, noisy: latents ``[B, C, F, H, W]``, with ``noisy = q_sample(clean, noise, t)``.
        t: int ``[B, F]``.

    Raises:
        ValueError: the prediction has neither C nor 2 C channels.
    """
    channels = clean.shape[1]
    if prediction.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"prediction of {prediction.shape[1]} channels for latents of {channels}: give the noise, or noise and "
            f"variance ({2 * channels})"
        )
    prediction, clean, noise, noisy = (values.float() for values in (prediction, clean, noise, noisy))
    eps = prediction[:, :channels]
    mse = _mean((noise - eps).square())
    if prediction.shape[1] == channels:
        return Losses(mse, mse, torch.zeros_like(mse))
    vb = _variational_bound(eps.detach(), prediction[:, channels:], clean, noisy, t)
    return Losses(mse + vb, mse, vb)


def _variational_bound(eps: Tensor, place: Tensor, clean: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    """Return the bound's term in bits per value: the divergence of the step back, ``[B]``.

    For a video whose every frame has t = 0 it is the likelihood of the data instead; a video with t = 0 in some of its
    frames only keeps the divergence for all, as published.
    """
    true_mean, true_log_variance = posterior(clean, noisy, t)
    mean, least = posterior(predict_clean(noisy, eps, t), noisy, t)
    share = (place + 1) / 2
    log_variance = share * _at(_coefficients().log_variance_most, t) + (1 - share) * least
    divergence = 0.5 * (
        -1.0
        + log_variance
        - true_log_variance
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    likelihood = -_log_likelihood(clean, mean, 0.5 * log_variance)
    is_last = t.amax(dim=1) == 0  # [B]
    return torch.where(is_last, _mean(likelihood), _mean(divergence)) / log(2)


def _log_likelihood(values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log likelihood of values in -1..1 in steps of 2 / 255 under Gaussians."""
    centred, inverse = values - mean, (-log_scale).exp()
    below, above = (_normal_cdf(inverse * (centred + side / 255)) for side in (-1, 1))
    lowest, highest, between = above, 1 - below, above - below
    share = torch.where(values < -0.999, lowest, torch.where(values > 0.999, highest, between))
    return share.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x.pow(3))))  # the published approximation


def _mean(values: Tensor) -> Tensor:
    return values.mean(dim=tuple(range(1, values.ndim)))  # [B]


# ---- random draws --------------------------------------------------------------------------------------------------


def draw_ptss(
    batch: int, frames: int, p: float, generator: Generator | None, per: Literal["batch", "sample"] = "batch"
) -> Tensor:
    """Draw timesteps: independent ones for each frame with probability p, else one for each video.

    This is probabilistic timestep sampling (PTSS). FVDM trains from scratch with p = 0.2, and decides once for a whole
    batch of one process; the draws are made in its order, so equal generators give equal timesteps. Each frame's own
    distribution is uniform for any p, and two frames of a video correlate by 1 - p.

    Args:
        batch, frames: B and F.
        p: 0..1.
        generator: on the CPU; None: PyTorch's own.
        per: "sample" decides for each video instead.

    Returns:
        int64 ``[B, F]``, 0..999.

    Raises:
        ValueError: p is outside 0..1, or `per` is neither.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p={p:g} is outside 0..1")
    if per not in ("batch", "sample"):
        raise ValueError(f"per={per!r} is neither 'batch' nor 'sample'")
    shared = torch.randint(NUM_TRAIN_TIMESTEPS, (batch, 1), generator=generator).expand(batch, frames)
    is_independent = torch.rand(1 if per == "batch" else batch, generator=generator) < p
    if not bool(is_independent.any()):
        return shared.clone()
    own = torch.randint(NUM_TRAIN_TIMESTEPS, (batch, frames), generator=generator)
    return torch.where(is_independent.unsqueeze(1), own, shared)


def drop_labels(class_labels: Tensor, num_classes: int, p: float, generator: Generator | None) -> Tensor:
    """Replace labels ``[B]`` by `num_classes`, no class, with probability p each (FVDM: 0.1), for guidance later."""
    is_dropped = torch.rand(len(class_labels), generator=generator) < p
    return torch.where(is_dropped.to(class_labels.device), num_classes, class_labels)
