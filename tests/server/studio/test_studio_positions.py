"""Hold the page's rules of places to Python's: both answer the cases of position_cases.json alike."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pusa.defaults import WAN_DEFAULTS
from pusa.numerals import is_noise_multiplier, parse_numbers, split_list
from pusa.positions import frames_of, latent_frames, nearest_of
from pusa.request import Position, preset_noise
from pusa.request.overlap import default_overlap

CASES = json.loads((Path(__file__).parent / "position_cases.json").read_text(encoding="utf-8"))


def answer(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except ValueError:
        return "error"


@pytest.mark.parametrize("case", CASES["parse"], ids=lambda case: repr(case["text"]))
def test_a_place_is_read(case: dict[str, Any]) -> None:
    found = answer(lambda: Position.parse(case["text"]))
    if case.get("error"):
        assert found == "error"
    else:
        assert (found.unit, found.value, str(found)) == (case["unit"], case["value"], case["shown"])
        assert math.copysign(1, found.value) == (-1 if case["value"] < 0 else 1)


def test_a_place_is_a_latent_frame() -> None:
    for case in CASES["index"]:
        clip = case["frames"], case["fps"], case["factor"]
        found = answer(lambda text=case["text"], clip=clip: Position.parse(text).latent_index(*clip))
        assert found == case.get("index", "error"), case


def test_lists_are_split() -> None:
    for case in CASES["lists"]:
        assert split_list(case["text"]) == case["parts"], case
    for case in CASES["noise_lists"]:
        found = answer(lambda text=case["text"]: parse_numbers(text))
        if found != "error" and not all(map(is_noise_multiplier, found)):
            found = "error"
        assert found == case.get("values", "error"), case


def test_lengths_overlaps_and_presets() -> None:
    for case in CASES["lengths"]:
        latents = latent_frames(case["frames"], case["factor"])
        found = latents, nearest_of(case["frames"], case["factor"], 1), frames_of(latents, case["factor"])
        assert found == (case["latents"], case["nearest"], case["decoded"]), case
    for case in CASES["overlaps"]:
        found = default_overlap(case["window"], case["factor"], most=case["most"], sides=case["sides"])
        assert found == case["overlap"], case
    for case in CASES["presets"]:
        assert preset_noise(case["preset"], case["kind"], case["count"], WAN_DEFAULTS) == case["noise"], case
