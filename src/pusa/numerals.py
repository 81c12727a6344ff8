"""Parse numbers, sizes and lists in text from outside: ASCII digits, bounded in length, and finite.

`int` and `float` take more than they should from strangers (``1_0``, digits of every script, ``nan``), raise on what
`str.isdigit` accepts (``²``), and take seconds over very long numbers.
"""

import math
import re

from pusa.codes import CodedError

__all__ = [
    "MAX_CHARACTERS",
    "MAX_VALUES",
    "check_noise_multiplier",
    "is_noise_multiplier",
    "is_whole",
    "parse_number",
    "parse_numbers",
    "parse_size",
    "parse_whole",
    "split_list",
]

MAX_CHARACTERS = 100
"""The most characters of a number, its sign counted: no field of a request needs more."""

MAX_VALUES = 512
"""The most values of a list in a request."""

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_SIZE = re.compile(r"\s*([0-9]{1,9})\s*[xX×*]\s*([0-9]{1,9})\s*")
_COMMAS = ",;，、"
_SEPARATOR = re.compile(rf"\s*[{_COMMAS}]\s*|\s+")


def is_whole(text: str) -> bool:
    """Tell whether `parse_whole` takes a text."""
    return len(text) <= MAX_CHARACTERS and _WHOLE.fullmatch(text) is not None


def parse_whole(text: str, name: str = "") -> int:
    """Parse a whole number; blanks around it do not count.

    Args:
        name: of the value, for the error.

    Raises:
        ValueError: the text is no whole number, or too long.
    """
    text = text.strip()
    if not is_whole(text):
        raise CodedError(
            "not_a_whole_number",
            f"{_described(text, name)} is not a whole number{_limit(text)}: write digits from 0 to 9, such as 12",
            field=name,
            value=text[:60],
        )
    return int(text)


def parse_number(text: str, name: str = "") -> float:
    """Parse a finite number, such as ``12``, ``0.25`` or ``1e-3``; blanks around it do not count.

    Args:
        name: of the value, for the error.

    Raises:
        ValueError: the text is no number, too long, or the number too large.
    """
    text = text.strip()
    value = float(text) if len(text) <= MAX_CHARACTERS and _NUMBER.fullmatch(text) else math.nan
    if math.isinf(value):
        raise CodedError(
            "not_a_number",
            f"{_described(text, name)} is too large: give a number below 1e308",
            field=name,
            value=text[:60],
        )
    if math.isnan(value):
        raise CodedError(
            "not_a_number",
            f"{_described(text, name)} is not a number{_limit(text)}: write digits from 0 to 9, such as 0.25",
            field=name,
            value=text[:60],
        )
    return value


def split_list(text: str) -> list[str]:
    """Split a text at commas, semicolons or blanks; those at its ends do not count.

    Returns:
        1..`MAX_VALUES` parts, an empty one between two commas and for an empty text.

    Raises:
        ValueError: the list is longer.
    """
    parts = _SEPARATOR.split(text.strip().strip(_COMMAS).strip())
    if len(parts) > MAX_VALUES:
        raise CodedError(
            "list_too_long",
            f"{len(parts)} values are too many: give at most {MAX_VALUES}",
            given=len(parts),
            limit=MAX_VALUES,
        )
    return parts


def parse_numbers(text: str) -> list[float]:
    """Parse a list such as ``0,0.3,0.4``. Raises ValueError."""
    return [parse_number(part) for part in split_list(text)]


def parse_size(text: str, name: str = "size") -> tuple[int, int]:
    """Parse ``832x480`` to (832, 480).

    Args:
        name: of the value, for the error.

    Raises:
        ValueError: the text is no size.
    """
    match = _SIZE.fullmatch(text) if len(text) <= MAX_CHARACTERS else None
    if match is None:
        raise CodedError(
            "size_unknown",
            f"{name} {_shown(text)} is not understood: write WIDTHxHEIGHT in pixels, such as 832x480",
            field=name,
            value=text[:60],
        )
    return int(match[1]), int(match[2])


def is_noise_multiplier(value: float) -> bool:
    """Tell whether a number is in 0..1."""
    return 0 <= value <= 1


def check_noise_multiplier(value: float) -> None:
    """Raise ValueError for a number outside 0..1."""
    if not is_noise_multiplier(value):
        raise CodedError("noise_outside", f"noise_multiplier={value:g} is outside 0..1", value=value)


def _described(text: str, name: str) -> str:
    return f"{name}={_shown(text)}" if name else _shown(text)


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 57 else text[:57] + "...")


def _limit(text: str) -> str:
    return f" of at most {MAX_CHARACTERS} characters" if len(text) > MAX_CHARACTERS else ""
