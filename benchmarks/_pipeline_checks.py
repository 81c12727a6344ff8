"""Checks of what a user calls: LoRA files, checkpoints' keys, and the pipeline from text and images to video."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import WAN_1_3B, WAN_14B
from _golden import T2V_PIPELINE, Golden, Measured, check, departure, distance, spread, velocity, walk, within
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import BatchEncoding, UMT5Config, UMT5EncoderModel

from pusa.conditions import PusaCondition
from pusa.models import original
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.pipeline import PusaPipeline

# ---- LoRA ----------------------------------------------------------------------------------------------------------

LORAS = {  # name: files with their alphas; the recorded outputs; the recorded merged weights; the entry of report.json
    "official .pt, alpha 1": (
        {"pusa_official_keys.pt": 1.0},
        "pusa_alpha1.0",
        "merged_pusa_alpha1.0",
        "diffusion_model.* lora_A/lora_B, weight 1.0",
    ),
    "official .safetensors, alpha 1.4": (
        {"pusa_official_keys.safetensors": 1.4},
        "pusa_alpha1.4",
        "merged_pusa_alpha1.4",
        "diffusion_model.* lora_A/lora_B, weight 1.4",
    ),
    "diffusion_model A/B, alpha 1.4": (
        {"pusa_diffusion_model_AB.safetensors": 1.4},
        "pusa_diffusion_model_AB_alpha1.4",
        "merged_pusa_alpha1.4",
        "diffusion_model.* lora_A/lora_B, weight 1.4",
    ),
    "diffusion_model up/down, alpha 1.4": (
        {"pusa_diffusion_model_up_down.safetensors": 1.4},
        "pusa_alpha1.4",  # the original cannot read this file; it holds the same matrices
        "merged_pusa_alpha1.4",
        "diffusion_model.* lora_up/lora_down, weight 1.4",
    ),
    "lightx2v with alpha": (
        {"lightx2v_with_alpha.safetensors": 1.0},
        "lightx2v_with_alpha_via_load_lora_lightx2v",
        None,
        "lightx2v with alpha, weight 1.0",
    ),
    "lightx2v without alpha, at 1/rank": (  # what the original makes of a missing alpha
        {"lightx2v_without_alpha.safetensors": 1 / 6},
        "lightx2v_without_alpha_via_load_lora_lightx2v",
        None,
        "lightx2v without alpha, weight 1/rank",
    ),
    "lightx2v with alpha, then official 1.4": (
        {"lightx2v_with_alpha.safetensors": 1.0, "pusa_official_keys.pt": 1.4},
        "lightx2v_then_pusa1.4",
        "merged_lightx2v_then_pusa1.4",
        "lightx2v(alpha) weight 1.0 + pusa weight 1.4",
    ),
}


@functools.cache
def _with_loras(golden: Golden, case: str, *, merged: bool = False) -> tuple[PusaPipeline, list[int]]:
    pipe = golden.pipeline()
    files = LORAS[case][0].items()
    layers = [pipe.load_pusa(golden.folder / "lora" / f, alpha=a, adapter_name=Path(f).stem) for f, a in files]
    if merged:
        pipe.merge_lora()
    return pipe, layers


def _probe(golden: Golden, pipe: PusaPipeline, case: str, error_name: str) -> Measured:
    _, output, _, entry = LORAS[case]
    ours = velocity(pipe.transformer, golden.tensors("lora/probe_input"))
    recorded = golden.json("lora/report")["diffusers"][entry][error_name]
    theirs = golden.tensors("lora/probe_outputs")[output]
    return Measured(distance(ours, theirs), within(recorded, theirs))


@check("LoRA as an adapter, layers not adapted", LORAS)
def _(golden: Golden, case: str) -> Measured:
    expected = golden.json("lora/report")["reference"]["pusa_alpha1.0"]["changed_keys"]
    return Measured(max(abs(layers - expected) for layers in _with_loras(golden, case)[1]), 0)


@check("LoRA as an adapter, output", LORAS)
def _(golden: Golden, case: str) -> Measured:
    return _probe(golden, _with_loras(golden, case)[0], case, "output_maxabs_vs_reference")


@check("LoRA merged, output", LORAS)
def _(golden: Golden, case: str) -> Measured:
    pipe, _ = _with_loras(golden, case, merged=True)
    return _probe(golden, pipe, case, "output_after_fuse_maxabs")


@check("LoRA merged, weights", [case for case, (_, _, merged, _) in LORAS.items() if merged])
def _(golden: Golden, case: str) -> Measured:
    pipe, _ = _with_loras(golden, case, merged=True)
    weights = {k.replace(".base_layer.", "."): v for k, v in pipe.transformer.state_dict().items() if ".lora_" not in k}
    ours = original.transformer_to_original(weights)
    theirs = golden.tensors(f"lora/{LORAS[case][2]}")
    # One rounding of numbers up to 1: the original adds files one after another, and here they are summed first.
    return Measured(max(distance(ours[name], tensor) for name, tensor in theirs.items()), 1.2e-7)


@departure("LoRA", "merged in bf16", "the original rounds B A and the sum to bf16; here the sum is rounded once")
def _(golden: Golden) -> float:
    exact, rounded = (golden.tensors(f"lora/merged_pusa_alpha1.4{suffix}") for suffix in ("", "_bf16"))
    return max(distance(tensor.bfloat16(), rounded[name]) for name, tensor in exact.items())


# ---- key lists -----------------------------------------------------------------------------------------------------

KEY_LISTS = {  # recorded list: the model whose keys and shapes it names, and the way from the original's names to it
    "wan2.1_t2v_14b_diffusers": ("14b", None),
    "wan2.1_t2v_1.3b_diffusers": ("1.3b", None),
    "wan2.2_i2v_a14b_diffusers_each_expert": ("i2v a14b", None),
    "wan2.1_vae_diffusers": ("vae", None),
    "wan2.1_t2v_14b_original": ("14b", original.transformer_to_diffusers),
    "wan2.1_t2v_1.3b_original": ("1.3b", original.transformer_to_diffusers),
    "wan2.2_t2v_a14b_original_each_expert": ("14b", original.transformer_to_diffusers),
    "wan2.2_i2v_a14b_original_each_expert": ("i2v a14b", original.transformer_to_diffusers),
    "wan2.1_i2v_14b_original": ("i2v 14b", original.transformer_to_diffusers),
    "wan2.1_vae_original": ("vae", original.vae_to_diffusers),
    "umt5_xxl_encoder_original": ("umt5", original.text_encoder_to_transformers),
}


@functools.cache
def full_size_shapes(name: str) -> dict[str, list[int]]:
    """Keys and shapes of a model of production size, made without memory."""
    with torch.device("meta"):
        if name == "vae":
            model: torch.nn.Module = AutoencoderKLWan()
        elif name == "umt5":
            sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
            model = UMT5EncoderModel(UMT5Config(vocab_size=256384, **sizes))
        else:
            image = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
            configs = {"14b": WAN_14B, "1.3b": WAN_1_3B, "i2v 14b": WAN_14B | image}
            model = PusaWanTransformer3DModel(**configs.get(name, WAN_14B | {"in_channels": 36}))
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # a second name of the text encoder's shared.weight
    return shapes


@check("keys and shapes that differ", KEY_LISTS)
def _(golden: Golden, case: str) -> Measured:
    name, renamed = KEY_LISTS[case]
    recorded = golden.json(f"keys/{case}")
    recorded = renamed(recorded) if renamed else recorded
    ours = full_size_shapes(name)
    return Measured(sum(ours.get(key) != recorded.get(key) for key in ours.keys() | recorded.keys()), 0)


# ---- end to end ----------------------------------------------------------------------------------------------------

PIPELINE_CASES = (
    "t2v",
    "t2v_multiframe_pipeline",
    "i2v_0.2",
    "i2v_0.0",
    "i2v_0.2_cfg1",
    "i2v_0.2_untiled",
    "i2v_0.2_small_tiles",
    "i2v_0.2_10steps",
    "startend_0.2_0.5",
    "v2v_0.0_0.3",
)
SMALL_TILES = "i2v_0.2_small_tiles"  # its image is encoded in tiles; we start from the recorded latents of it
DECODED_CASES = [case for case in PIPELINE_CASES if case != SMALL_TILES]


class RecordedTokens:
    """In place of a tokenizer: the stored ids and masks of the texts "positive" and "negative"."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data

    def __call__(self, texts: list[str], **_: Any) -> BatchEncoding:
        names = {"input_ids": "ids", "attention_mask": "mask"}
        return BatchEncoding({k: torch.cat([self.data[f"{n}_{t}"] for t in texts]) for k, n in names.items()})


@dataclass(frozen=True)
class Run:
    """Hold the output of the pipeline for a recorded request."""

    data: dict[str, Tensor]
    known: list[int]  # latent frames with a condition
    start: Tensor  # latents [C, F, h, w] that the model is first given
    latents: Tensor  # after each step [N, C, F, h, w]
    sigmas: Tensor  # [N + 1, F]
    times: Tensor  # given to the model [N, F]
    video: Tensor  # [1, 3, n, H, W] in -1..1


@functools.cache
def run_pipeline(golden: Golden, case: str, follow_rounding: bool) -> Run:
    record, data = golden.record_of("pipeline", case), golden.tensors(f"pipeline/case_{case}")
    pipe = golden.pipeline(reference_rounding=follow_rounding and record["pipeline"] != T2V_PIPELINE)
    pipe.tokenizer = RecordedTokens(data)
    known, multipliers = record["cond_indices"] or [], record["noise_multipliers"] or []
    if case == SMALL_TILES:
        conditions = [PusaCondition(latents=data["cond_latents"][0], latent_index=known, noise_multiplier=multipliers)]
    elif "video_uint8" in data:
        video = data["video_uint8"].numpy()
        conditions = [PusaCondition(video=video, latent_index=known, noise_multiplier=multipliers)]
    else:
        images = list(data.get("images_uint8", ()))
        conditions = [
            PusaCondition(image=image.numpy(), latent_index=i, noise_multiplier=m)
            for image, i, m in zip(images, known, multipliers, strict=True)
        ]
    seen = walk(
        pipe,
        prompt="positive",
        negative_prompt="negative",
        conditions=conditions,
        height=record["height"],
        width=record["width"],
        num_frames=record["num_frames"],
        num_inference_steps=record["num_inference_steps"],
        guidance_scale=record["cfg_scale"],
        latents=data["noise"],
        output_type="pt",
        max_sequence_length=golden.json("pipeline/index")["text_len"],
    )
    latent_frames = data["noise"].shape[2]
    return Run(
        data=data,
        known=known,
        start=seen.inputs[0],
        latents=torch.stack(seen.latents),
        sigmas=pipe.scheduler.frame_sigmas[:, 0].expand(-1, latent_frames),
        times=torch.cat([pipe.scheduler.frame_timesteps(k).expand(1, latent_frames) for k in range(len(seen.latents))]),
        video=seen.frames.transpose(1, 2) * 2 - 1,  # of [1, n, 3, H, W] in 0..1
    )


@check("pipeline, sigmas and timesteps per frame", PIPELINE_CASES)
def _(golden: Golden, case: str) -> Measured:
    run = run_pipeline(golden, case, follow_rounding=True)
    sigmas = max(distance(run.sigmas[:-1], run.data["sigma"]), distance(run.sigmas[1:], run.data["sigma_next"]))
    return Measured(max(sigmas, distance(run.times, run.data["model_timestep"])), 0)


@check("pipeline, start (text, images, noise)", PIPELINE_CASES)
def _(golden: Golden, case: str) -> Measured:
    run = run_pipeline(golden, case, follow_rounding=True)
    recorded = 0.0 if case == SMALL_TILES else golden.json("pipeline/parity")[case]["model_input_latents_step0"]
    theirs = run.data["model_input_latents"][0]
    return Measured(distance(run.start, theirs), within(recorded, theirs))


@check("pipeline, latents after each step", PIPELINE_CASES)
def _(golden: Golden, case: str) -> Measured:
    run = run_pipeline(golden, case, follow_rounding=True)
    return Measured(distance(run.latents, run.data["latents"]), 2e-5)


@check("pipeline, decoded video", DECODED_CASES)
def _(golden: Golden, case: str) -> Measured:
    run = run_pipeline(golden, case, follow_rounding=True)
    recorded = golden.json("pipeline/parity")[case]["video"]
    return Measured(distance(run.video, run.data["video"]), within(recorded, run.data["video"]))


@check("exact mode, latents after each step / range", [case for case in PIPELINE_CASES if case != "t2v"])
def _(golden: Golden, case: str) -> Measured:
    """The recorded t2v is exact already: it is above."""
    run = run_pipeline(golden, case, follow_rounding=False)
    steps = zip(run.latents, run.data["latents"], strict=True)
    return Measured(max(distance(ours, theirs) / spread(theirs) for ours, theirs in steps), 3e-2)


@check("noise multiplier 0 comes out as it went in", ["i2v_0.0", "v2v_0.0_0.3"])
def _(golden: Golden, case: str) -> Measured:
    run = run_pipeline(golden, case, follow_rounding=False)
    return Measured(distance(run.latents[-1][:, 0], run.start[:, 0]), 0)


@departure("pipeline", f"{SMALL_TILES}, decoded", "the original lays and blends tiles differently; latents match")
def _(golden: Golden) -> float:
    run = run_pipeline(golden, SMALL_TILES, follow_rounding=True)
    return distance(run.video, run.data["video"])
