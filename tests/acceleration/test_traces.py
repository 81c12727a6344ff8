"""What a part of a model is predicted to hold at once is what the real module holds, traced at full size.

The real classes run with the real shapes on the meta device: every tensor has its size, none has contents.
"""

import pytest
import torch
from diffusers import AutoencoderKLWan
from memory_trace import live_bytes, meta_transformer
from peft import LoraConfig

from pusa import zoo
from pusa.acceleration.needs import shapes_of
from pusa.acceleration.shapes.common import VaeShape
from pusa.acceleration.shapes.wan import WAN22_VAE, WanTransformer, WanVae
from pusa.models.vae import decode_chunks, encode_video

CLOSE = 0.1
SIZES = {"480p": (480, 832), "720p": (720, 1280)}
WAN22_CONFIG = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def trace_forward(config: dict, height: int, width: int, *, dtype: str = "bfloat16", rank: int = 0) -> int:
    """The most that a forward of two of the model's blocks holds: they are alike, so more add nothing."""
    model = meta_transformer(config, DTYPES[dtype], layers=2)
    if rank:
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    spatial = 16 if config["in_channels"] == 48 else 8
    with torch.device("meta"):
        latents = torch.empty(1, config["in_channels"], 21, height // spatial, width // spatial, dtype=DTYPES[dtype])
        text = torch.empty(1, 512, config["text_dim"], dtype=DTYPES[dtype])
        timestep = torch.empty(1, 21)
    with live_bytes() as count:
        model(latents, timestep, text, return_dict=False)
    return count.peak


def shape_of(config: dict) -> WanTransformer:
    return WanTransformer.from_config(config)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["wan2.1-14b", "wan2.1-1.3b", "wan2.2-ti2v-5b"])
def test_a_forward_holds_what_is_predicted(name: str, size: str) -> None:
    config = dict(zoo.get(name).transformer)
    height, width = SIZES[size]
    pixels = 32 if name == "wan2.2-ti2v-5b" else 16
    predicted = shape_of(config).activation_bytes(21 * (height // pixels) * (width // pixels))
    assert predicted == pytest.approx(trace_forward(config, height, width), rel=CLOSE)


@pytest.mark.parametrize("name", ["wan2.1-14b", "wan2.1-1.3b"])
@pytest.mark.parametrize(("dtype", "rank"), [("float32", 0), ("bfloat16", 512)])
def test_fp32_and_adapters_hold_what_is_predicted(name: str, dtype: str, rank: int) -> None:
    config = dict(zoo.get(name).transformer)
    predicted = shape_of(config).activation_bytes(32_760, dtype=dtype, adapters=rank > 0)
    assert predicted == pytest.approx(trace_forward(config, 480, 832, dtype=dtype, rank=rank), rel=CLOSE)


@pytest.mark.parametrize("name", ["wan2.1-14b", "wan2.1-1.3b", "wan2.2-ti2v-5b"])
def test_weights_and_blocks_have_the_predicted_size(name: str) -> None:
    config = dict(zoo.get(name).transformer)
    model = meta_transformer(config, torch.bfloat16)
    sizes = {key: value.numel() * value.element_size() for key, value in model.named_parameters()}
    block = sum(size for key, size in sizes.items() if key.startswith("blocks.0."))
    predicted = shape_of(config)
    assert predicted.weight_bytes("bfloat16") == pytest.approx(sum(sizes.values()), rel=0.01)
    assert predicted.block_bytes("bfloat16") == pytest.approx(block, rel=0.01)
    of_zoo = shapes_of(zoo.get(name)).transformer
    assert of_zoo.weight_bytes("bfloat16") == pytest.approx(sum(sizes.values()), rel=0.005)


def meta_vae(config: dict, dtype: str) -> AutoencoderKLWan:
    with torch.device("meta"):
        return AutoencoderKLWan(**config).to(DTYPES[dtype]).eval()


def latents_of(shape: VaeShape, frames: int, height: int, width: int) -> torch.Tensor:
    size = 1, shape.channels, frames, height // shape.spatial, width // shape.spatial
    return torch.empty(size, device="meta")


VAES = [
    pytest.param({}, WanVae(), "480p", "bfloat16", id="wan2.1-480p"),
    pytest.param({}, WanVae(), "720p", "bfloat16", id="wan2.1-720p"),
    pytest.param({}, WanVae(), "480p", "float32", id="wan2.1-480p-fp32"),
    pytest.param(WAN22_CONFIG, WAN22_VAE, "480p", "bfloat16", id="wan2.2-480p"),
    pytest.param(WAN22_CONFIG, WAN22_VAE, "720p", "bfloat16", id="wan2.2-720p"),
]


@pytest.mark.parametrize(("config", "shape", "size", "dtype"), VAES)
def test_decoding_holds_what_is_predicted(config: dict, shape: VaeShape, size: str, dtype: str) -> None:
    height, width = SIZES[size][0] // 16 * 16, SIZES[size][1]
    vae, latents = meta_vae(config, dtype), latents_of(shape, 3, height, width)
    kept = []
    with live_bytes() as count, torch.device("meta"):
        for frames in decode_chunks(vae, latents):  # the third latent frame is as all later ones
            del frames
            kept.append(count.live)
    assert shape.decode_bytes(height, width, dtype) == pytest.approx(count.peak, rel=CLOSE)
    assert shape.cache_bytes(height, width, dtype) == pytest.approx(kept[1], rel=CLOSE)


@pytest.mark.parametrize(("config", "shape", "size", "dtype"), VAES)
def test_encoding_holds_what_is_predicted(config: dict, shape: VaeShape, size: str, dtype: str) -> None:
    height, width = SIZES[size][0] // 16 * 16, SIZES[size][1]
    vae = meta_vae(config, dtype)
    for frames in (1, 13):
        with live_bytes() as count, torch.device("meta"):
            encode_video(vae, torch.empty(1, 3, frames, height, width, dtype=DTYPES[dtype]))
        assert shape.encode_bytes(height, width, frames, dtype) == pytest.approx(count.peak, rel=CLOSE)


def test_decoding_in_tiles_holds_what_is_predicted() -> None:
    vae, shape = meta_vae({}, "bfloat16"), WanVae()
    vae.use_tiling = True
    with live_bytes() as count, torch.device("meta"):
        vae.decode(latents_of(shape, 2, 320, 448).bfloat16(), return_dict=False)  # 2 by 3 tiles: a second each
    assert shape.tiled_decode_bytes(320, 448, 5) == pytest.approx(count.peak, rel=CLOSE)


def test_a_vae_reads_its_shape_from_its_configuration() -> None:
    assert WanVae.from_config(WAN22_CONFIG, WAN22_VAE.parameters) == WAN22_VAE
    vae = meta_vae(WAN22_CONFIG, "bfloat16")
    assert sum(p.numel() for p in vae.parameters()) == WAN22_VAE.parameters
    assert sum(p.numel() for p in meta_vae({}, "bfloat16").parameters()) == WanVae().parameters


def test_the_trace_counts_what_the_allocator_of_the_cpu_counts() -> None:
    """The trace is worth as much as this: the same module, small, with contents, seen by torch's own profiler."""
    config = {**zoo.get("wan2.1-14b").transformer, "num_attention_heads": 2, "ffn_dim": 1024, "text_dim": 64}
    model = meta_transformer(config, torch.float32, layers=2)
    with torch.device("meta"):
        inputs = torch.empty(1, 16, 3, 16, 16), torch.empty(1, 3), torch.empty(1, 32, 64)
    with live_bytes() as count:
        model(*inputs, return_dict=False)
    real = model.to_empty(device="cpu")
    for buffer in ("freqs_cos", "freqs_sin"):
        setattr(real.rope, buffer, torch.zeros_like(getattr(real.rope, buffer), device="cpu"))
    inputs = tuple(torch.zeros(value.shape) for value in inputs)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        real(*inputs, return_dict=False)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert count.peak == pytest.approx(peak, rel=CLOSE)
