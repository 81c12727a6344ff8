"""Run Mochi's transformer with one timestep per latent frame.

Pusa V0.5 ("Thousands Timesteps") is genmo's Mochi, fine-tuned with a vector of timesteps: same modules, same
parameters. The visual stream's modulation follows the latent frame, one row each, ``[B, F, 4 D]``, broadcast over the
frame's tokens (the original expands it to tokens); the text stream is modulated by the mean of the frames' embeddings.

Shape letters: B batch, F latent frames, S visual tokens (frame-major), L text tokens, G timesteps per sample (F or 1),
D width.
"""

import functools
from typing import Any

import torch
from diffusers import MochiTransformer3DModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.models.embeddings import MochiCombinedTimestepCaptionEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_mochi import MochiRoPE, MochiTransformerBlock
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from pusa.models.promotion import check_promotable


def _scale(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply tokens ``[B, S, D]`` by a row per frame ``[B, G, D]``."""
    return (x.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)).flatten(1, 2)


def _normalise(norm: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    """Normalise tokens ``[B, S, D]`` and multiply them by a row per frame ``[B, G, D]``, in fp32."""
    return _scale(norm(x.float()), scale).type_as(x)


class PusaMochiTimestepEmbedding(MochiCombinedTimestepCaptionEmbedding):
    """Embed a vector of timesteps, and the text; same parameters as the stock class."""

    def forward(
        self,
        timestep: Tensor,  # [B] or [B, F]
        encoder_hidden_states: Tensor,  # [B, L, text_dim]
        encoder_attention_mask: Tensor | None,  # [B, L]; None: no padding
        hidden_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute a row per timestep ``[B, G, D]``, each with the pooled text added, and the text ``[B, L, D']``."""
        if encoder_attention_mask is None:
            encoder_attention_mask = encoder_hidden_states.new_ones(encoder_hidden_states.shape[:2], dtype=torch.bool)
        sinusoid = self.time_proj(timestep.flatten())  # fp32
        temb = self.timestep_embedder(sinusoid.to(hidden_dtype)).unflatten(0, (timestep.shape[0], -1))
        pooled = self.pooler(encoder_hidden_states, encoder_attention_mask)
        return temb + pooled.unsqueeze(1), self.caption_proj(encoder_hidden_states)


class PusaMochiNormOut(AdaLayerNormContinuous):
    """Modulate the last layer by a row per frame; same parameters as the stock class."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """Compute tokens ``[B, S, D]`` from such and the embeddings ``[B, G, D]``."""
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=-1)
        frames = self.norm(x).unflatten(1, (scale.shape[1], -1))  # [B, G, S/G, D]
        return (frames * (1 + scale).unsqueeze(2) + shift.unsqueeze(2)).flatten(1, 2)


class PusaMochiRoPE(MochiRoPE):
    """Compute the angles of Mochi's learned rotary embedding on any device, in fp32 also under autocast."""

    def forward(
        self,
        pos_frequencies: Tensor,  # [3, heads, d / 2], of time, height and width
        num_frames: int,
        height: int,
        width: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute cosine and sine ``[S, heads, d / 2]``."""
        positions = self._get_positions(num_frames, height, width, device, dtype)  # [S, 3]
        t, y, x = (
            place[:, None, None] * frequencies
            for place, frequencies in zip(positions.float().unbind(1), pos_frequencies.float(), strict=True)
        )
        angles = t + y + x
        return angles.cos(), angles.sin()


class PusaMochiAttnProcessor:
    """Compute Mochi's joint attention of visual and text tokens, by the chosen backend, with no loop over the batch.

    Stock looks for the padding with `nonzero` in every block, which waits for the device and breaks compiled graphs.
    """

    _attention_backend: AttentionBackendName | None = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [B, S, D]
        encoder_hidden_states: Tensor,  # [B, L, D']
        attention_mask: Tensor | None = None,  # [B, L], 0 or False for padding; None: there is none
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,  # [S, heads, d / 2]
    ) -> tuple[Tensor, Tensor]:
        """Return both streams; text tokens that are padding have values without meaning, which nothing reads."""
        projections = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        (query, key, value), (text_query, text_key, text_value) = (
            [projection(x).unflatten(2, (attn.heads, -1)) for projection in stream]
            for stream, x in zip(projections, (hidden_states, encoder_hidden_states), strict=True)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = _rotate(query, *image_rotary_emb), _rotate(key, *image_rotary_emb)
        query = torch.cat([query, attn.norm_added_q(text_query)], dim=1)  # [B, S + L, heads, d]
        key = torch.cat([key, attn.norm_added_k(text_key)], dim=1)
        value = torch.cat([value, text_value], dim=1)

        backend, sizes = self._attention_backend, (hidden_states.shape[1], encoder_hidden_states.shape[1])
        if attention_mask is not None:
            attention_mask = functional.pad(attention_mask.bool(), (sizes[0], 0), value=True)[:, None, None]
            backend = AttentionBackendName.NATIVE  # flash and sage kernels take no mask
        x = dispatch_attention_fn(
            query, key, value, attn_mask=attention_mask, backend=backend, parallel_config=self._parallel_config
        )
        visual, text = x.flatten(2, 3).type_as(query).split(sizes, dim=1)
        visual = attn.to_out[1](attn.to_out[0](visual))
        return visual, text if attn.context_pre_only else attn.to_add_out(text)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of channels of queries or keys ``[B, S, heads, d]``, in fp32, by ``[S, heads, d / 2]``."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class PusaMochiTransformerBlock(MochiTransformerBlock):
    """Run Mochi's block with a row of ``temb`` per latent frame; same parameters and rounding as the stock class."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, S, D]
        encoder_hidden_states: Tensor,  # [B, L, D']
        temb: Tensor,  # [B, G, D]
        encoder_attention_mask: Tensor | None = None,  # [B, L]; None: no padding
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the visual and the text tokens; the last block returns the text as it came."""
        text, text_temb = encoder_hidden_states, temb.mean(1, keepdim=True)  # [B, 1, D]
        modulation = self.norm1.linear(self.norm1.silu(temb))  # [B, G, 4 D]
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        x = _normalise(self.norm1.norm, hidden_states, 1 + scale_msa.float())
        if self.context_pre_only:
            text_scale = self.norm1_context.linear_1(self.norm1_context.silu(text_temb))
            text_x = _normalise(self.norm1_context.norm.norm, text, 1 + text_scale.float())
        else:
            text_modulation = self.norm1_context.linear(self.norm1_context.silu(text_temb))  # [B, 1, 4 D']
            text_scale, text_gate_msa, text_scale_mlp, text_gate_mlp = text_modulation.chunk(4, dim=-1)
            text_x = _normalise(self.norm1_context.norm, text, 1 + text_scale.float())

        x, text_x = self.attn1(
            hidden_states=x,
            encoder_hidden_states=text_x,
            image_rotary_emb=image_rotary_emb,
            attention_mask=encoder_attention_mask,
        )

        hidden_states = hidden_states + _normalise(self.norm2.norm, x, gate_msa.tanh())
        x = self.ff(_normalise(self.norm3.norm, hidden_states, 1 + scale_mlp.float()))
        hidden_states = hidden_states + _normalise(self.norm4.norm, x, gate_mlp.tanh())
        if not self.context_pre_only:
            text = text + _normalise(self.norm2_context.norm, text_x, text_gate_msa.tanh())
            text_x = self.ff_context(_normalise(self.norm3_context.norm, text, 1 + text_scale_mlp.float()))
            text = text + _normalise(self.norm4_context.norm, text_x, text_gate_mlp.tanh())
        return hidden_states, text


class _Paddings:
    """Find the padding of prompts, and remember for each tensor if it has any.

    To look at values waits for all that the device has to do; a prompt is the same tensor at every step.
    """

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()  # prompt -> (its version, True if it has padding)

    def __reduce__(self) -> tuple[type["_Paddings"], tuple[()]]:
        """Forget all in copies of a model, which may be in another process."""
        return type(self), ()

    def mask(self, text: Tensor) -> Tensor | None:
        """Return the mask ``[B, L]`` of a prompt ``[B, L, D]``, or None if no row is zero (or it holds no values)."""
        if text.is_meta or text.shape[1] == 0:
            return None
        mask = text.detach().ne(0).any(-1)
        version = -1 if text.is_inference() else text._version
        known_version, has_padding = self._known.get(text, (None, True))
        if known_version != version:
            has_padding = not bool(mask.all())
            self._known[text] = version, has_padding
        return mask if has_padding else None


class PusaMochiTransformer3DModel(MochiTransformer3DModel):
    """Run `diffusers.MochiTransformer3DModel`, also with one timestep per latent frame.

    Configuration, parameters and state dict are the stock ones, and it saves folders under the name of the stock class.
    All that diffusers does to a Mochi transformer (LoRA, offloading, layerwise casting, caches) applies; and unlike
    with the stock class, attention backends and regional compilation do.
    """

    _no_split_modules = ["PusaMochiTransformerBlock"]  # noqa: RUF012 (diffusers reads a plain class attribute)
    _repeated_blocks = ["PusaMochiTransformerBlock"]  # noqa: RUF012

    frame_obstacle = "its text tokens attend to all frames, and are modulated by the mean of their timesteps"

    @functools.wraps(MochiTransformer3DModel.__init__)  # type: ignore[misc]  # diffusers reads the configuration from this signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adopt_parts()

    def _adopt_parts(self) -> None:
        self._paddings = _Paddings()
        self.time_embed.__class__ = PusaMochiTimestepEmbedding
        self.norm_out.__class__ = PusaMochiNormOut
        self.rope.__class__ = PusaMochiRoPE
        for block in self.transformer_blocks:
            block.__class__ = PusaMochiTransformerBlock
            if type(block.attn1.processor) is MochiAttnProcessor2_0:  # one of the user's stays
                block.attn1.processor.__class__ = PusaMochiAttnProcessor  # and keeps its attention backend

    @classmethod
    def from_mochi(cls, model: MochiTransformer3DModel) -> "PusaMochiTransformer3DModel":
        """Turn a stock Mochi transformer into this class, in place and without copying a weight.

        Args:
            model: a `diffusers.MochiTransformer3DModel`; one of this class is returned as it is.

        Returns:
            The same object.

        Raises:
            TypeError: `model` is of another class, such as a sharded or wrapped one.
            ValueError: the model or a block is compiled or carries hooks (offloading, caching, parallelism), which
                would go on calling the old forward.
        """
        if isinstance(model, cls):
            return model
        check_promotable(model, MochiTransformer3DModel, "transformer_blocks", "from_mochi")
        model.__class__ = cls
        model._adopt_parts()
        return model

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the blocks, under the name that Wan's transformer gives them."""
        return self.transformer_blocks

    def to_json_string(self) -> str:
        """Write the configuration under the name of the stock class, so that any diffusers program can load it."""
        return super().to_json_string().replace(f'"{type(self).__name__}"', f'"{MochiTransformer3DModel.__name__}"')

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity as Mochi has it, data minus noise.

        Args:
            hidden_states: latents ``[B, C, F, H, W]``.
            encoder_hidden_states: prompt embeddings ``[B, L, text_dim]``; L may be 0 (an empty prompt).
            timestep: 1000 * (1 - sigma), 0 (pure noise) to 1000, in fp32 (bf16 rounds it by up to 4): ``[B]`` one per
                sample or ``[B, F]`` one per latent frame.
            encoder_attention_mask: ``[B, L]``, 0 or False for padding, which takes no part in attention. None: rows of
                zeros are padding; a prompt without any takes the faster attention, by the chosen backend.
            attention_kwargs: as in diffusers; ``{"scale": s}`` scales all adapters for this call.
            return_dict: a `Transformer2DModelOutput` rather than a tuple of one.

        Returns:
            The velocity, shaped like `hidden_states`.

        Raises:
            ValueError: the timestep has none of these shapes.
        """
        num_frames = hidden_states.shape[2]
        if timestep.ndim not in (1, 2) or (timestep.ndim == 2 and timestep.shape[1] != num_frames):
            raise ValueError(
                f"timestep of shape {list(timestep.shape)}: give one per sample [B], or per latent frame "
                f"[B, {num_frames}]"
            )
        if encoder_attention_mask is None:
            encoder_attention_mask = self._paddings.mask(encoder_hidden_states)
        return super().forward(
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask,
            attention_kwargs=attention_kwargs,
            return_dict=return_dict,
        )


# First-block cache, MagCache and the others ask this registry what a block returns.
TransformerBlockRegistry.register(
    PusaMochiTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
)
