"""Synthesize clips with the base model: any number of machines and stops gives the same clips."""

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from model_folders import describe_model

from pusa.data.dataset import LatentDataset
from pusa.data.prepare import ClipSettings
from pusa.data.synthesize import SynthesisSettings, synthesize
from pusa.pipeline import PusaPipeline

PROMPTS = ["a fox", "waves on a beach"]
SETTINGS = SynthesisSettings(model="tiny", size=(48, 32), frames=5, steps=2, negative_prompt="blur", seed=7)


def made(output: Path, settings: SynthesisSettings = SETTINGS, **more: Any) -> LatentDataset:
    events = list(synthesize(PROMPTS, output, settings, **more))
    assert events[-1].kind == "done"
    return LatentDataset(events[-1].path or output)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return made(tmp_path_factory.mktemp("whole") / "clips", count=3)


def same(one: LatentDataset, other: LatentDataset) -> bool:
    return one.hash == other.hash and all(torch.equal(one.latents(i), other.latents(i)) for i in range(len(one)))


def test_a_clip_is_plain_text_to_video_of_its_prompt_and_seed(whole):
    pipe = PusaPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    assert len(whole.clips) == 3
    for clip in whole.clips:
        number = int(clip.source.rpartition(" ")[2]) - SETTINGS.seed
        latents = pipe(
            PROMPTS[number % 2],
            "blur",
            width=48,
            height=32,
            num_frames=5,
            num_inference_steps=2,
            guidance_scale=3.0,
            max_sequence_length=64,
            generator=torch.Generator().manual_seed(SETTINGS.seed + number),
            output_type="latent",
        ).frames[0]
        assert clip.caption == PROMPTS[number % 2]
        assert torch.allclose(whole.latents(whole.clips.index(clip)), latents, rtol=0.01, atol=0.01)  # bf16 on disk


def test_prompts_are_used_again_with_other_seeds(whole):
    foxes = [index for index, clip in enumerate(whole.clips) if clip.caption == "a fox"]
    assert len(foxes) == 2
    assert not torch.allclose(*(whole.latents(index) for index in foxes), atol=0.1)
    assert (whole.clips[0].frames, whole.clips[0].width, whole.clips[0].height) == (5, 48, 32)
    assert whole.empty_embeds.shape[0] == 1


def test_parts_on_several_machines_are_the_whole(whole, tmp_path):
    for part in (1, 2):
        made(tmp_path, count=3, part=(part, 2))
    assert same(LatentDataset(tmp_path), whole)


def test_a_stop_loses_the_clip_at_hand_and_no_other(whole, tmp_path):
    stopped = Event()
    for event in synthesize(PROMPTS, tmp_path / "clips", SETTINGS, count=3, stop=stopped.is_set):
        assert event.kind != "done"
        if event.kind == "step" and event.stage == "make clips" and event.step == 3:  # of the second clip
            stopped.set()
    assert len(LatentDataset(tmp_path / "clips")) == 1
    assert same(made(tmp_path / "clips", count=3), whole)


def test_more_clips_are_added_and_none_is_made_again(whole, tmp_path):
    made(tmp_path / "clips", count=2)
    steps = [e.step for e in synthesize(PROMPTS, tmp_path / "clips", SETTINGS, count=3) if e.kind == "step"]
    assert steps == [5, 6]
    assert same(LatentDataset(tmp_path / "clips"), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (50, 32)}, "size 50x32: sides are multiples of 16"),
        ({"frames": 6}, r"frames=6: a clip has 4n \+ 1 frames; give 5"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, SynthesisSettings(model="tiny", **changes))


@pytest.mark.parametrize("factor", [1, 6])
def test_clips_have_the_lengths_that_their_model_makes(factor, tmp_path):
    model = describe_model(tmp_path / "model", width=64, height=64, num_frames=1 + 2 * factor, frames_per_latent=factor)
    assert ClipSettings(model=model).resolved().frames == (1 + 2 * factor,)
    for frames in (1, 1 + 3 * factor):
        assert SynthesisSettings(model=model, frames=frames).resolved().frames == frames
        assert ClipSettings(model=model, frames=(frames,)).resolved().frames == (frames,)
    wrong, message = {1: (-1, "1 or more frames; give 1"), 6: (17, r"6n \+ 1 frames; give 19")}[factor]
    with pytest.raises(ValueError, match=f"frames={wrong}: a clip has {message}"):
        SynthesisSettings(model=model, frames=wrong).resolved()
    with pytest.raises(ValueError, match=f"frames={wrong}: a clip has {message}"):
        ClipSettings(model=model, frames=(wrong,))


def test_wan_is_guided_as_its_authors_do_and_a_model_of_the_package_as_it_is_made_for():
    assert SynthesisSettings(model="wan2.1-14b").resolved().guidance == 5.0
    assert SynthesisSettings(model="tiny").resolved().guidance == 3.0
    assert SynthesisSettings(model="tiny", guidance=2).resolved().guidance == 2


def test_a_part_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="part 3/2: the first number is 1 to 2"):
        synthesize(PROMPTS, tmp_path, SETTINGS, part=(3, 2))
