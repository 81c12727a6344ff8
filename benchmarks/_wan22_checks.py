"""Check Wan2.2-A14B: two experts, of which the noise of a step chooses one, with a LoRA and its alpha for each."""

import functools
from typing import Any

import torch
from _golden import Golden, Measured, Walk, check, distance, spread, velocity, walk, within
from torch import Tensor

from pusa.conditions import PusaCondition
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler

EXPERTS = {"transformer": "high", "transformer_2": "low"}
CASES = (
    "t2v_4steps",
    "t2v_10steps",
    "t2v_12steps_tie_at_875",
    "i2v_0.2_4steps",
    "i2v_0.2_10steps",
    "i2v_0.0_4steps",
    "multi_0.2_0.5_4steps",
    "extension_0_0.3_4steps",
    "i2v_0.2_cfg1_lora_1.5_1.4_4steps",
)
STEP_COUNTS = ("1", "2", "4", "6", "8", "10", "12", "15", "20", "24", "25", "30", "36", "40", "48", "50")
OTHER_BOUNDARIES = ("0.5", "0.9", "1.0")


def two_experts(golden: Golden, *, reference_rounding: bool = False, boundary: float = 0.875) -> PusaPipeline:
    """Make a pipeline of the recorded experts; its VAE and the lack of a text encoder do not matter here."""
    experts = {}
    for name, noise in EXPERTS.items():
        model = PusaWanTransformer3DModel(**golden.json("wan22/index")["diffusers_config"])
        model.load_state_dict(golden.tensors(f"wan22/weights_{noise}_diffusers"))
        experts[name] = model.eval()
    pipe = PusaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=golden.vae,
        scheduler=PusaFlowMatchEulerScheduler(reference_rounding=reference_rounding),
        boundary_ratio=boundary,
        **experts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_loras(golden: Golden, pipe: PusaPipeline, **alphas: float) -> None:
    """Attach each expert's recorded LoRA, and set the alphas of "high" and "low"."""
    name = "wan22/weights_{}_lora_official_keys.safetensors"
    pipe.load_pusa({part: golden.folder / name.format(noise) for part, noise in EXPERTS.items()})
    pipe.set_alpha({part: alphas[noise] for part, noise in EXPERTS.items()})


def request_of(golden: Golden, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the record of a case, and the arguments of the same call here."""
    index, inputs = golden.json("wan22/index"), golden.tensors("wan22/inputs")
    record = golden.record_of("wan22", case)
    conditions = [
        PusaCondition(
            latents=inputs["video_latents"][0, :, i : i + 1] if name == "v" else inputs[f"image_{name}_latent"][0],
            latent_index=i,
            noise_multiplier=m,
        )
        for i, m, name in zip(record["positions"], record["multipliers"], record["condition"], strict=True)
    ]
    _, _, _, height, width = index["latents"]
    call = {
        "prompt_embeds": inputs["prompt_embeds"],
        "negative_prompt_embeds": inputs["negative_prompt_embeds"],
        "latents": inputs["noise"],
        "conditions": conditions,
        "height": 8 * height,
        "width": 8 * width,
        "num_frames": index["num_frames"],
        "num_inference_steps": record["steps"],
        "guidance_scale": record["cfg"],
        "output_type": "latent",
    }
    return record, call


@functools.cache
def run_case(golden: Golden, case: str) -> Walk:
    """Run a recorded case with the rounding of its pipeline."""
    record, call = request_of(golden, case)
    pipe = two_experts(golden, reference_rounding=record["pipeline"] != "t2v")
    if record["lora_alpha"]:
        load_loras(golden, pipe, **record["lora_alpha"])
    return walk(pipe, **call)


@check("two experts, steps of another expert", CASES)
def _(golden: Golden, case: str) -> Measured:
    data, run = golden.tensors(f"wan22/case_{case}"), run_case(golden, case)
    passes = len(run.experts) // len(data["expert"])
    wrong = sum(e != int(data["expert"][i // passes]) for i, e in enumerate(run.experts))
    return Measured(wrong, 0)


@check("two experts, timesteps given to the model", CASES)
def _(golden: Golden, case: str) -> Measured:
    data, run = golden.tensors(f"wan22/case_{case}"), run_case(golden, case)
    passes = len(run.times) // len(data["model_timestep"])
    return Measured(distance(torch.stack(run.times[::passes]), data["model_timestep"]), 0)


@check("two experts, start", CASES)
def _(golden: Golden, case: str) -> Measured:
    data, run = golden.tensors(f"wan22/case_{case}"), run_case(golden, case)
    recorded = golden.json("wan22/parity")[case]["start"]
    return Measured(distance(run.inputs[0], data["start_latents"]), within(recorded, data["start_latents"]))


@check("two experts, predictions from recorded latents", [case for case in CASES if case.endswith("_4steps")])
def _(golden: Golden, case: str) -> Measured:
    """Give each expert what the original's had; the recorded errors are of whole walks, so the range decides."""
    data, inputs = golden.tensors(f"wan22/case_{case}"), golden.tensors("wan22/inputs")
    pipe, (record, _) = two_experts(golden), request_of(golden, case)
    if record["lora_alpha"]:
        load_loras(golden, pipe, **record["lora_alpha"])
    experts = [getattr(pipe, part) for part in EXPERTS]
    latents = torch.cat([data["start_latents"][None], data["latents"][:-1]])
    errors = []
    for name, context in (("pred_cond", "prompt_embeds"), ("pred_uncond", "negative_prompt_embeds")):
        for k, theirs in enumerate(data.get(name, ())):
            given = {"latents": latents[k : k + 1], "timestep": data["model_timestep"][k : k + 1]}
            ours = velocity(experts[int(data["expert"][k])], {**given, "context": inputs[context]})
            errors.append(distance(ours[0], theirs) / spread(theirs))
    return Measured(max(errors), 1e-5)


@check("two experts, latents after each step", CASES)
def _(golden: Golden, case: str) -> Measured:
    data, run = golden.tensors(f"wan22/case_{case}"), run_case(golden, case)
    record, _ = request_of(golden, case)
    ours = torch.stack([run.latents[step] for step in record["saved_steps"]])
    recorded = max(golden.json("wan22/parity")[case]["latents_per_step"])
    return Measured(distance(ours, data["latents"]), within(recorded, data["latents"]))


@functools.cache
def _two_experts_at(golden: Golden, boundary: float) -> PusaPipeline:
    return two_experts(golden, boundary=boundary)


def experts_of(golden: Golden, steps: int, boundary: float) -> tuple[list[int], Tensor]:
    """Run a clip of two latent frames, the first nearly clean; return the expert and the timestep of each step."""
    inputs = golden.tensors("wan22/inputs")
    first = PusaCondition(latents=inputs["image_a_latent"][0, :, :, :2, :2], latent_index=0, noise_multiplier=0.2)
    pipe = _two_experts_at(golden, boundary)
    size = {"height": 16, "width": 16, "num_frames": 5}
    call = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
    seen = walk(pipe, prompt_embeds=inputs["prompt_embeds"], conditions=[first], **size, **call)
    return seen.experts, pipe.scheduler.timesteps


@check("two experts, steps of another expert, by the number of steps", STEP_COUNTS)
def _(golden: Golden, case: str) -> Measured:
    recorded = golden.json("wan22/experts")["tables"][case]
    ours, timesteps = experts_of(golden, int(case), golden.json("wan22/experts")["boundary"])
    if distance(timesteps, torch.tensor(recorded["timesteps"])) > 1e-4:  # one rounding of numbers up to 1000
        return Measured(float("inf"), 0)
    return Measured(sum(e != (name == "low") for e, name in zip(ours, recorded["expert"], strict=True)), 0)


@check("two experts, high-noise steps at another boundary", OTHER_BOUNDARIES)
def _(golden: Golden, case: str) -> Measured:
    recorded = golden.json("wan22/experts")["other_boundaries"][case]
    ours = {steps: experts_of(golden, int(steps), float(case))[0].count(0) for steps in recorded}
    return Measured(max(abs(ours[steps] - count) for steps, count in recorded.items()), 0)
