"""Parse JSON from clients after counting its values, so that a small body cannot take much memory or time.

Eight megabytes of ``[]`` would become hundreds of megabytes of lists in seconds. Counting takes no memory and stops at
the limit. Text that holds a file in base64 does not count.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from pusa.numerals import parse_number, parse_whole
from pusa.server.errors import ServiceError

__all__ = [
    "BASE64",
    "MAX_DEPTH",
    "MAX_PLAIN_BYTES",
    "MAX_VALUES",
    "PIECE_BYTES",
    "BodyBudget",
    "holds_file",
    "parse_json",
]

MAX_VALUES = 20_000
MAX_PLAIN_BYTES = 2**20
"""Limit for the bytes of a request that are neither a file part nor base64."""
MAX_DEPTH = 16
PIECE_BYTES = 2**20
"""Go through long text in such pieces: between two of them, but not within, other threads can run."""

_LONG_BYTES = 4096  # shorter strings always count, base64 or not
_COLON = re.compile(rb"[ \t\r\n]*:")
_TOKEN = re.compile(rb'[\[\]{},"]')
_DATA_URL = re.compile(rb"data:[^,]{0,250};base64,", re.IGNORECASE)
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_=\\ \r\n\t"
_BYTES_PER_ESCAPE = 16  # at most one escape in so many bytes: base64 with escaped slashes or line breaks has fewer
_QUOTE, _BACKSLASH = b'"', 0x5C


@dataclass
class BodyBudget:
    """Count down the values and bytes that a request may still have, over all its parts.

    Args:
        values: numbers, strings, lists, objects and names in JSON.
        plain_bytes: bytes outside of files and base64.
    """

    values: int = MAX_VALUES
    plain_bytes: int = MAX_PLAIN_BYTES

    def take_values(self, count: int = 1) -> None:
        """Take from `values`. Raises ServiceError (400) if too few are left."""
        self.values -= count
        if self.values < 0:
            raise ServiceError(
                400,
                "invalid_body",
                f"the request has more than {MAX_VALUES} values, the limit: send fewer, and files as parts or base64",
            )

    def take_plain(self, count: int) -> None:
        """Take from `plain_bytes`. Raises ServiceError (413) if too few are left."""
        self.plain_bytes -= count
        if self.plain_bytes < 0:
            raise ServiceError(
                413,
                "too_large",
                f"the request has more than {MAX_PLAIN_BYTES / 2**20:g} MiB besides files and base64, the limit: "
                "send less, and files as multipart/form-data",
            )

    def take_text(self, text: bytes | bytearray, start: int = 0, end: int | None = None) -> None:
        """Take the bytes of a string, unless it is a file in base64."""
        end = len(text) if end is None else end
        if end - start <= _LONG_BYTES or not holds_file(text, start, end):
            self.take_plain(end - start)


def holds_file(text: bytes | bytearray, start: int, end: int) -> bool:
    """Check whether a long string is base64, bare or in a data URL, escaped as JSON or not."""
    if text.count(b"\\", start, end) * _BYTES_PER_ESCAPE > end - start:
        return False
    if text[start : start + 5].lower() == b"data:":
        found = _DATA_URL.match(bytes(text[start : start + 300]).replace(b"\\/", b"/"))
        if found is None:
            return False
        comma = text.find(b",", start, end)
        start = comma + 1
    return all(not piece.translate(None, BASE64) for piece in _pieces(text, start, end))


def _pieces(text: bytes | bytearray, start: int, end: int) -> Iterator[bytes | bytearray]:
    for position in range(start, end, PIECE_BYTES):
        yield text[position : min(position + PIECE_BYTES, end)]


def parse_json(data: bytes | bytearray, budget: BodyBudget, what: str, param: str | None = None) -> Any:
    """Parse JSON. It may take 0.1 s: call it in a thread.

    Args:
        data: UTF-8; invalid bytes become U+FFFD.
        budget: what the request may still have; the values and bytes of `data` are taken from it.
        what: names the data in errors.
        param: the field that errors are about.

    Raises:
        ServiceError: 400 for invalid JSON, too many values or too deep nesting, 413 for too much text.
    """
    _count(data, budget, what, param)
    try:
        return json.loads(
            data.decode("utf-8", "replace"),
            parse_constant=_refuse_constant,
            parse_int=partial(parse_whole, name="a value"),
            parse_float=partial(parse_number, name="a value"),
        )
    except ValueError as error:  # a JSONDecodeError, or of one number
        fault = " is not JSON" if isinstance(error, json.JSONDecodeError) else ""
        raise ServiceError(400, "invalid_body", f"{what}{fault}: {str(error)[:200]}", param) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _count(data: bytes | bytearray, budget: BodyBudget, what: str, param: str | None) -> None:
    """Take the values and bytes of `data` from the budget.

    Invalid JSON is left to the parser, which builds no more than was counted before the error.
    """
    position = depth = 0
    while found := _TOKEN.search(data, position, position + budget.plain_bytes + 1):
        budget.take_plain(found.end() - position)
        position = found.end()
        token = found[0]
        if token in (b"]", b"}"):
            depth -= 1
            continue
        budget.take_values()
        if token == _QUOTE:
            end = _end_of_text(data, position, budget)
            if end < 0:
                return
            if _COLON.match(data, end + 1):
                budget.take_plain(end - position)  # names always count
            else:
                budget.take_text(data, position, end)
            position = end + 1
        elif token != b",":
            depth += 1
            if depth > MAX_DEPTH:
                raise ServiceError(400, "invalid_body", f"{what} is nested more than {MAX_DEPTH} deep", param)
    budget.take_plain(len(data) - position)


def _end_of_text(data: bytes | bytearray, start: int, budget: BodyBudget) -> int:
    """Find the quotation mark that ends a string; -1 if there is none."""
    position = start
    while (quote := data.find(_QUOTE, position)) >= 0:
        before = quote
        while before > start and data[before - 1] == _BACKSLASH:
            before -= 1
            budget.take_plain(1)  # each costs an iteration; base64 has none before a quotation mark
        if (quote - before) % 2 == 0:
            return quote
        budget.take_values()
        position = quote + 1
    return -1
