"""`--memory` and `--quantize` reach what loads the model, from every command and from the server's settings."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import pusa
from media_samples import psnr

from pusa import media
from pusa.acceleration.decisions import LoadOptions
from pusa.server.settings_sources import load_settings
from pusa.server.worker.engine_process import PusaEngine

SMALL = ("--model", "tiny", "--size", "32x32", "--frames", 5, "--steps", 2, "--seed", 0)


def test_weights_in_fewer_bits_make_nearly_the_same_video() -> None:
    assert pusa("generate", "a cat", *SMALL, "-o", "exact.mp4").exit_code == 0
    exact = media.read_video(Path("exact.mp4"))
    for kind in ("int8", "fp8"):
        done = pusa("generate", "a cat", *SMALL, "--quantize", kind, "-o", f"{kind}.mp4")
        assert done.exit_code == 0, done.stderr
        assert f"tiny: transformer on the CPU in {kind}\n" in done.stderr
        assert json.loads(pusa("info", f"{kind}.mp4", "--json").stdout)["rounded weights"] == f"transformer: {kind}"
        less = media.read_video(Path(f"{kind}.mp4"))
        assert not np.array_equal(less, exact)
        assert psnr(less, exact) > 30


@pytest.mark.parametrize(
    "args",
    [
        ("extend", "exact.mp4", "--overlap", 1, *SMALL),
        ("transition", "exact.mp4", "exact.mp4", "--overlap", 1, "--frames", 17, *SMALL[:4], *SMALL[6:]),
        ("loop", "a cat", "--frames", 17, *SMALL[:4], *SMALL[6:]),
        ("replay", "exact.mp4"),
    ],
)
def test_every_command_that_makes_a_video_takes_them(args: tuple[object, ...]) -> None:
    pusa("generate", "a cat", *SMALL, "-o", "exact.mp4")
    done = pusa(*args, "--memory", "smallest", "--quantize", "int8", "--json", "-o", "out.mp4")
    assert done.exit_code == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    (planned,) = (event for event in events if event["kind"] == "planned")
    assert planned["summary"] == "tiny: transformer on the CPU in int8"


def test_unknown_wishes_are_refused_with_the_known_ones() -> None:
    assert "'balanced'" in pusa("generate", "a cat", "--memory", "huge").stderr
    assert "'int8'" in pusa("decode", "z.safetensors", "--quantize", "int3").stderr


def test_the_server_s_settings_reach_the_process_that_loads_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(environ={"PUSA_MEMORY": "fastest"}, options={"quantize": "fp8"})
    assert settings.load_options == LoadOptions("fastest", "fp8", compile="auto")
    assert PusaEngine("tiny").load_options == LoadOptions()
    monkeypatch.setenv("PUSA_MEMORY", "fastest")
    monkeypatch.setenv("PUSA_QUANTIZE", "fp8")
    assert PusaEngine("tiny").load_options == LoadOptions("fastest", "fp8")
    with pytest.raises(ValueError, match="quantize"):
        load_settings(environ={}, options={"quantize": "int3"})
