"""Numbers as text: what is one, and what is told of the rest, wherever text from outside becomes a number."""

import math

import pytest
from click.testing import CliRunner

from pusa.cli import main
from pusa.cli.options import parse_keyframe, parse_noise
from pusa.client.wire import number_of
from pusa.numerals import (
    MAX_CHARACTERS,
    MAX_VALUES,
    is_whole,
    parse_number,
    parse_numbers,
    parse_size,
    parse_whole,
    split_list,
)

NO_NUMBERS = [
    "²",
    "٣",
    "1²",
    "5" * 5000,
    "1_0",
    "",
    " ",
    "0x10",
    "1 2",
    "nan",
    "inf",
    "-inf",
    "Infinity",
    "½",
    "１",
    "--1",
    "\0",
]
NO_WHOLE = [*NO_NUMBERS, "1.0", "1e3", "."]
NO_NUMBER = [*NO_NUMBERS, ".", "1e", "1e99999", "1,5", "e5"]


@pytest.mark.parametrize("text", NO_WHOLE)
def test_what_is_no_whole_number_is_refused_in_one_short_line(text: str) -> None:
    assert not is_whole(text)
    with pytest.raises(ValueError) as refused:
        parse_whole(text, "seed")
    told = str(refused.value)
    assert told.startswith("seed=")
    assert "write digits from 0 to 9" in told
    assert len(told) < 200
    assert "\n" not in told


@pytest.mark.parametrize("text", NO_NUMBER)
def test_what_is_no_number_is_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_number(text)
    assert "write digits from 0 to 9" in str(refused.value)
    assert len(str(refused.value)) < 200


def test_a_number_that_no_float_holds_is_called_too_large() -> None:
    for text in ("1e999", "-1e999"):
        with pytest.raises(ValueError, match="too large"):
            parse_number(text)


@pytest.mark.parametrize(("text", "value"), [("0", 0), (" 12 ", 12), ("-3", -3), ("+4", 4), ("007", 7)])
def test_whole_numbers(text: str, value: int) -> None:
    assert parse_whole(text) == value
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("0.25", 0.25), (".5", 0.5), ("5.", 5.0), ("-1e-3", -0.001), ("2E2", 200.0)]
)
def test_numbers(text: str, value: float) -> None:
    assert parse_number(text) == value


def test_the_longest_number_is_one() -> None:
    assert parse_whole("9" * MAX_CHARACTERS) == int("9" * MAX_CHARACTERS)
    assert math.isfinite(parse_number("9" * MAX_CHARACTERS))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0,0.3,0.4", ["0", "0.3", "0.4"]),
        (" 0 , 80f,1.5s;last", ["0", "80f", "1.5s", "last"]),
        ("0，0.3、0.4 0.5\n1", ["0", "0.3", "0.4", "0.5", "1"]),
        ("0, 1,", ["0", "1"]),
        ("0,,1", ["0", "", "1"]),
        (" ", [""]),
        (",", [""]),
    ],
)
def test_a_list_has_commas_of_any_kind_or_blanks_between_its_values(text: str, parts: list[str]) -> None:
    assert split_list(text) == parts


def test_a_list_has_a_most_number_of_values() -> None:
    assert parse_numbers(",".join(["0"] * MAX_VALUES)) == [0.0] * MAX_VALUES
    with pytest.raises(ValueError, match="513 values are too many: give at most 512"):
        parse_numbers(",".join(["0"] * (MAX_VALUES + 1)))


@pytest.mark.parametrize("text", ["832x480", " 832 X 480 ", "832×480", "832*480"])
def test_a_size_is_width_by_height(text: str) -> None:
    assert parse_size(text) == (832, 480)


@pytest.mark.parametrize("text", ["", "832", "832x", "x480", "832x480x3", "-1x2", "1.5x2", "a" * 5000])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not understood: write WIDTHxHEIGHT in pixels") as refused:
        parse_size(text)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("text", ["²", "5" * 5000, "nan", "inf", "1_0", "٣"])
def test_the_command_line_says_what_is_wrong(text: str) -> None:
    for parse, given in (
        (parse_size, f"{text}x64"),
        (parse_numbers, f"0,{text}"),
        (parse_noise, f"0,{text}"),
        (parse_keyframe, f"a.png@{text}"),
        (parse_keyframe, f"a.png@0:{text}"),
    ):
        with pytest.raises(ValueError, match=r"is not (understood|a number)") as refused:
            parse(given)  # type: ignore[operator]
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("text", ["²", "5" * 5000, "0", "-1"])
def test_options_of_commands_say_what_is_wrong(text: str) -> None:
    for option, value in (("--clips-per-video", text), ("--part", f"{text}/4"), ("--part", f"1/{text}")):
        result = CliRunner().invoke(main, ["data", "prepare", ".", "out", "--model", "tiny", f"{option}={value}"])
        assert result.exit_code == 2
        [line] = result.stderr.splitlines()
        assert option in line
        assert len(line) < 250


def test_steps_of_an_evaluation_say_what_is_wrong() -> None:
    from pusa.cli.eval import evaluation

    command = next(name for name, one in evaluation.commands.items() if "--steps" in str([p.opts for p in one.params]))
    for text in ("²", "5" * 5000, "4,nan"):
        result = CliRunner().invoke(evaluation, [command, "--steps", text])
        assert result.exit_code == 2
        assert not isinstance(result.exception, ValueError)


def test_a_server_cannot_make_its_client_wait_for_ever() -> None:
    assert number_of("inf", 2.0) == number_of("nan", 2.0) == number_of("²", 2.0) == 2.0
    assert number_of("1.5", 2.0) == 1.5
