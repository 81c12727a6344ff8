"""Convert between Wan's own layout and diffusers', and load folders as Wan publishes them.

Each name is a pair of templates in one table that serves both directions. Conversion renames keys and copies nothing;
it works on any part of a state dict (one shard at a time), with any values: tensors, shapes, file names.
`pusa.models.convert` writes a folder in diffusers' layout.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from pusa.models import files, wan22_vae
from pusa.models.files import WrongArchitectureError
from pusa.models.fp8 import store_as_fp8
from pusa.models.names import BLOCK_NAMES, MODEL_NAMES
from pusa.models.parts import Tensors, check_tensors, refuse_quantised, tensors_in
from pusa.models.sources import configs
from pusa.models.streaming import Devices, LoadCounter, Places, device_of, fill, places
from pusa.resources import DType, dtype_of
from pusa.scheduler import PusaFlowMatchEulerScheduler

Value = TypeVar("Value")

WAN22_BOUNDARY_RATIO = 0.875  # of the text-to-video pair: the high-noise expert runs while t >= 875


# ---- names ---------------------------------------------------------------------------------------------------------

_FIELDS = {"n": r"(?P<n>\d+)", "p": r"(?P<p>\w+)", "side": "(?P<side>encoder|decoder)"}


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{", "{").replace(r"\}", "}").format(**_FIELDS))


class KeyTable:
    """Rename keys of one model by pairs of templates (original, diffusers).

    In a template ``{n}`` is a block's number, ``{p}`` a parameter's name, ``{side}`` encoder or decoder.
    """

    def __init__(self, model: str, pairs: Iterable[tuple[str, str]]) -> None:
        self.model = model
        pairs = list(pairs)
        self._forward = [(_pattern(original), other) for original, other in pairs]
        self._backward = [(_pattern(other), original) for original, other in pairs]

    def to_diffusers(self, state_dict: Mapping[str, Value]) -> dict[str, Value]:
        """Rename original keys to diffusers'; raise WrongArchitectureError if a key is in neither template."""
        return self._rename(state_dict, self._forward)

    def to_original(self, state_dict: Mapping[str, Value]) -> dict[str, Value]:
        """Rename diffusers' keys to the original ones; raise as `to_diffusers`."""
        return self._rename(state_dict, self._backward)

    def _rename(self, state_dict: Mapping[str, Value], rules: list[tuple[re.Pattern[str], str]]) -> dict[str, Value]:
        renamed: dict[str, Value] = {}
        unknown = []
        for key, value in state_dict.items():
            for pattern, template in rules:
                if match := pattern.fullmatch(key):
                    renamed[template.format(**match.groupdict())] = value
                    break
            else:
                unknown.append(key)
        if unknown:
            some = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            raise WrongArchitectureError(
                f"{len(unknown)} of {len(state_dict)} tensors are not those of {self.model}: {some}"
            )
        return renamed


def _transformer_pairs() -> Iterator[tuple[str, str]]:
    names = MODEL_NAMES | {f"blocks.{{n}}.{name}": f"blocks.{{n}}.{other}" for name, other in BLOCK_NAMES.items()}
    for name, other in names.items():
        if name.endswith("modulation"):  # a parameter, not a module
            yield name, other
        else:
            yield f"{name}.{{p}}", f"{other}.{{p}}"


_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESAMPLE = ("resample.1", "time_conv")


def _shared_vae_pairs() -> Iterator[tuple[str, str]]:
    yield "conv1.{p}", "quant_conv.{p}"
    yield "conv2.{p}", "post_quant_conv.{p}"
    yield "{side}.conv1.{p}", "{side}.conv_in.{p}"
    yield "{side}.head.0.{p}", "{side}.norm_out.{p}"
    yield "{side}.head.2.{p}", "{side}.conv_out.{p}"
    for name in ("norm", "to_qkv", "proj"):
        yield f"{{side}}.middle.1.{name}.{{p}}", f"{{side}}.mid_block.attentions.0.{name}.{{p}}"
    for name, other in _RESIDUAL.items():
        yield f"{{side}}.middle.0.{name}.{{p}}", f"{{side}}.mid_block.resnets.0.{other}.{{p}}"
        yield f"{{side}}.middle.2.{name}.{{p}}", f"{{side}}.mid_block.resnets.1.{other}.{{p}}"


def _vae_pairs() -> Iterator[tuple[str, str]]:
    yield from _shared_vae_pairs()
    for name, other in _RESIDUAL.items():
        yield f"encoder.downsamples.{{n}}.{name}.{{p}}", f"encoder.down_blocks.{{n}}.{other}.{{p}}"
    for name in _RESAMPLE:
        yield f"encoder.downsamples.{{n}}.{name}.{{p}}", f"encoder.down_blocks.{{n}}.{name}.{{p}}"
    # The original counts the decoder's layers across stages of three residual blocks and an upsampler.
    for stage in range(4):
        for block in range(3):
            for name, other in _RESIDUAL.items():
                yield (
                    f"decoder.upsamples.{4 * stage + block}.{name}.{{p}}",
                    f"decoder.up_blocks.{stage}.resnets.{block}.{other}.{{p}}",
                )
        for name in _RESAMPLE:
            yield (
                f"decoder.upsamples.{4 * stage + 3}.{name}.{{p}}",
                f"decoder.up_blocks.{stage}.upsamplers.0.{name}.{{p}}",
            )


def _text_encoder_pairs() -> Iterator[tuple[str, str]]:
    yield "token_embedding.{p}", "shared.{p}"
    yield "norm.{p}", "encoder.final_layer_norm.{p}"
    for original, other in {
        "norm1": "0.layer_norm",
        "attn.q": "0.SelfAttention.q",
        "attn.k": "0.SelfAttention.k",
        "attn.v": "0.SelfAttention.v",
        "attn.o": "0.SelfAttention.o",
        "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
        "norm2": "1.layer_norm",
        "ffn.gate.0": "1.DenseReluDense.wi_0",
        "ffn.fc1": "1.DenseReluDense.wi_1",
        "ffn.fc2": "1.DenseReluDense.wo",
    }.items():
        yield f"blocks.{{n}}.{original}.{{p}}", f"encoder.block.{{n}}.layer.{other}.{{p}}"


TRANSFORMER = KeyTable("a Wan transformer", _transformer_pairs())
VAE = KeyTable("the Wan2.1 VAE", _vae_pairs())
WAN22_VAE = KeyTable("the Wan2.2 VAE", [*_shared_vae_pairs(), *wan22_vae.stage_pairs(_RESIDUAL, _RESAMPLE)])
TEXT_ENCODER = KeyTable("a UMT5 encoder", _text_encoder_pairs())
_WAN22_STAGE = re.compile(
    r"(?:encoder\.downsamples|decoder\.upsamples)\.\d+\.(?:down|up)samples\.|"
    r"encoder\.down_blocks\.\d+\.(?:resnets|downsampler)\.|decoder\.up_blocks\.\d+\.upsampler\."
)
# Transformers has the embedding under two names, Wan and safetensors under one.
EMBEDDING, TIED_COPY = "shared.weight", "encoder.embed_tokens.weight"


def transformer_to_diffusers(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename the transformer's keys; this and its siblings raise WrongArchitectureError for unknown keys."""
    return TRANSFORMER.to_diffusers(state_dict)


def transformer_to_original(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Invert `transformer_to_diffusers`."""
    return TRANSFORMER.to_original(state_dict)


def vae_to_diffusers(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename keys of ``Wan2.1_VAE.pth`` or ``Wan2.2_VAE.pth`` to those of `AutoencoderKLWan`.

    A part of a state dict that has none of the Wan2.2 VAE's own names is taken for the Wan2.1 VAE's.
    """
    table = WAN22_VAE if any(_WAN22_STAGE.match(key) for key in state_dict) else VAE
    return table.to_diffusers(state_dict)


def vae_to_original(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Invert `vae_to_diffusers`."""
    table = WAN22_VAE if any(_WAN22_STAGE.match(key) for key in state_dict) else VAE
    return table.to_original(state_dict)


def text_encoder_to_transformers(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename keys of ``models_t5_umt5-xxl-enc-bf16.pth`` to those of transformers' `UMT5EncoderModel`."""
    return TEXT_ENCODER.to_diffusers(state_dict)


def text_encoder_to_original(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Invert `text_encoder_to_transformers`; drop the second name of the tied embedding."""
    return TEXT_ENCODER.to_original({key: value for key, value in state_dict.items() if key != TIED_COPY})


# ---- configurations ------------------------------------------------------------------------------------------------


def config_from_keys(shapes: Mapping[str, Sequence[int]], *, num_heads: int | None = None) -> dict[str, Any]:
    """Derive the diffusers configuration of a transformer in the original layout.

    Args:
        shapes: original key -> shape, of the whole model.
        num_heads: attention heads, which no shape shows. None: heads of 128 channels, as in all published models.

    Returns:
        Arguments of `WanTransformer3DModel`.

    Raises:
        WrongArchitectureError: an image-to-video model, another architecture, or a width that needs `num_heads`.
    """
    patch, head = shapes.get("patch_embedding.weight"), shapes.get("head.head.weight")
    if patch is None or head is None or "blocks.0.ffn.0.weight" not in shapes:
        raise WrongArchitectureError(
            f"these {len(shapes)} tensors are no Wan transformer: patch_embedding, blocks or head is missing"
        )
    dim, in_channels, *patch_size = patch
    out_channels = head[0] // math.prod(patch_size)
    takes_images = configs.takes_images(shapes)
    config: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "image_dim": shapes["img_emb.proj.0.weight"][0] if takes_images else None,
        "added_kv_proj_dim": dim if takes_images else None,
    }
    files.check_text_to_video(config, "this checkpoint")
    transformer_to_diffusers(shapes)
    if num_heads is None and dim % configs.HEAD_DIM:
        raise WrongArchitectureError(f"a width of {dim} is no multiple of 128: config.json must say num_heads")
    return {
        **config,
        **configs.config_from_shapes(shapes, num_heads),
        "patch_size": tuple(patch_size),
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.self_attn.norm_q.weight" in shapes else None,
    }


def text_encoder_config_from_keys(shapes: Mapping[str, Sequence[int]]) -> UMT5Config:
    """Derive the transformers configuration of a UMT5 encoder in the original layout (original key -> shape)."""
    text_encoder_to_transformers(shapes)
    vocab_size, d_model = shapes["token_embedding.weight"]
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shapes["blocks.0.attn.q.weight"][0] // num_heads,
        d_ff=shapes["blocks.0.ffn.fc1.weight"][0],
        num_layers=configs.count_blocks(shapes),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
    )


def vae_config_from_keys(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Derive the arguments of `AutoencoderKLWan` for a VAE in the original layout (original key -> shape).

    Raises:
        WrongArchitectureError: neither the Wan2.1 VAE with its 16 latent channels nor the Wan2.2 VAE with its 48,
            the only ones whose latent statistics are known.
    """
    vae_to_diffusers(shapes)
    z_dim, is_wan22 = shapes["conv2.weight"][0], wan22_vae.SIGN in shapes
    name, expected = ("Wan2.2", wan22_vae.Z_DIM) if is_wan22 else ("Wan2.1", 16)
    if z_dim != expected:
        raise WrongArchitectureError(f"this VAE has {z_dim} latent channels; the {name} VAE has {expected}")
    if is_wan22:
        if (widest := shapes["decoder.conv1.weight"][0]) % 4:
            raise WrongArchitectureError(f"its decoder begins with {widest} channels, no multiple of 4")
        return wan22_vae.config_from_shapes(shapes)
    return {"base_dim": shapes["encoder.conv1.weight"][0], "z_dim": z_dim}


# ---- files ---------------------------------------------------------------------------------------------------------


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the part's name before an error of its checkpoint, and explain a missing tensor."""
    try:
        yield
    except WrongArchitectureError as error:
        raise WrongArchitectureError(f"{where}: {error}") from error
    except KeyError as error:
        raise WrongArchitectureError(
            f"{where} is not exactly its checkpoint: weights are in no file: {error.args[0]}, ..."
        ) from error


def _shapes(tensors: Tensors) -> dict[str, Sequence[int]]:
    return {key: shape for key, (shape, _) in tensors.items()}


def empty_transformer(folder: Path) -> WanTransformer3DModel:
    """Build the expert in a folder without its weights, from the headers of its shards and, if any, ``config.json``.

    Raises:
        WrongArchitectureError: see `config_from_keys`; or its shards have not exactly the model's tensors.
    """
    where = f"the transformer in {folder.name}"
    config = files.read_json(folder / "config.json")
    if config.get("model_type", "t2v") not in ("t2v", "ti2v"):
        raise WrongArchitectureError(
            f"config.json says model_type={config['model_type']!r}: Pusa needs a text-to-video base ('t2v', 'ti2v')"
        )
    tensors = tensors_in(files.transformer_shards(folder))
    refuse_quantised(tensors, where)
    with _named(where):
        model_config = config_from_keys(_shapes(tensors), num_heads=config.get("num_heads"))
    with init_empty_weights():
        model = WanTransformer3DModel(**model_config)
    check_tensors(model, transformer_to_diffusers(tensors), where)
    return model


def load_transformer(
    folder: Path,
    dtype: torch.dtype,
    *,
    device: "torch.device | str" = "cpu",
    counter: LoadCounter | None = None,
    as_fp8: bool = False,
) -> WanTransformer3DModel:
    """Load one expert tensor by tensor: see `pusa.models.streaming.fill`.

    Args:
        as_fp8: store its linear layers as fp8 (`pusa.models.fp8`) as they are read.
    """
    model = empty_transformer(folder)
    if as_fp8:
        store_as_fp8(model, dtype)
    fill(model, places_of_transformer(folder), dtype, device=device, counter=counter)
    return model


def places_of_transformer(folder: Path) -> Places:
    """List the tensors of one expert's files, and where they belong in diffusers' class."""
    return places(files.transformer_shards(folder), transformer_to_diffusers)


def empty_vae(folder: Path) -> tuple[AutoencoderKLWan, Places]:
    """Build the VAE of Wan2.1 or TI2V-5B without its weights, and list them; raises as `empty_transformer`."""
    path = files.original_vae(folder)
    where, tensors = f"the vae in {path.name}", tensors_in([path])
    refuse_quantised(tensors, where)
    with _named(where):
        config = vae_config_from_keys(_shapes(tensors))
    with init_empty_weights():
        vae = AutoencoderKLWan(**config)
    check_tensors(vae, vae_to_diffusers(tensors), where)
    return vae, places([path], vae_to_diffusers)


def load_vae(
    folder: Path, dtype: torch.dtype, *, device: "torch.device | str" = "cpu", counter: LoadCounter | None = None
) -> AutoencoderKLWan:
    """Load the Wan2.1 VAE."""
    vae, weights = empty_vae(folder)
    fill(vae, weights, dtype, device=device, counter=counter)
    return vae


def empty_text_encoder(folder: Path) -> tuple[UMT5EncoderModel, Places]:
    """Build the UMT5 encoder without its weights, and list them; raise as `empty_vae`."""
    path = files.original_weights(folder, files.ORIGINAL_TEXT_ENCODER)
    where, tensors = f"the text_encoder in {path.name}", tensors_in([path])
    refuse_quantised(tensors, where)
    with _named(where):
        config = text_encoder_config_from_keys(_shapes(tensors))
    with init_empty_weights():
        encoder = UMT5EncoderModel(config)
    check_tensors(encoder, text_encoder_to_transformers(tensors), where)
    return encoder, places([path], text_encoder_to_transformers)


def load_text_encoder(
    folder: Path,
    dtype: torch.dtype,
    *,
    device: "torch.device | str" = "cpu",
    counter: LoadCounter | None = None,
    keep_mapped: bool = False,
) -> UMT5EncoderModel:
    """Load the UMT5 encoder; its embeddings are tied."""
    encoder, weights = empty_text_encoder(folder)
    fill(encoder, weights, dtype, device=device, counter=counter, keep_mapped=keep_mapped)
    return encoder


def load_components(
    folder: Path,
    *,
    dtype: DType,
    skip: Collection[str] = (),
    device: Devices = "cpu",
    counter: LoadCounter | None = None,
    as_fp8: Collection[str] = (),
) -> dict[str, Any]:
    """Load all components of a `WanPipeline` from a complete folder in the original layout.

    Args:
        folder: of Wan2.1 (shards beside the VAE) or Wan2.2 (``high_noise_model``, ``low_noise_model``).
        dtype: one for all, or by component with a "default".
        skip: components not to load.
        device: one for all, or by component; the CPU for those that it does not name.
        counter: counts the bytes read.
        as_fp8: transformers whose linear layers are stored as fp8 as they are read.

    Returns:
        Arguments of the pipeline class.

    Raises:
        WrongArchitectureError, UnsafeFileError: see `empty_transformer` and `pusa.models.tensors`.
    """
    experts = files.original_experts(folder)
    loaders: dict[str, Any] = {"vae": (load_vae, folder), "text_encoder": (load_text_encoder, folder)}
    for component, place in experts.items():  # the largest last
        loaders[component] = (partial(load_transformer, as_fp8=component in as_fp8), place)
    components: dict[str, Any] = {
        component: load(place, dtype_of(component, dtype), device=device_of(component, device), counter=counter)
        for component, (load, place) in loaders.items()
        if component not in skip
    }
    if "tokenizer" not in skip:
        components["tokenizer"] = AutoTokenizer.from_pretrained(folder / files.ORIGINAL_TOKENIZER)
    if "scheduler" not in skip:
        components["scheduler"] = PusaFlowMatchEulerScheduler()
    boundary_ratio = WAN22_BOUNDARY_RATIO if len(experts) == 2 else None
    is_ti2v = files.original_vae(folder).stem == files.ORIGINAL_WAN22_VAE  # trained with a time for each token
    return components | {"boundary_ratio": boundary_ratio, "expand_timesteps": is_ti2v}
