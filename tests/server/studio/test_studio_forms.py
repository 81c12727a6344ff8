"""The page's fields become a request, and the fields and the timeline show the same."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from pusa.server.studio.forms import (
    Form,
    FormDefaults,
    FormError,
    build_request,
    format_list,
    read_noise,
    read_positions,
    spread_positions,
    with_fast,
)
from pusa.server.studio.texts import LANGUAGES, texts

from pusa import zoo
from pusa.request import GenerationRequest, field_specs, preset_alpha, preset_noise
from pusa.server.studio import examples, timeline, views

MINI, BIG = FormDefaults.of("mini"), FormDefaults.of("wan2.1-14b")


def asked(**fields: object) -> dict[str, object]:
    return build_request(Form(**fields), "mini")[0]  # type: ignore[arg-type]


def refused(**fields: object) -> str:
    with pytest.raises(FormError) as caught:
        asked(**fields)
    assert caught.value.text or caught.value.key in texts("en")
    return caught.value.text or caught.value.key


# ---- the original's parameters ---------------------------------------------------------------------------------------


def test_the_large_model_has_the_originals_defaults():
    assert (BIG.positions, BIG.multipliers, BIG.noise) == ("0,20", "0.2,0.5", 0.2)
    assert (BIG.video_positions, BIG.video_multipliers) == ("0,1,2,3", "0,0.3,0.4,0.5")
    assert (BIG.alpha, BIG.generation.steps, BIG.generation.num_frames) == (1.4, 10, 81)
    assert BIG.sizes[:2] == ["832x480", "480x832"]
    assert "1280x720" in BIG.sizes


def test_the_embedded_model_has_places_that_are_in_its_clip():
    assert MINI.positions == "0,last"
    assert MINI.sizes == ["96x96", "96x64", "64x96"]
    assert MINI.alpha_2 is None
    assert FormDefaults.of("wan2.2-a14b").alpha_2 == 1.4


# ---- requests --------------------------------------------------------------------------------------------------------


def test_an_image_is_the_first_frame_with_its_noise():
    request, files = build_request(Form(tab="image", image="/a/Cat.PNG", prompt=" a cat ", noise=0.35), "mini")
    assert request["conditions"] == [
        {"kind": "image", "file": "0.png", "positions": [0], "noise": [0.35], "fit": "crop"}
    ]
    assert files == {"0.png": Path("/a/Cat.PNG")}
    assert request["prompt"] == "a cat"
    assert request["task"] == "generate"


def test_many_images_go_to_their_places_each_with_its_noise():
    images = [f"/a/{n}.png" for n in range(9)]
    request = asked(tab="images", images=images, positions="0 1 2 3 4 5 6 7 last", multipliers="0.2", prompt="x")
    places = [condition["positions"] for condition in request["conditions"]]
    assert places == [[str(n)] for n in range(8)] + [["last"]]
    assert {condition["noise"][0] for condition in request["conditions"]} == {0.2}
    two = asked(tab="images", images=images[:2], positions="0，1.5s", multipliers="0, 0.5", prompt="x")
    assert [(c["positions"], c["noise"]) for c in two["conditions"]] == [(["0"], [0.0]), (["1.5s"], [0.5])]


def test_a_video_keeps_the_latent_frames_that_are_named():
    request = asked(tab="video", video="/a/b.mp4", video_positions="0,1,2,3", video_multipliers="0,0.3,0.4,0.5")
    assert request["conditions"][0]["positions"] == ["0", "1", "2", "3"]
    assert request["conditions"][0]["noise"] == [0.0, 0.3, 0.4, 0.5]


@pytest.mark.parametrize(("mode", "videos"), [("extend", 1), ("transition", 2), ("loop", 0)])
def test_the_other_modes_of_the_video_tab_are_tasks(mode, videos):
    form = {"video": "/a/1.mp4", "second_video": "/a/2.mp4", "video_positions": "nonsense", "prompt": "x"}
    request = asked(tab="video", mode=mode, **form)
    assert request["task"] == mode
    assert len(request["conditions"]) == videos
    assert all("positions" not in condition and "noise" not in condition for condition in request["conditions"])


def test_a_loop_may_begin_with_a_picture():
    request = asked(tab="video", mode="loop", loop_image="/a/1.png", prompt="x", noise=0.1, overlap=5)
    assert request["conditions"][0]["noise"] == [0.1]


def test_what_the_page_sends_is_a_request_with_all_that_was_set():
    form = Form(
        tab="text", prompt="x", preset="creative", alpha=1.3, steps=4, negative_prompt="y", seed=" 7 ", size="96 x 64",
        frames=17, guidance=2, shift=4, overlap=0, fps=8,
    )  # fmt: skip
    resolved = GenerationRequest.model_validate(build_request(form, "mini")[0]).resolved(zoo.defaults_of("mini"))
    got = {name: getattr(resolved, name) for name in ("alpha", "steps", "negative_prompt", "seed", "width", "height")}
    assert got == {"alpha": 1.3, "steps": 4, "negative_prompt": "y", "seed": 7, "width": 96, "height": 64}
    assert (resolved.frames, resolved.guidance, resolved.shift, resolved.fps) == (17, 2.0, 4.0, 8.0)


def test_a_story_has_a_line_for_each_prompt():
    request = asked(tab="text", prompts="0s: a cat stands\n\n 3s: a cat spins \n", frames=97, schedule="wave")
    assert request["prompts"] == ["0s: a cat stands", " 3s: a cat spins "]
    assert request["schedule"] == "wave"
    with pytest.raises(FormError, match="the first must be at 0s"):
        asked(tab="text", prompts="1s: a cat stands", frames=97)


def test_inputs_of_other_tabs_do_not_count():
    assert asked(tab="text", prompt="x", image="/a/1.png", video="/a/1.mp4")["conditions"] == []


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tab": "image"}, "error.no_image"),
        ({"tab": "images"}, "error.no_images"),
        ({"tab": "video"}, "error.no_video"),
        ({"tab": "video", "video": "1.mp4", "video_positions": " "}, "error.no_positions"),
        ({"tab": "video", "mode": "transition", "video": "1.mp4"}, "error.no_second_video"),
        ({"tab": "images", "images": ["1.png", "2.png"], "positions": "0"}, "error.position_count"),
        ({"tab": "images", "images": ["1.png"], "positions": "0", "multipliers": "0,0"}, "error.multiplier_count"),
        ({"tab": "images", "images": ["1.png"], "positions": "0", "multipliers": "1.5"}, "error.multiplier"),
        ({"tab": "images", "images": ["1.png"], "positions": "0", "multipliers": "nan"}, "error.multiplier"),
        ({"tab": "images", "images": ["1.png"], "positions": "0", "multipliers": "a"}, "error.multiplier_text"),
        ({"prompt": "x", "size": "large"}, "error.size"),
        ({"prompt": "x", "seed": "-3"}, "error.seed"),
    ],
)
def test_a_missing_or_malformed_field_is_an_error_in_every_language(fields, told):
    assert refused(**fields) == told
    assert all(told in texts(language) for language in LANGUAGES)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"tab": "images", "images": ["1.png"], "positions": "9"}, "9 latent frames (0..8"),
        ({"tab": "images", "images": ["1.png", "2.png"], "positions": "0,0f"}, "both hold latent frame 0"),
        ({"tab": "images", "images": ["1.png"], "positions": "x"}, "position 'x' is not understood"),
        ({"prompt": "x", "alpha": 9.0}, "alpha"),
    ],
)
def test_errors_of_the_request_are_shown_in_its_words(fields, words):
    assert words in refused(**fields)


# ---- presets ---------------------------------------------------------------------------------------------------------


def test_presets_move_noise_and_alpha_around_the_originals_values():
    assert preset_noise("balanced", "image", 3) == [0.2, 0.5, 0.5]
    assert preset_noise("balanced", "video", 5) == [0.0, 0.3, 0.4, 0.5, 0.5]
    assert preset_noise("faithful", "video", 2) == [0.0, 0.0]
    assert preset_noise("creative", "image", 2) == [0.4, 0.7]
    assert [preset_alpha(p, 1.4) for p in ("faithful", "balanced", "creative")] == [1.5, 1.4, 1.3]


# ---- the timeline ----------------------------------------------------------------------------------------------------


def marks(form: Form, defaults: FormDefaults = MINI) -> list[tuple[int, float]]:
    return [(mark["cell"], mark["noise"]) for mark in timeline.timeline_value(form, defaults)["marks"]]


def test_the_timeline_shows_what_the_fields_say():
    form = Form(tab="images", images=["/t/a.png", "/t/b.png"], positions="0,last", multipliers="0.2,0.5")
    value = timeline.timeline_value(form, MINI)
    assert (value["count"], value["frames"], value["fps"]) == (9, 33, 16.0)
    assert marks(form) == [(0, 0.2), (8, 0.5)]
    assert value["marks"][1]["src"] == "gradio_api/file=/t/b.png"
    assert marks(Form(tab="images", positions="0,1s,-1f", multipliers=".1")) == [(0, 0.1), (4, 0.1), (8, 0.1)]
    assert marks(Form(tab="video", video_positions="0,20", video_multipliers="0,1"), BIG) == [(0, 0.0), (20, 1.0)]


def test_what_was_done_on_the_timeline_goes_back_into_the_fields():
    value = timeline.timeline_value(Form(tab="images", positions="last,0", multipliers="0.5,0.2"), MINI)
    assert timeline.field_texts(value) == ("last,0", "0.5,0.2")  # untouched places stay as they were written
    value["marks"][1] |= {"cell": 3, "place": None, "noise": 0.25}
    assert timeline.field_texts(value) == ("last,3", "0.5,0.25")  # pictures keep their order
    video = timeline.timeline_value(Form(tab="video", video_positions="0,1", video_multipliers="0,0.3"), MINI)
    video["marks"].insert(0, {"cell": 5, "noise": 0.4, "place": None})
    assert timeline.field_texts(video) == ("0,1,5", "0,0.3,0.4")


@pytest.mark.parametrize("positions", ["0,99", "x", "0,0", "1e3", "9s"])
def test_a_place_that_is_none_is_an_error_on_the_timeline_and_no_exception(positions):
    value = timeline.timeline_value(Form(tab="images", positions=positions, multipliers="0"), MINI)
    assert value["error"]["text"]
    assert value["marks"] == []


def test_what_extension_transition_and_loop_take_over_is_shown():
    extend = timeline.timeline_value(Form(tab="video", mode="extend", video="/t/a.mp4"), MINI)
    assert [mark["cell"] for mark in extend["marks"]] == [0, 1, 2, 3]
    assert (extend["mode"], extend["video"]) == ("fixed", "gradio_api/file=/t/a.mp4")
    transition = timeline.timeline_value(Form(tab="video", mode="transition", overlap=5), MINI)
    assert [mark["cell"] for mark in transition["marks"]] == [0, 1, 7, 8]
    loop = timeline.timeline_value(Form(tab="video", mode="loop", overlap=5), MINI)
    assert loop["bridge"] == [4, 9]
    assert timeline.timeline_value(Form(tab="video", mode="extend", overlap=33), MINI)["error"]["text"]


@pytest.mark.parametrize("factor", [1, 6])
def test_the_timeline_of_another_model_has_its_latent_frames(factor):
    other = FormDefaults(generation=replace(MINI.generation, num_frames=8 * factor + 1, frames_per_latent=factor))
    places = f"0,{factor * 3}f,last"
    value = timeline.timeline_value(Form(tab="images", positions=places, multipliers="0"), other)
    assert (value["count"], value["frames"], value["frames_per_latent"]) == (9, 8 * factor + 1, factor)
    assert [mark["cell"] for mark in value["marks"]] == [0, 3, 8]
    asked = {"tab": "video", "overlap": factor + 1, "frames": 8 * factor + 1 + factor // 2 - (factor > 1)}
    transition = timeline.timeline_value(Form(mode="transition", **asked), other)
    assert [mark["cell"] for mark in transition["marks"]] == [0, 1, 7, 8]
    assert timeline.timeline_value(Form(mode="loop", **asked), other)["bridge"] == [4, 9]


def test_text_alone_has_no_timeline():
    assert timeline.timeline_value(Form(tab="text"), MINI)["mode"] == "none"


def test_pictures_are_spread_over_the_clip():
    assert format_list(spread_positions(1, 9)) == "0"
    assert format_list(spread_positions(3, 9)) == "0,4,last"
    assert format_list(spread_positions(5, 21)) == "0,5,10,15,last"
    assert len(set(spread_positions(9, 9))) == 9


def test_lists_are_read_with_any_comma():
    assert read_noise("0;0.3，0.4 0.5") == [0, 0.3, 0.4, 0.5]
    assert format_list(read_positions(" 0 , 80f,1.5s;last")) == "0,80f,1.5s,last"
    assert read_noise("") == []


# ---- texts, examples, settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_text_with_its_values(language):
    def holes(text: str) -> list[str]:
        return sorted(re.findall(r"\{\w+\}", text))

    english, other = texts("en"), texts(language)
    assert other.keys() == english.keys()
    assert [key for key in english if holes(english[key]) != holes(other[key])] == []


def test_every_text_that_the_scripts_name_is_there():
    folder = Path(timeline.__file__).parent / "assets"
    named = {
        key for path in folder.glob("*.js") for key in re.findall(r"""\bt\("([a-z][\w.]*)"[,)]""", path.read_text())
    }
    assert len(named) > 40
    assert named - texts("en").keys() == set()


def test_fields_are_explained_in_the_words_of_the_request():
    help = {field.name: field.help for field in field_specs(GenerationRequest)}
    assert texts("en")["help.steps"] == help["steps"]
    assert texts("fr")["help.steps"] != help["steps"]


@pytest.mark.parametrize("example", examples.EXAMPLES, ids=lambda example: example.name)
@pytest.mark.parametrize("model", ["mini", "wan2.1-14b"])
def test_every_example_is_a_request_of_every_model_with_files_of_the_package(example, model):
    request, files = build_request(examples.form_of(example, FormDefaults.of(model)), model)
    assert request["prompt"] == example.prompt
    assert all(path.is_file() for path in (*files.values(), *example.shows))
    assert (
        timeline.timeline_value(examples.form_of(example, FormDefaults.of(model)), FormDefaults.of(model))["error"]
        is None
    )


def test_every_tab_has_examples_that_weigh_little():
    assert {example.tab for example in examples.EXAMPLES} == {"image", "images", "video", "text"}
    assert {e.values["mode"] for e in examples.EXAMPLES if e.tab == "video"} == {
        "complete",
        "extend",
        "transition",
        "loop",
    }
    assert sum(path.stat().st_size for path in examples.CLIPS.iterdir()) < 1_000_000


def test_the_settings_that_are_shown_hold_no_keys_of_the_store():
    request = GenerationRequest(
        prompt="x",
        conditions=[{"kind": "image", "file": "inputs/video_1/0.png", "positions": ["1.5s"], "noise": [0.2]}],
    )
    resolved = request.resolved(zoo.defaults_of("mini")).model_dump(mode="json")
    shown = views.settings(resolved, 1)
    assert shown["conditions"] == [{"kind": "image", "positions": ["1.5s"], "noise": [0.2], "part": None}]
    assert shown["frames"] == {"frames": 33, "seconds": 2.06, "fps": 16.0}
    assert shown["size"] == "96x96"
    assert "inputs/" not in str(views.without_keys(resolved))


def test_the_fast_switch_sets_the_sliders_to_what_it_stands_for():
    form = with_fast(Form(prompt="a cat", fast=True), BIG)
    assert (form.steps, form.guidance, form.shift) == (4, 1.0, 5.0)
    request, _ = build_request(form, "wan2.1-14b")
    assert (request["fast"], request["steps"], request["guidance"]) == (True, 4, 1.0)
    form = with_fast(replace(form, fast=False), BIG)
    assert (form.steps, form.guidance, form.shift) == (10, 3.0, 5.0)
    assert "fast" not in build_request(form, "wan2.1-14b")[0]
