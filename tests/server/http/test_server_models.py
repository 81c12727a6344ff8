"""GET /v1/models/{id}: all that a form needs, taken from what the request itself declares."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from api_samples import Served, serving

from pusa.defaults import TI2V_DEFAULTS, WAN_DEFAULTS
from pusa.request import GenerationRequest, field_specs
from pusa.server.http.models import shapes_of, sizes_of
from pusa.server.http.schemas import CreateVideo
from pusa.server.http.validation import client_name


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("models"), model="mini", metadata="minimal", max_steps=60) as served:
        yield served


def test_a_model_has_all_that_a_form_needs(server: Served) -> None:
    model = server.http.get("/v1/models/mini").json()
    defaults = model["defaults"]
    assert (defaults["num_frames"], defaults["guidance_scale"], defaults["lora_alpha"]) == (33, 3.0, 1.4)
    assert (defaults["cond_positions"], defaults["noise_multipliers"]) == ([0, "last"], [0.2, 0.5])
    assert (defaults["overlap"], defaults["window"], defaults["final_noise_multiplier"]) == (13, 33, 0.7)
    assert model["presets"]["faithful"]["lora_alpha"] == 1.5
    assert model["presets"]["balanced"]["video_noise_multipliers"] == [0, 0.3, 0.4, 0.5]
    assert model["fast"] == {
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "flow_shift": 3.0,
        "lora_alpha": 1.4,
        "lora_alpha_2": None,
    }
    assert model["draft"] == {"width": 80, "height": 80, "num_inference_steps": 4}
    assert model["metadata"] == ["minimal", "off"]
    assert defaults["metadata"] == "minimal"
    assert ["rabbit", "bunny"] in [group[:2] for group in model["words"]["things"]]
    assert model["limits"]["steps"] == model["fields"]["num_inference_steps"]["maximum"] == 60
    assert (model["has_text"], model["experts"], model["has_waves"], model["frames_per_latent"]) == (True, 1, True, 4)


def test_its_defaults_make_the_video_of_a_request_without_them(server: Served) -> None:
    defaults = server.http.get("/v1/models/mini").json()["defaults"]
    names = ("num_frames", "num_inference_steps", "guidance_scale", "flow_shift", "lora_alpha", "negative_prompt")
    given = server.job(server.create(seed=1, **{name: defaults[name] for name in names})["id"])
    left_out = server.job(server.create(seed=1)["id"])
    model = server.service.defaults
    resolved = [GenerationRequest.model_validate(job.request).resolved(model) for job in (given, left_out)]
    assert resolved[0] == resolved[1]


def test_every_field_of_a_request_is_explained_with_its_range(server: Served) -> None:
    fields = server.http.get("/v1/models/mini").json()["fields"]
    known = set(CreateVideo.model_fields)
    assert set(fields) <= known
    hidden = {"model", "lora", "lora_layers"}
    assert {client_name(spec.name) for spec in field_specs(GenerationRequest)} - hidden <= set(fields)
    assert fields["guidance_scale"]["minimum"] == 1
    assert fields["guidance_scale"]["step"] == 0.5
    assert (fields["num_frames"]["low"], fields["num_frames"]["step"], fields["num_frames"]["unit"]) == (5, 4, "frames")
    assert fields["schedule"]["choices"] == ["even", "wave"]
    for name, spec in fields.items():
        assert spec["help"], name
        if spec["low"] is not None:
            assert spec["minimum"] <= spec["low"] < spec["high"] <= spec["maximum"], name


@pytest.mark.parametrize(
    ("defaults", "wide", "square"),
    [
        (WAN_DEFAULTS, "832x480", "640x640"),
        (TI2V_DEFAULTS, "1280x704", "960x960"),
        (replace(WAN_DEFAULTS, width=480, height=832), "832x480", "640x640"),
        (replace(WAN_DEFAULTS, width=96, height=96), "144x80", "96x96"),
        (replace(WAN_DEFAULTS, width=64, height=64, size_multiple=32), "128x64", "64x64"),
    ],
)
def test_shapes_are_sizes_that_the_model_makes(defaults: object, wide: str, square: str) -> None:
    shapes = shapes_of(defaults)  # type: ignore[arg-type]
    assert (shapes["16:9"], shapes["1:1"]) == (wide, square)
    assert shapes["9:16"] == "x".join(reversed(wide.split("x")))
    assert set(shapes.values()) <= set(sizes_of(defaults))  # type: ignore[arg-type]
