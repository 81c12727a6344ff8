"""The drawn world that the small model learns from; discs stand in for its pictures, so nothing is fetched."""

import pytest
import torch
from torch import Tensor
from world_samples import make_photographs, make_sprites, make_world

from pusa.mini.world.scenery import CANVAS, PLACES, paint_textures
from pusa.mini.world.vocabulary import CAMERAS, MOTIONS, THINGS, with_article
from pusa.mini.world.world import PHOTOGRAPH, TEXTURE, Scenes, World, captions, draw_scenes, is_held_out

SIZE = 32


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def scene(
    motion: str, *, camera: str = "fixed", thing: int = 0, place: int = 0, second: int = -1, wording: int = 0
) -> Scenes:
    still = list(MOTIONS).index("still")
    values = (thing, list(MOTIONS).index(motion), place, list(CAMERAS).index(camera), second, still, wording)
    return Scenes(*(torch.tensor([value]) for value in values), torch.full((1, 20), 0.5))


def track(world: World, scenes: Scenes, frames: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """Measure the x and y of the thing in each frame, in pixels, and the number of pixels that it covers."""
    _, alpha = world.render(scenes, frames, size=SIZE)
    mass = alpha[0, 0]  # [T, H, W]
    area = mass.sum(dim=(1, 2))
    pixels = torch.arange(SIZE, dtype=torch.float32)
    return (mass.sum(1) * pixels).sum(1) / area, (mass.sum(2) * pixels).sum(1) / area, area


def test_the_same_seed_draws_the_same_clips_with_the_same_captions(world: World) -> None:
    first, again, other = draw_scenes(8, 1), draw_scenes(8, 1), draw_scenes(8, 2)
    assert captions(first) == captions(again) != captions(other)
    assert torch.equal(world.render(first, 5, size=SIZE)[0], world.render(again, 5, size=SIZE)[0])
    twin = make_world()
    assert torch.equal(world.backgrounds, twin.backgrounds)


def test_clips_have_the_shape_and_range_that_the_vae_takes(world: World) -> None:
    video, alpha = world.render(draw_scenes(6, 0), 9, size=SIZE)
    assert video.shape == (6, 3, 9, SIZE, SIZE)
    assert alpha.shape == (6, 1, 9, SIZE, SIZE)
    assert -1 <= video.min() < -0.5
    assert 0.5 < video.max() <= 1
    assert alpha.min() >= 0
    assert alpha.max() <= 1


def test_held_out_combinations_are_never_drawn_for_training() -> None:
    seen = draw_scenes(5000, 3)
    assert not is_held_out(seen.thing, seen.motion, seen.place).any()
    unseen = draw_scenes(500, 3, held_out=True)
    assert is_held_out(unseen.thing, unseen.motion, unseen.place).all()


def test_every_thing_motion_and_place_is_seen_in_training_and_held_out_in_some_combination() -> None:
    for scenes in (draw_scenes(5000, 4), draw_scenes(2000, 4, held_out=True)):
        assert set(range(len(THINGS))) <= set(scenes.thing.tolist())
        assert set(scenes.motion.tolist()) == set(range(len(MOTIONS)))
        assert set(range(len(PLACES))) <= set(scenes.place.tolist())


@pytest.mark.parametrize(
    ("motion", "dx", "dy"), [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1), ("still", 0, 0)]
)
def test_a_motion_word_moves_the_thing_that_way(world: World, motion: str, dx: int, dy: int) -> None:
    x, y, area = track(world, scene(motion))
    for moved, direction in ((x[-1] - x[0], dx), (y[-1] - y[0], dy)):
        if direction:
            assert 4 < moved * direction < SIZE / 2
        else:
            assert moved.abs() < 0.1
    assert area.min() > 0.5 * area.max()


def test_things_that_go_away_shrink_fading_ones_vanish_and_circling_ones_come_round(world: World) -> None:
    _, _, area = track(world, scene("away"))
    assert (area.diff() < 0).all()
    opaque = world.render(scene("fade"), 33, size=SIZE)[1].amax(dim=(0, 1, 3, 4))
    assert opaque[0] == pytest.approx(1, abs=0.05)
    assert opaque[32] == pytest.approx(0, abs=0.05)
    x, y, _ = track(world, scene("orbit"), frames=33)
    assert x[32] == pytest.approx(float(x[0]), abs=0.2)
    assert y[16] - y[0] > 5 or y[0] - y[16] > 5


def test_swinging_things_turn_to_both_sides_and_back() -> None:
    half = make_sprites()
    half[..., 12:] = 0
    x, y, _ = track(make_world(half, variants=1), scene("swing"), frames=33)
    angle = torch.atan2(y - SIZE / 2, x - SIZE / 2) % (2 * torch.pi)  # about pi
    assert angle.max() - angle[0] > 0.3
    assert angle[0] - angle.min() > 0.3
    assert angle[32] == pytest.approx(float(angle[0]), abs=0.05)


def test_two_things_stand_side_by_side_and_both_are_named(world: World) -> None:
    pair = scene("still", thing=0, second=1)
    assert captions(pair) == ["a duck stands still and a fish stands still on the grass"]
    alpha = world.render(pair, 1, size=SIZE)[1][0, 0, 0]
    assert alpha[:, : SIZE // 2].sum() > 30
    assert alpha[:, SIZE // 2 :].sum() > 30


def test_bouncing_things_come_back_and_near_ones_grow(world: World) -> None:
    _, y, _ = track(world, scene("bounce"))  # 17 frames are one hop
    assert y[8] < y[0] - 4
    assert y[16] == pytest.approx(float(y[0]), abs=0.1)
    _, _, area = track(world, scene("near"))
    assert (area.diff() > 0).all()
    assert area[-1] > 1.5 * area[0]


def test_spinning_things_turn() -> None:
    half = make_sprites()
    half[..., 12:] = 0  # the left half of the disc
    x, y, _ = track(make_world(half, variants=1), scene("spin"))
    angles = torch.atan2(y - SIZE / 2, x - SIZE / 2)
    assert (angles[-1] - angles[0]).abs() > 1


@pytest.mark.parametrize(("camera", "direction"), [("left", 1), ("right", -1)])
def test_what_stands_still_leaves_the_view_when_the_camera_pans(world: World, camera: str, direction: int) -> None:
    x, _, _ = track(world, scene("still", camera=camera))
    assert (x[-1] - x[0]) * direction > 2


def test_zooming_in_makes_a_thing_larger_and_out_smaller(world: World) -> None:
    assert track(world, scene("still", camera="in"))[2].diff().min() > 0
    assert track(world, scene("still", camera="out"))[2].diff().max() < 0


def test_a_shorter_clip_is_the_beginning_of_a_longer_one_and_may_start_inside_it(world: World) -> None:
    scenes = draw_scenes(4, 5)
    whole = world.render(scenes, 9, size=SIZE)[0]
    assert torch.equal(world.render(scenes, 5, size=SIZE)[0], whole[:, :, :5])
    torch.testing.assert_close(world.render(scenes, 4, size=SIZE, start=5)[0], whole[:, :, 5:], atol=1e-5, rtol=0)


def test_captions_say_what_is_drawn_in_several_wordings() -> None:
    assert captions(scene("right", place=2, camera="in")) == [
        "a duck slides to the right under the sea, the camera zooms in"
    ]
    assert captions(scene("bounce", thing=3)) == ["an octopus bounces on the grass"]
    words = {captions(scene("up", thing=4, wording=wording))[0] for wording in range(12)}
    assert len(words) == 12  # 2 names, 3 verbs, 2 places
    assert "a bunny flies up in a meadow" in words
    names = [with_article(name) for name in ("apple", "unicorn", "umbrella", "orange", "ufo")]
    assert names == ["an apple", "a unicorn", "an umbrella", "an orange", "a ufo"]


@pytest.mark.parametrize(("place", "words"), [(TEXTURE, "an abstract picture"), (PHOTOGRAPH, "a photo")])
def test_pictures_have_no_thing_and_no_place_in_their_caption(world: World, place: int, words: str) -> None:
    scenes = scene("left", thing=-1, place=place, camera="left")
    assert captions(scenes) == [f"{words}, the camera pans to the left"]
    video, alpha = world.render(scenes, 5, size=SIZE)
    assert alpha.count_nonzero() == 0
    assert (video[:, :, 0] - video[:, :, -1]).abs().mean() > 0.01


def test_a_recipe_with_little_time_takes_the_first_things_only() -> None:
    scenes = draw_scenes(500, 0, things=5)
    assert set(scenes.thing.tolist()) == {-1, 0, 1, 2, 3, 4}
    assert scenes.second.max() < 5
    assert ((scenes.second != scenes.thing) | (scenes.second < 0)).all()


def test_textures_differ_and_stay_in_range() -> None:
    textures = paint_textures(3, torch.Generator().manual_seed(0))
    assert textures.shape == (3, 3, CANVAS, CANVAS)
    assert 0 <= textures.min() < textures.max() <= 1
    assert (textures[0] - textures[1]).abs().mean() > 0.05


def test_sprites_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError) as error:
        World(torch.zeros(101, 4, 8, 8), make_photographs())
    assert str(error.value) == "sprites of shape [101, 4, 8, 8]: [N, 4, S, S], N up to 100, is needed"


def test_a_world_of_few_sprites_draws_their_scenes_and_says_which_thing_it_lacks() -> None:
    few = make_world(make_sprites()[:5])
    assert few.things == 5
    scenes = draw_scenes(30, 0, things=5)
    assert torch.equal(few.render(scenes, 1, size=SIZE)[0], make_world().render(scenes, 1, size=SIZE)[0])
    with pytest.raises(ValueError) as error:
        few.render(scene("still", second=5), 1, size=SIZE)
    assert str(error.value) == (
        "a scene shows 'cat', number 6 of the things, and this world has sprites of the first 5 only: draw scenes with "
        "things=5, or make it of more sprites"
    )
