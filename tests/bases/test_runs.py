"""Run every base from its folder: resumed, replayed, decoded later, previewed; and from the command line."""

import json
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import made_by, pusa
from PIL import Image
from safetensors.torch import load_file
from studied_bases import NOT_WAN, Studied

from pusa import media
from pusa.events import Event
from pusa.generate import generate, read_request
from pusa.models.bases import defaults_in
from pusa.models.vae import DecodeError
from pusa.request import GenerationRequest

pytestmark = NOT_WAN


def image(studied: Studied, position: Any = 0, noise: float = 0.3) -> dict[str, Any]:
    return {"file": str(studied.pictures[0]), "positions": position, "noise": noise}


def made(request: GenerationRequest, output: Path, **options: Any) -> tuple[bytes, list[Event]]:
    events = list(generate(request, output, **options))
    assert events[-1].kind == "done"
    return output.read_bytes(), events


def cut_short(request: GenerationRequest, output: Path, checkpoint: Path, step: int) -> None:
    """End a run after a step, from which nothing is left but its checkpoint."""
    ended = threading.Event()
    for event in generate(request, output, stop=ended.is_set, checkpoint=checkpoint, checkpoint_every=1):
        if event.kind == "step" and event.stage == "denoise" and event.step == step:
            ended.set()
    assert checkpoint.is_file()
    assert not output.exists()


@pytest.mark.parametrize("schedule", ["even", "wave"])
def test_a_run_that_was_ended_goes_on_to_the_same_video(schedule: str, studied: Studied, tmp_path: Path) -> None:
    """End it in the second window of a long video, or in the middle of a wave; it begins with a noisy picture."""
    lengths = {"frames": studied.length(8), "window": studied.length(5), "overlap": studied.length(2)}
    asked = {**studied.request, **lengths, "conditions": [image(studied)], "schedule": schedule, "steps": 5}
    request = GenerationRequest(**asked)
    whole, _ = made(request, tmp_path / "whole.mp4")
    kept = tmp_path / "run.safetensors"
    cut_short(request, tmp_path / "again.mp4", kept, 6)
    again, events = made(request, tmp_path / "again.mp4", checkpoint=kept)
    assert again == whole
    assert all(event.step > 5 for event in events if event.kind == "step" and event.stage == "denoise")


def test_a_video_makes_itself_again_and_shows_itself_before(studied: Studied, tmp_path: Path) -> None:
    request = GenerationRequest(**studied.request, conditions=[image(studied)])
    first, events = made(request, tmp_path / "first.mp4", preview_every=1)
    previews = [event.image for event in events if event.kind == "preview"]
    assert len(previews) == request.steps
    assert {Image.open(BytesIO(preview)).size for preview in previews} == {(studied.base.side, studied.base.side)}
    stored, carried = read_request(media.read_metadata(tmp_path / "first.mp4"))
    assert stored.model == studied.folder.name  # a video does not tell folders
    stored = stored.model_copy(update={"model": str(studied.folder)})
    again, _ = made(stored, tmp_path / "again.mp4", carried=carried)
    assert again == first


def test_latents_that_were_not_decoded_are_decoded_later(
    studied: Studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerationRequest(**studied.request)
    made(request, tmp_path / "whole.mp4")

    def fail(*_: Any) -> Any:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(media.VideoWriter, "write", fail)
        with pytest.raises(DecodeError, match="pusa decode"):
            list(generate(request, tmp_path / "late.mp4"))
    latents = tmp_path / "late.latents.safetensors"
    assert load_file(latents)["latents"].shape[2] == studied.base.latents
    decoded = made_by("decode", latents, "--model", studied.folder, output=tmp_path / "late.mp4")
    assert np.array_equal(decoded, media.read_video(tmp_path / "whole.mp4"))


def test_the_command_line_makes_describes_and_plans(studied: Studied, tmp_path: Path) -> None:
    video, side = tmp_path / "a.mp4", studied.base.side
    frames = studied.length(3)
    size = ("--size", f"{side}x{side}", "--frames", frames, "--steps", 2, "--seed", 0, "--json", "-o", video)
    prompt = [studied.base.prompt] if studied.base.prompt else []
    run = pusa("generate", *prompt, "--model", studied.folder, "--image", studied.pictures[0], *size)
    assert run.exit_code == 0, run.output
    events = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert events[-1] == {"kind": "done", "path": str(video)}
    resolved = next(event["request"] for event in events if event["kind"] == "resolved")
    assert resolved["frames"] == frames == len(media.read_video(video))
    assert f'"frames_per_latent": {studied.base.factor}' in json.dumps(resolved) or studied.base.factor == 4
    told = json.loads(pusa("info", video, "--json").stdout)
    assert told["request"]["model"] == studied.folder.name
    for command in ("info", ("models", "show")):
        facts = pusa(*([command] if isinstance(command, str) else command), studied.folder)
        assert facts.exit_code == 0, facts.output
        assert f"({studied.pipe.base.name})" in facts.stdout
    planned = pusa("plan", studied.folder, "--gpu-gb", 24, "--ram-gb", 64, "--json")
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout.splitlines()[-1])["plans"][0]
    assert plan["problem"] == ""
    assert ("text_encoder" in plan["parts"]) == studied.pipe.base.has_text


def test_a_model_is_converted_to_16_bits_and_makes_a_video(studied: Studied, tmp_path: Path) -> None:
    done = pusa("models", "convert", studied.folder, tmp_path / "in-bf16")
    assert done.exit_code == 0, done.output
    assert defaults_in(tmp_path / "in-bf16") == defaults_in(studied.folder) == studied.pipe.defaults
    request = GenerationRequest(**{**studied.request, "model": str(tmp_path / "in-bf16"), "frames": studied.length(2)})
    made(request, tmp_path / "a.mp4")
