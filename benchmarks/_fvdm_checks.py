"""Check FVDM: transformer, DDPM on vectors, random timesteps, DDIM for each task."""

import functools
from collections.abc import Callable

import torch
from _golden import Golden, Measured, check, departure, distance, within
from torch import Tensor

from pusa.ddim import PusaDDIMScheduler
from pusa.models.fvdm import ddpm
from pusa.models.fvdm.transformer import FVDMTransformer3DModel

TIMES = ("equal", "i2v_frame0_zero", "all_unequal")
GUIDANCE, SAMPLED_CLASS = 7.0, 2
CONTEXT = 4  # frames of the second chunk that are the last ones of the first


@functools.cache
def transformer(golden: Golden, num_classes: int | None = None) -> FVDMTransformer3DModel:
    """Build the recorded network, with its 5 classes or without."""
    recorded = golden.json("fvdm/config")["model"]
    left_out = {"class_dropout_prob", "num_classes", "condition_noise", "max_period"}  # not of the network
    model = FVDMTransformer3DModel(
        **{name: value for name, value in recorded.items() if name not in left_out}, num_classes=num_classes
    )
    weights = "class_conditional" if num_classes else "unconditional"
    model.load_state_dict(golden.tensors(f"fvdm/weights_{weights}"))
    return model.eval()


def frames_second(recorded: Tensor) -> Tensor:
    """Turn recorded latents [B, F, C, H, W] into ours."""
    return recorded.transpose(1, 2)


@torch.no_grad()
def guided(golden: Golden, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Predict with and without the class, and guide the noise."""
    model = transformer(golden, 5)
    with_class, without = (model(latents, t, y, return_dict=False)[0] for y in (labels, None))
    noise, noise_without = with_class[:, :4], without[:, :4]
    return noise_without + GUIDANCE * (noise - noise_without)


# ---- transformer ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _against_original(golden: Golden, case: str, num_classes: int | None, output: str) -> Measured:
    data = golden.tensors(f"fvdm/forward_{case}")
    recorded = golden.json("fvdm/parity")[f"forward_{case}"]["sdpa_attention_vs_ref"]
    labels = data["y"] if num_classes else None
    ours = transformer(golden, num_classes)(frames_second(data["x"]), data["t"], labels, return_dict=False)[0]
    theirs = frames_second(data[output])
    return Measured(distance(ours, theirs), within(recorded, theirs))


for kind, num_classes, output in (("no classes", None, "output_unconditional"), ("classes", 5, "output_class")):
    check(f"FVDM transformer, {kind}", TIMES)(
        functools.partial(_against_original, num_classes=num_classes, output=output)
    )


@check("FVDM transformer, guidance 7", TIMES)
def _(golden: Golden, case: str) -> Measured:
    data = golden.tensors(f"fvdm/forward_{case}")
    recorded = golden.json("fvdm/parity")[f"forward_{case}"]["sdpa_attention_vs_ref"]
    ours = guided(golden, frames_second(data["x"])[:1], data["cfg_t"][:1], data["y"][:1])
    theirs = frames_second(data["output_class_cfg7"])[:1, :4]
    return Measured(distance(ours, theirs), within(GUIDANCE * recorded, theirs))


# ---- DDPM ----------------------------------------------------------------------------------------------------------


@check("FVDM respacing and alpha-bar", ("10", "50", "100", "250", "ddim50"))
def _(golden: Golden, case: str) -> Measured:
    recorded = golden.json("fvdm/schedules")["respaced"][case]
    steps = ddpm.timestep_map(case)
    ours, theirs = torch.tensor(steps), torch.tensor(recorded["timestep_map"])
    bars = torch.tensor(recorded["alphas_cumprod"], dtype=torch.float64)
    return Measured(distance(ours, theirs) + distance(ddpm.alphas_cumprod()[steps], bars), 1e-15)


def against_diffusion(ours: Callable[[Golden, dict[str, Tensor], Tensor], Tensor], golden: Golden, name: str) -> float:
    """Return the largest difference of a recorded value over the three cases of timesteps."""
    data = golden.tensors("fvdm/q_sample_and_loss")
    latents = {key: frames_second(value) for key, value in data.items() if value.ndim == 5}
    error = 0.0
    for case in TIMES:
        found = {key.removeprefix(f"{case}."): value for key, value in latents.items()}
        theirs = found[name] if name in found else data[f"{case}.{name}"]
        error = max(error, distance(ours(golden, found, data[f"{case}.t"]), theirs))
    return error


@torch.no_grad()
def _prediction(golden: Golden, data: dict[str, Tensor], t: Tensor) -> Tensor:
    return transformer(golden)(data["x_t"], t, return_dict=False)[0]


def _losses(golden: Golden, data: dict[str, Tensor], t: Tensor) -> ddpm.Losses:
    return ddpm.training_losses(_prediction(golden, data, t), data["x_start"], data["noise"], data["x_t"], t)


DIFFUSION: dict[str, Callable[[Golden, dict[str, Tensor], Tensor], Tensor]] = {
    "x_t": lambda _, data, t: ddpm.q_sample(data["x_start"], data["noise"], t),
    "posterior_mean": lambda _, data, t: ddpm.posterior(data["x_start"], data["x_t"], t)[0],
    "posterior_log_variance": lambda _, data, t: ddpm.posterior(data["x_start"], data["x_t"], t)[1].expand_as(
        data["x_t"]
    ),
    "mse": lambda golden, data, t: _losses(golden, data, t).mse,
    "vb": lambda golden, data, t: _losses(golden, data, t).vb,
    "loss": lambda golden, data, t: _losses(golden, data, t).loss,
    "pred_xstart": lambda golden, data, t: ddpm.predict_clean(data["x_t"], _prediction(golden, data, t)[:, :4], t),
}


@check("FVDM diffusion and loss", DIFFUSION)
def _(golden: Golden, case: str) -> Measured:
    recorded = max(golden.json("fvdm/parity")[f"q_sample_{times}"] for times in TIMES)
    tolerance = 2 * recorded if case in ("x_t", "posterior_mean", "posterior_log_variance") else 2e-6
    if case == "pred_xstart":  # up to 660, at timestep 999
        data = golden.tensors("fvdm/q_sample_and_loss")
        tolerance = max(within(0, data[f"{times}.pred_xstart"]) for times in TIMES)
    return Measured(against_diffusion(DIFFUSION[case], golden, case), tolerance)


@check("FVDM random timesteps", ("ptss",))
def _(golden: Golden, case: str) -> Measured:
    recorded, data = golden.json(f"fvdm/{case}"), golden.tensors(f"fvdm/{case}")
    generator = torch.Generator().manual_seed(recorded["seed"])
    size = recorded["local_batch"], recorded["frames"]
    ours = torch.stack([ddpm.draw_ptss(*size, 0.2, generator) for _ in range(200)])
    decisions = (ours != ours[:, :, :1]).any(dim=2).any(dim=1).long()
    first = distance(ours[:40], data["t_first_40"])
    return Measured(first + distance(decisions, data["async_first_200"]), 0)


# ---- DDIM ----------------------------------------------------------------------------------------------------------

TASKS = ("t2v", "i2v", "interpolation", "long_second_chunk", "class_cfg7_t2v")


def start(golden: Golden, task: str) -> tuple[Tensor, Tensor]:
    """Build the latents that a recorded task starts from, and its noise multipliers."""
    data = {name: frames_second(value) for name, value in golden.tensors("fvdm/sampling_ddim10").items()}
    latents, known, free = data["noise"].clone(), data["condition_latents"], torch.ones(8)
    if task == "long_second_chunk":
        free[:CONTEXT] = 0
        clean = torch.zeros_like(known)
        clean[:, :, :CONTEXT] = known[:, :, -CONTEXT:]
        t = torch.where(free == 0, 0, 999).unsqueeze(0)
        return ddpm.q_sample(clean, data["long_second_chunk.noise"], t), free
    kept = {"i2v": [0], "interpolation": [0, -1]}.get(task, [])
    latents[:, :, kept] = known[:, :, kept]
    free[kept] = 0
    return latents, free


@torch.no_grad()
def sample(golden: Golden, task: str, published_zero: bool = True) -> Tensor:
    """Take ten steps of a task; return the latents after each, as recorded: [10, F, C, H, W]."""
    latents, free = start(golden, task)
    scheduler = PusaDDIMScheduler(published_zero=published_zero)
    scheduler.set_timesteps(10, noise_multipliers=free)
    walked = []
    for k, timestep in enumerate(scheduler.timesteps):
        t = scheduler.frame_timesteps(k).expand(1, 8)
        if task == "class_cfg7_t2v":
            noise = guided(golden, latents, t, torch.tensor([SAMPLED_CLASS]))
        else:
            noise = transformer(golden)(latents, t, return_dict=False)[0]
        latents = scheduler.step(noise, timestep, latents).prev_sample
        walked.append(frames_second(latents)[0])
    return torch.stack(walked)


@check("FVDM DDIM, latents after each step", TASKS)
def _(golden: Golden, case: str) -> Measured:
    theirs = golden.tensors("fvdm/sampling_ddim10")[f"{case}.latents"]
    recorded = golden.json("fvdm/parity")["ddim_i2v_own_vs_ref" if case == "i2v" else "ddim_t2v_own_vs_ref"]
    return Measured(distance(sample(golden, case), theirs), within(recorded, theirs))


@departure("FVDM DDIM", "i2v, kept", "the original replaces a kept frame by the model's prediction at every step")
def _(golden: Golden) -> float:
    theirs = golden.tensors("fvdm/sampling_ddim10")["i2v.latents"]
    return distance(sample(golden, "i2v", published_zero=False)[:, 0], theirs[:, 0])
