"""A request is checked in one place, in words a person understands, and survives being stored."""

import json
import re
import string
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pusa.defaults import FastSettings
from pusa.fields import shown
from pusa.positions import spans
from pusa.request import (
    PRESETS,
    ConditionSpec,
    GenerationRequest,
    Position,
    ResolvedRequest,
    explain,
    field_specs,
    rounding_notes,
)
from pusa.zoo import GenerationDefaults, defaults_of

WAN = GenerationDefaults(steps=10, guidance=3.0, alpha=1.4, negative_prompt="blur")
WAN22 = replace(WAN, alpha={"transformer": 1.5, "transformer_2": 1.4})


def error_of(**values: object) -> str:
    with pytest.raises(ValidationError) as caught:
        GenerationRequest(**values)
    return explain(caught.value)


# --- positions


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        (3, "latent", 3),
        ("3", "latent", 3),
        (-2, "latent", -2),
        ("last", "latent", -1),
        (" LAST ", "latent", -1),
        ("80f", "frame", 80),
        ("-1f", "frame", -1),
        ("1.5s", "second", 1.5),
        ("2s", "second", 2.0),
        ("-0.25s", "second", -0.25),
    ],
)
def test_a_position_is_a_latent_frame_a_frame_a_time_or_last(text, unit, value):
    position = Position.parse(text)
    assert (position.unit, position.value) == (unit, value)
    assert Position.parse(str(position)) == position


@pytest.mark.parametrize(
    "text", ["", "x", "1.5", "1.5f", "f", "s", "--1", "1e3", "1 2", "٣", "9" * 50, 10**100, 1.0, True, None, [1]]
)
def test_anything_else_is_no_position(text):
    with pytest.raises(ValueError, match="is not understood: write a latent frame"):
        Position.parse(text)


@pytest.mark.parametrize(
    ("text", "index"),
    [(0, 0), (20, 20), ("last", 20), (-21, 0), ("0f", 0), ("1f", 1), ("4f", 1), ("5f", 2), ("80f", 20), ("-1f", 20),
     ("0s", 0), ("1.5s", 6), ("5s", 20), ("-1s", 17)],
)  # fmt: skip
def test_81_frames_are_latent_frames_0_to_20(text, index):
    assert Position.parse(text).latent_index(81, 16.0, 4) == index


@pytest.mark.parametrize("text", [21, -22, "81f", "-82f", "6s"])
def test_a_position_outside_the_video_is_refused_with_the_limits(text):
    with pytest.raises(ValueError, match=r"this video (has|is)"):
        Position.parse(text).latent_index(81, 16.0, 4)


def test_a_position_is_the_argument_of_a_condition():
    assert [Position.parse(p).place() for p in ("last", "80f", "1.5s")] == [
        {"latent_index": -1},
        {"frame_index": 80},
        {"seconds": 1.5},
    ]


# --- validation


@pytest.mark.parametrize(
    "field",
    [field for field in field_specs(GenerationRequest) if field.minimum is not None],
    ids=lambda field: field.name,
)
def test_every_range_includes_its_limits_and_nothing_beyond(field):
    for value in (field.minimum, field.maximum):
        assert getattr(GenerationRequest(prompt="x", **{field.name: value}), field.name) == value
    for value in (field.minimum - 1, field.maximum + 1):
        way_out = f": leave it out: {field.unset}" if value == -1 else ""
        assert error_of(prompt="x", **{field.name: value}) == f"{field.name}={value} is outside {field.range}{way_out}"


@pytest.mark.parametrize(
    "field", list(field_specs(GenerationRequest)) + list(field_specs(ConditionSpec)), ids=lambda field: field.name
)
def test_every_field_says_in_one_sentence_what_it_is(field):
    assert re.fullmatch(r"[A-Z].*\.", field.help)
    assert "\n" not in field.help
    assert (field.minimum is None) == (field.maximum is None)


def test_numbers_have_a_range_and_choices_are_listed():
    table = {field.name: field for field in field_specs(GenerationRequest)}
    assert all(k.range for k in table.values() if k.type in ("integer", "number"))
    assert table["preset"].choices == tuple(PRESETS)
    assert (table["steps"].range, table["alpha"].range) == ("1..200", "0.1..5")
    assert (table["width"].unit, table["model"].default, table["lora"].type) == ("pixels", "mini", "list")
    assert "conditions" not in table


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "ten"}, "steps='ten' is not a whole number"),
        ({"steps": 10.5}, "steps=10.5 is not a whole number"),
        ({"steps": True}, "steps=True is not a whole number"),
        ({"steps": 10**5000}, "steps=(a number of 16610 bits) is outside 1..200"),
        ({"alpha": float("nan")}, "alpha=nan is not a number"),
        ({"alpha": float("inf")}, "alpha=inf is not a number"),
        ({"guidance": "3"}, "guidance='3' is not a number"),
        ({"preset": "wild"}, "preset='wild' is none of faithful, balanced, creative"),
        ({"stpes": 3}, "'stpes' is unknown: did you mean steps?"),
        ({"lora": "a.safetensors"}, "lora='a.safetensors' is not a list"),
        ({"model": ""}, "model is empty: give something, or leave it out"),
        ({"negative_prompt": 3}, "negative_prompt=3 is not text"),
        ({"model": "m" * 5000}, "model has a length of 5000: the limit is 4096"),
        ({"prompt": "a\0b"}, r"'a\x00b' has a character that is not valid text: type it again"),
        ({"prompt": "\ud800"}, r"'\ud800' has a character that is not valid text: type it again"),
        ({"conditions": {"file": "a"}}, "conditions={'file': 'a'} is not a list"),
        ({"conditions": [3]}, "condition 1: 3 is not a set of named values"),
        ({"conditions": [{}]}, "condition 1: file is missing"),
        ({"conditions": [{"file": "a", "noise": 1.3}]}, "condition 1: noise=1.3 is outside 0..1"),
        ({"conditions": [{"file": "a", "noise": []}]}, "condition 1: noise is empty: give something, or leave it out"),
        ({"conditions": [{"file": "a", "fit": "zoom"}]}, "condition 1: fit='zoom' is none of crop, letterbox, stretch"),
        (
            {"conditions": [{"file": "a"}, {"file": "b", "positions": [1, 2]}]},
            "condition 2: an image has one position, not 2: add the image once for each",
        ),
        (
            {"conditions": [{"file": "a", "kind": "video", "positions": [0, 1, 2], "noise": [0, 0.5]}]},
            "condition 1: 2 noise multipliers for 3 positions: give one for all or one for each",
        ),
        (
            {"conditions": [{"file": "a", "kind": "video", "positions": ["last", 3, -1]}]},
            "condition 1: position last is given twice",
        ),
        ({"task": "extend"}, "task extend takes 1 video, not 0"),
        ({"task": "loop", "conditions": [{"kind": "video", "file": "a"}]}, "task loop takes 0 videos, not 1"),
    ],
)
def test_an_error_is_one_line_with_the_value_and_the_limit(values, message):
    assert error_of(**{"prompt": "x", **values}) == message


def test_all_errors_are_reported_at_once():
    assert error_of(prompt="x", steps=0, alpha=9.0).splitlines() == [
        "steps=0 is outside 1..200",
        "alpha=9.0 is outside 0.1..5",
    ]


def test_one_number_stands_for_a_list():
    spec = ConditionSpec(file="a.png", positions="1.5s", noise=0.3)
    assert (spec.positions, spec.noise) == ([Position("second", 1.5)], [0.3])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"x"', '{"prompt": "x", "steps": 1e999}', '{"prompt": "\\ud800"}']
)
def test_malformed_json_is_explained_in_one_line(text):
    with pytest.raises(ValidationError) as caught:
        GenerationRequest.model_validate_json(text)
    assert len(explain(caught.value).splitlines()) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*GenerationRequest.model_fields, "other"]), JSON, max_size=5))
def test_nothing_but_a_validation_error_comes_of_bad_input(values):
    errors = []
    try:
        GenerationRequest(**values)
    except ValidationError as error:
        errors = error.errors()
        lines = explain(error).splitlines()
    if errors:
        assert len(lines) == len(errors)
        assert all(0 < len(line) < 500 for line in lines)


@given(JSON)
@settings(max_examples=200, deadline=None)
def test_a_shown_value_is_short_and_printable(value):
    assert len(shown(value)) <= 60
    assert shown(value).isprintable()


def test_the_schema_has_types_ranges_units_and_help_for_every_field():
    schema = GenerationRequest.model_json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert all(field["description"] for field in schema["properties"].values())
    steps = schema["properties"]["steps"]
    assert {"type": "integer", "minimum": 1, "maximum": 200} in steps["anyOf"]
    assert schema["properties"]["frames"]["unit"] == "frames"
    position = schema["$defs"]["ConditionSpec"]["properties"]["positions"]["items"]
    assert re.match(position["anyOf"][1]["pattern"], "1.5s")


# --- resolving


def requests() -> st.SearchStrategy[GenerationRequest]:
    text = st.text(string.printable + "äß狐🦊", min_size=1, max_size=20).filter(str.strip)
    place = st.sampled_from([0, 2, -1, "last", "5f", "0.5s"])
    image = st.builds(
        ConditionSpec,
        file=text,
        positions=place,
        noise=st.none() | st.floats(0, 1),
        fit=st.sampled_from(["crop", "stretch"]),
    )
    return st.builds(
        GenerationRequest,
        prompt=text,
        negative_prompt=st.none() | text,
        conditions=st.lists(image, max_size=1),
        preset=st.sampled_from(list(PRESETS)),
        width=st.none() | st.integers(16, 2048),
        height=st.none() | st.integers(16, 2048),
        frames=st.none() | st.integers(33, 400),
        window=st.none() | st.integers(5, 400),
        fps=st.none() | st.floats(8, 60),
        steps=st.none() | st.integers(1, 200),
        alpha=st.none() | st.floats(0.1, 5),
        lora=st.lists(text, max_size=2),
        seed=st.none() | st.integers(0, 2**63 - 1),
    )


@settings(max_examples=150, deadline=None)
@given(requests(), st.sampled_from([WAN, WAN22]))
def test_a_resolved_request_is_complete_stays_the_same_and_survives_json(request_, defaults):
    resolved = request_.resolved(defaults)
    open_fields = {name for name, value in resolved if value is None}
    assert open_fields <= {"guidance_2", "alpha_2"}
    assert all(c.noise is not None and c.positions for c in resolved.conditions)
    assert resolved.resolved(defaults) == resolved
    assert GenerationRequest.model_validate_json(resolved.model_dump_json()).resolved(defaults) == resolved
    assert ResolvedRequest.model_validate(resolved.model_dump()) == resolved
    assert resolved.width % 16 == resolved.height % 16 == 0
    assert resolved.frames % 4 == resolved.window % 4 == resolved.overlap % 4 == 1
    assert rounding_notes(resolved, resolved) == []


def test_what_is_still_open_is_no_resolved_request():
    resolved = GenerationRequest(prompt="x", conditions=[{"file": "a.png"}]).resolved(WAN).model_dump()
    with pytest.raises(ValidationError) as refused:
        ResolvedRequest.model_validate({**resolved, "alpha": None, "seed": None})
    assert explain(refused.value) == "a resolved request has no alpha, seed: resolve the request it was made from"
    for name in ("noise", "encode"):
        [condition] = resolved["conditions"]
        with pytest.raises(ValidationError):
            ResolvedRequest.model_validate({**resolved, "conditions": [{**condition, name: None}]})


def test_explicit_values_win_over_the_preset_and_the_model():
    asked = GenerationRequest(prompt="x", preset="creative", alpha=1.7, steps=4, negative_prompt="", seed=0)
    resolved = asked.resolved(WAN)
    assert (resolved.alpha, resolved.steps, resolved.negative_prompt, resolved.seed) == (1.7, 4, "", 0)
    assert (resolved.width, resolved.frames, resolved.fps, resolved.guidance) == (832, 81, 16.0, 3.0)
    assert GenerationRequest(prompt="x").resolved(WAN).negative_prompt == "blur"


@pytest.mark.parametrize(
    ("preset", "noise", "alpha"), [("faithful", 0.0, 1.5), ("balanced", 0.2, 1.4), ("creative", 0.4, 1.3)]
)
def test_a_preset_is_noise_and_a_distance_from_the_models_alpha(preset, noise, alpha):
    resolved = GenerationRequest(prompt="x", preset=preset, conditions=[{"file": "a.png"}]).resolved(WAN)
    assert resolved.conditions[0].noise == [noise]
    assert resolved.alpha == alpha


def test_each_expert_of_wan22_has_an_alpha():
    assert [
        GenerationRequest(prompt="x").resolved(WAN22).alpha,
        GenerationRequest(prompt="x").resolved(WAN22).alpha_2,
    ] == [1.5, 1.4]
    one_for_both = GenerationRequest(prompt="x", alpha=1.2).resolved(WAN22)
    assert (one_for_both.alpha, one_for_both.alpha_2) == (1.2, None)


def test_a_seed_is_drawn_and_kept():
    asked = GenerationRequest(prompt="x")
    first = asked.resolved(WAN)
    assert first.seed is not None
    assert first.resolved(WAN).seed == first.seed
    assert len({asked.resolved(WAN).seed for _ in range(4)}) == 4


def test_sizes_and_lengths_are_rounded_with_a_note():
    asked = GenerationRequest(prompt="x", width=830, height=480, frames=80)
    resolved = asked.resolved(WAN)
    assert (resolved.width, resolved.height, resolved.frames) == (832, 480, 81)
    assert rounding_notes(asked, resolved) == [
        "width 830 becomes 832: it has to be a multiple of 16",
        "frames 80 becomes 81: it has to be 4n + 1",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 41, "conditions": [{"file": "a", "positions": 20}]}, "this video has 11 latent frames"),
        (
            {"conditions": [{"file": "a", "positions": "last"}, {"file": "b", "positions": "80f"}]},
            "conditions 1 and 2 both hold latent frame 20: move one of them",
        ),
        ({"frames": 241, "overlap": 81}, "overlap=81 leaves nothing to make in 81 frames: give at most 77"),
        (
            {
                "task": "transition",
                "frames": 5,
                "conditions": [{"kind": "video", "file": "a"}, {"kind": "video", "file": "b"}],
            },
            "overlap=1 leaves nothing to make in 5 frames: give more frames",
        ),
        (
            {"task": "extend", "conditions": [{"kind": "video", "file": "a", "noise": [0.0, 0.5]}]},
            "2 noise multipliers for an overlap of 13 frames, which is 4 latent frames: give 1 or 4",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_before_a_model_is_loaded(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GenerationRequest(prompt="x", **values).resolved(WAN)


def test_a_request_needs_no_torch():
    code = (
        "import sys, pusa.request, pusa.events; print([m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("own", ["single", "repeat"])
def test_images_are_encoded_as_the_model_has_it_and_videos_alone(own):
    images = [{"file": "a.png"}, {"file": "b.png", "encode": "single", "positions": ["last"]}]
    request = GenerationRequest(prompt="x", conditions=[*images, {"kind": "video", "file": "c.mp4", "positions": [1]}])
    resolved = request.resolved(replace(WAN, encode=own))
    assert [condition.encode for condition in resolved.conditions] == [own, "single", "single"]


# --- fast mode and guidance


def test_fast_sets_what_the_request_leaves_open():
    fast = FastSettings(steps=4, guidance=1.0, shift=5.0, alpha={"transformer": 1.5, "transformer_2": 1.4})
    defaults = replace(WAN, shift=8.0, boundary_ratio=0.875, fast=fast)
    request = GenerationRequest(prompt="x", fast=True).resolved(defaults)
    assert (request.steps, request.guidance, request.shift, request.alpha, request.alpha_2) == (4, 1.0, 5.0, 1.5, 1.4)
    own = {"steps": 6, "guidance": 3.0, "guidance_stop": 0.25, "shift": 3.0, "alpha": 1.1}
    request = GenerationRequest(prompt="x", fast=True, **own).resolved(defaults)
    assert {name: getattr(request, name) for name in own} == own
    with pytest.raises(ValueError, match="mini has no fast mode"):
        GenerationRequest(prompt="x", fast=True).resolved(WAN)
    lora = GenerationRequest(prompt="x", fast=True, lora=["mine.safetensors"]).resolved(replace(WAN, shift=8.0))
    assert (lora.steps, lora.guidance, lora.shift) == (4, 1.0, 8.0)


def test_guidance_of_a_request_with_conditions_is_the_models_for_them():
    defaults = replace(WAN, condition_guidance=1.5)
    image = {"kind": "image", "file": "a.png"}
    assert GenerationRequest(prompt="x").resolved(defaults).guidance == 3.0
    assert GenerationRequest(prompt="x", conditions=[image]).resolved(defaults).guidance == 1.5
    assert GenerationRequest(prompt="x", conditions=[image], guidance=2.0).resolved(defaults).guidance == 2.0
    assert GenerationRequest(prompt="x", conditions=[image]).resolved(WAN).guidance == 3.0
    with pytest.raises(ValidationError, match=r"guidance_start=0\.5 is above guidance_stop=0\.25"):
        GenerationRequest(prompt="x", guidance_start=0.5, guidance_stop=0.25)


# ---- schedules and prompts of a long video ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        ({}, "even"),
        ({"schedule": "wave"}, "wave:2"),
        ({"schedule": "wave:1"}, "wave:1"),
        ({"schedule": "wave", "frames": 49, "window": 17, "overlap": 5, "steps": 10}, "wave:5"),
    ],
)
def test_a_resolved_schedule_has_its_delay(fields, schedule):
    resolved = GenerationRequest(model="tiny", prompt="a cat", **fields).resolved(defaults_of("tiny"))
    assert resolved.schedule == schedule


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "wave:0"}, "schedule='wave:0' is not understood: write even, wave or wave:DELAY"),
        ({"schedule": "wave", "guidance_stop": 0.5}, "in a wave each frame is at another step"),
        ({"schedule": "wave", "conditions": [{"kind": "draft", "file": "a.mp4"}]}, "follow its draft together"),
        ({"schedule": "wave", "model": "wan2.2-a14b"}, "wan2.2-a14b has two experts.*--schedule even"),
        ({"schedule": "wave:1", "frames": 49, "window": 17, "overlap": 5, "steps": 10}, "give wave:5 or more"),
        ({"prompts": ["a", " "]}, "prompt 2 of prompts is empty"),
        ({"prompts": ["0s: a", "b"]}, "prompt 2 of prompts has no time and others have"),
        ({"prompts": ["1s: a", "2s: b"]}, "begins at 1s: the first must be at 0s"),
        ({"prompts": ["0s: a", "2s: b", "2s: c"]}, "begin at 2s and then at 2s: their times must rise"),
        ({"prompts": ["0s: a", "20f: b"]}, "give all times in seconds, or all in frames"),
        ({"prompts": ["a", "b"], "frames": 17}, "2 prompts for a video of 17 frames, which is made in 1 window of 17"),
        ({"prompts": ["0s: a", "9s: b"], "frames": 49, "window": 17}, "the prompt 'b': seconds=9: this video is"),
        ({"prompts": ["0s: a", "2.9s: b"], "frames": 49, "window": 17}, "the prompt at 2.9s holds in no window"),
        ({"prompts": ["0f: a", "19f: b", "20f: c"], "frames": 49, "window": 17}, "the prompt at 19f holds in no"),
    ],
)
def test_schedules_and_prompts_that_cannot_be_are_explained(fields, message):
    def resolve() -> None:
        request = GenerationRequest(**{"model": "tiny", "prompt": "x", **fields})
        request.resolved(defaults_of(request.model))

    with pytest.raises(ValueError, match=message):
        resolve()


def test_prompts_hold_by_window_or_from_their_time_on():
    size = {"model": "tiny", "frames": 49, "window": 17, "overlap": 5}
    windows = spans(13, 5, 2)

    def told(*prompts: str) -> list[str]:
        story = GenerationRequest(prompts=list(prompts), **size).resolved(defaults_of("tiny")).place_prompts()
        return [story.of_window(span) for span in windows]

    assert told("a", "b") == ["a", "b", "b", "b"]  # the last one holds on
    assert told("0s: a", "1.2s: b") == ["a", "b", "b", "b"]
    assert told("0f: a", "40f: b") == ["a", "a", "a", "b"]
    assert GenerationRequest(prompts=["0s: a", "2s: b"], **size).prompt == "a"
    both = GenerationRequest(prompt="x", prompts=["a"], **size)
    notes = rounding_notes(both, both.resolved(defaults_of("tiny")))
    assert notes == ["prompts stand for the prompt, which only names the video"]
