"""Motion masks and scaling, against what OpenCV 5.0 gives for the same frames with Physics-IQ's operations."""

import zlib

import numpy as np
import physics_iq_samples as samples

from pusa.evaluation.physics_iq.clips import blended
from pusa.evaluation.physics_iq.masks import motion_masks, resize

MOVING = [0, 533, 973, 1312]  # pixels of each mask, by OpenCV
MASKS_CRC, SMALLER_CRC = 3013789359, 3867302240


def noisy_clip(count: int) -> list[np.ndarray]:
    """Draw the moving square under noise that is stronger than the threshold of motion in places."""
    noise = np.random.default_rng(0)
    clip = samples.frames(0, 1, 1, 2, count)
    return [np.clip(frame + noise.integers(-60, 61, frame.shape), 0, 255).astype(np.uint8) for frame in clip]


def test_masks_are_those_of_opencv_bit_for_bit() -> None:
    masks = list(motion_masks(noisy_clip(len(MOVING))))
    assert [int(mask.sum()) for mask in masks] == MOVING
    assert zlib.crc32(np.packbits(np.stack(masks)).tobytes()) == MASKS_CRC


def test_nothing_moves_in_a_still_clip() -> None:
    frame = noisy_clip(1)[0]
    assert not any(mask.any() for mask in motion_masks([frame] * 4))


def test_smaller_frames_are_those_of_opencv_bit_for_bit() -> None:
    frame = noisy_clip(1)[0]
    smaller = [resize(frame, 48, 28), resize(frame, 101, 67), resize(frame[..., 0], 37, 28)]
    assert zlib.crc32(b"".join(one.tobytes() for one in smaller)) == SMALLER_CRC
    quarter = frame.astype(int).reshape(28, 4, 48, 4, 3)[:, 1:3, :, 1:3].sum(axis=(1, 3))  # the inner 4 of 16
    np.testing.assert_array_equal(smaller[0], (quarter + 2) // 4)


def test_another_rate_blends_neighbours_from_the_first_frame_to_the_last() -> None:
    frames = [np.full((2, 2, 3), 10 * index, np.uint8) for index in range(25)]
    assert [int(frame[0, 0, 0]) for frame in blended(iter(frames), 25, 5)] == [0, 60, 120, 180, 240]
    assert [int(frame[0, 0, 0]) for frame in blended(iter(frames), 25, 3)] == [0, 120, 240]
    assert [int(frame[0, 0, 0]) for frame in blended(iter(frames[:3]), 3, 5)] == [0, 5, 10, 15, 20]
