"""Make every task by every base: which latent frames are kept, to the bit, and how many frames the file has."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from studied_bases import Studied
from torch import Tensor

from pusa import media
from pusa.conditions import PusaCondition, place
from pusa.generate import generate
from pusa.positions import latent_frames
from pusa.request import GenerationRequest


def made(studied: Studied, output: Path, **asked: Any) -> tuple[list[Tensor], np.ndarray]:
    """Make a video; return the latents of each call of the pipeline, and the frames of the file."""
    studied.pipe.made = []
    request = GenerationRequest(**{**studied.request, "steps": 2, **asked})
    assert list(generate(request, output, pipeline=studied.pipe))[-1].kind == "done"
    assert all(bool(latents.isfinite().all()) for latents in studied.pipe.made)
    return studied.pipe.made, media.read_video(output)


def encoded(studied: Studied, frames: np.ndarray) -> Tensor:
    """Return the latents of frames ``[n, H, W, 3]``, as conditions have them."""
    pipe, factor = studied.pipe, studied.base.factor
    side = studied.base.side // pipe.vae_scale_factor_spatial
    placed = place(
        [PusaCondition(video=frames)],
        encode=pipe.encode_frames,
        shape=(pipe.transformer.config.in_channels, latent_frames(len(frames), factor), side, side),
        num_frames=len(frames),
        height=studied.base.side,
        width=studied.base.side,
        fps=8.0,
        factor=factor,
    )
    return placed.latents


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))[None]


def kept_image(path: Path, position: Any) -> dict[str, Any]:
    return {"file": str(path), "positions": position, "noise": 0.0, "encode": "single"}


def kept_video(path: Path, **places: Any) -> dict[str, Any]:
    return {"kind": "video", "file": str(path), "noise": 0.0, **places}


def test_text_alone_makes_a_video_that_its_seed_repeats(studied: Studied, tmp_path: Path) -> None:
    [first], frames = made(studied, tmp_path / "a.mp4")
    [again], _ = made(studied, tmp_path / "b.mp4")
    [other], _ = made(studied, tmp_path / "c.mp4", seed=4)
    assert frames.shape == (studied.length(studied.base.latents), studied.base.side, studied.base.side, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pictures_are_kept_where_they_are_placed(studied: Studied, tmp_path: Path) -> None:
    start, later = studied.pictures
    images = [kept_image(start, 0), kept_image(later, 2), kept_image(start, "last")]
    [latents], frames = made(studied, tmp_path / "a.mp4", conditions=images)
    assert len(frames) == studied.length(studied.base.latents)
    for index, path in ((0, start), (2, later), (-1, start)):
        assert torch.equal(latents[0, :, index], encoded(studied, picture(path))[:, 0])
    [noisy], _ = made(studied, tmp_path / "b.mp4", conditions=[images[0] | {"noise": 0.4}])
    assert not torch.equal(noisy[0, :, 0], latents[0, :, 0])


def test_a_video_is_completed(studied: Studied, tmp_path: Path) -> None:
    video = kept_video(studied.videos[0], positions=[0, 1, 2])
    [latents], _ = made(studied, tmp_path / "a.mp4", conditions=[video])
    assert torch.equal(latents[0, :, :3], encoded(studied, studied.frames[0][: studied.length(3)]))


def test_a_video_is_extended(studied: Studied, tmp_path: Path) -> None:
    overlap = studied.length(2)
    video = kept_video(studied.videos[0])
    [latents], frames = made(studied, tmp_path / "a.mp4", task="extend", conditions=[video], overlap=overlap)
    assert torch.equal(latents[0, :, :2], encoded(studied, studied.frames[0][-overlap:]))
    assert len(frames) == len(studied.frames[0]) + studied.length(studied.base.latents) - overlap


def test_two_videos_are_joined_and_a_loop_ends_where_it_begins(studied: Studied, tmp_path: Path) -> None:
    factor, overlap = studied.base.factor, studied.length(2)
    videos = [kept_video(path) for path in studied.videos]
    [latents], frames = made(studied, tmp_path / "a.mp4", task="transition", conditions=videos, overlap=overlap)
    assert torch.equal(latents[0, :, :2], encoded(studied, studied.frames[0][-overlap:]))
    new = studied.length(studied.base.latents) - overlap - 2 * factor
    assert len(frames) == 2 * len(studied.frames[0]) + new

    asked = {"window": studied.length(5), "frames": studied.length(8), "overlap": overlap}
    *windows, bridge = made(studied, tmp_path / "b.mp4", task="loop", **asked)[0]
    assert torch.equal(bridge[:, :, :2], windows[-1][:, :, -2:])
    assert len(media.read_video(tmp_path / "b.mp4")) == studied.length(8)


@pytest.mark.parametrize("schedule", ["even", "wave"])
def test_a_long_video_goes_on_from_its_own_frames(schedule: str, studied: Studied, tmp_path: Path) -> None:
    asked = {"frames": studied.length(9), "window": studied.length(5), "overlap": studied.length(2)}
    start = kept_image(studied.pictures[0], 0)
    windows, frames = made(studied, tmp_path / "a.mp4", conditions=[start], schedule=schedule, **asked)
    assert len(windows) > 1
    assert len(frames) == asked["frames"]
    assert torch.equal(windows[0][0, :, 0], encoded(studied, picture(studied.pictures[0]))[:, 0])
    if schedule == "even":
        assert torch.equal(windows[1][:, :, :2], windows[0][:, :, -2:])
