"""Make what no model is needed for: a still picture, and a cross-fade between the given frames."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

BASELINES = ("still frame", "cross-fade")


def still(real: np.ndarray, given: Sequence[int], length: int) -> np.ndarray:
    """Hold each given frame until the next one: uint8 ``[length, H, W, 3]``.

    Args:
        real: the clip, uint8 ``[F, H, W, 3]``, which has the given frames.
    """
    places = np.asarray(sorted(given))
    before = np.clip(np.searchsorted(places, np.arange(length), side="right") - 1, 0, None)
    return real[places[before]]


def cross_fade(real: np.ndarray, given: Sequence[int], length: int) -> np.ndarray:
    """Blend from each given frame to the next one; after the last it stays: uint8 ``[length, H, W, 3]``."""
    places = np.asarray(sorted(given))
    frames = still(real, given, length)
    for first, last in pairwise(places):
        for frame in range(first + 1, last):
            part = (frame - first) / (last - first)
            frames[frame] = np.rint((1 - part) * real[first] + part * real[last]).astype(np.uint8)
    return frames
