"""Numbers that people and programs write as text: ASCII digits, not too many of them, and finite.

`int` and `float` take more than they should from strangers (``1_0``, digits of every script, ``nan``), raise on what
`str.isdigit` has let through (``²``), and take seconds over very long numbers.
"""

import math
import re

__all__ = ["MAX_CHARACTERS", "is_whole", "parse_number", "parse_whole"]

MAX_CHARACTERS = 100
"""The most characters of a number, its sign counted: no field of a request needs more."""

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")


def is_whole(text: str) -> bool:
    """Tell whether `parse_whole` would take a text."""
    return len(text) <= MAX_CHARACTERS and _WHOLE.fullmatch(text) is not None


def parse_whole(text: str, what: str = "") -> int:
    """The whole number that a text says; blanks around it do not count.

    Args:
        what: name of the value, for the error.

    Raises:
        ValueError: it says none, or one that is too long.
    """
    text = text.strip()
    if not is_whole(text):
        raise ValueError(
            f"{_given(text, what)} is not a whole number{_why(text)}: write digits from 0 to 9, such as 12"
        )
    return int(text)


def parse_number(text: str, what: str = "") -> float:
    """The number that a text says, as `parse_whole` with ``0.25`` and ``1e-3`` too.

    Raises:
        ValueError: it says none, or one that is too long or too large.
    """
    text = text.strip()
    value = float(text) if len(text) <= MAX_CHARACTERS and _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{_given(text, what)} is not a number{_why(text)}: write digits from 0 to 9, such as 0.25")
    return value


def _given(text: str, what: str) -> str:
    shown = ascii(text if len(text) <= 57 else text[:57] + "...")
    return f"{what}={shown}" if what else shown


def _why(text: str) -> str:
    return f" of at most {MAX_CHARACTERS} characters" if len(text) > MAX_CHARACTERS else ""
