"""Check Pusa V0.5's whole loop on Mochi, from pictures and text to latents, against the original's."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _golden import Golden, Measured, check, departure, distance, walk, within
from _mochi_checks import transformer
from diffusers import AutoencoderKLMochi
from torch import Tensor

from pusa.conditions import PusaCondition
from pusa.models.mochi import tiny
from pusa.models.mochi.transformer import PusaMochiTransformer3DModel
from pusa.models.vae import codec_of
from pusa.pipeline import PusaPipeline

FOLDER = "mochi/sampler"
TASKS = ("t2v", "i2v_m0.4", "i2v_m0.0", "multi_0.3_0.7", "extension")
CASES = (
    *(f"{task}_tiny_4" for task in (*TASKS, "i2v_at_position_5_m0.4", "transition", "list_positions_quarter")),
    *(f"{task}_normalized_tiny_4" for task in TASKS[1:]),
    *("i2v_m0.4_tiny_10", "i2v_m0.4_tiny_cfg1_4"),
    *(f"{task}_{net}" for task in TASKS for net in ("linear_4", "tanh_10")),
    *("t2v_tanh_30", "i2v_m0.4_tanh_30", "extension_tanh_64", "multi_0.3_0.7_normalized_tanh_30"),
)
PREDICTIONS = tuple(case for case in CASES if case.endswith("4") and "tiny" in case)
PICTURES = {"image_a": 0, "image_b": 255}  # grey values, by which the stand-in for a VAE knows them


class RecordedVAE(AutoencoderKLMochi):
    """Encode grey pictures and a video to the recorded latents, as they come from the original's encoder."""

    recorded: dict[str, Tensor]

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        count = 1 + (x.shape[2] - 1) // 6
        name = "image_a_vae_latent" if x.mean() < 0 else "image_b_vae_latent"
        latents = self.recorded["video_vae_latents"][:, :, :count] if count > 1 else self.recorded[name]
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))


class AnalyticTransformer(PusaMochiTransformer3DModel):
    """Predict what the recorded loops without a network have in place of one; an empty prompt is the second pass."""

    net: str
    recorded: dict[str, Tensor]

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **_: Any) -> Any:
        sigma = (1 - timestep / 1000)[:, None, :, None, None]
        is_prompt = encoder_hidden_states.shape[1] > 0
        if self.net == "linear":
            velocity = self.recorded["linear_x0"] - self.recorded["linear_eps"]
            return (velocity if is_prompt else 0.5 * velocity + 0.1,)
        if is_prompt:
            return (hidden_states.tanh() * (0.2 + sigma),)
        return (0.3 * (hidden_states + 0.5).tanh() * (1.2 - sigma),)


@dataclass(frozen=True)
class Loop:
    """Hold what our pipeline computes for a recorded loop.

    Attributes:
        data: the recorded one.
        sigmas, times: ``[N, F]``.
        start: ``[C, F, h, w]``, given to the transformer first.
        latents: after each step ``[N, C, F, h, w]``.
        predictions: of both passes, or of one, ``[N, passes, C, F, h, w]``.
        latents_vae: the last ones, in the space of the VAE.
    """

    data: dict[str, Tensor]
    sigmas: Tensor
    times: Tensor
    start: Tensor
    latents: Tensor
    predictions: Tensor
    latents_vae: Tensor


def make_pipeline(golden: Golden, record: dict[str, Any]) -> PusaPipeline:
    """Make the pipeline of a recorded case, with its network and the stand-in for its VAE."""
    inputs = golden.tensors(f"{FOLDER}/inputs")
    vae = RecordedVAE(**tiny.VAE)
    vae.recorded = inputs
    if record["net"] == "tiny":
        model = transformer(golden)
    else:
        model = AnalyticTransformer(**golden.json("mochi/transformer/config")["diffusers"])
        model.net, model.recorded = record["net"], inputs
    pipe = PusaPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=None, transformer=model)
    pipe.normalize_conditions = record["normalize_conditions"]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditions_of(record: dict[str, Any]) -> list[PusaCondition]:
    """Make the conditions of a recorded case, of pictures and of a video in grey."""
    positions, multipliers = record.get("positions", []), record.get("multipliers", [])
    if not positions:
        return []
    if isinstance(record["cond"], str):
        video = np.zeros((37, 32, 48, 3), np.uint8)
        return [PusaCondition(video=video, latent_index=positions, noise_multiplier=multipliers)]
    return [
        PusaCondition(
            image=np.full((32, 48, 3), PICTURES[name], np.uint8), latent_index=position, noise_multiplier=multiplier
        )
        for name, position, multiplier in zip(record["cond"], positions, multipliers, strict=True)
    ]


@functools.cache
def run(golden: Golden, case: str) -> Loop:
    record, inputs = golden.record_of(FOLDER, case), golden.tensors(f"{FOLDER}/inputs")
    pipe = make_pipeline(golden, record)
    texts = {
        part: inputs[f"text_features_{part}"] * inputs[f"text_mask_{part}"].unsqueeze(2)
        for part in ("positive", "negative")
    }
    seen = walk(
        pipe,
        prompt_embeds=texts["positive"],
        negative_prompt_embeds=texts["negative"],
        conditions=conditions_of(record),
        height=32,
        width=48,
        num_frames=37,
        num_inference_steps=record["steps"],
        guidance_scale=record["cfg"],
        latents=golden.tensors(f"{FOLDER}/noise")["noise"].unsqueeze(0),
        output_type="latent",
    )
    passes = 1 if record["cfg"] == 1 else 2
    return Loop(
        data=golden.tensors(f"{FOLDER}/loop_{case}"),
        sigmas=pipe.scheduler.frame_sigmas[:-1, 0].expand(-1, seen.frames.shape[2]),
        times=torch.stack(seen.times[::passes]),
        start=seen.inputs[0],
        latents=torch.stack(seen.latents),
        predictions=torch.stack(seen.outputs).unflatten(0, (-1, passes)),
        latents_vae=codec_of(pipe.vae).denormalise(pipe.vae, seen.frames)[0],
    )


@check("mochi loop, sigmas and timesteps per frame", CASES)
def _(golden: Golden, case: str) -> Measured:
    loop = run(golden, case)
    sigmas = distance(loop.sigmas, loop.data["sigma"])
    return Measured(max(sigmas, distance(loop.times, loop.data["model_timestep"])), 0)


@check("mochi loop, start (pictures, noise)", CASES)
def _(golden: Golden, case: str) -> Measured:
    loop = run(golden, case)
    recorded = golden.json(f"{FOLDER}/parity")[case]["start"]
    return Measured(distance(loop.start, loop.data["start_latents"]), within(recorded, loop.data["start_latents"]))


@check("mochi loop, latents after each step", CASES)
def _(golden: Golden, case: str) -> Measured:
    loop, steps = run(golden, case), golden.record_of(FOLDER, case)["saved_steps"]
    recorded = max(golden.json(f"{FOLDER}/parity")[case]["latents_per_step"])
    ours = distance(loop.latents[steps], loop.data["latents"])
    in_vae = distance(loop.latents_vae, loop.data["latents_vae"])
    return Measured(max(ours, in_vae), within(recorded, loop.data["latents"]))


@check("mochi loop, predictions of both passes", PREDICTIONS)
def _(golden: Golden, case: str) -> Measured:
    loop = run(golden, case)
    names = ("pred_cond", "pred_uncond")[: loop.predictions.shape[1]]
    errors = [distance(loop.predictions[:, i], loop.data[name]) for i, name in enumerate(names)]
    recorded = max(golden.json(f"{FOLDER}/parity")[case]["latents_per_step"])
    return Measured(max(errors), within(recorded, loop.data["pred_cond"]))


def kept_frame(golden: Golden, case: str) -> float:
    """Compare a frame of multiplier 0 with the latents of its picture, in the space of the VAE."""
    picture = golden.tensors(f"{FOLDER}/inputs")["image_a_vae_latent"][0, :, 0]
    return distance(run(golden, case).latents_vae[:, 0], picture)


@check("mochi, a kept frame comes back as it was encoded", ["i2v_m0.0_normalized_tiny_4"])
def _(golden: Golden, case: str) -> Measured:
    recorded = golden.json(f"{FOLDER}/parity")[case]["kept_frames_vs_encoder_latent_in_vae_space_maxabs"]
    picture = golden.tensors(f"{FOLDER}/inputs")["image_a_vae_latent"]
    return Measured(kept_frame(golden, case), within(max(recorded), picture))


@departure("mochi", "i2v_m0.0 as published, kept frame", "V0.5 gives the network latents that are not normalised")
def _(golden: Golden) -> float:
    return kept_frame(golden, "i2v_m0.0_tiny_4")
