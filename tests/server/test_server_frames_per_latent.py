"""A server of a model with another number of frames to a latent frame than Wan's four."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_samples import NearProber, clip
from model_folders import describe_model
from server_samples import open_all, quick_settings

from pusa.positions import latent_frames
from pusa.request import GenerationRequest
from pusa.server.errors import ServiceError
from pusa.server.http.to_request import extension_length
from pusa.server.plans import steps_of, tokens_of, windows_of
from pusa.server.service import Upload, VideoService
from pusa.zoo import defaults_of

FACTORS = pytest.mark.parametrize("factor", [1, 6])


def service_of(folder: Path, factor: int) -> VideoService:
    size = {"width": 96, "height": 64, "num_frames": 6 * factor + 1, "frames_per_latent": factor}
    model = describe_model(folder / "model", **size, steps=10)
    settings = quick_settings(folder / "data", model=model, min_free_bytes=0)
    service = VideoService(settings, *open_all(settings))
    service.submitter.prober = NearProber(service.submitter.prober.limits)
    return service


def run(awaitable: Any) -> Any:
    return asyncio.run(awaitable)


@FACTORS
def test_an_edited_video_is_rounded_down_to_what_the_model_makes(factor: int, tmp_path: Path) -> None:
    service = service_of(tmp_path, factor)
    job = run(service.edit([Upload(name="a", path=clip(tmp_path, frames=20))], "in the snow"))
    assert job.request["frames"] == {1: 20, 6: 19}[factor]


@FACTORS
def test_the_second_video_of_a_transition_gives_whole_latent_frames(factor: int, tmp_path: Path) -> None:
    service = service_of(tmp_path, factor)
    first = Upload(name="a", path=clip(tmp_path, frames=20))
    request = {"overlap": factor + 1, "fps": 16.0}
    short = Upload(name="b", path=clip(tmp_path, frames=2 * factor - 1))
    with pytest.raises(ServiceError, match=f"has {2 * factor - 1} frames at 16 fps, {2 * factor} are taken over"):
        run(service.edit([first, short], "it becomes", request=request))
    enough = Upload(name="c", path=clip(tmp_path, frames=2 * factor))
    assert run(service.edit([first, enough], "it becomes", request=request)).request["task"] == "transition"


@FACTORS
def test_an_extension_adds_about_what_was_asked_for(factor: int, tmp_path: Path) -> None:
    defaults = service_of(tmp_path, factor).defaults
    for seconds in (0.1, 0.5, 1, 2, 5):
        length = extension_length(seconds, {}, defaults)
        video = {"kind": "video", "file": "a"}
        resolved = GenerationRequest(task="extend", prompt="x", conditions=[video], **length).resolved(defaults)
        assert resolved.overlap == length["overlap"]
        assert abs(resolved.frames - resolved.overlap - seconds * defaults.fps) <= factor


def test_an_estimate_counts_the_latent_frames_of_the_model() -> None:
    wan = defaults_of("wan2.1-14b")
    asked = {"prompt": "x", "frames": 97, "window": 49, "overlap": 13, "width": 832, "height": 480}
    for factor, windows in ((1, 3), (4, 3), (6, 3)):
        resolved = GenerationRequest(**asked).resolved(replace(wan, frames_per_latent=factor))
        assert tokens_of(resolved, 16) == latent_frames(49, factor) * 30 * 52
        assert windows_of(resolved) == windows
        assert steps_of(resolved) == 10 * windows
        wave = GenerationRequest(**asked, schedule="wave:4").resolved(replace(wan, frames_per_latent=factor))
        assert steps_of(wave) == 10 + 4 * (latent_frames(97, factor) - 1)
