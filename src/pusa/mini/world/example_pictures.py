"""Draw the example pictures of the package for image-to-video: scenes of the small world, and a painted view.

    python -m pusa.mini.world.example_pictures --cache FOLDER --output src/pusa/mini/pictures

The scenes are combinations of thing, motion and place that training never sees. The view imitates a photograph; the
package ships none, as training has seen those that may be given away.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pusa.mini.world import pictures
from pusa.mini.world.scenery import CANVAS, PLACES
from pusa.mini.world.vocabulary import MOTIONS, THINGS
from pusa.mini.world.world import Scenes, World, is_held_out

SIZE = 256
_FRAMES = 33
_SCENES = {  # name: thing, motion, place, and which frame
    "penguin": ("penguin", "right", "at the beach", 0),
    "star-start": ("star", "right", "in autumn", 0),
    "star-end": ("star", "right", "in autumn", _FRAMES - 1),
    "rabbit": ("rabbit", "bounce", "at the beach", 0),
    "whale-start": ("whale", "right", "in the sky", 0),
    "whale-end": ("whale", "right", "in the sky", _FRAMES - 1),
}


def main() -> None:
    """Draw all example pictures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder that pusa.mini.world.pictures.fetch downloads into"
    )
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    pictures.fetch(options.cache)
    world = World(pictures.load_sprites(options.cache, size=SIZE), torch.zeros(1, 3, CANVAS, CANVAS), variants=2)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, (thing, motion, place, frame) in _SCENES.items():
        pictures.as_image(draw_scene(world, thing, motion, place, frame)).save(
            options.output / f"{name}.png", optimize=True
        )
    pictures.as_image(paint_view()).save(options.output / "view.jpg", quality=92)


def draw_scene(world: World, thing: str, motion: str, place: str, frame: int) -> Tensor:
    """Draw one frame ``[3, SIZE, SIZE]`` in 0..1 of a clip that training never sees.

    Raises:
        ValueError: the combination is one of those trained on.
    """
    which = (
        next(i for i, names in enumerate(THINGS) if thing in names),
        list(MOTIONS).index(motion),
        next(i for i, other in enumerate(PLACES) if place in other.phrases),
    )
    subject, moves, where, zero = (torch.tensor([index]) for index in (*which, 0))
    if not is_held_out(subject, moves, where):
        raise ValueError(f"{thing}, {motion}, {place} is trained on: take another combination")
    alone = Scenes(subject, moves, where, zero, zero - 1, zero, zero, torch.full((1, 20), 0.5))
    video, _ = world.render(alone, _FRAMES, size=SIZE)
    return (video[0, :, frame] + 1) / 2


def paint_view(seed: int = 4) -> Tensor:
    """Paint a lake before mountains in the evening, with the haze and grain of a photo: ``[3, SIZE, SIZE]`` in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    size = 2 * SIZE  # made smaller at the end, as a camera's sensor does
    axis = torch.arange(size) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    horizon = 0.56

    def colour(*rgb: float) -> Tensor:
        return torch.tensor(rgb).view(3, 1, 1)

    def noise(rows: int, columns: int, octaves: int = 6) -> Tensor:
        """Make smooth noise ``[size, size]``, about -1..1; with more columns than rows its patches are wide and low."""
        field = torch.zeros(size, size)
        for octave in range(octaves):
            shape = (rows * 2**octave + 1, columns * 2**octave + 1)
            coarse = torch.rand(1, 1, *shape, generator=generator) * 2 - 1
            field += F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[0, 0] / 2**octave
        return field / 1.4

    height = (y / horizon).clamp(0, 1)
    picture = colour(0.2, 0.36, 0.62).lerp(colour(0.98, 0.78, 0.58), height**1.6)
    glow = torch.exp(-((x - 0.66) ** 2 + ((y - horizon + 0.2) * 1.3) ** 2) / 0.03)
    clouds = torch.sigmoid(7 * (noise(5, 2) - 0.15)) * (1 - height) ** 0.4
    picture = picture.lerp(colour(0.95, 0.72, 0.66) - 0.25 * noise(9, 4), 0.75 * clouds)
    picture = picture.lerp(colour(1.0, 0.93, 0.75), 0.85 * glow)

    for layer in range(4):  # from far to near: lower, darker, less hazy
        near = layer / 3
        edge = horizon - (0.24 - 0.17 * near) - (0.13 - 0.05 * near) * noise(1, 3 + 2 * layer)[0]
        rock = noise(6 + 4 * layer, 5 + 3 * layer)
        shade = colour(0.3, 0.33, 0.4).lerp(colour(0.07, 0.13, 0.12), near) * (1 + 0.5 * rock)
        if layer == 0:  # snow where it is high
            shade = shade.lerp(colour(0.9, 0.86, 0.88), torch.sigmoid(30 * (edge + 0.09 - y + 0.05 * rock)))
        haze = (0.62 * (1 - near) + 0.12) * (0.6 + 0.4 * height)
        shade = shade.lerp(colour(0.85, 0.7, 0.64), haze)
        picture = picture.lerp(shade, ((y - edge) * size / 2).clamp(0, 1))

    depth = ((y - horizon) / (1 - horizon)).clamp(0, 1)
    ripples = noise(40, 6, 3)
    mirrored = torch.stack([x * 2 - 1 + 0.03 * depth * ripples, (2 * horizon - y + 0.02 * depth * ripples) * 2 - 1], -1)
    water = F.grid_sample(picture[None], mirrored[None], padding_mode="reflection", align_corners=False)[0]
    water = (0.82 - 0.3 * depth) * water + 0.05 * ripples * (0.3 + glow)
    picture = picture.lerp(water, ((y - horizon) * size / 2).clamp(0, 1))

    bank = 0.9 - 0.1 * (x - 0.35).abs() ** 0.5 + 0.035 * noise(1, 7)[0]
    grass = colour(0.16, 0.17, 0.07) * (1 + 0.8 * noise(60, 90, 2)) + 0.05 * glow
    picture = picture.lerp(grass, ((y - bank) * size / 3).clamp(0, 1))
    for foot, tall in ((0.06, 0.55), (0.13, 0.4), (0.19, 0.26), (0.93, 0.34)):  # firs
        up = (0.93 - y) / tall
        width = 0.13 * tall * (1 - up) * (0.6 + 0.4 * torch.sin(up * 55).abs()) * (1 + 0.35 * noise(70, 3, 2))
        inside = ((width - (x - foot).abs()) * size / 2).clamp(0, 1) * ((up > 0) & (up < 1))
        picture = picture.lerp(colour(0.04, 0.08, 0.06) * (1 + 0.4 * noise(50, 50, 2)), inside)

    picture = picture.clamp(0, 1) ** 0.7  # as a camera exposes for the shadows
    picture = picture * (1.04 - 0.5 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))  # and a lens is darker at its rim
    small = F.interpolate(picture[None], (SIZE, SIZE), mode="area")[0]
    return (small + 0.012 * torch.randn(small.shape, generator=generator)).clamp(0, 1)


if __name__ == "__main__":
    main()
