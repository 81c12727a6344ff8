"""The probes learn shape and motion in seconds where there are only four shapes; the VAE between is left out."""

from pathlib import Path

import pytest
import torch
from shape_samples import make_shapes
from torch import Tensor
from world_samples import make_photographs

from pusa.mini.evaluation import probes
from pusa.mini.evaluation.probes import DISTORTIONS, Probes, rotate_hue, to_grey, train_probes
from pusa.mini.world.vocabulary import CAMERAS, MOTIONS
from pusa.mini.world.world import Scenes, World

FRAMES, SIZE, THINGS = 17, 48, 4


@pytest.fixture(scope="module")
def world() -> World:
    sprites = make_shapes()
    sprites[THINGS:] = sprites[THINGS:] * 0  # nothing else exists
    return World(sprites, make_photographs(), variants=2, motion_frames=FRAMES - 1)


@pytest.fixture(scope="module")
def full_world() -> World:
    """With all things, which the motion probe learns from."""
    return World(make_shapes(), make_photographs(), variants=2, motion_frames=FRAMES - 1)


def train(world: World, *, frame_steps: int, motion_steps: int) -> Probes:
    steps = {"frame_steps": frame_steps, "motion_steps": motion_steps}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "encode_video", lambda vae, video: video)
        patch.setattr(probes, "decode_video", lambda vae, latents: latents)
        return train_probes(world, None, things=THINGS, size=SIZE, **steps)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(world: World) -> Probes:
    """Knows things and places, not motions."""
    return train(world, frame_steps=190, motion_steps=2)


@pytest.fixture(scope="module")
def trained_to_follow(full_world: World) -> Probes:
    """Knows motions, not things."""
    return train(full_world, frame_steps=2, motion_steps=80)


def scenes(count: int, *, motions: tuple[str, ...] = tuple(MOTIONS), cameras: tuple[str, ...] = ("fixed",)) -> Scenes:
    number = torch.arange(count)
    motion = torch.tensor([list(MOTIONS).index(motions[i % len(motions)]) for i in range(count)])
    camera = torch.tensor([list(CAMERAS).index(cameras[i % len(cameras)]) for i in range(count)])
    nothing = torch.full((count,), -1)
    jitter = torch.rand(count, 20, generator=torch.Generator().manual_seed(5))
    return Scenes(number % THINGS, motion, number % 3, camera, nothing, 0 * number, 0 * number, jitter)


def share(hits: Tensor) -> float:
    return float(hits.float().mean())


@pytest.mark.parametrize("distortion", ["none", *DISTORTIONS])
def test_things_are_classified_by_shape_whatever_their_colour(world: World, trained: Probes, distortion: str) -> None:
    shown = scenes(24, motions=("still", "left", "near"))
    video, _ = world.render(shown, FRAMES, size=SIZE)
    if distortion != "none":
        video = DISTORTIONS[distortion](video)
    assert share(trained.classify(video).thing == shown.thing) > 0.7  # chance is one of five


def test_nothing_is_not_called_a_thing(world: World, trained: Probes) -> None:
    empty = Scenes(**{**vars(scenes(12)), "thing": torch.full((12,), -1)})
    seen = trained.classify(world.render(empty, FRAMES, size=SIZE)[0])
    assert share(seen.thing == THINGS) > 0.6


def test_directions_are_classified(full_world: World, trained_to_follow: Probes) -> None:
    shown = scenes(24, motions=("left", "right", "up", "down"))
    seen = trained_to_follow.classify(full_world.render(shown, FRAMES, size=SIZE)[0])
    assert share(seen.direction == shown.motion) > 0.8  # chance is one of four


def test_verdicts_have_the_shapes_that_are_promised_and_add_up(world: World, trained: Probes) -> None:
    video, _ = world.render(scenes(3), FRAMES, size=SIZE)
    seen = trained.classify(video)
    assert seen.things.shape == (3, probes.CLASSIFIED_FRAMES, THINGS + 1)
    assert seen.places.shape == (3, 13)
    assert seen.motions.shape == (3, len(MOTIONS))
    assert seen.cameras.shape == (3, len(CAMERAS))
    assert seen.features.shape == (3, 128)
    for probabilities in (seen.things, seen.places, seen.motions, seen.cameras):
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
    both = probes.Predictions.cat([trained.classify(video[:1]), trained.classify(video[1:])])
    torch.testing.assert_close(both.features, seen.features, atol=1e-4, rtol=1e-4)


def test_probes_come_back_from_their_file_and_only_for_what_they_were_trained_for(
    world: World, trained: Probes, tmp_path: Path
) -> None:
    trained.save(tmp_path / "probes.safetensors", "this VAE")
    again = Probes.load(tmp_path / "probes.safetensors", "this VAE")
    assert again is not None
    video, _ = world.render(scenes(2), FRAMES, size=SIZE)
    assert torch.equal(again.classify(video).features, trained.classify(video).features)
    assert Probes.load(tmp_path / "probes.safetensors", "another VAE") is None
    assert Probes.load(tmp_path / "other.safetensors", "this VAE") is None


def test_a_third_of_a_turn_of_the_hue_makes_green_of_red_and_grey_stays() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    third = torch.full((1,), 2 * torch.pi / 3)
    torch.testing.assert_close(rotate_hue(red, third).flatten(), torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(rotate_hue(to_grey(red), third), to_grey(red).contiguous())


def test_mirroring_exchanges_left_and_right_only() -> None:
    names = list(MOTIONS)
    other = probes.mirror_indices(names)
    assert [names[i] for i in other[[names.index("left"), names.index("right"), names.index("up")]]] == [
        "right",
        "left",
        "up",
    ]
    assert torch.equal(other[other], torch.arange(len(names)))
