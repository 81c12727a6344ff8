"""Lengths, places, windows and overlaps follow from the frames of a latent frame: 1, 4 (Wan) or 6 (Mochi)."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pusa
from pusa.defaults import WAN_DEFAULTS, GenerationDefaults
from pusa.positions import frames_of, latent_frames, latent_index_of, nearest_of, spans
from pusa.request import (
    GenerationRequest,
    Position,
    ResolvedRequest,
    default_overlap,
    final_request,
    rounding_notes,
    stored_request,
)
from pusa.request.prompts import story
from pusa.zoo import defaults_of

factors = st.sampled_from([1, 4, 6])
MOCHI = GenerationDefaults(width=848, num_frames=163, fps=30.0, frames_per_latent=6)
PICTURES = GenerationDefaults(width=256, height=256, num_frames=16, fps=8.0, frames_per_latent=1)
VIDEO = {"kind": "video", "file": "a.mp4"}


# ---- positions -------------------------------------------------------------------------------------------------------


@given(factors, st.integers(1, 500))
def test_every_frame_is_in_one_latent_frame_and_only_the_first_is_alone(factor: int, latents: int) -> None:
    frames = frames_of(latents, factor)
    assert latent_frames(frames, factor) == latents
    assert latent_frames(frames + 1, factor) == latents + 1 or factor > 1
    held = [latent_index_of(num_frames=frames, frame_index=frame, factor=factor) for frame in range(min(frames, 60))]
    assert held == [0, *(index for index in range(1, latents) for _ in range(factor))][: len(held)]


@given(factors, st.integers(1, 5000))
def test_a_length_is_rounded_to_the_nearest_that_the_model_makes(factor: int, asked: int) -> None:
    length = nearest_of(asked, factor, 1)
    assert frames_of(latent_frames(length, factor), factor) == length >= 1
    assert abs(length - asked) <= factor / 2
    assert factor > 1 or length == asked


@given(factors, st.integers(2, 60), st.data())
def test_a_place_is_the_same_in_latent_frames_frames_and_seconds(
    factor: int, latents: int, data: st.DataObject
) -> None:
    index, fps = data.draw(st.integers(0, latents - 1)), data.draw(st.sampled_from([8.0, 16.0, 30.0]))
    frames, last = frames_of(latents, factor), frames_of(index + 1, factor) - 1
    texts = [index, index - latents, f"{last}f", f"{last - frames}f", f"{last / fps:.3f}s"]
    assert {Position.parse(text).latent_index(frames, fps, factor) for text in texts} == {index}
    assert Position.parse("last").latent_index(frames, fps, factor) == latents - 1


def test_the_same_second_is_another_latent_frame_of_another_model() -> None:
    for factor, index in ((1, 24), (4, 6), (6, 4)):
        assert Position.parse("1.5s").latent_index(49, 16.0, factor) == index


# ---- requests --------------------------------------------------------------------------------------------------------


@given(factors, st.integers(1, 400), st.integers(1, 400), st.integers(1, 60), st.sampled_from(["generate", "loop"]))
def test_a_resolved_request_has_lengths_of_its_model(
    factor: int, frames: int, window: int, overlap: int, task: str
) -> None:
    asked = {"prompt": "x", "task": task, "frames": frames, "window": window, "seed": 0}
    defaults = replace(WAN_DEFAULTS, frames_per_latent=factor)
    for values in (asked, asked | {"overlap": overlap}):
        request = GenerationRequest.model_validate(values)
        try:
            resolved = request.resolved(defaults)
        except ValueError as error:
            assert "leaves nothing to make" in str(error)  # noqa: PT017
            continue
        lengths = resolved.frames, resolved.window, resolved.overlap
        assert all((length - 1) % factor == 0 for length in lengths)
        total, at_once, kept = (latent_frames(length, factor) for length in lengths)
        assert resolved.bridge_length == (at_once - 2 * kept if task == "loop" else 0)
        assert total > resolved.bridge_length >= 0
        if total > at_once:
            covered = spans(total, at_once, kept)
            assert covered[-1].start + covered[-1].length == total
        notes = rounding_notes(request, resolved)
        assert all(note.endswith(f": it has to be {factor}n + 1") for note in notes)
        assert factor > 1 or not notes


@given(factors, st.integers(1, 400))
def test_the_default_overlap_is_whole_latent_frames_in_half_a_window(factor: int, latents: int) -> None:
    window = frames_of(latents, factor)
    overlap = default_overlap(window, factor, most=13)
    assert (overlap - 1) % factor == 0
    assert 1 <= overlap <= 13
    assert overlap <= max(1, window // 2)
    assert overlap == 13 or latents < 2 * latent_frames(13, factor) + 1


def test_a_model_of_six_frames_to_a_latent_frame() -> None:
    asked = GenerationRequest(prompt="x", frames=160, overlap=12)
    resolved = asked.resolved(MOCHI)
    assert (resolved.frames, resolved.window, resolved.overlap) == (163, 163, 13)
    assert rounding_notes(asked, resolved) == [
        "frames 160 becomes 163: it has to be 6n + 1",
        "overlap 12 becomes 13: it has to be 6n + 1",
    ]
    last = {"file": "a.png", "positions": "27"}
    assert GenerationRequest(prompt="x", conditions=[last]).resolved(MOCHI).frames == 163
    with pytest.raises(ValueError, match=r"latent_index=28: this video has 28 latent frames \(0\.\.27"):
        GenerationRequest(prompt="x", conditions=[last | {"positions": "28"}]).resolved(MOCHI)
    places = [{"file": "a.png", "positions": f"{frame}f"} for frame in (7, 12)]
    with pytest.raises(ValueError, match="both hold latent frame 2"):
        GenerationRequest(prompt="x", conditions=places).resolved(MOCHI)
    with pytest.raises(ValueError, match="leaves nothing to make in 31 frames: give at most 7"):  # 2 + 1 + 2 of 6
        GenerationRequest(prompt="x", task="loop", window=31, overlap=19).resolved(MOCHI)
    noisy = [VIDEO | {"noise": [0.0, 0.1]}]
    with pytest.raises(ValueError, match="2 noise multipliers for an overlap of 13 frames, which is 3 latent frames"):
        GenerationRequest(prompt="x", task="extend", conditions=noisy).resolved(MOCHI)


def test_a_model_whose_latent_frames_are_frames_makes_any_length() -> None:
    for frames in (1, 2, 16, 37):
        asked = GenerationRequest(prompt="x", frames=frames, window=frames)
        assert asked.resolved(PICTURES).frames == frames
        assert rounding_notes(asked, asked.resolved(PICTURES)) == []
    extension = GenerationRequest(prompt="x", task="extend", frames=128, conditions=[VIDEO]).resolved(PICTURES)
    assert (extension.window, extension.overlap) == (16, 8)  # as FVDM's chunks
    assert len(spans(128, 16, 8)) == 15
    assert extension.still_frames == 16  # of a window: the whole video is kept, as far as it reaches


def test_prompts_and_waves_count_in_the_latent_frames_of_the_model() -> None:
    prompts = ["0f: a rocket stands", "48f: a rocket rises"]
    for factor, start in ((1, 48), (4, 12), (6, 8)):
        found = story(prompts, frames=97, fps=16, window=49, overlap=13, factor=factor)
        assert found.starts == (0, start)
    long = {"prompt": "x", "frames": 301, "window": 49, "steps": 12, "schedule": "wave"}
    delays = [GenerationRequest(**long).resolved(replace(MOCHI, frames_per_latent=n)).delay for n in (1, 4, 6)]
    assert delays == [2, 2, 3]  # fewer latent frames in the window: each has to wait longer
    with pytest.raises(ValueError, match="give wave:3 or more"):
        GenerationRequest(**long | {"schedule": "wave:2"}).resolved(MOCHI)


# ---- stored requests -------------------------------------------------------------------------------------------------


def test_a_stored_request_keeps_its_length_and_its_model_decides_anew() -> None:
    resolved = GenerationRequest(prompt="x", task="loop", frames=85, seed=1).resolved(MOCHI)
    stored = json.loads(resolved.model_dump_json())
    assert stored["frames_per_latent"] == 6
    assert ResolvedRequest.model_validate(stored) == resolved
    assert stored_request(stored).resolved(MOCHI) == resolved
    draft = GenerationRequest(prompt="x", draft=True, frames=85).resolved(MOCHI)
    assert final_request(draft, "draft.mp4", MOCHI).resolved(MOCHI).frames == 85


def test_a_request_of_before_is_one_of_wan_and_is_stored_as_before() -> None:
    resolved = GenerationRequest(prompt="x", task="loop", seed=1).resolved(defaults_of("wan2.1-14b"))
    stored = json.loads(resolved.model_dump_json())
    assert "frames_per_latent" not in stored
    assert ResolvedRequest.model_validate(stored) == resolved
    assert (resolved.frames_per_latent, resolved.bridge_length) == (4, 21 - 2 * 4)


def test_no_user_sets_the_frames_of_a_latent_frame() -> None:
    with pytest.raises(ValueError, match="frames_per_latent"):
        GenerationRequest.model_validate({"prompt": "x", "frames_per_latent": 6})


# ---- the house -------------------------------------------------------------------------------------------------------

_TAKE_A_FACTOR = {  # module -> functions, and where in their positional arguments the factor is
    "pusa.positions": {"latent_frames": 2, "frames_of": 2, "latent_index_of": None},
    "pusa.conditions": dict.fromkeys(("latent_indices_of", "place", "multipliers_by_frame", "encode_by_frame")),
    "pusa.long_video": {"chain": None},
}


def silent_calls(source: str) -> list[str]:
    """List the calls that leave the factor to its default, which is Wan's."""
    tree = ast.parse(source)
    names: dict[str, int | None] = {f"long_video.{name}": at for name, at in _TAKE_A_FACTOR["pusa.long_video"].items()}
    for imported in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        functions = _TAKE_A_FACTOR.get(imported.module or "", {})
        names |= {alias.name: functions[alias.name] for alias in imported.names if alias.name in functions}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    return [
        ast.unparse(call)
        for call in calls
        if not any(word.arg in ("factor", None) for word in call.keywords)
        and len(call.args) != names[ast.unparse(call.func)]
    ]


def test_nothing_in_the_package_counts_by_wans_factor_in_silence() -> None:
    start = "from pusa.positions import frames_of\n"
    assert silent_calls(start + "frames_of(3)") == ["frames_of(3)"]
    assert silent_calls(start + "frames_of(3, 6)") == silent_calls(start + "frames_of(3, factor=6)") == []
    folder = Path(pusa.__file__).parent
    sources = {path: path.read_text() for path in folder.rglob("*.py")}
    using = {
        path: text for path, text in sources.items() if any(name in text for name in (*_TAKE_A_FACTOR, "long_video"))
    }
    assert len(using) > 20
    assert {path.name: calls for path, text in using.items() if (calls := silent_calls(text))} == {}
