"""Draw sprites of several shapes, for tests that discs (see world_samples.py) would not serve."""

import torch
from torch import Tensor

from pusa.mini.world.vocabulary import THINGS


def make_shapes(size: int = 48) -> Tensor:
    """Sprites ``[len(THINGS), 4, size, size]``: cross, ring, half disc, L in turn, in colours of their own."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = (x.square() + y.square()).sqrt()
    bar, post = (y.abs() < 0.25) & (x.abs() < 0.8), (x.abs() < 0.25) & (y.abs() < 0.8)
    alphas = [
        bar & (x > -0.8) | post & (y < 0),  # a T upside down
        (radius < 0.8) & (radius > 0.45),
        (radius < 0.8) & (y > 0),
        (x.abs() < 0.7) & (y.abs() < 0.7) & ~((x > 0) & (y < 0)),  # an L
    ]
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(len(THINGS), 3, 1, 1, generator=generator)
    shades = 0.6 + 0.4 * torch.stack([x, y, x * y, radius]).view(4, 1, size, size).clamp(-1, 1)
    sprites = []
    for number in range(len(THINGS)):
        alpha = alphas[number % 4].float()[None]
        sprites.append(torch.cat([(colours[number] * shades[number % 4]).clamp(0, 1) * alpha, alpha]))
    return torch.stack(sprites)
