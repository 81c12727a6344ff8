"""Define the editions of the small world: which things and places it has, how large things are, and how they move.

A model knows the words of one edition, and its folder names that edition in ``pusa.json`` (`edition_of`). Scenes of all
editions number things, motions and places alike, by `THINGS`, `MOTIONS` and `PLACES`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.mini.world.scenery import PLACES
from pusa.mini.world.vocabulary import CAMERAS, MOTIONS, PHOTOGRAPH_WORDS, THINGS


@dataclass(frozen=True)
class MotionStyle:
    """Set how large things are and how far they move; lengths are halves of the frame, angles radians.

    Attributes:
        half_size, half_size_spread: half the height of a sprite with its margins: the least, and what chance adds.
        x_spread, y_spread: range of the middle of a path.
        slide, rise: way of left and right, and of up and down, in a whole motion.
        growth: change of the log size of things that come closer or go away.
        spin: angle of a spin.
        swing: largest angle of a swing.
        orbit: radius of a circle.
        bounce: height of a bounce.
        pan, zoom: way of the camera, and its change of the log size.
    """

    half_size: float = 0.6
    half_size_spread: float = 0.14
    x_spread: float = 0.4
    y_spread: float = 0.3
    slide: float = 0.8
    rise: float = 0.7
    growth: float = 0.8
    spin: float = 3.5
    swing: float = 0.5
    orbit: float = 0.3
    bounce: float = 0.4
    pan: float = 0.5
    zoom: float = 0.35


@dataclass(frozen=True)
class Edition:
    """Describe an edition.

    Attributes:
        things, places: indices into `THINGS` and `PLACES`.
        texture_share, photograph_share: shares of scenes in place of a painted place.
        pair_share: share of scenes with a second thing.
    """

    name: str
    things: tuple[int, ...] = tuple(range(len(THINGS)))
    places: tuple[int, ...] = tuple(range(len(PLACES)))
    style: MotionStyle = field(default_factory=MotionStyle)
    texture_share: float = 0.07
    photograph_share: float = 0.16
    pair_share: float = 0.06

    @property
    def sprites(self) -> int:
        """Return how many of the first of `THINGS` hold all things of this edition."""
        return self.span(len(self.things))

    def span(self, things: int) -> int:
        """Return how many of the first of `THINGS` hold its first `things` things."""
        return max(self.things[:things]) + 1

    def words(self, things: int) -> dict[str, list[Any]]:
        """List the words of the first `things` of its things, as ``pusa.json`` has them."""
        return {
            "things": [list(THINGS[index][1:]) for index in self.things[:things]],
            "motions": [list(words) for words in MOTIONS.values()],
            "places": [list(PLACES[index].phrases) for index in self.places],
            "cameras": [words.removeprefix(", ") for words in CAMERAS.values() if words],
            "pictures": list(PHOTOGRAPH_WORDS),
        }

    def thing_at(self, numbers: Tensor) -> Tensor:
        """Map numbers among its things to indices into `THINGS`."""
        return torch.tensor(self.things)[numbers]

    def place_at(self, numbers: Tensor) -> Tensor:
        """Map numbers among its places to indices into `PLACES`."""
        return torch.tensor(self.places)[numbers]


def _things(*names: str) -> tuple[int, ...]:
    known = [words[1] for words in THINGS]
    return tuple(known.index(name) for name in names)


def _places(*phrases: str) -> tuple[int, ...]:
    known = [place.phrases[0] for place in PLACES]
    return tuple(known.index(phrase) for phrase in phrases)


FIRST = Edition("first")
# Bodies that are recognised by their outline at 64 pixels and are like no other of the list; heads without bodies, and
# the second of two alike (chick and duck, car and bus, snowman and ghost) are left out. Of night and space one is left.
SECOND = Edition(
    "second",
    things=_things(
        *("duck", "fish", "turtle", "octopus", "rabbit", "cat", "penguin", "dinosaur", "whale", "crab"),
        *("apple", "mushroom", "donut", "rocket", "bus", "balloon", "ghost", "star", "butterfly", "ladybug"),
    ),
    places=_places(
        *("on the grass", "at the beach", "under the sea", "in the snow", "in the desert"),
        *("in space", "in the forest", "at sunset", "in autumn", "in the sky"),
    ),
    style=MotionStyle(
        half_size=0.68,
        half_size_spread=0.16,
        x_spread=0.2,
        y_spread=0.16,
        slide=0.65,
        rise=0.55,
        growth=0.6,
        spin=1.8,
        swing=0.4,
        orbit=0.22,
        bounce=0.3,
        pan=0.4,
        zoom=0.3,
    ),
    texture_share=0.1,
    photograph_share=0.24,
    pair_share=0.0,
)
EDITIONS: Mapping[str, Edition] = {edition.name: edition for edition in (FIRST, SECOND)}


def edition_of(folder: Path) -> Edition:
    """Read which edition a model folder knows: "world" in its ``pusa.json``; without that entry the first.

    Raises:
        ValueError: this version has no such edition.
    """
    name = json.loads((folder / "pusa.json").read_text()).get("world", FIRST.name)
    if name not in EDITIONS:
        raise ValueError(f"{folder} knows the world {name!r}, and this version has {', '.join(EDITIONS)}")
    return EDITIONS[name]
