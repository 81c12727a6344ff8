"""The recorded numbers of the original, tiny models with its weights, and the list of checks against them."""

import functools
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from pusa.models.wan import PusaWanTransformer3DModel
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler

T2V_PIPELINE = "WanVideoPusaPipeline"  # the original's only pipeline that does not truncate timesteps

TRANSFORMER_CASES = (
    "scalar_equal",
    "i2v_frame0_zero",
    "multi_frame",
    "all_unequal_with_zeros",
    "batch2",
    "single_latent_frame",
    "frames21_v2v_like",
)
TRAJECTORIES = (
    "t2v",
    "t2v_multiframe_pipeline",
    "i2v_m0.0",
    "i2v_m0.2",
    "startend_0.2_0.5",
    "v2v_0.0_0.3_0.4_0.5",
    "edge_multiplier_one",
)


class Golden:
    """The recorded data, and tiny models with its weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cache  # noqa: B019 (one object per process)
    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @functools.cache  # noqa: B019
    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def transformer(
        self, cls: type[WanTransformer3DModel] = PusaWanTransformer3DModel, dtype: torch.dtype = torch.float32
    ) -> Any:
        """A new one; in bf16 it keeps the parts in fp32 that loading a real one keeps."""
        model = cls(**self.json("transformer/config")["diffusers_config"])
        model.load_state_dict(self.tensors("transformer/weights_diffusers"))
        if dtype != torch.float32:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model = cls.from_pretrained(folder, torch_dtype=dtype)
        return model.eval()

    @functools.cached_property
    def vae(self) -> AutoencoderKLWan:
        vae = AutoencoderKLWan(base_dim=8, z_dim=16)
        vae.load_state_dict(self.tensors("vae/weights_diffusers"))
        return vae.eval()

    @functools.cached_property
    def text_encoder(self) -> UMT5EncoderModel:
        encoder = UMT5EncoderModel(UMT5Config(**self.json("text/config")["umt5_config"]))
        weights = self.tensors("text/weights_transformers")
        encoder.load_state_dict(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]})
        return encoder.eval()

    def pipeline(self, reference_rounding: bool = False) -> PusaPipeline:
        pipe = PusaPipeline(
            tokenizer=None,
            text_encoder=self.text_encoder,
            vae=self.vae,
            scheduler=PusaFlowMatchEulerScheduler(reference_rounding=reference_rounding),
            transformer=self.transformer(),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def record_of(self, part: str, case: str) -> dict[str, Any]:
        """Return what the index of a part says of a case."""
        return next(c for c in self.json(f"{part}/index")["cases"] if c["case"] == case)


@dataclass(frozen=True)
class Measured:
    error: float
    tolerance: float

    @property
    def is_within(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Check:
    component: str
    case: str
    measure: Callable[[Golden], Measured]


@dataclass(frozen=True)
class Departure:
    """A difference that stays, and why."""

    component: str
    case: str
    reason: str
    measure: Callable[[Golden], float]


CHECKS: list[Check] = []
DEPARTURES: list[Departure] = []


def check(component: str, cases: Iterable[str]) -> Callable[[Callable[..., Measured]], None]:
    """Register ``measure(golden, case)`` for each case."""

    def register(measure: Callable[..., Measured]) -> None:
        CHECKS.extend(Check(component, case, functools.partial(measure, case=case)) for case in cases)

    return register


def departure(component: str, case: str, reason: str) -> Callable[[Callable[[Golden], float]], None]:
    def register(measure: Callable[[Golden], float]) -> None:
        DEPARTURES.append(Departure(component, case, reason, measure))

    return register


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, infinite if `ours` is not finite.

    Raises:
        ValueError: the shapes differ; broadcasting would hide it.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{list(ours.shape)} against {list(theirs.shape)}")
    difference = (ours.double() - theirs.double()).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def spread(tensor: Tensor) -> float:
    return (tensor.max() - tensor.min()).item()


@dataclass
class Walk:
    """Hold what a call of a pipeline does; with guidance a step has two passes.

    Attributes:
        experts: of each pass, 0 for the transformer and 1 for the second one, of low noise.
        inputs, times, outputs: of each pass, ``[C, F, h, w]``, ``[F]`` and ``[C, F, h, w]``.
        latents: after each step, ``[C, F, h, w]``.
        frames: what the call returns.
    """

    experts: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    frames: Any = None


def walk(pipe: PusaPipeline, **call: Any) -> Walk:
    """Call a pipeline, and note what its transformers are given, and predict."""
    seen = Walk()

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        seen.experts.append(int(module is pipe.transformer_2))
        seen.inputs.append(kwargs["hidden_states"][0].clone())
        seen.times.append(kwargs["timestep"][0].clone())
        seen.outputs.append(output[0][0])

    def keep(pipe: PusaPipeline, k: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.latents.append(tensors["latents"][0])
        return {}

    models = [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]
    hooks = [model.register_forward_hook(note, with_kwargs=True) for model in models]
    seen.frames = pipe(callback_on_step_end=keep, **call).frames
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def velocity(model: WanTransformer3DModel, data: dict[str, Tensor], path: str = "frame") -> Tensor:
    """Predict a recorded case; timesteps per ``frame``, per ``token`` or (equal for all frames) ``scalar``."""
    times, latents = data["timestep"], data["latents"]
    if path == "token":
        times = times.repeat_interleave(latents.shape[3] * latents.shape[4] // 4, dim=1)  # patches of 2 x 2
    elif path == "scalar":
        times = times[:, 0]
    return model(latents.to(model.dtype), times, data["context"].to(model.dtype), return_dict=False)[0]


def within(recorded_error: float, recorded: Tensor) -> float:
    """The error allowed: twice the recorded one, and what CPUs differ by that add up in other orders."""
    return max(2 * recorded_error, 2e-6 * float(recorded.max() - recorded.min()))
