"""Run FVDM's transformer: Latte's, with one timestep per frame (arXiv 2410.03160; parameters as published).

Frames are latents of an image VAE, so every frame has its own. Blocks alternate between attention inside a frame and
attention along time at one place. A frame's timestep modulates its tokens in both, and in the final layer; nothing else
differs from Latte. The modulation stays one row per frame, ``[B, F, 1, 6 D]``; the published code repeats it for every
place before the temporal blocks' linear layer, with the same numbers.

Shape letters: B batch, F frames, S tokens of a frame, D width.
"""

from collections import OrderedDict
from itertools import chain
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed_from_grid,
    get_timestep_embedding,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6), "T": (6, 192, 3)}
"""Depth, width and heads by name: the paper's four, and T of its code."""
FREQUENCIES = 256


def config_of(size: str = "XL/2", **options: Any) -> dict[str, Any]:
    """Return the arguments of `FVDMTransformer3DModel` for a size of the paper.

    Args:
        size: "XL/2", "L/2", "B/2" or "S/2" (674, 457, 130 and 32 million parameters): a key of `SIZES` and the patch.
        options: other arguments, such as ``num_frames=16, num_classes=101``.

    Raises:
        ValueError: there is no such size.
    """
    name, _, patch = size.partition("/")
    if name not in SIZES or not (patch.isdecimal() and int(patch) > 0):
        known = ", ".join(f"{known}/2" for known in SIZES)
        raise ValueError(f"size={size!r} is no size of FVDM's: give one of {known} (the number is the patch)")
    depth, hidden_size, num_heads = SIZES[name]
    sizes = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": int(patch)}
    return {**sizes, **options}


class FVDMAttnProcessor:
    """Compute self-attention with diffusers' choice of backends, PyTorch's by default."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
        """Attend within the sequences ``[n, s, D]``."""
        query, key, value = attn.qkv(hidden_states).unflatten(2, (3, attn.heads, -1)).unbind(2)  # [n, s, heads, d]
        x = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.proj(x.flatten(2).type_as(hidden_states))


class FVDMAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = FVDMAttnProcessor
    _available_processors = [FVDMAttnProcessor]  # noqa: RUF012 (diffusers reads a plain class attribute)
    _supports_qkv_fusion = False  # they are one layer already

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.processor = FVDMAttnProcessor()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.processor(self, hidden_states)


def _modulation(dim: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class FVDMTransformerBlock(nn.Module):
    """Attend inside each frame or, in a temporal block, along time at each place; then the MLP (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, is_temporal: bool) -> None:
        super().__init__()
        self.is_temporal = is_temporal
        self.norm1, self.norm2 = _norm(dim), _norm(dim)
        self.attn = FVDMAttention(dim, heads)
        width = int(dim * mlp_ratio)
        layers = {"fc1": nn.Linear(dim, width), "act": nn.GELU("tanh"), "fc2": nn.Linear(width, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.adaLN_modulation = _modulation(dim, 6)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Compute the hidden states ``[B, F, S, D]`` with `temb` ``[B, F, 1, D]``."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(temb).chunk(6, dim=-1)
        x = self.norm1(hidden_states) * (1 + scale_attn) + shift_attn
        hidden_states = hidden_states + gate_attn * self._attend(x)
        x = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        return hidden_states + gate_mlp * self.mlp(x)

    def _attend(self, x: Tensor) -> Tensor:
        if not self.is_temporal:
            return self.attn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = x.transpose(1, 2)  # [B, S, F, D]
        return self.attn(x.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(1, 2)


class FVDMFinalLayer(nn.Module):
    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = _norm(dim)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = _modulation(dim, 2)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Project tokens ``[B, F, S, D]`` to patches ``[B, F, S, out_features]``."""
        shift, scale = self.adaLN_modulation(temb).chunk(2, dim=-1)
        return self.linear(self.norm_final(hidden_states) * (1 + scale) + shift)


class FVDMTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """Predict noise by FVDM's network (LatteVIDEO in its code), under the parameter names that it is published with.

    Args:
        input_size: latent height and width in training, 32 for 256 x 256 pixels; one number if they are equal.
        patch_size: latent pixels of a token's side.
        in_channels: latent channels C.
        hidden_size, depth, num_heads, mlp_ratio: see `config_of`; half of the blocks are temporal.
        num_frames: frames in training, and the most that a call may have.
        num_classes: classes, for a class-conditional network; None: it has no labels.
        learn_sigma: predict the variance, too.

    Raises:
        ValueError: the depth is odd, or the width no multiple of 4 and of `num_heads`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FVDMTransformerBlock"]  # noqa: RUF012 (diffusers reads a plain class attribute)
    _repeated_blocks = ["FVDMTransformerBlock"]  # noqa: RUF012
    frame_obstacle = "its spatial blocks keep no keys of a frame for the next step"
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder", "y_embedder", "final_layer"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_frames: int = 16,
        num_classes: int | None = None,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        if depth < 2 or depth % 2:
            raise ValueError(f"depth={depth}: half of the blocks are temporal, so give an even number from 2 on")
        if hidden_size % 4 or hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is no multiple of 4 and of num_heads={num_heads}")
        sides = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if any(side % patch_size for side in sides):
            raise ValueError(f"input_size={input_size} is no multiple of patch_size={patch_size}")
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self._grid = sides[0] // patch_size, sides[1] // patch_size

        embedders: dict[str, nn.Module] = {"proj": nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)}
        self.x_embedder = nn.Sequential(OrderedDict(embedders))
        time_mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.t_embedder = nn.Sequential(OrderedDict(mlp=time_mlp))
        if num_classes is not None:  # and a row for no class
            table = nn.Embedding(num_classes + 1, hidden_size)
            self.y_embedder = nn.Sequential(OrderedDict(embedding_table=table))
        self.register_buffer("pos_embed", places(hidden_size, *self._grid))  # [1, S, D]
        self.register_buffer("temp_embed", moments(hidden_size, num_frames))  # [1, F, D]
        self.blocks_spatial, self.blocks_temp = (
            nn.ModuleList(
                FVDMTransformerBlock(hidden_size, num_heads, mlp_ratio, is_temporal) for _ in range(depth // 2)
            )
            for is_temporal in (False, True)
        )
        self.final_layer = FVDMFinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.gradient_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        """Draw weights as published: Xavier, with modulations and output 0, so that every block begins as identity."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a view
            elif isinstance(module, nn.Linear):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith("t_embedder"):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the blocks in the order in which they run, under the name that Wan's transformer gives them."""
        return nn.ModuleList(chain.from_iterable(zip(self.blocks_spatial, self.blocks_temp, strict=True)))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise (eps).

        Args:
            hidden_states: latents ``[B, C, F, H, W]``, with up to `num_frames` frames. Sizes other than `input_size`
                have positions on the same scale, which the network has not seen in training.
            timestep: index of the DDPM's 1000 steps, 0..999 (999 is nearly pure noise): ``[B, F]`` one per frame, or
                ``[B]`` one per video.
            class_labels: ``[B]``, 0..num_classes - 1, or num_classes for no class; None: no class.
            return_dict: a `Transformer2DModelOutput` rather than a tuple of one.
            attention_kwargs: as in diffusers; ``{"scale": s}`` scales all adapters for this call.

        Returns:
            ``[B, C, F, H, W]``: the noise; with `learn_sigma` ``[B, 2 C, F, H, W]``: the noise, then where the log
            variance lies between its bounds, -1 to 1 (`pusa.models.fvdm.ddpm`).

        Raises:
            ValueError: a shape or a label does not fit the network.
        """
        timestep = self._checked_timestep(hidden_states, timestep)
        dtype, num_frames = hidden_states.dtype, hidden_states.shape[2]
        grid = [side // self.config.patch_size for side in hidden_states.shape[3:]]

        frames = hidden_states.transpose(1, 2)  # [B, F, C, H, W]
        x = self.x_embedder(frames.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])
        x = x + self._places(grid).to(x)  # [B, F, S, D]
        waves = get_timestep_embedding(timestep.flatten(), FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        temb = self.t_embedder(waves.to(dtype)).unflatten(0, timestep.shape)  # [B, F, D]
        labels = self._checked_labels(class_labels, hidden_states)
        if labels is not None:
            temb = temb + self.y_embedder(labels).unsqueeze(1)
        temb = temb.unsqueeze(2)  # [B, F, 1, D]

        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        for number, pair in enumerate(zip(self.blocks_spatial, self.blocks_temp, strict=True)):
            for block in pair:
                if number == 0 and block.is_temporal:
                    x = x + self.temp_embed[:, :num_frames].unsqueeze(2).to(x)
                x = self._gradient_checkpointing_func(block, x, temb) if checkpointing else block(x, temb)

        sample = self._video(self.final_layer(x, temb), grid)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _places(self, grid: list[int]) -> Tensor:
        return self.pos_embed if tuple(grid) == self._grid else places(self.config.hidden_size, *grid)

    def _video(self, patches: Tensor, grid: list[int]) -> Tensor:
        """Put patches ``[B, F, S, p p c]`` in their places: ``[B, c, F, H, W]``."""
        side = self.config.patch_size
        x = patches.unflatten(3, (side, side, -1)).unflatten(2, grid)  # [B, F, h, w, p, p, c]
        x = x.permute(0, 6, 1, 2, 4, 3, 5)  # [B, c, F, h, p, w, p]
        return x.reshape(*x.shape[:3], grid[0] * side, grid[1] * side)

    def _checked_timestep(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """Check latents and timesteps against the network and each other; return the timesteps as ``[B, F]``."""
        shape, side = list(hidden_states.shape), self.config.patch_size
        if len(shape) != 5 or shape[1] != self.config.in_channels:
            raise ValueError(f"hidden_states of shape {shape}: give [B, {self.config.in_channels}, F, H, W]")
        batch, _, frames, height, width = shape
        if frames > self.config.num_frames:
            raise ValueError(
                f"hidden_states has {frames} frames, and this network has positions for {self.config.num_frames}: make "
                "a longer video in chunks, each from the last frames of the one before"
            )
        if height % side or width % side:
            raise ValueError(f"latents of {height} x {width} are no whole patches of {side} x {side}: give multiples")
        if timestep.ndim == 1 and len(timestep) == batch:
            return timestep.unsqueeze(1).expand(batch, frames)
        if list(timestep.shape) != [batch, frames]:
            raise ValueError(
                f"timestep of shape {list(timestep.shape)}: give one per frame [{batch}, {frames}] or per video "
                f"[{batch}]"
            )
        return timestep

    def _checked_labels(self, class_labels: Tensor | None, hidden_states: Tensor) -> Tensor | None:
        """Check labels; return them on the latents' device, "no class" if there are none, None without classes."""
        classes, batch = self.config.num_classes, hidden_states.shape[0]
        if classes is None:
            if class_labels is not None:
                raise ValueError(
                    "class_labels were given, and this network was trained without classes: leave them out"
                )
            return None
        if class_labels is None:
            return torch.full((batch,), classes, device=hidden_states.device)
        if list(class_labels.shape) != [batch]:
            raise ValueError(f"class_labels of shape {list(class_labels.shape)}: give one per video [{batch}]")
        if class_labels.device.type == "cpu" and not bool(((class_labels >= 0) & (class_labels <= classes)).all()):
            raise ValueError(f"class_labels={class_labels.tolist()}: give 0..{classes - 1}, or {classes} for no class")
        return class_labels.to(hidden_states.device)


def places(dim: int, height: int, width: int) -> Tensor:
    """Return the sin-cos embedding of a frame's places, row by row: fp32 ``[1, height * width, dim]``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([columns, rows]).double()  # columns first, as published
    return get_2d_sincos_pos_embed_from_grid(dim, grid).float().unsqueeze(0)


def moments(dim: int, frames: int) -> Tensor:
    """Return the sin-cos embedding of the frames' numbers: fp32 ``[1, frames, dim]``."""
    return get_1d_sincos_pos_embed_from_grid(dim, torch.arange(frames).double()).float().unsqueeze(0)
