"""Waves and stories by the random-weight model: every task, frames shown while later ones are made, prompts in turn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pusa import media
from pusa.events import Event, Frames, Note, Resolved, Stage, Step
from pusa.generate import generate, read_request
from pusa.pipeline import PusaPipeline
from pusa.request import GenerationRequest
from pusa.scheduler import wave_sigmas

SMALL = {"model": "tiny", "prompt": "a cat", "seed": 3, "steps": 2, "width": 48, "height": 32, "frames": 17}


def run(
    output: Path, *, pipeline: PusaPipeline | None = None, growing: Path | None = None, **asked: Any
) -> list[Event]:
    request = GenerationRequest(**{**SMALL, **asked})
    return list(generate(request, output, pipeline=pipeline, growing=growing))


@pytest.fixture
def clip(tmp_path: Path) -> dict[str, Any]:
    """Write a short video of a user; return it as a condition that is kept exactly."""
    pictures = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), np.uint8)
    with media.VideoWriter(tmp_path / "clip.mp4", width=48, height=32) as writer:
        writer.write(pictures)
    return {"kind": "video", "file": str(tmp_path / "clip.mp4"), "noise": [0.0]}


class Recorded(PusaPipeline):
    """Record the prompts, by their first embedding, and the tables of its calls."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((kwargs["prompt_embeds"], kwargs.get("frame_sigmas"), kwargs["num_frames"]))
        return super().__call__(*args, **kwargs)


def recorded() -> Recorded:
    pipe = PusaPipeline.from_pretrained("tiny")
    pipe.__class__ = Recorded
    pipe.calls = []
    return pipe


@pytest.mark.parametrize(
    ("asked", "frames", "steps"),
    [
        ({"schedule": "wave:2"}, 17, 2 + 4 * 2),
        ({"schedule": "wave:1", "task": "extend", "conditions": 1, "overlap": 5}, 20 + 12, 2 + 2),
        ({"schedule": "wave:1", "task": "transition", "conditions": 2, "overlap": 5}, 20 + 4 + 20, 2),
        ({"schedule": "wave:1", "task": "loop", "overlap": 5}, 17, (2 + 3) + 2),
        ({"schedule": "wave:1", "frames": 41, "overlap": 5}, 41, 2 + 10),
        ({"schedule": "wave:1", "frames": 41, "overlap": 5, "task": "extend", "conditions": 1}, 20 + 36, 2 + 8),
    ],
)
def test_each_task_can_be_a_wave(asked, frames, steps, clip, tmp_path):
    asked["conditions"] = [clip] * asked.get("conditions", 0)
    events = run(tmp_path / "out.mp4", **asked)
    assert media.probe_video(tmp_path / "out.mp4").frames == frames
    told = [event for event in events if isinstance(event, Step) and event.stage == "denoise"]
    assert [event.step for event in told] == list(range(1, steps + 1))
    assert {event.steps for event in told} == {steps}


def test_a_wave_is_the_call_of_the_pipeline_by_its_table(tmp_path):
    pipe = PusaPipeline.from_pretrained("tiny")
    events = run(tmp_path / "%04d.png", pipeline=pipe, schedule="wave:2", exact=True)
    [resolved] = [event.request for event in events if isinstance(event, Resolved)]
    frames = pipe(
        "a cat", resolved["negative_prompt"], 32, 48, 17, guidance_scale=resolved["guidance"],
        frame_sigmas=wave_sigmas(5, 2, delay=2, shift=pipe.scheduler.config.shift),
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).frames  # fmt: skip
    own = media.to_uint8(torch.cat(list(pipe.decode_stream(frames)), 2))
    shown = np.stack([np.asarray(Image.open(file)) for file in sorted(tmp_path.glob("*.png"))])
    assert np.array_equal(shown, own)


def test_a_long_wave_keeps_a_picture_in_its_later_part(tmp_path, clip):
    kept = {**clip, "kind": "image", "file": str(tmp_path / "cat.png"), "positions": ["last"], "encode": "single"}
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)).save(tmp_path / "cat.png")
    pipe = recorded()
    run(tmp_path / "out.mp4", pipeline=pipe, schedule="wave:1", frames=41, overlap=5, conditions=[kept])
    *others, (_, table, frames) = pipe.calls
    assert others
    assert frames == 17  # memory is that of a window
    assert table[:, -1].tolist() == [0.0] * len(table)
    assert all(bool(table[0, -1] > 0) for _, table, _ in others)


def test_frames_are_shown_while_later_ones_are_made(tmp_path):
    growing, seen = tmp_path / "part.mp4", []
    request = GenerationRequest(**{**SMALL, "schedule": "wave:2"})
    stages = []
    for event in generate(request, tmp_path / "out.mp4", growing=growing):
        if isinstance(event, Frames):
            assert (event.path, event.total) == (growing, 17)
            seen.append(event.done)
            if 1 < event.done < 17 and growing.exists():  # a run is ahead of its events
                assert len(media.read_video(growing)) >= event.done - 1
        stages += [event.stage] if isinstance(event, Stage) else []
    assert seen == [1, 5, 9, 13, 17]
    assert stages[stages.index("denoise") :] == ["denoise", "decode"] * 5
    assert not growing.exists()
    assert media.probe_video(tmp_path / "out.mp4").frames == 17


def test_a_growing_file_that_cannot_be_written_is_a_note(tmp_path):
    (tmp_path / "part.mp4").write_text("mine")
    events = run(tmp_path / "out.mp4", growing=tmp_path / "part.mp4", schedule="wave:2")
    assert any("part.mp4 is there already" in event.message for event in events if isinstance(event, Note))
    assert (tmp_path / "part.mp4").read_text() == "mine"
    assert events[-1].kind == "done"


def test_a_smaller_plan_in_the_middle_of_a_wave_changes_nothing(tmp_path, monkeypatch):
    from pusa.generate.tasks import Tasks

    whole, again = tmp_path / "whole.mp4", tmp_path / "again.mp4"
    run(whole, schedule="wave:1")
    plan = Tasks.plan

    def plan_and_suspend(tasks: Tasks) -> Any:
        found = plan(tasks)
        inner = found.pieces

        def pieces() -> Any:
            for piece in inner:
                yield piece
                tasks.take_smaller_plan("decoding")

        found.pieces = pieces()
        return found

    monkeypatch.setattr(Tasks, "plan", plan_and_suspend)
    run(again, schedule="wave:1")
    assert again.read_bytes() == whole.read_bytes()


def test_each_window_has_the_prompt_that_is_in_force(tmp_path):
    lines = ["0s: a cat stands", "2s: a cat spins"]
    pipe = recorded()
    events = run(tmp_path / "out.mp4", pipeline=pipe, frames=41, overlap=5, prompts=lines, prompt="")
    run(tmp_path / "other.mp4", pipeline=pipe, prompt="a cat spins")
    first, second, third, other = [embeds for embeds, *_ in pipe.calls]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(third, other)
    request, _ = read_request(media.read_metadata(tmp_path / "out.mp4"))
    assert request.prompts == lines
    assert request.prompt == "a cat stands"
    assert events[-1].kind == "done"
