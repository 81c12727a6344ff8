"""Run the transformer for a denoising step: one pass for the prompt, and one for the negative prompt with guidance."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pusa.models.bases import base_of
from pusa.models.frame_skipping import FrameStore, StepFrames

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
        frames: latent frames to compute, and those whose keys and values serve the next step; None: all, and none.
    """

    expert: str
    index: int
    steps: int
    sigma: float
    latents: Tensor
    timesteps: Tensor
    prompts: tuple[Tensor, ...]
    attention_kwargs: dict[str, Any] | None = None
    frames: StepFrames | None = None


class FrameStores:
    """Hold a `FrameStore` for each pass during a call."""

    def __init__(self) -> None:
        self._stores = [FrameStore() for _ in PASSES]

    def clear(self) -> None:
        """Free all keys and values."""
        for store in self._stores:
            store.clear()

    @property
    def num_bytes(self) -> int:
        """Count the bytes of the keys and values of all passes."""
        return sum(store.num_bytes for store in self._stores)

    def begin(self, number: int, inputs: StepInputs) -> FrameStore | None:
        """Begin a step of a pass; return its store, or None if the step computes every frame and stores nothing."""
        if inputs.frames is None:
            return None
        store = self._stores[number]
        return store if store.begin(inputs.frames, inputs.expert, inputs.index, inputs.latents.shape[2]) else None


def predict(model: Any, inputs: StepInputs, passes: Sequence[int], stores: FrameStores) -> list[Tensor]:
    """Predict the velocities ``[B, C, F, h, w]`` of some passes, given by their index in `inputs.prompts`."""
    found, base = [], base_of(model)
    for number in passes:
        frames = stores.begin(number, inputs)
        with model.cache_context(
            PASSES[number], step_index=inputs.index, sigma=inputs.sigma, num_inference_steps=inputs.steps
        ):
            output = model(
                hidden_states=inputs.latents,
                timestep=inputs.timesteps,
                attention_kwargs=inputs.attention_kwargs,
                return_dict=False,
                **base.text_inputs(inputs.prompts[number], inputs.latents),
                **({} if frames is None else {"frames": frames}),
            )[0]
            found.append(base.prediction(output, inputs.latents.shape[1]))
    return found


def check_range(start: float, stop: float) -> None:
    """Raise ValueError if two parts of the steps, between which they are guided, are no range."""
    if not 0 <= start <= stop <= 1:
        raise ValueError(
            f"guidance_start={start:g} and guidance_stop={stop:g} are no range of the steps: give 0..1, the start first"
        )


def is_in_range(index: int, steps: int, start: float, stop: float) -> bool:
    """Tell if a step is guided; as in diffusers' guiders, ``start=0.25, stop=0.5`` is step 1 of steps 0..3."""
    first, end = (int(part * steps + 1e-9) for part in (start, stop))  # 0.29 * 100 is 28.999...
    return first <= index < end


class LocalPasses:
    """Run all passes in this process.

    `pusa.acceleration.parallel.SharedPasses` divides them among processes; a pipeline calls one or the other.

    Attributes:
        stores: keys and values of latent frames; none between calls.
    """

    def __init__(self) -> None:
        self.stores = FrameStores()

    @contextmanager
    def call(self, latents: Tensor) -> Iterator[Tensor]:
        """Enclose the steps of a call that starts from `latents` ``[B, C, F, h, w]``; yield those to start from."""
        try:
            yield latents
        finally:
            self.stores.clear()

    def is_stopped(self, wanted: bool) -> bool:
        """Tell, before a step, if the call ends there; `wanted`: this process asks for it."""
        return wanted

    def run(self, pipe: Any, inputs: StepInputs) -> list[Tensor]:
        """Predict the velocities of all passes of a step."""
        return predict(getattr(pipe, inputs.expert), inputs, range(len(inputs.prompts)), self.stores)
