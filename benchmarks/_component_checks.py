"""Checks of each part alone: transformer, sampler, VAE, text encoder."""

import functools
from collections.abc import Iterable

import torch
from _golden import (
    T2V_PIPELINE,
    TRAJECTORIES,
    TRANSFORMER_CASES,
    Golden,
    Measured,
    check,
    departure,
    distance,
    spread,
    velocity,
    within,
)
from diffusers import WanTransformer3DModel

from pusa.models.vae import decode_video, encode_video
from pusa.scheduler import PusaFlowMatchEulerScheduler

# ---- transformer ---------------------------------------------------------------------------------------------------

EQUAL_TIMES = ("scalar_equal", "single_latent_frame")


@check("transformer, against the original", TRANSFORMER_CASES)
def _(golden: Golden, case: str) -> Measured:
    data = golden.tensors(f"transformer/case_{case}")
    recorded = golden.json("transformer/parity")[case]["diffusers_2d_vs_ref_maxabs"]
    tolerance = within(recorded, data["output"])
    return Measured(distance(velocity(golden.transformer(), data), data["output"]), tolerance)


@check("transformer [B], against the original", EQUAL_TIMES)
def _(golden: Golden, case: str) -> Measured:
    data = golden.tensors(f"transformer/case_{case}")
    recorded = golden.json("transformer/parity")[case]["diffusers_scalar_vs_ref_maxabs"]
    tolerance = within(recorded, data["output"])
    return Measured(distance(velocity(golden.transformer(), data, "scalar"), data["output"]), tolerance)


def _against_stock(golden: Golden, case: str, path: str, dtype: torch.dtype) -> Measured:
    data = golden.tensors(f"transformer/case_{case}")
    theirs = velocity(golden.transformer(WanTransformer3DModel, dtype), data, path)
    ours = velocity(golden.transformer(dtype=dtype), data)
    return Measured(distance(ours, theirs), 1e-5 * spread(theirs) if dtype == torch.float32 else 0)


for dtype_name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
    for stock, path, names in (("per token", "token", TRANSFORMER_CASES), ("scalar", "scalar", EQUAL_TIMES)):
        check(f"per frame = stock {stock}, {dtype_name}", names)(
            functools.partial(_against_stock, path=path, dtype=dtype)
        )


# ---- scheduler -----------------------------------------------------------------------------------------------------

TABLES = ("1", "2", "4", "8", "10", "20", "25", "30", "40", "50")
OTHER_SHIFTS = ("10_shift3.0_denoise1.0", "10_shift8.0_denoise1.0", "10_shift1.0_denoise1.0")
RULED_STEPS = {0: 0, 1: 3, 4: 9, 5: 0, 6: 0, 7: 1, 9: 9}  # recorded single step -> number of the step in a table of 10


@check("sigmas and timesteps", TABLES + OTHER_SHIFTS)
def _(golden: Golden, case: str) -> Measured:
    recorded = golden.json("scheduler/tables")["tables"][case]
    steps, _, rest = case.partition("_shift")
    scheduler = PusaFlowMatchEulerScheduler(shift=float(rest.split("_")[0] or 5) if rest else 5.0)
    scheduler.set_timesteps(int(steps))
    sigmas = distance(scheduler.sigmas, torch.tensor([*recorded["sigmas"], 0.0]))
    return Measured(max(sigmas, distance(scheduler.timesteps, torch.tensor(recorded["timesteps"])) / 1000), 6e-8)


@check("timesteps given to the model", TABLES)
def _(golden: Golden, case: str) -> Measured:
    recorded = golden.json("scheduler/tables")["tables"][case]
    error = 0.0
    for rounding, pipelines in ((False, "t2v_pipeline"), (True, "multiframe_v2v_pipelines")):
        scheduler = PusaFlowMatchEulerScheduler(reference_rounding=rounding)
        scheduler.set_timesteps(int(case))
        given = torch.stack([scheduler.frame_timesteps(k) for k in range(int(case))]).flatten()
        error = max(error, distance(given, torch.tensor(recorded[f"model_timesteps_{pipelines}"]["fp32"])))
    return Measured(error, 0)


@check("one step, by the noise multipliers", map(str, RULED_STEPS))
def _(golden: Golden, case: str) -> Measured:
    record = next(r for r in golden.json("scheduler/single_steps") if r["id"] == int(case))
    data = golden.tensors("scheduler/single_steps")
    multipliers = torch.ones(6)
    for frame, multiplier in record["kwargs"].get("noise_multipliers", {}).items():
        multipliers[int(frame)] = multiplier
    scheduler = PusaFlowMatchEulerScheduler()
    scheduler.set_timesteps(record["num_steps"], noise_multipliers=multipliers)
    k = RULED_STEPS[int(case)]
    stepped = scheduler.step(data[f"{case}.model_output"], scheduler.timesteps[k], data[f"{case}.sample"])
    return Measured(distance(stepped.prev_sample, data[f"{case}.prev_sample"]), 5e-7)


@check("one step, between recorded sigmas", [str(i) for i in range(12)])
def _(golden: Golden, case: str) -> Measured:
    record = next(r for r in golden.json("scheduler/single_steps") if r["id"] == int(case))
    data = golden.tensors("scheduler/single_steps")
    scheduler = PusaFlowMatchEulerScheduler()
    scheduler.set_timesteps(frame_sigmas=torch.tensor([record["sigma"], record["sigma_next"]]))
    stepped = scheduler.step(data[f"{case}.model_output"], scheduler.timesteps[0], data[f"{case}.sample"])
    return Measured(distance(stepped.prev_sample, data[f"{case}.prev_sample"]), 5e-7)


@check("noise on conditions and on training data", ["addnoise0", "addnoise1", "addnoise2", "train"])
def _(golden: Golden, case: str) -> Measured:
    data = golden.tensors("scheduler/single_steps")
    record = next(r for r in golden.json("scheduler/single_steps") if r["id"] == case)
    scheduler = PusaFlowMatchEulerScheduler()
    if case == "train":
        sigmas = data["train.timestep"].div(1000).unsqueeze(0).repeat(2, 1, 1)  # [2, B, F]
    else:
        scheduler.set_timesteps(record["num_steps"])
        nearest = (scheduler.timesteps - record["timestep"]).abs().argmin()  # how the original finds the step
        sigmas = torch.stack([scheduler.sigmas[nearest] * record["noise_multiplier"], torch.tensor(0.0)]).unsqueeze(1)
    scheduler.set_timesteps(frame_sigmas=sigmas)
    return Measured(distance(scheduler.add_noise(data[f"{case}.x"], data[f"{case}.noise"]), data[f"{case}.out"]), 5e-7)


def trajectory(golden: Golden, case: str, dtype: str, steps: Iterable[int] = (1, 4, 10, 30)) -> tuple[float, float]:
    """Largest differences of sigmas, and of latents, over the recorded walks with analytic denoisers."""
    index = golden.json("scheduler/index")["cases"]
    record = next(c for c in index if c["case"] == case and c["dtype"] == dtype)
    data = golden.tensors(f"scheduler/trajectory_{case}_{dtype}")
    noise, clean = data["noise"], torch.zeros_like(data["noise"])
    multipliers = torch.ones(record["latent_frames"])
    multipliers[record["cond_indices"]] = torch.tensor(record["noise_multipliers"])
    if record["cond_indices"]:
        clean[:, :, record["cond_indices"]] = data["cond_latents"]
    sigma_error = latent_error = 0.0
    for n in steps:
        scheduler = PusaFlowMatchEulerScheduler(reference_rounding=record["pipeline"] != T2V_PIPELINE)
        scheduler.set_timesteps(n, noise_multipliers=multipliers)
        sigmas = scheduler.frame_sigmas[:, 0].expand(-1, len(multipliers))
        for denoiser in ("linear", "tanh"):
            sigma_error = max(sigma_error, distance(sigmas[:-1], data[f"{denoiser}.{n}.sigma"]))
            sigma_error = max(sigma_error, distance(sigmas[1:], data[f"{denoiser}.{n}.sigma_next"]))
            x, walked = scheduler.add_noise(clean, noise), []
            for k, t in enumerate(scheduler.timesteps):
                times = scheduler.frame_timesteps(k)[:, None, :, None, None] / 1000
                x = scheduler.step(noise - data["x0"] if denoiser == "linear" else x.tanh() * times, t, x).prev_sample
                walked.append(x[0])
            rows = [0, 1, 15, 29] if (denoiser, n) == ("linear", 30) else range(n)
            recorded = data[f"{denoiser}.{n}.latents"]
            latent_error = max(latent_error, distance(torch.stack([walked[row] for row in rows]), recorded))
    return sigma_error, latent_error


@check("sampler, sigmas per frame", [f"{case} {dtype}" for case in TRAJECTORIES for dtype in ("fp32", "bf16")])
def _(golden: Golden, case: str) -> Measured:
    name, dtype = case.split()
    return Measured(trajectory(golden, name, dtype)[0], 0)


@check("sampler, latents after each step", TRAJECTORIES)
def _(golden: Golden, case: str) -> Measured:
    return Measured(trajectory(golden, case, "fp32")[1], 1e-6)


@departure("sampler", "t2v bf16", "the original rounds the noise and the timesteps to bf16; here both stay fp32")
def _(golden: Golden) -> float:
    return trajectory(golden, "t2v", "bf16")[1]


@departure("sampler", "edge_tiny_multiplier fp32", "the original freezes a frame whose timestep is below 1")
def _(golden: Golden) -> float:
    return trajectory(golden, "edge_tiny_multiplier", "fp32")[1]


@departure("sampler", "edge_all_conditioned fp32", "with every frame conditioned the original finds the wrong steps")
def _(golden: Golden) -> float:
    return trajectory(golden, "edge_all_conditioned", "fp32")[1]


# ---- VAE and text encoder ------------------------------------------------------------------------------------------

VAE_CASES = ("1", "5", "17")
TEXT_CASES = ("len32", "len512", "len64_batch2")
UNTILED = "tile_30x52_15x26_pipeline_default"  # the tiny videos fit into one of its tiles


@check("VAE encode, frames", VAE_CASES)
def _(golden: Golden, case: str) -> Measured:
    data, parity = golden.tensors(f"vae/case_{case}frames"), golden.json("vae/parity")[f"{case}_frames"]
    ours = encode_video(golden.vae, data["video"])
    errors = [distance(ours, data["encoded"]), distance(ours, data[f"encoded_{UNTILED}"])]
    return Measured(max(errors), within(parity["encode_diffusers_vs_ref"], data["encoded"]))


@check("VAE decode, frames", VAE_CASES)
def _(golden: Golden, case: str) -> Measured:
    data, parity = golden.tensors(f"vae/case_{case}frames"), golden.json("vae/parity")[f"{case}_frames"]
    ours = decode_video(golden.vae, data["latents"])
    errors = [distance(ours, data["decoded"]), distance(ours, data[f"decoded_{UNTILED}"])]
    return Measured(max(errors), within(parity["decode_diffusers_clamped_vs_ref"], data["decoded"]))


@departure("VAE", "17 frames in tiles of 3 x 4", "the original lays and blends tiles differently")
def _(golden: Golden) -> float:
    data = golden.tensors("vae/case_17frames")
    return distance(decode_video(golden.vae, data["latents"]), data["decoded_tile_3x4_2x2"])


@check("text encoder", TEXT_CASES)
def _(golden: Golden, case: str) -> Measured:
    data = golden.tensors(f"text/case_{case}")
    with torch.no_grad():
        ours = golden.text_encoder(data["input_ids"], data["attention_mask"]).last_hidden_state
    recorded = golden.json("text/parity")[case]["all_tokens"]
    return Measured(distance(ours, data["encoder_output"]), within(recorded, data["encoder_output"]))
