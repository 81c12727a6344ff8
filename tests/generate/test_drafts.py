"""A draft is small and quick; its final follows it frame by frame, keeps what was given, and can be replayed."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pusa import media, zoo
from pusa.conditions import PusaCondition, fit_image, pixels
from pusa.defaults import WAN_DEFAULTS, GenerationDefaults
from pusa.generate import drafts, generate, read_request
from pusa.pipeline import PusaPipeline
from pusa.positions import Span
from pusa.request import FINAL_NOISE, GenerationRequest, final_request
from pusa.scheduler import PusaFlowMatchEulerScheduler

SMALL: dict[str, Any] = {"model": "tiny", "prompt": "a cat", "seed": 0, "width": 32, "height": 32, "steps": 1}


def make(request: GenerationRequest, output: Path, **options: Any) -> np.ndarray:
    assert list(generate(request, output, **options))[-1].kind == "done"
    if output.is_dir():  # of pictures, which no codec changes
        return np.stack([np.asarray(Image.open(file)) for file in sorted(output.iterdir())])
    return media.read_video(output)


def moving_square(path: Path, frames: int, size: int = 32) -> str:
    clip = np.full((frames, size, size, 3), 40, np.uint8)
    for number, frame in enumerate(clip):
        frame[8:20, number % 16 : number % 16 + 10] = (230, 180, 60)
    with media.VideoWriter(path, width=size, height=size, fps=16) as writer:
        writer.write(clip)
    return str(path)


def final_of(draft: Path, **asked: Any) -> GenerationRequest:
    request, _ = read_request(media.read_metadata(draft))
    return final_request(request, str(draft), zoo.defaults_of(request.model), **asked)


# ---- the request -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defaults", "draft", "steps"),
    [
        (WAN_DEFAULTS, (416, 240), 4),
        (zoo.defaults_of("mini"), (80, 80), 4),  # 48 would be mush: docs/speed.md
        (GenerationDefaults(width=1280, height=704, steps=50, size_multiple=32), (640, 352), 20),
    ],
)
def test_a_draft_has_half_the_size_and_few_steps_and_its_final_has_the_models(
    defaults: GenerationDefaults, draft: tuple[int, int], steps: int
) -> None:
    resolved = GenerationRequest(prompt="a cat", draft=True).resolved(defaults)
    assert (resolved.width, resolved.height, resolved.steps) == (*draft, steps)
    again = GenerationRequest.model_validate(resolved.model_dump()).resolved(defaults)  # as a replay does
    assert again == resolved
    final = final_request(resolved, "draft.mp4", defaults).resolved(defaults)
    assert (final.width, final.height) == (defaults.width, defaults.height)
    assert final.steps == round(defaults.steps * FINAL_NOISE)
    assert [(c.kind, c.noise) for c in final.conditions] == [("draft", [FINAL_NOISE])]


def test_values_that_a_user_sets_win() -> None:
    request = GenerationRequest(prompt="a cat", draft=True, width=320, height=640, steps=7).resolved(WAN_DEFAULTS)
    assert (request.width, request.height, request.steps) == (320, 640, 7)
    final = final_request(request, "draft.mp4", WAN_DEFAULTS, noise=0.5, steps=3).resolved(WAN_DEFAULTS)
    assert (final.width, final.height, final.steps, final.conditions[0].noise) == (640, 1280, 3, [0.5])


def test_what_is_no_draft_has_no_final() -> None:
    with pytest.raises(ValueError, match="it is no draft: make one with --draft"):
        final_request(GenerationRequest(prompt="a cat"), "a.mp4", WAN_DEFAULTS)
    with pytest.raises(ValueError, match="task loop has no drafts"):
        GenerationRequest(prompt="a cat", task="loop", draft=True)
    with pytest.raises(ValueError, match="give the final a size"):
        final_request(GenerationRequest(prompt="a", draft=True, width=1280, height=704), "a.mp4", WAN_DEFAULTS)


# ---- the video -------------------------------------------------------------------------------------------------------


def test_a_final_follows_its_draft_and_replays(tmp_path: Path) -> None:
    draft, final = tmp_path / "draft.mp4", tmp_path / "final"
    small = make(GenerationRequest(**SMALL, draft=True), draft)
    frames = make(final_of(draft, noise=0.0, size=(64, 64), steps=1), final)
    pipe = PusaPipeline.from_pretrained("tiny")
    enlarged = pixels([fit_image(frame, 64, 64, "stretch") for frame in small])
    kept = media.to_uint8(torch.cat(list(pipe.decode_stream(pipe.encode_frames(enlarged))), 2))
    assert np.abs(frames.astype(int) - kept).max() <= 1

    free = make(final_of(draft, noise=0.4, size=(64, 64), steps=1), tmp_path / "free")
    assert np.abs(free.astype(int) - kept).max() > 10
    draft.unlink()  # its frames are inside the final
    request, carried = read_request(media.read_metadata(tmp_path / "free"))
    assert (make(request, tmp_path / "again", carried=carried) == free).all()


def test_a_final_of_an_extension_shows_the_video_and_the_new_frames(tmp_path: Path) -> None:
    given = {"kind": "video", "file": moving_square(tmp_path / "in.mp4", 13, 64)}
    asked = {"task": "extend", "frames": 9, "overlap": 5, "conditions": [given], "draft": True}
    draft, final = tmp_path / "draft.mp4", tmp_path / "final.mp4"
    assert len(make(GenerationRequest(**SMALL | asked), draft)) == 17
    _, carried = read_request(media.read_metadata(draft))
    assert media.probe_video(BytesIO(next(iter(carried.values())))).width == 64  # as the final needs it
    assert make(final_of(draft, steps=1), final, carried=carried).shape == (17, 64, 64, 3)


def test_given_frames_win_over_the_draft_in_every_window() -> None:
    draft = drafts.Draft(np.zeros((25, 8, 8, 3), np.uint8), 0.6)  # 7 latent frames
    given = PusaCondition(image=np.zeros((8, 8, 3), np.uint8), latent_index=1)
    condition = drafts.follow(draft, [given], total=7, fps=16, factor=4)
    [first] = condition(Span(0, 4, 0))
    assert (first.latent_index, len(first.video), first.noise_multiplier) == ([0, 2, 3], 13, 0.6)
    [later] = condition(Span(3, 4, 1))
    assert (later.latent_index, len(later.video)) == ([1, 2, 3], 13)
    assert drafts.follow(None, [given], total=7, fps=16, factor=4)(Span(0, 4, 0)) == []


def test_a_final_starts_below_the_boundary_with_the_low_noise_expert() -> None:
    pipe = PusaPipeline.from_pretrained("tiny")
    pipe.register_to_config(boundary_ratio=0.875)
    pipe._set_guidance(3.0, 2.0)
    pipe.scheduler = PusaFlowMatchEulerScheduler(shift=5.0)
    for multipliers, expert in ((None, "transformer"), ([1.0, 0.6], "transformer"), ([0.6, 0.6], "transformer_2")):
        pipe.scheduler.set_timesteps(4, noise_multipliers=multipliers and torch.tensor(multipliers))
        assert pipe._expert(0)[0] == expert
