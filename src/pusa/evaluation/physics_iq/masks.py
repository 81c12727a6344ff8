"""Compute the motion masks of a clip as Physics-IQ does, and scale frames as it does before it compares them.

Physics-IQ uses OpenCV. The operations that it takes from there are few and exactly defined on bytes, so that NumPy
gives the same masks, bit for bit, without a package of 60 MB.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

THRESHOLD = 10  # grey levels that a moving pixel differs by from the running average
_WEIGHT = 0.3  # of the newest frame in the running average
_RED, _GREEN, _BLUE, _SHIFT = 9798, 19235, 3735, 15  # OpenCV's fixed-point weights of grey
_ONE = 2048  # a weight of 1 in OpenCV's fixed-point scaling
_RADIUS = 2  # of the blur and of the squares that open and close a mask


def motion_masks(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the mask of each frame: where it differs from the running average of the clip so far.

    A frame is turned grey, blurred by the binomial 5x5 kernel and blended into the average with a weight of 0.3. A
    pixel moves if it differs from the average, which holds it already, by more than `THRESHOLD` grey levels; opening
    and closing by a 5x5 square removes specks and fills gaps. Nothing moves in the first frame.

    Args:
        frames: uint8 ``[H, W, 3]`` in RGB.

    Yields:
        bool ``[H, W]``, one for each frame.
    """
    average: np.ndarray | None = None
    for frame in frames:
        grey = blur(to_grey(frame))
        if average is None:
            average = grey.astype(np.float64)
            yield np.zeros(grey.shape, dtype=bool)
            continue
        average *= 1 - _WEIGHT
        average += grey * _WEIGHT
        moved = np.abs(grey - np.rint(average).astype(np.int16)) > THRESHOLD
        yield erode(dilate(dilate(erode(moved))))


def to_grey(frame: np.ndarray) -> np.ndarray:
    """Convert a frame, uint8 ``[H, W, 3]`` in RGB, to its luma, int16 ``[H, W]`` in 0..255."""
    red, green, blue = (frame[..., channel].astype(np.int32) for channel in range(3))
    return ((red * _RED + green * _GREEN + blue * _BLUE + (1 << _SHIFT - 1)) >> _SHIFT).astype(np.int16)


def blur(grey: np.ndarray) -> np.ndarray:
    """Blur int16 ``[H, W]`` in 0..255 by the kernel 1 4 6 4 1 along both sides; edges are mirrored."""
    height, width = grey.shape
    padded = np.pad(grey.astype(np.int32), _RADIUS, mode="reflect")
    rows = _binomial([padded[:, at : at + width] for at in range(2 * _RADIUS + 1)])
    both = _binomial([rows[at : at + height] for at in range(2 * _RADIUS + 1)])
    return ((both + 128) >> 8).astype(np.int16)


def _binomial(shifted: Sequence[np.ndarray]) -> np.ndarray:
    first, second, third, fourth, fifth = shifted
    return first + fifth + 4 * (second + fourth) + 6 * third


def erode(mask: np.ndarray) -> np.ndarray:
    """Keep the pixels, bool ``[H, W]``, whose 5x5 neighbours are all set; those outside count as set."""
    return ~dilate(~mask)


def dilate(mask: np.ndarray) -> np.ndarray:
    """Set the pixels, bool ``[H, W]``, that have a set one among their 5x5 neighbours."""
    height, width = mask.shape
    padded = np.pad(mask, _RADIUS)
    shifts = range(2 * _RADIUS + 1)
    rows = np.logical_or.reduce([padded[:, at : at + width] for at in shifts])
    return np.logical_or.reduce([rows[at : at + height] for at in shifts])


def resize(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale uint8 ``[H, W]`` or ``[H, W, 3]`` bilinearly between the nearest pixels, without a filter against aliases.

    So does OpenCV by default, in fixed-point numbers that are followed here, as half of a mask's white is where a
    rounding decides if a pixel moves: smaller frames are equal to OpenCV's, larger ones within one grey level.
    """
    if frame.shape[:2] == (height, width):
        return frame
    left, right, across = _neighbours(frame.shape[1], width)
    above, below, down = _neighbours(frame.shape[0], height)
    trailing = (1,) * (frame.ndim - 2)
    rows = frame.astype(np.int32)
    rows = (rows[:, left] * across[0].reshape(-1, *trailing) + rows[:, right] * across[1].reshape(-1, *trailing)) >> 4
    upper, lower = (weights.reshape(-1, 1, *trailing) for weights in down)
    values = ((rows[above] * upper) >> 16) + ((rows[below] * lower) >> 16)
    return ((values + 2) >> 2).astype(np.uint8)


def _neighbours(length: int, wanted: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return both neighbours of each new pixel along one side, and their weights, which sum up to about 2048."""
    centres = ((np.arange(wanted) + 0.5) * (length / wanted) - 0.5).clip(0, length - 1).astype(np.float32)
    first = np.floor(centres).astype(np.intp)
    part = centres - first.astype(np.float32)
    weights = tuple(np.rint(weight * np.float32(_ONE)).astype(np.int32) for weight in (1 - part, part))
    return first, np.minimum(first + 1, length - 1), (weights[0], weights[1])
