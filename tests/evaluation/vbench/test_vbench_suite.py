"""The suite is read where the user has it, and what is missing is named with the place where it can be had."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from vbench_samples import BACKGROUND, CAMERA_WORDS, SUBJECTS, make_suite

from pusa.evaluation.vbench.suite import choose_prompts, nearest_ratio, parse_ratio, read_suite


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_suite(tmp_path / "VBench")


def test_checkout_its_package_and_a_folder_of_both_are_read(checkout: Path, tmp_path: Path) -> None:
    package = checkout / "vbench2_beta_i2v"
    mixed = tmp_path / "mixed"
    shutil.copytree(package / "data" / "crop", mixed / "crop")
    shutil.copy(package / "vbench2_i2v_full_info.json", mixed)

    suites = [read_suite(path) for path in (checkout, package, mixed)]

    assert suites[0] == suites[1]
    assert suites[0].prompts == suites[2].prompts
    assert [prompt.text for prompt in suites[0].prompts[:3]] == [*SUBJECTS, BACKGROUND]
    assert "temporal_flickering" not in suites[0].prompts[0].dimensions  # it is in the list, and not in the totals
    for suite in suites:
        images = suite.find_images("8-5", suite.prompts)
        assert set(images) == {"cat.png", "boat.png", "hill.png"}
        assert all(path.is_absolute() and path.is_file() for path in images.values())


def test_dimensions_choose_prompts(checkout: Path) -> None:
    prompts = read_suite(checkout).prompts

    def texts(*dimensions: str, count: int | None = None) -> list[str]:
        return [prompt.text for prompt in choose_prompts(prompts, dimensions, count)]

    assert texts("dynamic_degree") == list(SUBJECTS)
    assert texts("imaging_quality") == [*SUBJECTS, BACKGROUND]
    assert texts("camera_motion") == [f"{BACKGROUND}, {words}" for words in CAMERA_WORDS]
    two, one = texts("camera_motion", "i2v_subject", count=2), texts("camera_motion", "i2v_subject", count=1)
    assert len(two) == 4
    assert len(one) == 2
    assert set(one) < set(two)
    with pytest.raises(ValueError) as error:
        texts("i2v_sbject")
    assert str(error.value).startswith("'i2v_sbject' is no dimension of VBench-I2V that counts: it has ")


def test_missing_pieces_are_named(checkout: Path, tmp_path: Path) -> None:
    package = checkout / "vbench2_beta_i2v"
    crop = package / "data" / "crop"
    suite = read_suite(checkout)

    def refusal(kind: type[Exception], call: Callable[..., object], *arguments: object) -> str:
        with pytest.raises(kind) as error:
            call(*arguments)
        return str(error.value)

    source = "its script vbench2_beta_i2v/download_data.sh fetches them from Google Drive (crop.zip)"
    assert refusal(FileNotFoundError, suite.find_images, "7-4", suite.prompts) == (
        f"{crop / '7-4'} is missing: {source}; {crop} has 16-9, 8-5"
    )
    (crop / "8-5" / "boat.png").write_bytes(b"no picture")
    message = refusal(ValueError, suite.find_images, "8-5", suite.prompts)
    assert message.startswith(f"image '{crop / '8-5' / 'boat.png'}' does not open (")
    for name in ("cat.png", "hill.png"):
        (crop / "8-5" / name).unlink()
    assert refusal(FileNotFoundError, suite.find_images, "8-5", suite.prompts) == (
        f"image '{crop / '8-5' / 'cat.png'}' is missing, and 1 more: {source}"
    )
    shutil.rmtree(crop)
    (package / "data" / "origin").mkdir()
    assert refusal(FileNotFoundError, read_suite(checkout).find_images, "8-5", suite.prompts) == (
        f"{crop / '8-5'} is missing: {source}; {package / 'data' / 'origin'} has whole images, which scores do not "
        "compare with"
    )
    assert refusal(FileNotFoundError, read_suite, tmp_path / "nowhere") == (
        f"--suite '{tmp_path / 'nowhere'}' is no folder: give a checkout of https://github.com/Vchitect/VBench"
    )
    info = package / "vbench2_i2v_full_info.json"
    info.write_text('[{"prompt_en": "a cat"}]')
    assert refusal(ValueError, read_suite, checkout) == (
        f"{info} is no list of VBench-I2V's prompts (KeyError: 'image_name')"
    )
    info.unlink()
    assert refusal(FileNotFoundError, read_suite, checkout) == (
        f"{checkout} has no vbench2_i2v_full_info.json: give a checkout of https://github.com/Vchitect/VBench (the "
        "package on PyPI leaves that file out)"
    )


def test_ratio_that_fits_a_size() -> None:
    sizes = {(832, 480): "7-4", (1280, 720): "16-9", (1280, 704): "16-9", (96, 64): "8-5", (512, 512): "1-1"}

    assert {size: nearest_ratio(*size) for size in sizes} == sizes
    assert parse_ratio("5-4") == 1.25
    with pytest.raises(ValueError) as error:
        parse_ratio("16:9")
    assert str(error.value) == "'16:9' is no ratio: give 1-1, 8-5, 7-4, 16-9"
