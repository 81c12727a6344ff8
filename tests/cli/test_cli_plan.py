"""Test `pusa plan`: any machine, this machine, and the table of the guide."""

import json
from pathlib import Path

import pytest
from command_line import imports_of, pusa
from paths import ROOT
from sparse_models import transformer_shapes, write_sparse

from pusa import zoo


def test_a_described_machine_is_planned_for() -> None:
    shown = pusa("plan", "wan2.1-14b", "--gpu-gb", "24", "--ram-gb", "64", "--size", "1280x720")
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == "wan2.1-14b: transformer on the GPU in bfloat16, its blocks streamed from RAM, merged"
    for part in ("transformer", "text_encoder", "vae", "GPU memory", "RAM", "speed"):
        assert any(line.strip().startswith(part) for line in lines)
    assert "(predicted)" in shown.stdout
    assert "fallback 1: " in shown.stdout


def test_this_machine_is_planned_for_where_none_is_described() -> None:
    shown = pusa("plan", "tiny", "--json")
    found = json.loads(shown.stdout)
    assert found["machine"]["ram_bytes"] > 0
    assert found["plans"][0]["parts"]["transformer"]["storage"] in ("float32", "bfloat16")
    assert not found["plans"][0]["problem"]


def test_what_does_not_run_says_why() -> None:
    shown = pusa("plan", "wan2.1-14b", "--gpu-gb", "8", "--size", "1280x720")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("does not run: wan2.1-14b needs 9.8 GB of GPU memory for 1280x720 and 81 frames")


def test_wishes_and_numbers_of_cards_are_passed_on() -> None:
    words = ["plan", "wan2.1-14b", "--gpu-gb", "48", "--count", "2", "--capability", "8.6", "--json"]
    first = json.loads(pusa(*words).stdout)["plans"][0]
    assert first["parallel"]["guidance"] == 2
    fast = json.loads(pusa(*words, "--memory", "fastest", "--gpus", "1").stdout)["plans"][0]
    assert (fast["wish"], fast["parts"]["transformer"]["storage"], fast["parallel"]["guidance"]) == (
        "fastest",
        "int8",
        1,
    )
    alone = json.loads(pusa(*words, "--no-guidance", "--quantize", "fp8", "--frames", "49").stdout)["plans"][0]
    assert (alone["parallel"]["ulysses"], alone["parts"]["transformer"]["storage"]) == (2, "fp8")
    linked = json.loads(pusa(*words, "--nvlink").stdout)
    assert linked["machine"]["link"] == "nvlink"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan"], "Missing argument 'MODEL'"),
        (["plan", "wan2.1-14b", "--size", "big"], "'big' is no size: write WIDTHxHEIGHT"),
        (["plan", "wan2.1-14b", "--capability", "Ada"], "'Ada' is no compute capability"),
        (["plan", "wan2.1-14b", "--gpu-gb", "-1"], "-1"),
        (["plan", "wan2.1-14b", "--gpu-gb", "inf"], "gpu_gb=inf is above 1,000,000"),
        (["plan", "wan2.1-14b", "--ram-gb", "1e9"], "ram_gb=1e+09 is above 1,000,000"),
        (["plan", "wan2.1-14b", "--count", "2"], "--count describes a card: give --gpu-gb, too"),
    ],
)
def test_wrong_usage_is_an_error(words: list[str], message: str) -> None:
    shown = pusa(*words)
    assert shown.exit_code == 2
    assert message in shown.stderr


def test_the_guide_shows_what_the_command_prints() -> None:
    """After a change of the rules or of the zoo, paste what `pusa plan --table` prints into the page."""
    table = pusa("plan", "--table").stdout.strip()
    assert table in (ROOT / "docs" / "on_your_card.md").read_text()
    for name in ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b"):
        assert name in zoo.ZOO
        assert name in table


def test_planning_for_another_machine_loads_no_torch() -> None:
    assert "torch" not in imports_of(["plan", "wan2.1-14b", "--gpu-gb", "24"])


def test_zero_is_a_description_too() -> None:
    without_ram = pusa("plan", "wan2.1-14b", "--gpu-gb", "24", "--ram-gb", "0")
    assert "of RAM for 832x480 and 81 frames on this card, and 0 MB is free" in without_ram.stdout
    without_card = json.loads(pusa("plan", "wan2.1-14b", "--gpu-gb", "0", "--json").stdout)
    assert without_card["machine"]["cards"] == []
    assert without_card["machine"]["ram_bytes"] == 64 * 2**30 - 2 * 10**9


def test_a_long_video_is_planned_for_by_its_window() -> None:
    long, short = (pusa("plan", "wan2.1-14b", "--gpu-gb", "24", "--frames", frames) for frames in ("801", "81"))
    assert long.stdout == short.stdout
    assert long.stderr == "801 frames are made in windows of 81: planning for a window\n"


def test_a_quantised_file_is_planned_as_it_is(tmp_path: Path) -> None:
    file = write_sparse(tmp_path / "t.safetensors", transformer_shapes("wan2.1-14b"), "F8_E4M3")
    card = ("--gpu-gb", "24", "--ram-gb", "64", "--transformer", file, "--json")
    for words, storage, kept in (((), "fp8", True), (("--quantize", "none"), "bfloat16", False)):
        result = pusa("plan", *card, *words)
        assert (result.exit_code, "wan2.1-14b, with transformer t.safetensors" in result.stderr) == (0, True)
        [best, *_] = json.loads(result.stdout)["plans"]
        transformer = best["parts"]["transformer"]
        assert (best["model"], transformer["storage"], transformer["kept"]) == ("wan2.1-14b", storage, kept)
    assert pusa("plan", "wan2.1-14b", "--transformer", "absent.gguf").exit_code == 2
