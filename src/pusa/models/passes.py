"""Run the transformer for a denoising step: one pass for the prompt, and one for the negative prompt with guidance."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

PASSES = ("cond", "uncond")  # names of the two passes, for caches that remember a state of each


@dataclass(frozen=True)
class StepInputs:
    """Hold what the transformer reads at a step.

    Attributes:
        expert: "transformer" or "transformer_2".
        index, steps, sigma: the step, the number of steps and the base grid's sigma, for caches.
        latents: ``[B, C, F, h, w]`` in the transformer's dtype.
        timesteps: ``[B, F]``.
        prompts: embeddings ``[B, text, D]`` of the prompt, and with guidance of the negative prompt.
        attention_kwargs: as in diffusers.
    """

    expert: str
    index: int
    steps: int
    sigma: float
    latents: Tensor
    timesteps: Tensor
    prompts: tuple[Tensor, ...]
    attention_kwargs: dict[str, Any] | None = None


def predict(model: Any, inputs: StepInputs, passes: Sequence[int]) -> list[Tensor]:
    """Predict the velocities ``[B, C, F, h, w]`` of some passes, given by their index in `inputs.prompts`."""
    found = []
    for number in passes:
        with model.cache_context(
            PASSES[number], step_index=inputs.index, sigma=inputs.sigma, num_inference_steps=inputs.steps
        ):
            found.append(
                model(
                    hidden_states=inputs.latents,
                    timestep=inputs.timesteps,
                    encoder_hidden_states=inputs.prompts[number].to(inputs.latents),
                    attention_kwargs=inputs.attention_kwargs,
                    return_dict=False,
                )[0]
            )
    return found


class LocalPasses:
    """Run all passes in this process.

    `pusa.acceleration.parallel.SharedPasses` divides them among processes; a pipeline calls one or the other.
    """

    @contextmanager
    def call(self, latents: Tensor) -> Iterator[Tensor]:
        """Enclose the steps of a call that starts from `latents` ``[B, C, F, h, w]``; yield those to start from."""
        yield latents

    def is_stopped(self, wanted: bool) -> bool:
        """Tell, before a step, if the call ends there; `wanted`: this process asks for it."""
        return wanted

    def run(self, pipe: Any, inputs: StepInputs) -> list[Tensor]:
        """Predict the velocities of all passes of a step."""
        return predict(getattr(pipe, inputs.expert), inputs, range(len(inputs.prompts)))
