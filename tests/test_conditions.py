"""Conditions become latents and noise multipliers at their latent frames."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from color_samples import CHART, TO_P3, chart_pixels, linear, patches, profile_of, srgb
from PIL import Image, ImageCms

from pusa.conditions import PusaCondition, fit_image, place
from pusa.models.vae import encode_video
from pusa.positions import latent_index_of

CLIP = {"num_frames": 17, "height": 32, "width": 48, "shape": (16, 5, 4, 6)}  # 5 latent frames


def picture(seed: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture(scope="module")
def encode(tiny_vae) -> Any:
    vae = tiny_vae()
    return lambda video: encode_video(vae, video)


@pytest.mark.parametrize(
    ("position", "index"),
    [
        ({}, 0),
        ({"latent_index": 20}, 20),
        ({"latent_index": -1}, 20),
        ({"latent_index": "last"}, 20),
        ({"frame_index": 0}, 0),
        ({"frame_index": 1}, 1),
        ({"frame_index": 4}, 1),
        ({"frame_index": 5}, 2),
        ({"frame_index": 80}, 20),
        ({"frame_index": -1}, 20),
        ({"frame_index": -81}, 0),
        ({"frame_index": "last"}, 20),
        ({"seconds": 0.0}, 0),
        ({"seconds": 1.5}, 6),
        ({"seconds": -0.5}, 19),
        ({"seconds": -0.01}, 20),
        ({"seconds": "last"}, 20),
    ],
)
def test_one_function_converts_every_way_to_say_a_position(position, index):
    assert latent_index_of(num_frames=81, fps=16, **position) == index


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ({"latent_index": 21}, "latent_index=21: this video has 21 latent frames (0..20, or -21..-1 from the end)"),
        ({"latent_index": -22}, "latent_index=-22: this video has 21 latent frames"),
        ({"frame_index": 81}, "frame_index=81: this video has 81 frames (0..80"),
        ({"seconds": -6.0}, "seconds=-6: this video is 5.0625 s long"),
        ({"seconds": 6.0}, "seconds=6: this video is 5.0625 s long (81 frames at 16 fps)"),
    ],
)
def test_a_position_outside_the_clip_names_its_limits(position, message):
    with pytest.raises(ValueError) as error:
        latent_index_of(num_frames=81, **position)
    assert message in str(error.value)


@pytest.mark.parametrize("index", [1.5, True, "first", None])
def test_a_position_that_is_no_whole_number_is_refused(index):
    if index is None:
        assert latent_index_of(num_frames=5, latent_index=None) == 0
        return
    with pytest.raises(TypeError, match="neither a whole number nor 'last'"):
        latent_index_of(num_frames=81, latent_index=index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of image, video and latents, not none"),
        ({"image": picture(), "video": [picture()]}, "not image and video"),
        ({"image": picture(), "latent_index": 0, "seconds": 1.0}, "one of latent_index, frame_index and seconds"),
        ({"image": picture(), "noise_multiplier": 1.3}, "noise_multiplier=1.3 is outside 0..1"),
        ({"image": picture(), "noise_multiplier": [0.2, -0.1]}, "noise_multiplier=-0.1 is outside 0..1"),
        ({"image": picture(), "noise_multiplier": float("nan")}, "noise_multiplier=nan is outside 0..1"),
        ({"image": picture(), "latent_index": [0, 3]}, "for one image"),
        ({"image": picture(), "latent_index": []}, "is empty"),
        ({"video": []}, "the video has no frames"),
        ({"image": picture(), "fit": "zoom"}, "fit='zoom' is none of"),
        ({"image": picture(), "encode": "twice"}, "encode='twice' is neither"),
    ],
)
def test_a_condition_that_makes_no_sense_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError) as error:
        PusaCondition(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("seconds", ["1.5s", float("nan")])
def test_seconds_that_are_no_number_are_refused(seconds):
    with pytest.raises(TypeError, match="is neither a number nor 'last'"):
        latent_index_of(num_frames=81, seconds=seconds)


def test_numpys_whole_numbers_are_whole_numbers(encode):
    placement = place([PusaCondition(image=picture(), latent_index=np.int64(3))], encode=encode, **CLIP)
    assert placement.noise_multipliers.tolist() == [1, 1, 1, 0, 1]


@pytest.mark.parametrize("arguments", [{"image": "cat.png"}, {"video": "cat.mp4"}, {"video": iter([picture()])}])
def test_names_and_generators_are_refused_at_once(arguments):
    with pytest.raises(TypeError, match=r"is a name: read the file with pusa\.media\.read_|give a list of images"):
        PusaCondition(**arguments)


def test_an_image_is_held_at_its_place_with_its_noise(encode):
    placement = place([PusaCondition(image=picture(), latent_index=2, noise_multiplier=0.2)], encode=encode, **CLIP)
    assert placement.noise_multipliers.tolist() == [1, 1, pytest.approx(0.2), 1, 1]
    alone = encode(torch.tensor(np.asarray(picture())).permute(2, 0, 1)[None, :, None].float() * 2 / 255 - 1)
    torch.testing.assert_close(placement.latents[:, 2], alone[0, :, 0])
    assert placement.latents[:, [0, 1, 3, 4]].abs().max() == 0


def test_a_video_keeps_its_latent_frames_at_their_indices(encode):
    video = [picture(i) for i in range(17)]
    whole = place([PusaCondition(video=video, latent_index=0)], encode=encode, **CLIP)
    chosen = place(
        [PusaCondition(video=video, latent_index=[0, 3, -1], noise_multiplier=[0.0, 0.3, 0.4])], encode=encode, **CLIP
    )
    torch.testing.assert_close(chosen.latents[:, [0, 3, 4]], whole.latents[:, [0, 3, 4]])
    torch.testing.assert_close(chosen.noise_multipliers, torch.tensor([0, 1, 1, 0.3, 0.4]))
    assert whole.noise_multipliers.tolist() == [0] * 5


def test_latents_go_in_as_they_are(encode):
    z = torch.randn(16, 2, 4, 6)
    placement = place([PusaCondition(latents=z, latent_index=-2)], encode=encode, **CLIP)
    assert torch.equal(placement.latents[:, 3:], z)
    placement = place([PusaCondition(latents=z, latent_index=[4, 1])], encode=encode, **CLIP)
    assert torch.equal(placement.latents[:, [4, 1]], z)


def test_repeat_encodes_a_later_picture_as_four_static_frames_in_context(encode):
    placement = place([PusaCondition(image=picture(), latent_index=3, encode="repeat")], encode=encode, **CLIP)
    static = place([PusaCondition(video=[picture()] * 5)], encode=encode, **CLIP)
    torch.testing.assert_close(placement.latents[:, 3], static.latents[:, 1])
    at_the_start = place([PusaCondition(image=picture(), encode="repeat")], encode=encode, **CLIP)
    single = place([PusaCondition(image=picture())], encode=encode, **CLIP)
    torch.testing.assert_close(at_the_start.latents, single.latents)


def test_repeat_gives_each_later_place_four_frames_of_a_video(encode):
    video = [picture(i) for i in range(8)]
    placement = place([PusaCondition(video=video, latent_index=-2, encode="repeat")], encode=encode, **CLIP)
    context = place([PusaCondition(video=[video[0], *video])], encode=encode, **CLIP)
    torch.testing.assert_close(placement.latents[:, 3:], context.latents[:, 1:3])


def test_conditions_may_come_in_any_order_and_kind(encode):
    conditions = [
        PusaCondition(image=picture(1), latent_index="last", noise_multiplier=0.5),
        PusaCondition(latents=torch.ones(16, 1, 4, 6), frame_index=5),
        PusaCondition(video=[picture(2)] * 5),
    ]
    forwards, backwards = (place(c, encode=encode, **CLIP) for c in (conditions, conditions[::-1]))
    assert torch.equal(forwards.latents, backwards.latents)
    assert forwards.noise_multipliers.tolist() == [0, 0, 0, 1, 0.5]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (
            [PusaCondition(video=[picture()] * 9), PusaCondition(image=picture(), latent_index=2)],
            "conditions 1 and 2 both hold latent frame 2",
        ),
        ([PusaCondition(video=[picture()] * 5, latent_index=[0, 3])], "latent_index=3: the video given has 5 frames"),
        ([PusaCondition(video=[picture()] * 9, latent_index=3)], "3 latent frames from latent_index=3 on end after"),
        ([PusaCondition(video=[picture()] * 21)], "6 latent frames from latent_index=0"),
        ([PusaCondition(video=[picture()] * 5, noise_multiplier=[0.1] * 3)], "3 noise multipliers for 2 latent frames"),
        ([PusaCondition(video=[picture()] * 5, latent_index=[1, -4])], "names a latent frame twice"),
        ([PusaCondition(latents=torch.zeros(16, 1, 8, 6))], "latents of shape [16, 1, 8, 6]: this clip needs"),
        ([PusaCondition(latents=torch.zeros(16, 4, 6))], "give [C, f, h, w]"),
        ([PusaCondition(video=[picture()] * 3, latent_index=1, encode="repeat")], "too few for encode='repeat'"),
        ([PusaCondition(image=np.full((8, 8, 3), 7.0))], "floats from 7 to 7: give values in 0..1"),
        ([PusaCondition(image=np.zeros((8, 8), np.uint8))], "give [H, W, 3] or [H, W, 4]"),
    ],
)
def test_a_condition_that_does_not_fit_is_an_error_with_the_way_out(conditions, message, encode):
    with pytest.raises(ValueError) as error:
        place(conditions, encode=encode, **CLIP)
    assert message in str(error.value)


def test_nothing_is_encoded_before_all_places_fit():
    def encode(_: Any) -> Any:
        raise AssertionError("encoded although a place is wrong")

    conditions = [PusaCondition(image=picture()), PusaCondition(image=picture(), latent_index=9)]
    with pytest.raises(ValueError, match="latent_index=9"):
        place(conditions, encode=encode, **CLIP)


def test_frames_beyond_whole_latent_frames_are_left_out_with_a_warning(encode, caplog):
    with caplog.at_level(logging.WARNING, logger="pusa"):
        place([PusaCondition(video=[picture()] * 7)], encode=encode, **CLIP)
    assert "the last 2 of the video's 7 frames are left out" in caplog.text


@pytest.mark.parametrize("size", [(64, 32), (20, 90), (48, 32)])
def test_crop_covers_letterbox_shows_all_stretch_distorts(size):
    white = Image.new("RGB", size, "white")
    cropped, boxed, stretched = (fit_image(white, 48, 32, fit) for fit in ("crop", "letterbox", "stretch"))
    assert cropped.size == boxed.size == stretched.size == (48, 32)
    assert np.asarray(cropped).min() == np.asarray(stretched).min() == 255
    shown = (np.asarray(boxed) == 255).all(-1).mean()
    scale = min(48 / size[0], 32 / size[1])
    assert shown == pytest.approx(size[0] * size[1] * scale**2 / (48 * 32), abs=0.06)


def test_a_phone_picture_is_turned_upright_and_transparency_becomes_white():
    lying = Image.new("RGB", (60, 40), "red")
    lying.getexif()[0x0112] = 6  # turn by 90 degrees to show
    lying.paste("blue", (0, 0, 30, 40))
    upright = np.asarray(fit_image(lying, 40, 60))
    assert upright[5, 20].tolist() == [0, 0, 255]
    assert upright[55, 20].tolist() == [255, 0, 0]
    assert np.asarray(fit_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8, 8)).min() == 255
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    assert np.asarray(fit_image(palette, 8, 8)).min() == 255


def test_pictures_may_be_pil_arrays_or_tensors():
    pil = picture()
    array = np.asarray(pil)
    tensor = torch.tensor(array).permute(2, 0, 1)
    for image in (pil, array, array / 255.0, tensor, tensor / 255.0):
        assert np.array_equal(np.asarray(fit_image(image, 48, 32)), array)
    with pytest.raises(TypeError, match="give a PIL image, an array or a tensor"):
        fit_image("cat.png", 48, 32)


def test_16_bit_and_float_pictures_keep_their_grey():
    grey = np.full((8, 8), 128)
    pictures = {
        "I;16": Image.fromarray((grey * 257).astype(np.uint16)),
        "I;16B": Image.frombytes("I;16B", (8, 8), (grey * 257).astype(">u2").tobytes()),
        "I": Image.fromarray((grey * 257).astype(np.int32)),
        "I of 8 bits": Image.new("L", (8, 8), 128).convert("I"),
        "F": Image.fromarray((grey / 255).astype(np.float32)),
        "F of 8 bits": Image.new("L", (8, 8), 128).convert("F"),
        "F of 16 bits": Image.fromarray((grey * 257).astype(np.float32)),
        "LA": Image.new("LA", (8, 8), (128, 255)),
        "uint16": np.full((8, 8, 3), 128 * 257, np.uint16),
        "float16": np.full((8, 8, 3), 128 / 255, np.float16),
        "torch.uint16": torch.full((3, 8, 8), 128 * 257, dtype=torch.int32).to(torch.uint16),
        "torch.bfloat16": torch.full((3, 8, 8), 128 / 255, dtype=torch.bfloat16),
    }
    for name, picture in pictures.items():
        shown = np.asarray(fit_image(picture, 16, 16)).astype(int)
        assert np.abs(shown - 128).max() <= 1, name
    with pytest.raises(TypeError, match=r"an image of int64: give uint8 .*, uint16 .* or floats"):
        fit_image(np.full((8, 8, 3), 5), 16, 16)


def test_a_profile_is_applied_to_a_picture_of_pillow_which_stays_as_it_is():
    coded = srgb((linear(CHART) @ TO_P3.T).clip(0, 1))
    wide = Image.fromarray(chart_pixels(coded, 160, 96, depth=8))
    wide.info["icc_profile"] = profile_of("P3")
    assert np.abs(patches(np.asarray(fit_image(wide, 160, 96))) - CHART).mean() <= 4
    assert wide.info["icc_profile"] == profile_of("P3")
    image = Image.new("L", (8, 8), 100)
    image.info["icc_profile"] = b"damaged"
    assert np.asarray(fit_image(image, 8, 8)).max() == 100
    assert image.info["icc_profile"] == b"damaged"
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image.info["icc_profile"] = lab  # the profile of another kind of picture
    assert np.asarray(fit_image(image, 8, 8)).max() == 100
