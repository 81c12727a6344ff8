"""Paint places and textures, the backgrounds of `pusa.mini.world.world`."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CANVAS = 192
"""Pixels of a background, both ways; a frame shows a bit more than half of it."""

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Place:
    """Describe a sky from top to bottom, layers of ground before each other, a disc in the sky, dots anywhere.

    A layer is its colour, the height of its upper edge (-1 top, 1 bottom) and how hilly that edge is.
    """

    phrases: tuple[str, ...]
    sky: tuple[Colour, Colour]
    layers: tuple[tuple[Colour, float, float], ...] = ()
    disc: Colour | None = None
    dots: Colour | None = None


PLACES: tuple[Place, ...] = (
    Place(
        ("on the grass", "in a meadow"),
        ((0.35, 0.62, 0.95), (0.8, 0.92, 1.0)),
        (((0.5, 0.75, 0.4), 0.0, 0.15), ((0.32, 0.62, 0.2), 0.25, 0.08)),
    ),
    Place(
        ("at the beach", "on the sand"),
        ((0.4, 0.72, 0.98), (0.85, 0.95, 1.0)),
        (((0.1, 0.5, 0.75), -0.1, 0.0), ((0.93, 0.83, 0.6), 0.3, 0.06)),
    ),
    Place(
        ("under the sea", "under water"),
        ((0.1, 0.55, 0.8), (0.0, 0.15, 0.4)),
        (((0.1, 0.3, 0.45), 0.4, 0.25), ((0.25, 0.35, 0.4), 0.6, 0.15)),
        dots=(0.7, 0.9, 1.0),
    ),
    Place(
        ("in the snow", "in winter"),
        ((0.6, 0.7, 0.82), (0.85, 0.88, 0.93)),
        (((0.72, 0.8, 0.9), 0.0, 0.35), ((0.95, 0.97, 1.0), 0.3, 0.08)),
        dots=(1.0, 1.0, 1.0),
    ),
    Place(
        ("in the desert", "among dunes"),
        ((0.95, 0.75, 0.45), (1.0, 0.92, 0.7)),
        (((0.85, 0.55, 0.25), 0.05, 0.3), ((0.75, 0.45, 0.2), 0.4, 0.2)),
        disc=(1.0, 0.97, 0.8),
    ),
    Place(
        ("in space", "among the stars"),
        ((0.02, 0.02, 0.08), (0.1, 0.03, 0.2)),
        disc=(0.75, 0.75, 0.7),
        dots=(1.0, 1.0, 0.9),
    ),
    Place(
        ("in the forest", "among trees"),
        ((0.5, 0.65, 0.45), (0.75, 0.8, 0.55)),
        (((0.15, 0.35, 0.2), -0.5, 1.2), ((0.07, 0.24, 0.13), -0.1, 1.4), ((0.3, 0.25, 0.15), 0.5, 0.08)),
    ),
    Place(
        ("at sunset", "in the evening"),
        ((0.35, 0.15, 0.45), (1.0, 0.5, 0.25)),
        (((0.35, 0.1, 0.25), 0.2, 0.3), ((0.12, 0.05, 0.15), 0.5, 0.1)),
        disc=(1.0, 0.8, 0.35),
    ),
    Place(
        ("at night", "in the moonlight"),
        ((0.03, 0.05, 0.2), (0.12, 0.18, 0.42)),
        (((0.06, 0.12, 0.18), 0.25, 0.25), ((0.03, 0.07, 0.1), 0.5, 0.1)),
        disc=(0.95, 0.95, 0.85),
        dots=(0.9, 0.9, 1.0),
    ),
    Place(
        ("in autumn", "among red leaves"),
        ((0.75, 0.8, 0.88), (0.95, 0.9, 0.8)),
        (((0.8, 0.4, 0.12), -0.3, 0.9), ((0.7, 0.22, 0.1), 0.05, 0.8), ((0.6, 0.42, 0.2), 0.45, 0.1)),
    ),
    Place(
        ("in a room", "at home"),
        ((0.93, 0.88, 0.78), (0.85, 0.78, 0.66)),
        (((0.97, 0.96, 0.93), 0.28, 0.0), ((0.55, 0.36, 0.22), 0.36, 0.0)),
    ),
    Place(
        ("in the sky", "above the clouds"),
        ((0.25, 0.5, 0.92), (0.65, 0.82, 1.0)),
        (((0.9, 0.94, 1.0), 0.2, 0.9), ((1.0, 1.0, 1.0), 0.5, 0.5)),
    ),
)


def _noise(count: int, generator: torch.Generator, *, octaves: tuple[int, ...] = (3, 6, 12, 24, 48)) -> Tensor:
    """Make smooth random fields ``[count, CANVAS, CANVAS]`` of mean 0, finer detail being fainter."""
    field = torch.zeros(count, CANVAS, CANVAS)
    for cells in octaves:
        coarse = torch.rand(count, 1, cells + 1, cells + 1, generator=generator) - 0.5
        field += F.interpolate(coarse, CANVAS, mode="bicubic", align_corners=True)[:, 0] * octaves[0] / cells
    return field


def _axes() -> tuple[Tensor, Tensor]:
    axis = torch.linspace(-1, 1, CANVAS)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def paint_places(variants: int, generator: torch.Generator) -> Tensor:
    """Paint each place `variants` times: ``[len(PLACES) * variants, 3, CANVAS, CANVAS]`` in 0..1, place by place."""
    return torch.stack([_paint(place, generator) for place in PLACES for _ in range(variants)])


def _paint(place: Place, generator: torch.Generator) -> Tensor:
    x, y = _axes()
    mottle = _noise(2 + len(place.layers), generator)
    mix = ((y + 1) / 2 + 0.3 * mottle[0]).clamp(0, 1)
    top, bottom = (torch.tensor(colour).view(3, 1, 1) for colour in place.sky)
    picture = top + (bottom - top) * mix
    if place.disc is not None:
        cx, cy, radius = (torch.rand(3, generator=generator) * torch.tensor([1.0, 0.4, 0.12])).tolist()
        distance = ((x - cx + 0.5).square() + (y + cy + 0.1).square()).sqrt() / (radius + 0.12)
        picture = picture.lerp(torch.tensor(place.disc).view(3, 1, 1), ((1 - distance) * 12).clamp(0, 1))
    for (colour, height, hills), texture in zip(place.layers, mottle[2:], strict=True):
        edge = height + hills * _noise(1, generator, octaves=(4, 9, 20))[0, 0]  # [CANVAS], by column
        cover = ((y - edge) * CANVAS / 3).clamp(0, 1)
        shade = 1 + 0.5 * texture - 0.15 * (y - height)
        picture = picture.lerp(torch.tensor(colour).view(3, 1, 1) * shade, cover)
    if place.dots is not None:
        spots = torch.rand(CANVAS, CANVAS, generator=generator)
        bright = (spots > 0.996).float() * torch.rand(CANVAS, CANVAS, generator=generator)
        glow = F.avg_pool2d(bright[None, None], 3, stride=1, padding=1)[0, 0] * 5
        picture = picture.lerp(torch.tensor(place.dots).view(3, 1, 1), glow.clamp(0, 0.9))
    return picture.clamp(0, 1)


def paint_textures(count: int, generator: torch.Generator) -> Tensor:
    """Paint abstract pictures ``[count, 3, CANVAS, CANVAS]`` in 0..1 with gradients, grain and edges like photographs.

    They make the training data resemble pictures of users.
    """
    x, y = _axes()
    picture = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, CANVAS, CANVAS)
    for layer in range(4):
        field = _noise(count, generator)  # [count, CANVAS, CANVAS]
        turn, frequency, level, sharpness = torch.rand(4, count, 1, 1, generator=generator).unbind(0)
        stripes = torch.sin((3 + 25 * frequency) * (x * torch.cos(math.pi * turn) + y * torch.sin(math.pi * turn)))
        disc = 0.8 * level + 0.2 - ((x - 2 * turn + 1).square() + (y - 2 * frequency + 1).square()).sqrt()
        shape = [field, 0.4 * stripes + field, disc + 0.2 * field, field][layer]
        cover = torch.sigmoid((shape - 0.3 * (level - 0.5)) * (4 + 60 * sharpness.square())).unsqueeze(1)
        light, grain = _noise(2 * count, generator).view(2, count, 1, CANVAS, CANVAS)
        colour = torch.rand(count, 3, 1, 1, generator=generator) + 0.5 * light
        picture = picture + cover * (colour * (1 + 0.3 * grain) - picture) * (0.5 + 0.5 * level.unsqueeze(1))
    fine = torch.randn(count, 1, CANVAS, CANVAS, generator=generator)
    strength = 0.02 * torch.rand(count, 1, 1, 1, generator=generator)
    return (picture + strength * fine).clamp(0, 1)
