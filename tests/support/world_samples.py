"""Draw pictures in place of those of the small model's world, so that no test downloads anything."""

import torch
from torch import Tensor

from pusa.mini.world.scenery import CANVAS
from pusa.mini.world.vocabulary import THINGS
from pusa.mini.world.world import World


def make_sprites(size: int = 24) -> Tensor:
    """A disc for every thing, each in its own colour: ``[100, 4, size, size]``."""
    axis = torch.linspace(-1, 1, size)
    disc = ((axis[:, None].square() + axis.square()).sqrt() < 0.8).float()
    colours = torch.rand(len(THINGS), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return torch.cat([colours * disc, disc.expand(len(THINGS), 1, -1, -1)], dim=1)


def make_photographs() -> Tensor:
    """Three pictures of nothing: ``[3, 3, CANVAS, CANVAS]``."""
    return torch.rand(3, 3, CANVAS, CANVAS, generator=torch.Generator().manual_seed(1))


def make_world(sprites: Tensor | None = None, variants: int = 2) -> World:
    return World(make_sprites() if sprites is None else sprites, make_photographs(), variants=variants)
