"""Frames by their times, and pieces without loss: the very pixels that reading the whole video gives."""

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media_samples import encode, grey_levels, levels_of, moving_gradient, picture_bytes, write
from PIL import Image

from pusa.media import MediaError, MediaLimits, probe_video, read_video, read_xmp
from pusa.media.stills import read_stills, write_piece

FPS = 25


def middles(numbers: list[int], fps: int = FPS) -> list[Fraction]:
    return [Fraction(2 * number + 1, 2 * fps) for number in numbers]


LONG = moving_gradient(230)  # more than nine seconds: far frames are sought, not decoded up to
MAKERS: dict[str, Callable[[], bytes]] = {
    "mp4 with few key frames": lambda: encode(
        LONG, container="mp4", codec="libx264", pixels="yuv420p", stream={"g": "60", "bf": "3"}
    ),
    "webm without an index": lambda: encode(
        LONG, container="webm", codec="libvpx-vp9", pixels="yuv420p", options={"live": "1"}, stream={"cpu-used": "8"}
    ),
    "mpeg-ts": lambda: encode(LONG, container="mpegts", codec="mpeg2video", pixels="yuv420p"),
    "avi": lambda: encode(LONG, container="avi", codec="mpeg4", pixels="yuv420p"),
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_stills_are_the_frames_of_the_whole_video(name: str) -> None:
    content = MAKERS[name]()
    whole = read_video(content)
    assert len(whole) == len(LONG)
    for numbers in ([0, 1, 229], [200], [7, 8, 120, 121, 228]):
        for number, still in zip(numbers, read_stills(content, middles(numbers)), strict=True):
            assert np.array_equal(still, whole[number]), (name, number)


def test_times_outside_of_a_video_give_its_ends_and_held_frames_are_held(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", grey_levels([0, 60, 120, 180]), fps=16)
    assert levels_of(np.stack(read_stills(path, [-1, 0, 0.0624, 0.0626, 99]))) == pytest.approx(
        [0, 0, 0, 60, 180], abs=2
    )
    held = encode(grey_levels([10, 200, 90]), times_ms=[0, 1000, 1100])
    assert levels_of(np.stack(read_stills(held, [0.5, 0.99, 1.05, 1.2]))) == [10, 10, 200, 90]
    [small] = read_stills(encode(LONG[:1]), [0], fit=(40, 1))
    assert small.shape == (24, 40, 3)


@pytest.mark.parametrize("box", [None, (3, 5, 58, 40)], ids=["all of it", "an odd region"])
def test_a_piece_has_the_very_pixels(tmp_path: Path, box: tuple[int, int, int, int] | None) -> None:
    content = MAKERS["mp4 with few key frames"]()
    target = io.BytesIO()
    options = {"first": 150, "frames": 41, "fps": Fraction(FPS), "max_bytes": 2**28}
    assert write_piece(content, target, box=box, xmp=b"<x/>", **options) == 41
    whole = read_video(content)[150:191]
    left, top, right, bottom = box or (0, 0, 160, 96)
    assert np.array_equal(read_video(target.getvalue()), whole[:, top:bottom, left:right])
    info = probe_video(target.getvalue())
    assert (info.frames, info.fps, info.width, info.height) == (41, FPS, right - left, bottom - top)
    assert read_xmp(target.getvalue()) == b"<x/>"


def test_a_piece_ends_with_its_video_and_within_its_limit() -> None:
    content = encode(LONG[:20])
    target = io.BytesIO()
    piece = {"frames": 50, "fps": Fraction(FPS)}
    assert write_piece(content, target, first=15, max_bytes=2**28, **piece) == 5
    with pytest.raises(MediaError, match="ends before the piece begins"):
        write_piece(content, io.BytesIO(), first=30, max_bytes=2**28, **piece)
    noise = np.random.default_rng(0).integers(0, 256, (60, 96, 160, 3), np.uint8)
    with pytest.raises(MediaError, match=r"more than 0\.04768 MiB without loss; take a shorter one"):
        write_piece(encode(noise), io.BytesIO(), first=0, max_bytes=50_000, **piece)


def test_animations_of_pillow_have_stills_too() -> None:
    images = [Image.new("RGB", (32, 32), (level,) * 3) for level in (0, 100, 200)]
    for kind in ("WEBP", "AVIF", "PNG", "GIF"):
        options = {} if kind in ("PNG", "GIF") else {"quality": 100}
        content = picture_bytes(images[0], kind, save_all=True, append_images=images[1:], duration=100, **options)
        levels = levels_of(np.stack(read_stills(content, [0.05, 0.15, 0.25])))
        assert levels == pytest.approx([0, 100, 200], abs=4), kind


def test_limits_hold_for_stills_too() -> None:
    with pytest.raises(MediaError, match="limit"):
        read_stills(encode(LONG[:20]), [0.5], limits=MediaLimits(max_frames=10))
