"""Run Wan's transformer with one timestep per latent frame.

Vectorised timesteps (FVDM, arXiv 2410.03160; Pusa V1.0, arXiv 2507.16116) change two things in a text-to-video
transformer and add no parameter: it embeds a vector of timesteps, and shift, scale and gate of every block and of the
head follow the latent frame. The modulation stays one row per frame, ``[B, F, 6, D]``, broadcast over the frame's
tokens; expanded to tokens it would hold 10 GB more at 480p in the 14B model.

Shape letters: B batch, F latent frames, S tokens (frame-major), G timesteps per sample (F or S), D width.
"""

import functools
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models._modeling_parallel import ContextParallelInput
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from pusa.models.frame_skipping import FrameStore, spread, take
from pusa.models.promotion import check_promotable


def _modulate(x: Tensor, scale: Tensor, shift: Tensor | None, token_groups: Tensor | None) -> Tensor:
    """Compute ``x * scale + shift`` for tokens x ``[B, S, D]`` with a row of scale and shift ``[B, G, D]`` per frame.

    `token_groups` ``[S]`` is the row of each token, where x is a slice of the tokens.
    """
    if token_groups is not None:
        x = x * scale.index_select(1, token_groups)
        return x if shift is None else x + shift.index_select(1, token_groups)
    x = x.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)  # [B, F, S/F, D]
    if shift is not None:
        x = x + shift.unsqueeze(2)
    return x.flatten(1, 2)


class PusaWanAttnProcessor(WanAttnProcessor):
    """Compute Wan's attention; and self-attention of some frames to all, with stored keys and values of the others."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [B, s, D]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        stored: tuple[Tensor, ...] | None = None,  # keys and values [B, S - s, heads, d], or () if s is S
    ) -> Any:
        """Return what stock does; with `stored`, it and the rotated keys and the values ``[B, s, heads, d]``."""
        if stored is None or rotary_emb is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = _rotate(attn.norm_q(query).unflatten(2, (attn.heads, -1)), *rotary_emb)
        key = _rotate(attn.norm_k(key).unflatten(2, (attn.heads, -1)), *rotary_emb)
        value = value.unflatten(2, (attn.heads, -1))
        keys, values = key, value
        if stored:
            keys, values = torch.cat([key, stored[0]], dim=1), torch.cat([value, stored[1]], dim=1)
        x = dispatch_attention_fn(query, keys, values, backend=self._attention_backend)
        x = x.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](x)), key, value


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of channels of queries or keys ``[B, s, heads, d]`` by their positions ``[1, s, 1, d]``."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class PusaWanTransformerBlock(WanTransformerBlock):
    """Wan's block with a row of ``temb`` per latent frame instead of per token; same parameters and rounding."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, S, D]
        encoder_hidden_states: Tensor,  # [B, text, D]
        temb: Tensor,  # [B, 6, D] or [B, G, 6, D]
        rotary_emb: Tensor,
        token_groups: Tensor | None = None,  # [s]: the row of temb for each token, when this rank holds a slice
        stored: tuple[Tensor, ...] | None = None,  # keys and values of the frames that are not in hidden_states
    ) -> Any:
        """Compute the hidden states; with `stored`, a tuple of them and the keys and values of their frames."""
        is_stock = temb.ndim == 3 or (token_groups is None and temb.shape[1] == hidden_states.shape[1])
        if is_stock and stored is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)

        modulation = self.scale_shift_table.unsqueeze(0) + temb.float()  # [B, G, 6, D]
        shift_msa, scale_msa, gate_msa, shift_ffn, scale_ffn, gate_ffn = modulation.unbind(2)

        x = _modulate(self.norm1(hidden_states.float()), 1 + scale_msa, shift_msa, token_groups).type_as(hidden_states)
        own: list[Tensor] = []
        if stored is None:
            x = self.attn1(x, None, None, rotary_emb)
        else:
            x, *own = self.attn1(x, None, None, rotary_emb, stored=stored)
        hidden_states = (hidden_states.float() + _modulate(x, gate_msa, None, token_groups)).type_as(hidden_states)

        x = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(x, encoder_hidden_states, None, None)

        x = _modulate(self.norm3(hidden_states.float()), 1 + scale_ffn, shift_ffn, token_groups).type_as(hidden_states)
        x = self.ffn(x)
        x = (hidden_states.float() + _modulate(x.float(), gate_ffn, None, token_groups)).type_as(hidden_states)
        return x if stored is None else (x, *own)


class TokenGroups(nn.Module):
    """Index of the timestep of each token, ``[S]``.

    It is a module, without parameters, because context parallelism splits the outputs of modules: a rank's tokens need
    not begin or end with a frame.
    """

    def forward(self, groups: int, tokens: int, device: torch.device) -> Tensor:
        return torch.arange(groups, device=device).repeat_interleave(tokens // groups)


class PusaWanTransformer3DModel(WanTransformer3DModel):
    """`diffusers.WanTransformer3DModel` that also takes one timestep per latent frame.

    Configuration, parameters and state dict are the stock ones, and it saves folders under the name of the stock class.
    All that diffusers does to a Wan transformer (LoRA, offloading, layerwise casting, caches, attention
    backends, regional compilation, Ulysses and ring attention) applies.
    """

    _no_split_modules = ["PusaWanTransformerBlock"]  # noqa: RUF012 (diffusers reads a plain class attribute)
    _repeated_blocks = ["PusaWanTransformerBlock"]  # noqa: RUF012
    # Stock splits a 2-D timestep over ranks; here every rank keeps all timesteps and splits the index into them.
    _cp_plan = {  # noqa: RUF012
        **{name: plan for name, plan in WanTransformer3DModel._cp_plan.items() if name},
        "token_groups": {0: ContextParallelInput(split_dim=0, expected_dims=1, split_output=True)},
    }

    @functools.wraps(WanTransformer3DModel.__init__)  # type: ignore[misc]  # diffusers reads the configuration from this signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adopt_blocks()

    def _adopt_blocks(self) -> None:
        self.token_groups = TokenGroups()
        for block in self.blocks:
            block.__class__ = PusaWanTransformerBlock
            if type(block.attn1.processor) is WanAttnProcessor:  # one of the user's stays
                block.attn1.processor.__class__ = PusaWanAttnProcessor  # and keeps its attention backend

    @classmethod
    def from_wan(cls, model: WanTransformer3DModel) -> "PusaWanTransformer3DModel":
        """Turn a stock Wan transformer into this class, in place and without copying a weight.

        Args:
            model: a `diffusers.WanTransformer3DModel`; one of this class is returned as it is.

        Returns:
            The same object.

        Raises:
            TypeError: `model` is of another class, such as a sharded or wrapped one.
            ValueError: the model or a block is compiled or carries hooks (offloading, caching, parallelism), which
                would go on calling the old forward.
        """
        if isinstance(model, cls):
            return model
        check_promotable(model, WanTransformer3DModel, "blocks", "from_wan")
        model.__class__ = cls
        model._adopt_blocks()
        return model

    def to_json_string(self) -> str:
        """Write the configuration under the name of the stock class, so that any diffusers program can load it."""
        return super().to_json_string().replace(f'"{type(self).__name__}"', f'"{WanTransformer3DModel.__name__}"')

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        frames: FrameStore | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity (noise minus data).

        Args:
            hidden_states: latents ``[B, C, F, H, W]``.
            timestep: 0..1000 (1000 is pure noise): ``[B]`` one per sample, ``[B, F]`` one per latent frame,
                or ``[B, S]`` one per token; the first and the last take the stock path.
            encoder_hidden_states: prompt embeddings ``[B, text, text_dim]``.
            encoder_hidden_states_image: image embeddings of Wan's own image-to-video models, as in diffusers.
            return_dict: a `Transformer2DModelOutput` rather than a tuple of one.
            attention_kwargs: as in diffusers; ``{"scale": s}`` scales all adapters for this call.
            frames: the latent frames to compute, in a step that has begun, with the keys and values of the others,
                whose velocity is returned as 0. None: all frames are computed.

        Returns:
            The velocity, shaped like `hidden_states`.

        Raises:
            ValueError: the timestep has none of these shapes, or not ``[B, F]`` with `frames`; or every frame of this
                model must be computed, see `frame_obstacle`.
        """
        _, _, num_frames, height, width = hidden_states.shape
        p_t, p_h, p_w = self.config.patch_size
        num_frames //= p_t
        tokens = num_frames * (height // p_h) * (width // p_w)
        if timestep.ndim > 2 or (timestep.ndim == 2 and timestep.shape[1] not in (num_frames, tokens)):
            raise ValueError(
                f"timestep of shape {list(timestep.shape)}: give one per sample [B], per latent frame "
                f"[B, {num_frames}] or per token [B, {tokens}]"
            )
        if frames is not None:
            self._check_frames(timestep, num_frames)
        stock = super().forward
        inputs = (hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image)
        if timestep.ndim < 2:
            return stock(*inputs, return_dict=return_dict, attention_kwargs=attention_kwargs)
        token_groups = self.token_groups(timestep.shape[1], tokens, hidden_states.device)
        is_split = token_groups.shape[0] < tokens
        if timestep.shape[1] == tokens and not is_split and frames is None:
            return stock(*inputs, return_dict=return_dict, attention_kwargs=attention_kwargs)
        groups = token_groups if is_split else None
        sample = self._forward_groups(*inputs, groups, frames, attention_kwargs=attention_kwargs)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @property
    def frame_obstacle(self) -> str:
        """Say why every latent frame must be computed at every step; "" if `frames` may leave some out."""
        if getattr(self, "is_cache_enabled", False):
            return "a step cache is enabled"
        if getattr(self, "_parallel_config", None) is not None:
            return "ranks share the tokens"
        if self.config.patch_size[0] != 1:
            return f"patches of {self.config.patch_size[0]} latent frames"
        for block in self.blocks:
            if not isinstance(block, PusaWanTransformerBlock):
                return f"blocks are of {type(block).__name__}"
            if not isinstance(block.attn1.processor, PusaWanAttnProcessor):
                return f"self-attention is of {type(block.attn1.processor).__name__}"
        return ""

    def _check_frames(self, timestep: Tensor, num_frames: int) -> None:
        if self.frame_obstacle:
            raise ValueError(f"every latent frame of this model must be computed: {self.frame_obstacle}")
        if list(timestep.shape[1:]) != [num_frames]:
            raise ValueError(
                f"timestep of shape {list(timestep.shape)}: with frames to compute, give one per latent frame "
                f"[B, {num_frames}]"
            )

    @apply_lora_scale("attention_kwargs")
    def _forward_groups(
        self,
        hidden_states: Tensor,  # [B, C, F, H, W]
        timestep: Tensor,  # [B, G]
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None,
        token_groups: Tensor | None,  # [s] or None: all tokens are here, frame by frame
        frames: FrameStore | None = None,  # None: all are computed
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        rotary_emb, num_frames = self.rope(hidden_states), hidden_states.shape[2]
        if frames is not None:
            every, some = range(num_frames), frames.computed
            hidden_states, timestep = take(hidden_states, some, every, dim=2), take(timestep, some, every, dim=1)
            rotary_emb = tuple(take(part, some, every, dim=1) for part in rotary_emb)
        grid = [size // patch for size, patch in zip(hidden_states.shape[2:], self.config.patch_size, strict=True)]
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()  # [B, S, D]

        temb, modulation, text, image = self.condition_embedder(
            timestep.flatten(),
            encoder_hidden_states,
            encoder_hidden_states_image,
            timestep_seq_len=timestep.shape[1],
        )  # temb [B, G, D]
        modulation = modulation.unflatten(2, (6, -1))  # [B, G, 6, D]
        if image is not None:
            text = torch.cat([image, text], dim=1)

        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            inputs = (x, text, modulation, rotary_emb, token_groups)
            if frames is not None:
                x = frames.keep(number, *block(*inputs, frames.stored(number)))
            else:
                x = self._gradient_checkpointing_func(block, *inputs) if checkpointing else block(*inputs)

        shift, scale = (self.scale_shift_table.unsqueeze(0).to(temb.device) + temb.unsqueeze(2)).to(x.device).unbind(2)
        x = _modulate(self.norm_out(x.float()), 1 + scale, shift, token_groups).type_as(x)
        x = self.proj_out(x)  # [B, S, C * patch], gathered from all ranks

        x = x.unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid)  # [B, f, h, w, p_t, p_h, p_w, C]
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, f, p_t, h, p_h, w, p_w]
        sizes = [count * patch for count, patch in zip(grid, self.config.patch_size, strict=True)]
        x = x.reshape(*x.shape[:2], *sizes)  # [B, C, F, H, W]; one copy, as FSDP2 warns of views
        if frames is None:
            return x
        frames.end()
        return spread(x, frames.computed, num_frames, dim=2)


# First-block cache, MagCache and the others ask this registry what a block returns.
TransformerBlockRegistry.register(
    PusaWanTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)
