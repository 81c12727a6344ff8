"""Each base's description has the counts of its real classes, and predicts what they hold, traced at full size."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLMochi, MochiTransformer3DModel
from memory_trace import live_bytes
from plan_table import machine_of

from pusa import zoo
from pusa.acceleration.needs import clip_of, shapes_of
from pusa.acceleration.planning import plan
from pusa.acceleration.shapes import parts_of
from pusa.acceleration.shapes.fvdm import ImageVae
from pusa.acceleration.shapes.mochi import MochiTransformer, MochiVae
from pusa.defaults import GenerationDefaults
from pusa.models.mochi.transformer import PusaMochiTransformer3DModel

CLOSE = 0.1
MOCHI = zoo.get("pusa-v0.5")
FVDM_SIZES = {"XL": (28, 1152, 16, 674), "L": (24, 1024, 16, 457), "B": (12, 768, 12, 130), "S": (12, 384, 6, 32)}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def counted(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fvdm(size: str) -> dict[str, Any]:
    depth, width, heads, _ = FVDM_SIZES[size]
    return {"_class_name": "FVDMTransformer3DModel", "depth": depth, "hidden_size": width, "num_heads": heads}


# ---- Mochi -----------------------------------------------------------------------------------------------------------


def test_mochi_has_the_parameters_of_the_class_of_diffusers() -> None:
    with torch.device("meta"):
        transformer, vae = MochiTransformer3DModel(), AutoencoderKLMochi()
    shape = MochiTransformer.from_config(transformer.config)
    assert shape.total_parameters == pytest.approx(counted(transformer), rel=1e-3)
    block = shape.block_parameters + shape.full_block_parameters
    assert block == pytest.approx(counted(transformer.transformer_blocks[0]), rel=1e-3)
    assert MOCHI.parameters["transformer"] == counted(transformer)
    assert MOCHI.parameters["vae"] == MochiVae.from_config(vae.config).parameters == counted(vae)
    assert MochiVae.from_config(vae.config) == MochiVae() == MochiVae.from_config({})
    assert all(transformer.config[key] == value for key, value in MOCHI.transformer.items() if key != "_class_name")


def test_a_forward_of_mochi_has_the_tokens_and_operations_that_were_computed_for_it() -> None:
    shapes = shapes_of(MOCHI)
    clip = clip_of(MOCHI, shapes)
    assert clip.shape == (12, 28, 60, 106)
    assert shapes.transformer.tokens(clip) == 44_520
    linear, attention = shapes.transformer.flops(clip)
    assert linear == pytest.approx(0.48e15, rel=0.02)
    assert attention == pytest.approx(1.17e15, rel=0.02)
    short = clip_of(MOCHI, shapes, (848, 480, 85))
    assert sum(shapes.transformer.flops(short)) == pytest.approx(0.59e15, rel=0.03)


def test_fp8_leaves_the_modulation_of_mochi_in_bf16() -> None:
    shape = shapes_of(MOCHI).transformer
    with torch.device("meta"):
        block = MochiTransformer3DModel(num_layers=2).transformer_blocks[0]  # the last one is smaller
    kept = sum(p.numel() for name, p in block.named_parameters() if name.startswith(("norm1.", "norm1_context.")))
    expected = counted(block) - kept + 2 * kept
    assert shape.block_bytes("fp8") == pytest.approx(expected, rel=0.01)
    assert shape.block_bytes("bfloat16") == pytest.approx(2 * counted(block), rel=0.01)


@pytest.fixture
def meta_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Mochi's rotary embedding run on the meta device, which has no autocast."""
    real = torch.autocast

    def autocast(device: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device == "meta" else real(device, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", autocast)


@pytest.mark.usefixtures("meta_autocast")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_forward_of_mochi_holds_what_is_predicted(dtype: str) -> None:
    number = getattr(torch, dtype)
    with torch.device("meta"):
        model = PusaMochiTransformer3DModel(num_layers=3).to(number).eval()
        latents, text = torch.empty(1, 12, 28, 60, 106, dtype=number), torch.empty(1, 256, 4096, dtype=number)
        timestep = torch.empty(1, 28)
    with live_bytes() as count:
        model(latents, text, timestep, None, return_dict=False)
    predicted = shapes_of(MOCHI).transformer.activation_bytes(44_520, dtype=dtype)
    assert predicted == pytest.approx(count.peak, rel=CLOSE)


@pytest.fixture(scope="module")
def mochi_vae() -> Iterator[AutoencoderKLMochi]:
    with torch.device("meta"):
        yield AutoencoderKLMochi().to(torch.bfloat16).eval()


@pytest.mark.parametrize(("height", "width"), [(480, 848), (256, 256)])
def test_decoding_a_latent_frame_of_mochi_holds_what_is_predicted(
    mochi_vae: AutoencoderKLMochi, height: int, width: int
) -> None:
    inputs: list[torch.Size] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].shape))
        for module in mochi_vae.decoder.modules()
        if type(module).__name__ == "CogVideoXCausalConv3d"
    ]
    with live_bytes() as count, torch.device("meta"):
        mochi_vae.decoder(torch.empty(1, 12, 1, height // 8, width // 8, dtype=torch.bfloat16))
    for hook in hooks:
        hook.remove()
    # Each causal convolution looks at two frames before, which diffusers repeats and a stream has to keep.
    kept = sum(2 * 2 * channels * h * w for _, channels, _, h, w in inputs)
    shape = MochiVae()
    assert shape.cache_bytes(height, width) == pytest.approx(kept, rel=0.01)
    assert shape.decode_bytes(height, width) - kept == pytest.approx(count.peak, rel=CLOSE)


@pytest.mark.parametrize(("height", "width"), [(480, 848), (256, 256)])
@pytest.mark.parametrize("frames", [1, 7, 163])
def test_encoding_for_mochi_holds_what_is_predicted(
    mochi_vae: AutoencoderKLMochi, height: int, width: int, frames: int
) -> None:
    with live_bytes() as count, torch.device("meta"):
        mochi_vae.encoder(torch.empty(1, 3, frames, height, width, dtype=torch.bfloat16))
    assert MochiVae().encode_bytes(height, width, frames) == pytest.approx(count.peak, rel=CLOSE)


@pytest.mark.parametrize(("cards", "least", "most"), [("1x24", 9, 22), ("1x48", 30, 45), ("1x80", 30, 75)])
def test_mochi_runs_in_bf16_on_common_cards(cards: str, least: int, most: int) -> None:
    """Compare with about 60 GB of the official code, and 22 GB of diffusers for 85 frames, offloaded and in tiles."""
    found = plan(MOCHI, machine=machine_of(cards, 64))
    assert found.parts["transformer"].storage == "bfloat16"
    assert least * 10**9 < found.peak_bytes < most * 10**9
    assert found.relative_speed > 0.9
    assert found.merge is False


def test_a_way_out_for_mochi_has_frames_that_it_can_make() -> None:
    found = plan(MOCHI, machine=machine_of("1x8", 64))
    assert "49 frames fits" in found.problem


# ---- FVDM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", FVDM_SIZES)
def test_fvdm_has_the_published_parameters(size: str) -> None:
    shape = parts_of(fvdm(size), {}, {}).transformer
    assert round(shape.total_parameters / 1e6) == pytest.approx(FVDM_SIZES[size][3], abs=1)


def test_the_vae_of_fvdm_holds_what_is_predicted_frame_by_frame() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**SD_VAE).eval()
    shape = ImageVae.from_config(vae.config)
    assert shape == ImageVae()
    assert shape.parameters == counted(vae)
    with live_bytes() as count, torch.device("meta"):
        vae.decode(torch.empty(1, 4, 32, 32))
    assert shape.decode_bytes(256, 256, "float32") == pytest.approx(count.peak, rel=CLOSE)
    with live_bytes() as count, torch.device("meta"):
        vae.encode(torch.empty(1, 3, 256, 256))
    assert shape.encode_bytes(256, 256, 1, "float32") == pytest.approx(count.peak, rel=CLOSE)


def test_fvdm_plans_sixteen_latent_frames_and_no_text_encoder() -> None:
    defaults = GenerationDefaults(width=256, height=256, num_frames=16, frames_per_latent=1, guidance=1.0)
    model = zoo.ZooModel(name="an FVDM", title="", transformer=fvdm("XL"), defaults=defaults)
    shapes = shapes_of(model)
    assert clip_of(model, shapes).shape == (4, 16, 32, 32)
    assert shapes.transformer.tokens(clip_of(model, shapes)) == 16 * 256
    for machine in (machine_of("1x8", 16), replace(machine_of("1x8", 16), cards=())):
        found = plan(model, machine=machine)
        assert found.problem == ""
        assert set(found.parts) == {"transformer", "vae"}
