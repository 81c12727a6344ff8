"""A preset gives the same noise to the same conditions from the command line, HTTP and Python."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from api_samples import Served, clip, png, serving

from pusa.cli.options import build_conditions, build_request
from pusa.request import GenerationRequest
from pusa.zoo import defaults_of

IMAGE_NOISE = {"faithful": [0, 0, 0], "balanced": [0.2, 0.5, 0.5], "creative": [0.4, 0.7, 0.7]}
VIDEO_NOISE = {
    "faithful": [0, 0, 0, 0, 0],
    "balanced": [0, 0.3, 0.4, 0.5, 0.5],
    "creative": [0.2, 0.5, 0.6, 0.7, 0.7],
}
IMAGE_PLACES = (["0"], ["last"], ["0", "last"], ["0", "2", "last"])
VIDEO_PLACES = [[str(place) for place in range(count)] for count in range(1, 6)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("presets")) as served:
        yield served


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "a.png").write_bytes(png())
    return {"image": str(tmp_path / "a.png"), "video": str(clip(tmp_path))}


def from_command_line(file: str, places: Sequence[str], preset: str, noise: str | None) -> Any:
    if file.endswith(".mp4"):
        conditions = build_conditions(videos=[file], positions=",".join(places), noise=noise)
    else:
        conditions = build_conditions(keyframes=[f"{file}@{place}" for place in places], noise=noise)
    return build_request("generate", size=None, prompt="x", preset=preset, conditions=conditions)


def from_http(server: Served, file: str, places: Sequence[str], preset: str, noise: str | None) -> Any:
    is_video = file.endswith(".mp4")
    url = f"data:{'video/mp4' if is_video else 'image/png'};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"
    fields = {"cond_positions": ",".join(places), **({} if noise is None else {"noise_multipliers": noise})}
    video = server.create(input_reference=[url] * (1 if is_video else len(places)), preset=preset, **fields)
    return server.job(video["id"]).request


def from_python(file: str, places: Sequence[str], preset: str, noise: str | None) -> Any:
    values: dict[str, Any] = {"file": file} if noise is None else {"file": file, "noise": float(noise)}
    if file.endswith(".mp4"):
        conditions = [{"kind": "video", "positions": list(places), **values}]
    else:
        conditions = [{"positions": place, **values} for place in places]
    return {"prompt": "x", "preset": preset, "conditions": conditions}


def noise_of(request: Any) -> list[float]:
    """Resolve a request as the worker does, and return the noise of all places in their order."""
    values = request if isinstance(request, dict) else request.model_dump()
    conditions = GenerationRequest.model_validate(values).resolved(defaults_of("tiny")).conditions
    return [value for condition in conditions for value in condition.noise or []]


@pytest.mark.parametrize("preset", IMAGE_NOISE)
@pytest.mark.parametrize("places", IMAGE_PLACES, ids=",".join)
def test_images_have_the_presets_noise_from_every_door(server, files, places, preset):
    file, expected = files["image"], IMAGE_NOISE[preset][: len(places)]
    assert noise_of(from_command_line(file, places, preset, None)) == expected
    assert noise_of(from_http(server, file, places, preset, None)) == expected
    assert noise_of(from_python(file, places, preset, None)) == expected


@pytest.mark.parametrize("preset", VIDEO_NOISE)
@pytest.mark.parametrize("places", VIDEO_PLACES, ids=",".join)
def test_places_of_a_video_have_the_presets_noise_from_every_door(server, files, places, preset):
    file, expected = files["video"], VIDEO_NOISE[preset][: len(places)]
    assert noise_of(from_command_line(file, places, preset, None)) == expected
    assert noise_of(from_http(server, file, places, preset, None)) == expected
    assert noise_of(from_python(file, places, preset, None)) == expected


@pytest.mark.parametrize("kind", ["image", "video"])
def test_noise_of_the_request_wins_over_every_preset(server, files, kind):
    places = ["0", "2", "last"]
    for preset in IMAGE_NOISE:
        for request in (
            from_command_line(files[kind], places, preset, "0.35"),
            from_http(server, files[kind], places, preset, "0.35"),
            from_python(files[kind], places, preset, "0.35"),
        ):
            assert set(noise_of(request)) == {0.35}


def test_a_start_and_an_end_image_have_the_noise_of_two_images(server, files):
    image = files["image"]
    start_end = build_conditions(image=image, keyframes=[f"{image}@last"])
    request = build_request("generate", size=None, prompt="x", conditions=start_end)
    assert noise_of(request) == [0.2, 0.5]
    url = f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    assert noise_of(server.job(server.create(input_reference=[url, url])["id"]).request) == [0.2, 0.5]


def test_the_noise_of_one_image_does_not_change_the_others(files):
    image = files["image"]
    conditions = build_conditions(image=image, keyframes=[f"{image}@2:0.9", f"{image}@last"])
    assert noise_of(build_request("generate", size=None, prompt="x", conditions=conditions)) == [0.2, 0.9, 0.5]


def test_a_video_of_which_all_is_kept_has_one_noise(server, files):
    expected = {"faithful": [0], "balanced": [0.2], "creative": [0.4]}
    for preset, noise in expected.items():
        url = f"data:video/mp4;base64,{base64.b64encode(Path(files['video']).read_bytes()).decode()}"
        assert noise_of(server.job(server.create(input_reference=url, preset=preset)["id"]).request) == noise
        conditions = build_conditions(videos=[files["video"]])
        assert noise_of(build_request("generate", size=None, prompt="x", preset=preset, conditions=conditions)) == noise
