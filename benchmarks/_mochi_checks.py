"""Check Mochi's transformer (Pusa V0.5) against the original."""

import math

import torch
from _golden import Golden, Measured, check, distance, within
from diffusers import MochiTransformer3DModel
from torch import Tensor, nn

from pusa.models.mochi.checkpoint import transformer_to_diffusers
from pusa.models.mochi.schedule import linear_quadratic
from pusa.models.mochi.transformer import PusaMochiTransformer3DModel

FOLDER = "mochi/transformer"
CASES = (
    "equal_sigma",
    "start_sigma_one",
    "i2v_frame0_zero",
    "i2v_m0.4",
    "multi_frame",
    "all_unequal_with_zeros",
    "batch2",
    "masked_text_3_tokens",
    "empty_negative_prompt",
    "single_latent_frame",
    "frames28_extension_like",
)
EQUAL_TIMES = ("equal_sigma", "start_sigma_one", "single_latent_frame")
TABLES = ("2", "3", "4", "5", "8", "10", "20", "25", "30", "50", "64")


class RecordedSinusoid(nn.Module):
    """Make the sinusoid of timesteps with the frequencies of the machine that recorded the data.

    Its ``exp`` rounds some of the 128 frequencies otherwise than this machine's. A timestep of 1000 makes 6e-5 of the
    last bit of a frequency, and the tiny network 1e-4 of that, as between fp32 and fp64 in the original.
    """

    def __init__(self, sinusoid: Tensor, timestep: Tensor) -> None:
        """Find the frequencies, within four roundings of their values, by one recorded sinusoid ``[F, 256]``."""
        super().__init__()
        values = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        near = torch.stack([(values.view(torch.int32) + ulps).view(torch.float32) for ulps in range(-4, 5)])  # [9, 128]
        angles = timestep[:, None, None] * near  # [F, 9, 128]
        cos, sin = sinusoid[:, None].chunk(2, dim=-1)
        errors = torch.maximum((angles.cos() - cos).abs(), (angles.sin() - sin).abs()).amax(0)  # [9, 128]
        self.frequencies = near.gather(0, errors.argmin(0, keepdim=True))[0]

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep[:, None].float() * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def transformer(
    golden: Golden, cls: type[MochiTransformer3DModel] = PusaMochiTransformer3DModel, own_sinusoid: bool = False
) -> MochiTransformer3DModel:
    """Make the tiny recorded model; with `own_sinusoid` by this machine's frequencies."""
    model = cls(**golden.json(f"{FOLDER}/config")["diffusers"])
    model.load_state_dict(golden.tensors(f"{FOLDER}/weights_diffusers"))
    if not own_sinusoid:
        sinusoid = golden.tensors(f"{FOLDER}/case_multi_frame_activations")["sinusoid_cos_then_sin"]
        timestep = golden.tensors(f"{FOLDER}/case_multi_frame")["timestep"]
        model.time_embed.time_proj = RecordedSinusoid(sinusoid[0], timestep[0])
    return model.eval()


@torch.no_grad()
def velocity(model: nn.Module, data: dict[str, Tensor], timestep: Tensor | None = None) -> Tensor:
    """Predict a recorded case; `timestep` stands in for the recorded one."""
    return model(
        hidden_states=data["latents"],
        timestep=data["timestep"] if timestep is None else timestep,
        encoder_hidden_states=data["text_features"],
        encoder_attention_mask=data["text_mask"],
        return_dict=False,
    )[0]


@check("mochi transformer, against the original", CASES)
def _(golden: Golden, case: str) -> Measured:
    data = golden.tensors(f"{FOLDER}/case_{case}")
    recorded = golden.json(f"{FOLDER}/parity")[case]["perframe_diffusers_vs_ref_maxabs"]
    return Measured(distance(velocity(transformer(golden), data), data["output"]), within(recorded, data["output"]))


@check("mochi transformer [B], against the original", ("equal_sigma", "single_latent_frame"))
def _(golden: Golden, case: str) -> Measured:
    data = golden.tensors(f"{FOLDER}/case_{case}")
    recorded = golden.json(f"{FOLDER}/parity")[case]["stock_MochiTransformer3DModel_vs_ref_maxabs"]
    ours = velocity(transformer(golden), data, data["timestep"][:, 0])
    return Measured(distance(ours, data["output"]), within(recorded, data["output"]))


@check("mochi per frame = stock", EQUAL_TIMES)
def _(golden: Golden, case: str) -> Measured:
    data = golden.tensors(f"{FOLDER}/case_{case}")
    theirs = velocity(transformer(golden, MochiTransformer3DModel, own_sinusoid=True), data, data["timestep"][:, 0])
    ours = velocity(transformer(golden, own_sinusoid=True), data)
    return Measured(distance(ours, theirs), within(0, theirs))


@check("mochi checkpoint, genmo's to diffusers'", ["all tensors"])
def _(golden: Golden, case: str) -> Measured:
    ours = transformer_to_diffusers(golden.tensors(f"{FOLDER}/weights_genmo"))
    theirs = golden.tensors(f"{FOLDER}/weights_diffusers")
    if ours.keys() != theirs.keys():
        return Measured(math.inf, 0)
    return Measured(max(distance(ours[key], theirs[key]) for key in ours), 0)


@check("mochi sigmas", TABLES)
def _(golden: Golden, case: str) -> Measured:
    recorded = golden.json("mochi/sampler/tables")["tables"][case]["sigmas"]
    return Measured(distance(linear_quadratic(int(case)), torch.tensor(recorded)), 0)
