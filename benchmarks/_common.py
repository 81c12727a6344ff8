"""Share tables, model configurations and the cost of a forward pass among the benchmark scripts."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

from pusa.conditions import PusaCondition
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.training.flops import Workload, flops

WAN_14B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
}
"""Wan2.1 T2V 14B, and each expert of Wan2.2 A14B."""
WAN_1_3B: dict[str, Any] = WAN_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}


def forward_flops(config: dict[str, Any], grid: Sequence[int], text_tokens: int, timesteps: int = 1) -> int:
    """Floating-point operations of the matrix products of one forward of one sample, two per multiply-add.

    Args:
        config: of the transformer, without image embeddings.
        grid: latent frames, height and width ``(F, h, w)``.
        text_tokens: length of the prompt embeddings.
        timesteps: how many are embedded: 1, F or S.
    """
    work = Workload(model=config, grid=tuple(grid), text_tokens=text_tokens, timesteps=timesteps, rank=None)
    return flops(work).forward


def kept_frames(task: str, frames: int) -> list[int]:
    """List the latent frames, of so many, that a task keeps: none, the first, the first four, or every second one."""
    return {
        "text": [],
        "image": [0],
        "extension": list(range(min(4, frames - 1))),
        "completion": list(range(1 if frames > 9 else 0, frames, 2)),
    }[task]


def conditions_of(latents: Tensor, kept: list[int]) -> list[PusaCondition]:
    """Keep frames of latents ``[C, F, h, w]`` exactly."""
    return [PusaCondition(latents=latents[:, kept], latent_index=kept)] if kept else []


def timesteps_for(path: str, times: Tensor, tokens: int) -> Tensor:
    """Times ``[B, F]`` as each path takes them: "scalar" ``[B]`` (the last frame's), "frame", "token" ``[B, S]``."""
    if path == "token":
        return times.repeat_interleave(tokens // times.shape[1], dim=1)
    return times if path == "frame" else times[:, -1]


def stock_twin(model: WanTransformer3DModel) -> WanTransformer3DModel:
    """A stock transformer on the very same weights, without a copy."""
    with torch.device("meta"):
        twin = WanTransformer3DModel.from_config(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.rope = model.rope  # its buffers are in no state dict
    return twin.eval()


def in_dtype(model: PusaWanTransformer3DModel, dtype: torch.dtype) -> PusaWanTransformer3DModel:
    """A copy in `dtype`, but for the parts that stay in fp32 when a model is loaded."""
    state = {n: t if is_kept_in_fp32(model, n) else t.to(dtype) for n, t in model.state_dict().items()}
    copy = PusaWanTransformer3DModel.from_config(model.config).to(model.device)
    copy.load_state_dict(state, assign=True)
    return copy.eval()


def is_kept_in_fp32(model: WanTransformer3DModel, name: str) -> bool:
    """Return True if loading keeps the parameter of this name in fp32 whatever the dtype."""
    return not set(model._keep_in_fp32_modules).isdisjoint(name.split("."))


class SameSigmas(FlowMatchEulerDiscreteScheduler):
    """The stock scheduler on our sigmas: its own grid is shifted twice and ends elsewhere."""

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None, **_: Any) -> None:
        super().set_timesteps(sigmas=torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist(), device=device)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Text in columns: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
