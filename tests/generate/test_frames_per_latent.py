"""Make every task with a VAE of 1, 4 or 6 frames to a latent frame: which input frames are kept, and where."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import describe_model
from PIL import Image
from studied_bases import Recorder
from torch import Tensor, nn

from pusa import media
from pusa.generate import generate, read_request
from pusa.models import tiny
from pusa.pipeline import PusaPipeline
from pusa.positions import frames_of, latent_frames
from pusa.request import GenerationRequest

WIDTH, HEIGHT = 32, 32
FACTORS = pytest.mark.parametrize("factor", [1, 4, 6])


class Repeat(nn.Module):
    """Decode latents to blocks of 8 x 8 pixels, and to `factor` equal frames after the first."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor, feat_cache: list[Any], feat_idx: list[int], first_chunk: bool) -> Tensor:
        frames = z[:, :3].repeat_interleave(1 if first_chunk else self.factor, dim=2)
        return frames.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


class MeanPipeline(Recorder):
    """Encode a latent frame as the mean of its frames; record the latents that each call returns."""

    def statistics(self) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        return tuple(torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))

    def encode_frames(self, video: Tensor) -> Tensor:
        factor = self.vae_scale_factor_temporal
        assert (video.shape[2] - 1) % factor == 0
        blocks = nn.functional.avg_pool3d(video, (1, 8, 8))
        later = blocks[:, :, 1:].unflatten(2, (-1, factor)).mean(3) if video.shape[2] > 1 else blocks[:, :, :0]
        z = torch.cat([blocks[:, :, :1], later], dim=2)
        z = torch.cat([z, z.new_zeros(z.shape[0], 13, *z.shape[2:])], dim=1)
        mean, std = self.statistics()
        return (z - mean) / std

    def grey_of(self, latents: Tensor) -> list[float]:
        """Return the mean level 0..255 of each latent frame."""
        mean, std = self.statistics()
        return ((latents * std + mean)[0, :3].mean(dim=(0, 2, 3)) * 127.5 + 127.5).tolist()


def pipeline_of(factor: int) -> MeanPipeline:
    parts = tiny.components()
    parts["vae"].register_to_config(scale_factor_temporal=factor)
    parts["vae"].decoder, parts["vae"].post_quant_conv = Repeat(factor), nn.Identity()
    pipe = PusaPipeline(**parts)
    pipe.__class__ = MeanPipeline
    pipe.made = []
    return pipe


def model_of(folder: Path, factor: int, latents: int = 9) -> str:
    """Describe a model of clips of `latents` latent frames, without weights: tests bring a pipeline."""
    size = {"width": WIDTH, "height": HEIGHT, "num_frames": frames_of(latents, factor), "frames_per_latent": factor}
    return describe_model(folder, **size, steps=2, guidance=1.0, max_sequence_length=32, encode="repeat")


def grey_video(path: Path, first: int, frames: int) -> dict[str, Any]:
    """Write a video whose frame k has the grey level first + k; return it as a condition that is kept."""
    with media.VideoWriter(path, width=WIDTH, height=HEIGHT, lossless=True) as writer:
        for level in range(first, first + frames):
            writer.write(np.full((1, HEIGHT, WIDTH, 3), level, np.uint8))
    return {"kind": "video", "file": str(path), "noise": [0.0]}


def grey_image(path: Path, level: int) -> str:
    Image.new("RGB", (WIDTH, HEIGHT), (level, level, level)).save(path)
    return str(path)


class Run:
    """Make a video by a model of `factor`; hold its frames' levels, and those of the latents of each call."""

    def __init__(self, folder: Path, factor: int, **asked: Any) -> None:
        model = asked.pop("model", None) or model_of(folder / "model", factor)
        self.request = GenerationRequest(**{"model": model, "prompt": "a cat", "seed": 0, **asked})
        self.pipe = pipeline_of(factor)
        self.output = folder / "out.mp4"
        assert list(generate(self.request, self.output, pipeline=self.pipe))[-1].kind == "done"
        self.frames = media.read_video(self.output)
        self.greys = self.frames.mean(axis=(1, 2, 3))
        self.latents = [self.pipe.grey_of(latents) for latents in self.pipe.made]


def mean_levels(first: int, latents: int, factor: int) -> list[float]:
    """Return the means of the levels from `first` on, `factor` to a latent frame."""
    return [first + factor * number + (factor - 1) / 2 for number in range(latents)]


def near(expected: list[float]) -> Any:
    return pytest.approx(expected, abs=1.5)  # an mp4 rounds levels


@FACTORS
def test_keyframes_fill_the_latent_frames_that_hold_them(factor: int, tmp_path: Path) -> None:
    last = frames_of(9, factor) - 1
    places = {0: 20, f"{frames_of(3, factor)}f": 90, f"{last / 16:.3f}s": 160}  # latent frames 0, 3 and 8
    conditions = [
        {"file": grey_image(tmp_path / f"{level}.png", level), "positions": place, "noise": 0.0}
        for place, level in places.items()
    ]
    run = Run(tmp_path, factor, conditions=conditions)
    [made] = run.latents
    assert [made[index] for index in (0, 3, 8)] == near([20, 90, 160])
    assert len(run.frames) == last + 1
    assert list(run.greys[[0, frames_of(3, factor), frames_of(4, factor) - 1, last]]) == near([20, 90, 90, 160])


@FACTORS
def test_an_extension_goes_on_from_the_last_frames(factor: int, tmp_path: Path) -> None:
    overlap = frames_of(3, factor)
    video = grey_video(tmp_path / "in.mp4", 50, overlap + 5)
    run = Run(tmp_path, factor, task="extend", conditions=[video], overlap=overlap)
    [made] = run.latents
    assert made[:3] == near([55, *mean_levels(56, 2, factor)])
    assert len(run.frames) == overlap + 5 + factor * 6
    assert list(run.greys[: overlap + 5]) == near(list(range(50, 55 + overlap)))


@FACTORS
def test_a_transition_ends_with_whole_latent_frames_of_the_second_video(factor: int, tmp_path: Path) -> None:
    overlap = frames_of(2, factor)
    videos = [grey_video(tmp_path / "a.mp4", 20, 15), grey_video(tmp_path / "b.mp4", 120, 2 * factor)]
    run = Run(tmp_path, factor, task="transition", conditions=videos, overlap=overlap)
    [made] = run.latents
    assert made[:2] == near([35 - overlap, *mean_levels(36 - overlap, 1, factor)])
    assert made[-2:] == near(mean_levels(120, 2, factor))
    assert len(run.frames) == 15 + (frames_of(9, factor) - overlap - 2 * factor) + 2 * factor
    assert list(run.greys[-2 * factor :]) == near(list(range(120, 120 + 2 * factor)))
    short = grey_video(tmp_path / "short.mp4", 120, 2 * factor - 1)
    with pytest.raises(ValueError, match=f"has {2 * factor - 1} frames at 16 fps, {2 * factor} are taken over"):
        Run(
            tmp_path, factor, model=run.request.model, task="transition", conditions=[videos[0], short], overlap=overlap
        )


@FACTORS
def test_a_loop_ends_where_it_begins(factor: int, tmp_path: Path) -> None:
    levels = [60, 90, 120]
    images = [
        {"file": grey_image(tmp_path / f"{place}.png", level), "positions": place, "noise": 0.0}
        for place, level in enumerate(levels)
    ]
    lengths = {"window": frames_of(7, factor), "overlap": frames_of(2, factor)}
    run = Run(tmp_path, factor, task="loop", conditions=images, **lengths)
    clip, bridge = run.latents
    assert (len(clip), len(bridge)) == (9 - 3, 7)
    assert bridge[:2] == near(clip[-2:])
    first_frames = [60] + [level for level in levels[1:] for _ in range(factor)]
    assert bridge[-2:] == near(list(np.reshape(first_frames[: 2 * factor], (2, factor)).mean(axis=1)))
    assert len(run.frames) == frames_of(9, factor)


@FACTORS
@pytest.mark.parametrize("schedule", ["even", "wave"])
def test_a_long_video_keeps_what_is_given_in_every_window(factor: int, schedule: str, tmp_path: Path) -> None:
    picture, video = grey_image(tmp_path / "a.png", 200), grey_video(tmp_path / "b.mp4", 30, frames_of(3, factor))
    given = [
        {"file": picture, "positions": f"{frames_of(15, factor)}f", "noise": 0.0},  # latent frame 15
        video | {"positions": [1, 2]},
    ]
    lengths = {"frames": frames_of(17, factor), "window": frames_of(9, factor), "overlap": frames_of(3, factor)}
    run = Run(tmp_path, factor, conditions=given, schedule=schedule, **lengths)
    assert len(run.frames) == lengths["frames"]
    by_latent = run.greys[1:].reshape(16, factor).mean(axis=1)
    assert [by_latent[14], *by_latent[:2]] == near([200, *mean_levels(31, 2, factor)])


@FACTORS
def test_a_final_follows_its_draft_frame_by_frame(factor: int, tmp_path: Path) -> None:
    lengths = {"frames": frames_of(13, factor), "window": frames_of(9, factor), "overlap": frames_of(3, factor)}
    draft = grey_video(tmp_path / "draft.mp4", 40, lengths["frames"])
    run = Run(tmp_path, factor, conditions=[draft | {"kind": "draft"}], **lengths)
    levels = [40.0, *mean_levels(41, 12, factor)]
    assert run.latents[0] == near(levels[:9])
    assert run.latents[1] == near(levels[4:])
    assert len(run.frames) == lengths["frames"]


@FACTORS
def test_a_replay_makes_the_same_video(factor: int, tmp_path: Path) -> None:
    first = Run(tmp_path, factor, task="loop", frames=frames_of(9, factor) + factor // 2)
    stored = media.read_metadata(first.output)
    assert stored["request"].get("frames_per_latent", 4) == factor
    request, carried = read_request(stored)
    request = request.model_copy(update={"model": first.request.model})  # the file does not name folders
    events = generate(request, tmp_path / "again.mp4", pipeline=pipeline_of(factor), carried=carried)
    assert list(events)[-1].kind == "done"
    assert np.array_equal(media.read_video(tmp_path / "again.mp4"), first.frames)


def test_a_model_that_is_taken_for_another_is_refused(tmp_path: Path) -> None:
    request = GenerationRequest(model=model_of(tmp_path / "model", 6), prompt="a cat")
    with pytest.raises(ValueError, match="6 frames to a latent frame, and its VAE makes one of 4: say so in its pusa"):
        list(generate(request, tmp_path / "out.mp4", pipeline=PusaPipeline.from_pretrained("tiny")))
    assert latent_frames(request.resolved(PusaPipeline.from_pretrained("tiny").defaults).frames, 4) == 5
