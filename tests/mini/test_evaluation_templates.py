"""Known sprites are found where they are, and how they move follows from that; shapes stand in for the sprites."""

import pytest
import torch
from shape_samples import make_shapes
from world_samples import make_photographs

from pusa.mini.evaluation.templates import SEARCHED_FRAMES, Matcher, direction_of, motion_of
from pusa.mini.world.vocabulary import CAMERAS, MOTIONS
from pusa.mini.world.world import Scenes, World, camera_view, motion_path

FRAMES, SIZE = 33, 64


@pytest.fixture(scope="module")
def world() -> World:
    return World(make_shapes(), make_photographs(), variants=2)


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    return Matcher(make_shapes()[:4])


def scenes_of(motions: list[str], *, thing: int = 0, camera: str = "fixed", place: int = 0) -> Scenes:
    count = len(motions)

    def column(value: int) -> torch.Tensor:
        return torch.full((count,), value)

    jitter = torch.rand(count, 20, generator=torch.Generator().manual_seed(3))
    motion = torch.tensor([list(MOTIONS).index(name) for name in motions])
    moves = column(list(CAMERAS).index(camera))
    return Scenes(column(thing), motion, column(place), moves, column(-1), column(0), column(0), jitter)


def test_a_sprite_is_found_where_it_is_drawn(world: World, matcher: Matcher) -> None:
    scenes = scenes_of(["left", "near", "spin"], camera="in")
    track = matcher.track(world.render(scenes, FRAMES, size=SIZE)[0], scenes.thing)
    moments = torch.linspace(0, 1, SEARCHED_FRAMES)
    x, y, scale, angle, _ = motion_path(scenes.motion, moments, scenes.jitter.unsqueeze(-1))
    pan, zoom = camera_view(scenes.camera, moments)
    assert (track.x - (x - pan) / zoom).abs().median() < 0.03
    assert (track.y - y / zoom).abs().median() < 0.03
    assert (track.scale.log() - (scale / zoom).log()).abs().median() < 0.06
    turned = track.angle[2] - angle[2]
    assert torch.atan2(torch.sin(turned), torch.cos(turned)).abs().median() < 0.15
    assert track.score.mean() > 0.5


def test_another_sprite_is_not_found(world: World, matcher: Matcher) -> None:
    scenes = scenes_of(["still", "right"])
    video = world.render(scenes, FRAMES, size=SIZE)[0]
    own, other = (matcher.track(video, torch.full((2,), thing)).score.mean() for thing in (0, 1))
    assert own > other + 0.3


def test_motions_follow_from_tracks(world: World, matcher: Matcher) -> None:
    scenes = scenes_of(list(MOTIONS))
    track = matcher.track(world.render(scenes, FRAMES, size=SIZE)[0], scenes.thing)
    found = motion_of(track, scenes.camera, matcher.distinctness[scenes.thing])
    assert (found == scenes.motion).float().mean() >= 11 / 12


@pytest.mark.parametrize("camera", ["left", "out"])
def test_the_camera_s_motion_is_not_the_thing_s(world: World, matcher: Matcher, camera: str) -> None:
    scenes = scenes_of(["left", "right", "up", "down"], camera=camera)
    track = matcher.track(world.render(scenes, FRAMES, size=SIZE)[0], scenes.thing)
    assert torch.equal(direction_of(track, scenes.camera), scenes.motion)


def test_a_fading_thing_is_lost(world: World, matcher: Matcher) -> None:
    scenes = scenes_of(["fade", "still"])
    track = matcher.track(world.render(scenes, FRAMES, size=SIZE)[0], scenes.thing)
    assert track.density[0, -1] < 0.3 * track.density[0, 0]
    assert track.density[1].min() > 0.8 * track.density[1].max()


def test_a_ring_is_less_distinct_when_turned_than_an_l(matcher: Matcher) -> None:
    assert matcher.distinctness[1] < 0.5 < matcher.distinctness[3]
