"""A run that was cut short goes on from its checkpoint, and its video is the same to the byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pusa import media
from pusa.events import Event
from pusa.generate import generate
from pusa.generate.checkpoint import DenoisingCheckpoint, request_key
from pusa.pipeline import PusaPipeline
from pusa.request import GenerationRequest, ResolvedRequest
from pusa.zoo import defaults_of

SMALL = {"model": "tiny", "prompt": "a cat", "seed": 3, "steps": 4, "width": 48, "height": 32, "frames": 9}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """An image and a video of a user, as conditions."""
    folder = tmp_path_factory.mktemp("given")
    pictures = np.random.default_rng(0).integers(0, 256, (12, 32, 48, 3), np.uint8)
    Image.fromarray(pictures[0]).save(folder / "cat.png")
    with media.VideoWriter(folder / "clip.mp4", width=48, height=32) as writer:
        writer.write(pictures)
    return {
        "image": {"kind": "image", "file": str(folder / "cat.png")},
        "video": {"kind": "video", "file": str(folder / "clip.mp4")},
    }


def request(**asked: Any) -> GenerationRequest:
    return GenerationRequest(**{**SMALL, **asked})


def made(asked: GenerationRequest, output: Path, **options: Any) -> tuple[bytes, list[Event]]:
    events = list(generate(asked, output, **options))
    assert events[-1].kind == "done"
    return output.read_bytes(), events


def cut_short(asked: GenerationRequest, output: Path, checkpoint: Path, is_the_end: Callable[[Any], bool]) -> None:
    """Run until an event after which nothing more is heard of it."""
    ended = False

    def stop() -> bool:
        return ended

    for event in generate(asked, output, stop=stop, checkpoint=checkpoint, checkpoint_every=2):
        ended = ended or is_the_end(event)
    assert ended
    assert not output.exists()
    assert checkpoint.is_file()


def after_steps(count: int) -> Callable[[Event], bool]:
    return lambda event: event.kind == "step" and event.step == count


def when_decoding(event: Event) -> bool:
    return event.kind == "stage" and event.stage == "decode"


# What is asked for, the step after which the run ends, and the one after which it goes on. Frames that are kept as they
# are, as the overlap of a continuation, are left out of steps: only before those that compute all can a run go on.
TASKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "text": ({}, 2, 2),
    "image": ({"conditions": ["image"]}, 3, 2),
    "extension": ({"task": "extend", "conditions": ["video"], "overlap": 5, "steps": 8}, 6, 5),
    "extension, exact": ({"task": "extend", "conditions": ["video"], "overlap": 5, "exact": True}, 2, 2),
    "transition": ({"task": "transition", "conditions": ["video", "video"], "overlap": 1, "steps": 8}, 7, 7),
    "loop, in its clip": ({"task": "loop", "frames": 17, "window": 17, "overlap": 5}, 3, 2),
    "loop, in its bridge": ({"task": "loop", "frames": 17, "window": 17, "overlap": 5}, 7, 7),
    "long, in its second window": ({"frames": 21, "window": 9, "overlap": 1}, 6, 4),
    "long, between windows": ({"frames": 21, "window": 9, "overlap": 1}, 4, 4),
    "long, in its last window": ({"frames": 21, "window": 9, "overlap": 1, "conditions": ["image"]}, 10, 8),
    "long with a step cache, in its second window": (  # no window ends at a fourth step
        {"frames": 21, "window": 9, "overlap": 1, "steps": 6, "step_cache": "first_block"},
        8,
        6,
    ),
    "wave": ({"schedule": "wave:2", "conditions": ["image"]}, 7, 4),
    "wave of a loop": ({"task": "loop", "frames": 17, "window": 17, "overlap": 5, "schedule": "wave:1"}, 8, 7),
    "long wave, in its first turn": (
        {"frames": 29, "window": 17, "overlap": 1, "schedule": "wave:2", "exact": True},
        4,
        4,
    ),
    "long wave, in a later turn": ({"frames": 29, "window": 17, "overlap": 1, "schedule": "wave:2"}, 12, 8),
}


@pytest.mark.parametrize("name", TASKS)
def test_what_goes_on_from_a_checkpoint_is_the_same_to_the_byte(name, given, tmp_path):
    asked, step, reached = TASKS[name]
    asked = request(**{**asked, "conditions": [given[kind] for kind in asked.get("conditions", [])]})
    whole, _ = made(asked, tmp_path / "whole.mp4")
    kept = tmp_path / "run.safetensors"
    cut_short(asked, tmp_path / "again.mp4", kept, after_steps(step))
    again, events = made(asked, tmp_path / "again.mp4", checkpoint=kept)
    assert again == whole
    # Nothing that the checkpoint has is denoised again (it may have more: a run is ahead of its events).
    assert all(event.step > reached for event in events if event.kind == "step")
    assert not kept.exists()


def test_a_run_that_ended_while_decoding_denoises_nothing_again(tmp_path, monkeypatch):
    whole, _ = made(request(), tmp_path / "whole.mp4")
    kept = tmp_path / "run.safetensors"
    cut_short(request(), tmp_path / "again.mp4", kept, when_decoding)

    def must_not_run(*_: Any, **__: Any) -> None:
        raise AssertionError("the denoising loop ran")

    monkeypatch.setattr(PusaPipeline, "__call__", must_not_run)
    assert made(request(), tmp_path / "again.mp4", checkpoint=kept)[0] == whole


def test_a_drawn_seed_is_reported_and_the_reported_request_resumes(tmp_path):
    kept = tmp_path / "run.safetensors"
    told: list[ResolvedRequest] = []

    def end(event: Event) -> bool:
        told.extend([ResolvedRequest.model_validate(event.request)] if event.kind == "resolved" else [])
        return after_steps(2)(event)

    cut_short(request(seed=None), tmp_path / "out.mp4", kept, end)
    assert told[0].seed is not None
    whole, _ = made(told[0], tmp_path / "whole.mp4")
    again, events = made(told[0], tmp_path / "again.mp4", checkpoint=kept)
    assert again == whole
    assert {event.step for event in events if event.kind == "step"} <= {3, 4}


@pytest.mark.parametrize("other", [{"seed": 4}, {"prompt": "a dog"}, {"steps": 5}, {"conditions": ["image"]}])
def test_the_checkpoint_of_another_request_is_ignored_with_a_note(other, given, tmp_path):
    kept = tmp_path / "run.safetensors"
    cut_short(request(), tmp_path / "out.mp4", kept, after_steps(2))
    asked = request(**{**other, "conditions": [given[kind] for kind in other.get("conditions", [])]})
    whole, _ = made(asked, tmp_path / "whole.mp4")
    again, events = made(asked, tmp_path / "again.mp4", checkpoint=kept)
    assert again == whole
    notes = [event.message for event in events if event.kind == "note"]
    assert "run.safetensors is the checkpoint of another request: starting from the beginning" in notes


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_ignored_with_a_note(damage, tmp_path):
    kept = tmp_path / "run.safetensors"
    cut_short(request(), tmp_path / "out.mp4", kept, after_steps(2))
    kept.write_bytes(kept.read_bytes()[:-100] if damage is None else damage)
    whole, _ = made(request(), tmp_path / "whole.mp4")
    again, events = made(request(), tmp_path / "again.mp4", checkpoint=kept)
    assert again == whole
    (note,) = [event.message for event in events if event.kind == "note"]
    assert note is not None
    assert note.startswith("run.safetensors cannot be read as a checkpoint")


def test_the_key_of_a_request_does_not_depend_on_where_its_files_are():
    asked = request(conditions=[{"file": "cat.png", "sha256": "0" * 64}]).resolved(defaults_of("tiny"))
    (spec,) = asked.conditions
    elsewhere = asked.model_copy(update={"conditions": [spec.model_copy(update={"file": "inputs/1/0.png"})]})
    changed = asked.model_copy(update={"conditions": [spec.model_copy(update={"sha256": "1" * 64})]})
    assert request_key(elsewhere) == request_key(asked) != request_key(changed)


def test_it_is_written_every_few_steps_and_after_the_last_of_each_window(tmp_path):
    asked = request(steps=5, frames=13, window=9, overlap=1)
    _, events = made(asked, tmp_path / "out.mp4", checkpoint=tmp_path / "run.safetensors", checkpoint_every=2)
    steps = [event.step for event in events if event.kind == "checkpoint"]
    assert steps == [2, 4, 5, 9, 10]  # the second window leaves its overlap out but in its first and its last step


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    asked = request().resolved(defaults_of("tiny"))
    kept = DenoisingCheckpoint(tmp_path / "run.safetensors", asked, every=2)
    generator = torch.Generator().manual_seed(0)
    assert kept.save(0, torch.ones(1, 16, 3, 4, 6), 2, 4, generator)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError):
        kept.save(0, torch.zeros(1, 16, 3, 4, 6), 4, 4, generator)
    again = DenoisingCheckpoint(tmp_path / "run.safetensors", asked, every=2)
    assert again.read() is None
    latents, step = again.resume(0, 4)
    assert step == 2
    assert latents is not None
    assert torch.equal(latents, torch.ones(1, 16, 3, 4, 6))


def test_a_checkpoint_every_zero_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every=0 is below 1"):
        DenoisingCheckpoint(tmp_path / "run", request().resolved(defaults_of("tiny")), every=0)
