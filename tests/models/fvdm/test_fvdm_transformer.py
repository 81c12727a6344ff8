"""FVDM's transformer computes the published network with one timestep per frame, under the published names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from pusa import FVDMTransformer3DModel
from pusa.models.fvdm import tiny
from pusa.models.fvdm.transformer import SIZES, config_of, moments, places

FRAMES, CLASSES = 6, 3


def make(num_classes: int | None = None) -> FVDMTransformer3DModel:
    return tiny.components(num_classes=num_classes)["transformer"]


@pytest.fixture
def model() -> FVDMTransformer3DModel:
    return make()


def latents(batch: int = 2, height: int = 8, width: int = 8, frames: int = FRAMES) -> Tensor:
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(0))


def timesteps(batch: int = 2) -> Tensor:
    return torch.randint(1000, (batch, FRAMES), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def noise(model: FVDMTransformer3DModel, x: Tensor, t: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
    return model(x, t, labels, return_dict=False, **options)[0]


@pytest.mark.parametrize("classes", [None, 5], ids=["unconditional", "class_conditional"])
def test_parameters_have_the_published_names_and_positions(
    classes: int | None, golden_tensors: Callable, golden_json: Callable
) -> None:
    published = golden_tensors(f"fvdm/weights_{'class_conditional' if classes else 'unconditional'}")
    recorded = golden_json("fvdm/config")["model"]
    names = ("input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_frames", "learn_sigma")
    model = FVDMTransformer3DModel(**{name: recorded[name] for name in names}, num_classes=classes)
    ours = model.state_dict()
    assert ours.keys() == published.keys()
    assert torch.equal(ours["pos_embed"], published["pos_embed"])
    assert torch.equal(ours["temp_embed"], published["temp_embed"])
    model.load_state_dict(published)  # strict
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict({name: value for name, value in published.items() if name != "temp_embed"})


@pytest.mark.parametrize(("size", "millions"), [("XL/2", 674), ("L/2", 457), ("B/2", 130), ("S/2", 32)])
def test_the_sizes_of_the_paper(size: str, millions: int) -> None:
    with torch.device("meta"):
        model = FVDMTransformer3DModel(**config_of(size))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions
    assert model.config.num_frames == 16


def test_other_sizes() -> None:
    assert config_of("T/4", num_classes=101) == {
        "depth": 6, "hidden_size": 192, "num_heads": 3, "patch_size": 4, "num_classes": 101,
    }  # fmt: skip
    for wrong in ("M/2", "S", "S/0", "S/x"):
        with pytest.raises(ValueError, match=f"size='{wrong}' is no size of FVDM's: give one of XL/2"):
            config_of(wrong)
    assert {"XL", "L", "B", "S"} < SIZES.keys()


def test_one_timestep_per_video_is_the_same_for_all_frames(model: FVDMTransformer3DModel) -> None:
    t = torch.tensor([700, 30])
    expected = noise(model, latents(), t.unsqueeze(1).expand(2, FRAMES))
    assert torch.equal(noise(model, latents(), t), expected)
    assert torch.equal(noise(model, latents(), t.float()), expected)


def test_each_frame_has_a_timestep_of_its_own(model: FVDMTransformer3DModel) -> None:
    t = timesteps(1)
    first = noise(model, latents(1), t)
    t[0, 2] = (t[0, 2] + 500) % 1000
    change = (noise(model, latents(1), t) - first).abs().amax(dim=(0, 1, 3, 4))  # [F]
    assert change.argmax() == 2
    assert change[2] > 2 * change[[0, 1, 3, 4, 5]].max()  # the others see it through attention along time
    assert (change > 0).all()


def test_noise_and_variance_are_two_halves(model: FVDMTransformer3DModel) -> None:
    assert noise(model, latents(), timesteps()).shape == (2, 8, FRAMES, 8, 8)
    plain = FVDMTransformer3DModel(**tiny.TRANSFORMER, learn_sigma=False)
    assert noise(plain, latents(), timesteps()).shape == (2, 4, FRAMES, 8, 8)
    assert plain(latents(), timesteps()).sample.shape == (2, 4, FRAMES, 8, 8)


def test_a_new_network_begins_with_zeros() -> None:
    new = FVDMTransformer3DModel(**tiny.TRANSFORMER)
    assert (noise(new, latents(), timesteps()) == 0).all()
    assert new.blocks_temp[0].attn.qkv.weight.std() > 0.05


def test_no_class_is_the_last_row_of_the_labels() -> None:
    model = make(CLASSES)
    x, t = latents(), timesteps()
    assert torch.equal(noise(model, x, t), noise(model, x, t, torch.tensor([CLASSES, CLASSES])))
    two = noise(model, x[:1].expand(2, -1, -1, -1, -1), t[:1].expand(2, -1), torch.tensor([0, 2]))
    assert (two[0] - two[1]).abs().max() > 1e-3


def test_sizes_other_than_in_training_have_their_positions_on_the_same_scale(model: FVDMTransformer3DModel) -> None:
    wide = noise(model, latents(height=4, width=12), timesteps())
    assert wide.shape == (2, 8, FRAMES, 4, 12)
    grid = places(48, 4, 4).view(4, 4, 48)
    assert torch.equal(places(48, 2, 6).view(2, 6, 48)[:, :4], grid[:2])
    assert torch.equal(moments(48, 4), moments(48, 16)[:, :4])
    trained_wide = FVDMTransformer3DModel(**{**tiny.TRANSFORMER, "input_size": (4, 12)})
    trained_wide.load_state_dict(model.state_dict() | {"pos_embed": trained_wide.pos_embed})
    assert torch.equal(noise(trained_wide, latents(height=4, width=12), timesteps()), wide)


@pytest.mark.parametrize(
    ("x", "t", "labels", "message"),
    [
        (latents(), torch.zeros(2, 5), None, r"timestep of shape \[2, 5\]: give one per frame \[2, 6\] or per video"),
        (latents(), torch.zeros(3), None, r"timestep of shape \[3\]"),
        (latents()[:, :3], timesteps(), None, r"hidden_states of shape \[2, 3, 6, 8, 8\]: give \[B, 4, F, H, W\]"),
        (latents()[0], timesteps(), None, r"hidden_states of shape \[4, 6, 8, 8\]"),
        (latents(width=7), timesteps(), None, "latents of 8 x 7 are no whole patches of 2 x 2"),
        (latents(frames=17), torch.zeros(2), None, "17 frames, and this network has positions for 16: make a longer"),
        (latents(), timesteps(), torch.tensor([1]), r"class_labels of shape \[1\]: give one per video \[2\]"),
        (latents(), timesteps(), torch.tensor([0, 4]), r"class_labels=\[0, 4\]: give 0..2, or 3 for no class"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, t: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise(make(CLASSES), x, t, labels)


def test_labels_need_a_network_with_classes(model: FVDMTransformer3DModel) -> None:
    with pytest.raises(ValueError, match="trained without classes: leave them out"):
        noise(model, latents(), timesteps(), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "depth=3: half of the blocks are temporal"),
        ({"num_heads": 5}, "hidden_size=48 is no multiple of 4 and of num_heads=5"),
        ({"input_size": 7}, "input_size=7 is no multiple of patch_size=2"),
    ],
)
def test_impossible_networks_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FVDMTransformer3DModel(**{**tiny.TRANSFORMER, **change})


def test_saved_folders_load_again(model: FVDMTransformer3DModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = FVDMTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(noise(again, latents(), timesteps()), noise(model, latents(), timesteps()))
    half = FVDMTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    rounded = noise(half, latents().bfloat16(), timesteps())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), noise(model, latents(), timesteps()), rtol=0, atol=0.1)


def test_checkpointed_blocks_have_the_same_gradients(model: FVDMTransformer3DModel) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(latents(), timesteps()).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.train()
    model.enable_gradient_checkpointing()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_lora_is_scaled_by_the_call_and_backends_are_set(model: FVDMTransformer3DModel) -> None:
    before = noise(model, latents(), timesteps())
    model.add_adapter(LoraConfig(r=2, target_modules=["attn.qkv", "attn.proj"], init_lora_weights=False), "probe")
    adapted = noise(model, latents(), timesteps())
    assert (adapted - before).abs().max() > 1e-2
    assert torch.equal(noise(model, latents(), timesteps(), attention_kwargs={"scale": 0.0}), before)
    model.disable_adapters()
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(noise(model, latents(), timesteps()), before, rtol=0, atol=1e-5)
    with model.cache_context("cond"):
        assert noise(model, latents(), timesteps()).isfinite().all()


def test_the_tiny_parts_are_equal_for_equal_seeds_and_the_vae_is_the_image_one() -> None:
    one, two, other = (tiny.components(seed=seed) for seed in (1, 1, 2))
    x, t = latents(), timesteps()
    assert torch.equal(noise(one["transformer"], x, t), noise(two["transformer"], x, t))
    assert not torch.equal(noise(one["transformer"], x, t), noise(other["transformer"], x, t))
    assert one["tokenizer"] is None
    assert one["text_encoder"] is None
    with torch.no_grad():
        encoded = one["vae"].encode(torch.zeros(2, 3, 32, 48)).latent_dist.mode()
    assert encoded.shape == (2, 4, 4, 6)
    assert one["vae"].config.scaling_factor == 0.18215
