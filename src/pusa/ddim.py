"""Sample with a DDPM down a table with one column of sigmas per latent frame, by deterministic DDIM steps.

The table is that of `pusa.scheduler`, with another meaning: a frame of sigma s is at step t = 1000 s - 1 of a DDPM,
``x = sqrt(ab_t) * data + sqrt(1 - ab_t) * noise`` (`pusa.models.fvdm.ddpm`), and a frame of sigma 0 is clean (t = -1,
ab = 1). The model predicts the noise. A step keeps a frame's predicted noise and moves its predicted data to the next
sigma, each frame on its own (DDIM with eta 0, arXiv 2010.02502, on vectors: FVDM, arXiv 2410.03160).
"""

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from pusa.models.fvdm.ddpm import NUM_TRAIN_TIMESTEPS, alphas_cumprod, timestep_map, timesteps_of
from pusa.sigma_table import PusaSchedulerOutput, SigmaTableScheduler, over_latents


class PusaDDIMScheduler(SigmaTableScheduler):
    """Sample a noise-predicting model by DDIM, with a sigma per step, sample and latent frame.

    The model takes timesteps t = 0..999 (fp32), and 0 for clean frames. Sigmas are multiples of 1/1000: those of a
    table, and the products with noise multipliers, are rounded to the nearest one. Below 0.0005 a frame is clean.

    Args:
        num_train_timesteps: 1000, no other number.
        published_zero: as FVDM's code does, treat a clean frame as one at t = 0: each step then replaces it by the
            model's prediction of its data, from which it drifts away. False keeps it to the bit.

    Raises:
        ValueError: another `num_train_timesteps`.
    """

    @register_to_config
    def __init__(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS, published_zero: bool = False) -> None:
        if num_train_timesteps != NUM_TRAIN_TIMESTEPS:
            raise ValueError(f"num_train_timesteps={num_train_timesteps}: this DDPM has {NUM_TRAIN_TIMESTEPS}")
        self._start: tuple[Tensor, ...]  # factors of data and noise, fp32 [B, F]
        self._step: tuple[Tensor, ...]  # of latents and noise in each step, fp32 [N, B, F]
        self._data: tuple[Tensor, ...]  # of latents and noise, for the data predicted in each step

    def base_sigmas(self, num_inference_steps: int) -> Tensor:
        """Return the even grid of N steps, (t + 1) / 1000 for N timesteps t from 999 to 0, then 0: fp32 ``[N + 1]``.

        The timesteps are `timestep_map` of the number as a string, as FVDM samples; a single step is from 999, where
        the published map has 0.

        Raises:
            ValueError: more steps than timesteps.
        """
        if num_inference_steps > NUM_TRAIN_TIMESTEPS:
            raise ValueError(f"num_inference_steps={num_inference_steps} is above {NUM_TRAIN_TIMESTEPS}")
        rising = timestep_map(str(num_inference_steps)) if num_inference_steps > 1 else [NUM_TRAIN_TIMESTEPS - 1]
        return torch.tensor([*(t + 1 for t in reversed(rising)), 0]) / NUM_TRAIN_TIMESTEPS

    def _rounded(self, table: Tensor) -> Tensor:
        return (table * NUM_TRAIN_TIMESTEPS).round() / NUM_TRAIN_TIMESTEPS

    def _timesteps_of(self, sigmas: Tensor) -> Tensor:
        return timesteps_of(sigmas)

    def _use_table(self, table: Tensor, device: str | torch.device | None) -> None:
        super()._use_table(table, device)
        places = (table * NUM_TRAIN_TIMESTEPS).round().long()  # t + 1
        clean, every = torch.ones(1, dtype=torch.float64), alphas_cumprod()
        bars = torch.cat([clean, every])[places]  # [N + 1, B, F]
        before, after = bars[:-1], bars[1:]
        if self.config.published_zero:
            before = torch.cat([every[:1], every])[places[:-1]]
            self.moves = self.moves | (places[:-1] == 0).any(dim=1)
        is_noise = places[0] == NUM_TRAIN_TIMESTEPS  # ab is 0.00004 there, and the published sampler starts from noise
        kept = after / before

        def used(*factors: Tensor) -> tuple[Tensor, ...]:
            return tuple(factor.float().to(device) for factor in factors)

        self._start = used(bars[0].sqrt().masked_fill(is_noise, 0), (1 - bars[0]).sqrt().masked_fill(is_noise, 1))
        self._step = used(kept.sqrt(), (1 - after).sqrt() - (kept * (1 - before)).sqrt())
        self._data = used(before.rsqrt(), -(1 / before - 1).sqrt())

    def add_noise(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Mix each frame of ``clean`` with ``noise`` at its first sigma, to start sampling (exact at 0 and 1).

        Both are ``[B, C, F, H, W]``; a free frame, whose first sigma is 1, starts from the noise alone, as published,
        and may hold anything finite in ``clean``.
        """
        of_clean, of_noise = (over_latents(factor).to(noise.device) for factor in self._start)
        return of_clean * clean + of_noise * noise

    def mix(self, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
        place = round(sigma * NUM_TRAIN_TIMESTEPS)  # t + 1
        if place in (0, NUM_TRAIN_TIMESTEPS):
            return noise if place else clean
        bar = float(alphas_cumprod()[place - 1])
        return bar**0.5 * clean + (1 - bar) ** 0.5 * noise

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> PusaSchedulerOutput | tuple[Tensor]:
        """Move every frame from its sigma to its next one.

        Args:
            model_output: the noise ``[B, C, F, H, W]``, any floating dtype; further channels, such as those of a
                learned variance, are not used.
            timestep: ``timesteps[k]`` of this step; ignored after `set_begin_index`, from which on steps are counted.
            sample: latents ``[B, C, F, H, W]`` before the step. Frames whose sigma stays are returned unchanged, but
                for clean ones with `published_zero`.
            return_dict: a `PusaSchedulerOutput` rather than a tuple of one.

        Raises:
            ValueError: `timestep` is not in this table, or all steps are done.
        """
        k = self._index_of(timestep)
        prev_sample = _mixed(self._step, k, sample, model_output).to(sample.dtype)
        self._step_index = k + 1
        return PusaSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def denoised(self, step_index: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """Predict the clean latents ``[B, C, F, H, W]`` at step `step_index`; arguments as in `step`."""
        return _mixed(self._data, step_index, sample, model_output)


def _mixed(factors: tuple[Tensor, ...], k: int, sample: Tensor, model_output: Tensor) -> Tensor:
    """Add latents and the predicted noise with their factors at step k, in fp32."""
    of_sample, of_noise = (over_latents(factor[k]) for factor in factors)
    return of_sample * sample.float() + of_noise * model_output[:, : sample.shape[1]].float()
