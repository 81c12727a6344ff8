"""Render captioned clips of a small world on demand: things that move in front of places, under a moving camera.

A clip is a handful of integers and some jitter (`Scenes`), which determine its caption and its pixels. Everything is
seeded and batched: a few calls of `grid_sample` render all clips of a batch. One combination of thing, motion
and place in twelve is never drawn for training, so that composition can be measured.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pusa.mini.world.columns import Columns
from pusa.mini.world.edition import FIRST, Edition, MotionStyle
from pusa.mini.world.scenery import PLACES, paint_places, paint_textures
from pusa.mini.world.vocabulary import (
    BEFORE_PICTURE_WORDS,
    CAMERAS,
    MOTIONS,
    PHOTOGRAPH_WORDS,
    TEXTURE_WORDS,
    THINGS,
    with_article,
)

TEXTURE, PHOTOGRAPH = len(PLACES), len(PLACES) + 1
"""Values of `Scenes.place` for pictures instead of places: painted patterns and photographs."""

_DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
_HELD_OUT_EVERY = 12
_THING_BEFORE_PICTURE_SHARE, _MOVING_CAMERA_SHARE = 0.3, 0.3


@dataclass(frozen=True)
class Scenes(Columns):
    """Hold the scenes of B clips, ``[B]`` integers each, and their `jitter`, ``[B, 20]`` in 0..1.

    In `thing` and `second`, -1 is none.
    `place` is an index into `PLACES`, or `TEXTURE` or `PHOTOGRAPH`; `wording` picks among synonyms.
    """

    thing: Tensor
    motion: Tensor
    place: Tensor
    camera: Tensor
    second: Tensor
    second_motion: Tensor
    wording: Tensor
    jitter: Tensor


def is_held_out(thing: Tensor, motion: Tensor, place: Tensor) -> Tensor:
    """Return True for combinations that training never sees; a thing before a picture is never one of them."""
    return ((thing + 5 * motion + 7 * place) % _HELD_OUT_EVERY == 0) & (place < len(PLACES))


def draw_scenes(
    count: int,
    seed: int,
    *,
    things: int | None = None,
    held_out: bool = False,
    picture_share: float | None = None,
    edition: Edition = FIRST,
) -> Scenes:
    """Draw random scenes.

    Args:
        count: number of scenes.
        seed: the same seed draws the same scenes.
        things: use only the first of the edition's things; None: all.
        held_out: False: scenes for training. True: only combinations that training never sees, one thing in a place.
        picture_share: share of scenes that show a photograph or a painted texture instead of a place; None: the
            edition's.
        edition: the things and places to draw from.
    """
    things = len(edition.things) if things is None else things
    default_share = edition.texture_share + edition.photograph_share
    share = default_share if picture_share is None else picture_share
    texture_share = share * edition.texture_share / default_share
    generator = torch.Generator().manual_seed(seed)

    def pick(below: int) -> Tensor:
        return torch.randint(below, (count,), generator=generator)

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=generator) < (0 if held_out else probability)

    def pick_thing() -> Tensor:
        return edition.thing_at(pick(things))

    def pick_place() -> Tensor:
        return edition.place_at(pick(len(edition.places)))

    thing, motion, place = pick_thing(), pick(len(MOTIONS)), pick_place()
    while (is_unwanted := is_held_out(thing, motion, place) != held_out).any():
        thing = torch.where(is_unwanted, pick_thing(), thing)
        motion = torch.where(is_unwanted, pick(len(MOTIONS)), motion)
        place = torch.where(is_unwanted, pick_place(), place)
    pair = chance(edition.pair_share)
    number = torch.searchsorted(torch.tensor(edition.things), thing)  # among the edition's things, which are in order
    second = torch.where(pair, edition.thing_at((number + 1 + pick(things - 1)) % things), -1)
    kind = torch.rand(count, generator=generator) + held_out  # held out: no pictures
    place = torch.where(kind < share, PHOTOGRAPH, place)
    place = torch.where(kind < texture_share, TEXTURE, place)
    no_thing = (place >= TEXTURE) & ~((place == PHOTOGRAPH) & chance(_THING_BEFORE_PICTURE_SHARE))
    thing, second = torch.where(no_thing, -1, thing), torch.where(no_thing, -1, second)
    moves = torch.rand(count, generator=generator) < torch.where(no_thing, 0.9, _MOVING_CAMERA_SHARE)
    camera = torch.where(moves, 1 + pick(len(CAMERAS) - 1), 0)
    jitter = torch.rand(count, 20, generator=generator)
    return Scenes(thing, motion, place, camera, second, pick(len(MOTIONS)), pick(10_000), jitter)


def captions(scenes: Scenes) -> list[str]:
    """Describe each clip: ``a duck slides to the right under the sea, the camera zooms in``."""
    columns = {name: column.tolist() for name, column in vars(scenes).items() if name != "jitter"}
    return [_caption(*values) for values in zip(*columns.values(), strict=True)]


def _caption(thing: int, motion: int, place: int, camera: int, second: int, second_motion: int, wording: int) -> str:
    def word(choices: tuple[str, ...]) -> str:
        nonlocal wording
        wording, index = divmod(wording, len(choices))
        return choices[index]

    view = list(CAMERAS.values())[camera]
    if thing < 0:
        return word(TEXTURE_WORDS if place == TEXTURE else PHOTOGRAPH_WORDS) + view
    moves = list(MOTIONS.values())
    subject = f"{with_article(word(THINGS[thing][1:]))} {word(moves[motion])}"
    if second >= 0:
        subject += f" and {with_article(word(THINGS[second][1:]))} {word(moves[second_motion])}"
    where = word(PLACES[place].phrases if place < len(PLACES) else BEFORE_PICTURE_WORDS)
    return f"{subject} {where}{view}"


class World:
    """Render clips from sprites, photographs and painted backgrounds.

    Args:
        sprites: pictures of the first N of `THINGS`, ``[N, 4, S, S]`` RGB (premultiplied by) alpha in 0..1, see
            `pusa.mini.world.pictures`. `things` is N: scenes must be drawn with no more.
        photographs: ``[P, 3, CANVAS, CANVAS]`` in 0..1.
        seed: seed of the painted places and textures.
        variants: painted variants of each place; there are four times as many textures.
        motion_frames: frames of a complete motion; a longer clip continues it.
        device: the device that renders clips.
        edition: gives sizes and ways of things.
    """

    def __init__(
        self,
        sprites: Tensor,
        photographs: Tensor,
        *,
        seed: int = 0,
        variants: int = 8,
        motion_frames: int = 32,
        device: torch.device | str = "cpu",
        edition: Edition = FIRST,
    ) -> None:
        if sprites.ndim != 4 or sprites.shape[1] != 4 or not 0 < len(sprites) <= len(THINGS):
            raise ValueError(f"sprites of shape {list(sprites.shape)}: [N, 4, S, S], N up to {len(THINGS)}, is needed")
        self.things, self.edition = len(sprites), edition
        blur = sprites.shape[-1] // 16 * 2 + 1
        shadow = F.avg_pool2d(sprites[:, 3:], blur, stride=1, padding=blur // 2)
        self.sprites = torch.cat([sprites, shadow], dim=1).to(device)  # [N, 5, S, S]
        self.device = torch.device(device)
        self.motion_frames = motion_frames
        generator = torch.Generator().manual_seed(seed)
        textures = paint_textures(4 * variants, generator)
        self.backgrounds = torch.cat([paint_places(variants, generator), textures, photographs]).to(device)
        counts = torch.tensor([variants] * len(PLACES) + [len(textures), len(photographs)], device=device)
        self._background_counts, self._background_firsts = counts, counts.cumsum(0) - counts

    def in_edition(self, edition: Edition) -> "World":
        """Return the same world with sizes and ways of another edition."""
        world = copy.copy(self)
        world.edition = edition
        return world

    def half(self) -> "World":
        """Return the same world with pictures of half the resolution, which clips of few pixels need: they alias."""
        world = copy.copy(self)
        world.sprites, world.backgrounds = (F.avg_pool2d(images, 2) for images in (self.sprites, self.backgrounds))
        return world

    def render(self, scenes: Scenes, frames: int, *, size: int = 64, start: int = 0) -> tuple[Tensor, Tensor]:
        """Render clips of scenes, 16 frames per second.

        Args:
            frames: number of frames, from frame `start` on; a shorter clip is the beginning of a longer one.
            size: width and height in pixels.

        Returns:
            Video ``[B, 3, frames, size, size]`` in -1..1, and the things' alpha ``[B, 1, frames, size, size]`` in 0..1.

        Raises:
            ValueError: a scene shows a thing whose sprite this world does not have.
        """
        self._check_things(scenes)
        time = torch.arange(start, start + frames, device=self.device) / self.motion_frames  # [T]
        # Before the move to the device, as scenes are mostly on the host: reading a result of the device would wait.
        is_present = [bool((column >= 0).any()) for column in (scenes.second, scenes.thing)]
        scenes = scenes.to(self.device)
        jitter = scenes.jitter
        view = self._camera(scenes, time, size)  # [B, T, size, size, 2]

        flip = torch.where(jitter[:, 0] < 0.5, -1.0, 1.0).view(-1, 1, 1, 1)
        offset = 0.2 * (jitter[:, None, None, None, 1:3] - 0.5)
        on_canvas = (0.62 * view + offset) * torch.stack([flip, torch.ones_like(flip)], dim=-1)
        pick = (jitter[:, 7] * self._background_counts[scenes.place]).long()
        background = _sample(self.backgrounds[self._background_firsts[scenes.place] + pick], on_canvas, "reflection")
        tint = 1 + 0.2 * (jitter[:, 3:6, None, None, None] - 0.5)
        picture = (background * tint).clamp(0, 1)

        alpha = torch.zeros_like(picture[:, :1])
        pair = (scenes.second >= 0).unsqueeze(1)  # [B, 1]; two things stand side by side, smaller
        layers = (
            (scenes.second, scenes.second_motion, jitter[:, 10:], 0.48),
            (scenes.thing, scenes.motion, jitter[:, :10], -0.48),
        )
        for (thing, motion, layer_jitter, side), is_shown in zip(layers, is_present, strict=True):
            if not is_shown:
                continue
            shown = thing >= 0
            layer, shadow = self._thing(
                thing.clamp(min=0), motion, layer_jitter, side * pair, 1 - 0.32 * pair, time, view
            )
            layer, shadow = layer * shown.view(-1, 1, 1, 1, 1), shadow * shown.view(-1, 1, 1, 1, 1)
            picture = picture * (1 - 0.4 * shadow) * (1 - layer[:, 3:]) + layer[:, :3]
            alpha = alpha + layer[:, 3:] * (1 - alpha)
        return picture.clamp(0, 1) * 2 - 1, alpha

    def _check_things(self, scenes: Scenes) -> None:
        if self.things == len(THINGS) or not len(scenes):
            return
        highest = int(torch.maximum(scenes.thing, scenes.second).max())
        if highest >= self.things:
            raise ValueError(
                f"a scene shows {THINGS[highest][1]!r}, number {highest + 1} of the things, and this world has sprites "
                f"of the first {self.things} only: draw scenes with things={self.things}, or make it of more sprites"
            )

    def _thing(
        self, thing: Tensor, motion: Tensor, jitter: Tensor, side: Tensor, share: Tensor, time: Tensor, view: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Render one thing per clip on its path: RGB and alpha ``[B, 4, T, size, size]``, and its shadow."""
        x, y, scale, angle, opacity = motion_path(motion, time, jitter.unsqueeze(-1), self.edition.style)  # [B, T] each
        x, scale = x + side, scale * share
        dx, dy = view[..., 0] - x[..., None, None], view[..., 1] - y[..., None, None]
        cos, sin = (f(angle)[..., None, None] for f in (torch.cos, torch.sin))
        # Things look to the left, as drawn, unless they go to the right.
        names = list(MOTIONS)
        mirrored = (motion == names.index("right")) | ((motion != names.index("left")) & (jitter[:, 6] < 0.5))
        mirror = torch.where(mirrored, -1.0, 1.0).view(-1, 1, 1, 1)
        on_sprite = torch.stack([mirror * (cos * dx + sin * dy), cos * dy - sin * dx], dim=-1)
        on_sprite = on_sprite / scale[..., None, None, None]
        opacity = opacity[:, None, :, None, None]  # [B, 1, T, 1, 1]
        layer = _sample(self.sprites[thing, :4], on_sprite, "zeros") * opacity
        shadow = _sample(self.sprites[thing, 4:], on_sprite - on_sprite.new_tensor([0.0, 0.14]), "zeros") * opacity
        return layer, shadow

    def _camera(self, scenes: Scenes, time: Tensor, size: int) -> Tensor:
        """Compute the point x, y of the world that each pixel of each frame shows: ``[B, T, size, size, 2]``."""
        pan, zoom = camera_view(scenes.camera, time, self.edition.style)
        axis = (torch.arange(size, device=time.device) + 0.5) / size * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return torch.stack(
            [x * zoom[..., None, None] + pan[..., None, None], y * zoom[..., None, None].expand(-1, -1, size, size)],
            dim=-1,
        )


def camera_view(camera: Tensor, time: Tensor, style: MotionStyle = FIRST.style) -> tuple[Tensor, Tensor]:
    """Compute pan and zoom of the cameras ``[B]`` at times ``[T]``: ``[B, T]`` each.

    A point x of the frame shows ``x * zoom + pan`` of the world, in halves of the frame.
    """
    names = list(CAMERAS)
    amount = time.new_tensor([{"left": -style.pan, "right": style.pan}.get(name, 0.0) for name in names])[camera]
    rate = time.new_tensor([{"in": -style.zoom, "out": style.zoom}.get(name, 0.0) for name in names])[camera]
    return amount[:, None] * (time - 0.5), torch.exp(rate[:, None] * (time - 0.5))


def motion_path(
    motion: Tensor, time: Tensor, jitter: Tensor, style: MotionStyle = FIRST.style
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute centre x, y, half size (in halves of the frame), angle and opacity of things, ``[B, T]`` each."""
    names = list(MOTIONS)
    directions = [_DIRECTIONS.get(name, (0.0, 0.0)) for name in names]
    velocity = time.new_tensor([(style.slide * x, style.rise * y) for x, y in directions])[motion]  # [B, 2]
    bounces, nears, aways, spins, swings, orbits, fades = (
        (motion == names.index(name)).unsqueeze(1)
        for name in ("bounce", "near", "away", "spin", "swing", "orbit", "fade")
    )
    turn = 2 * math.pi * time
    run = (0.85 + 0.3 * jitter[:, 8]) * (time - 0.5)  # [B, T]
    x = style.x_spread * (jitter[:, 9] - 0.5) + velocity[:, :1] * run
    y = style.y_spread * (jitter[:, 1] - 0.5) + velocity[:, 1:] * run
    x = x + orbits * style.orbit * torch.sin(turn + 2 * math.pi * jitter[:, 8])
    y = y + orbits * style.orbit * torch.cos(turn + 2 * math.pi * jitter[:, 8])
    y = y + bounces * (0.375 * style.bounce - style.bounce * torch.sin(turn).abs())
    growth = style.growth * (nears.float() - aways.float())
    scale = (style.half_size + style.half_size_spread * jitter[:, 2]) * torch.exp(growth * (time - 0.5))
    angle = spins * style.spin * time + swings * style.swing * torch.sin(turn)
    opacity = 1 - fades * time.clamp(max=1)
    return x, y, scale, angle, opacity


def _sample(images: Tensor, grid: Tensor, padding: str) -> Tensor:
    """Sample images ``[B, C, S, S]`` at points ``[B, T, H, W, 2]`` without repeating them: ``[B, C, T, H, W]``."""
    batch, frames, height, width, _ = grid.shape
    sampled = F.grid_sample(images, grid.reshape(batch, -1, width, 2), padding_mode=padding, align_corners=False)
    return sampled.view(batch, -1, frames, height, width)
