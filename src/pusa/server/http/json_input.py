"""JSON from clients: its values are counted before anything is built of them.

Eight megabytes of ``[]`` become hundreds of megabytes of lists, and take seconds. What is counted costs no memory, and
what is refused costs no more than the counting up to there. A long text that holds a file is let through as it is.
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from pusa.numerals import parse_number, parse_whole
from pusa.server.errors import ServiceError

__all__ = ["BASE64", "MAX_DEPTH", "MAX_PLAIN_BYTES", "MAX_VALUES", "Budget", "holds_file", "parsed"]

MAX_VALUES = 20_000
MAX_PLAIN_BYTES = 2**20
"""The most bytes of a request that are neither a file part nor base64."""
MAX_DEPTH = 16

_LONG_BYTES = 4096  # shorter texts count as they are, whatever they hold
_NAMES = re.compile(rb"[ \t\r\n]*:")
_SIGN = re.compile(rb'[\[\]{},"]')
_DATA_URL = re.compile(rb"data:[^,]{0,250};base64,", re.IGNORECASE)
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_=\\ \r\n\t"
_BYTES_PER_ESCAPE = 16  # base64 with escaped slashes or line breaks has fewer escapes than one in so many bytes
_QUOTE, _BACKSLASH = b'"', 0x5C


@dataclass
class Budget:
    """Count down the values and bytes that a request may still bring along, over all its parts.

    Args:
        values: numbers, texts, lists, objects and names in JSON.
        plain_bytes: outside of files and base64.
    """

    values: int = MAX_VALUES
    plain_bytes: int = MAX_PLAIN_BYTES

    def take_values(self, count: int = 1) -> None:
        """Raise ServiceError (400) for more than is left."""
        self.values -= count
        if self.values < 0:
            raise ServiceError(
                400,
                "invalid_body",
                f"the request has more than {MAX_VALUES} values, the limit: send fewer, and files as parts or base64",
            )

    def take_plain(self, count: int) -> None:
        """Raise ServiceError (413) for more than is left."""
        self.plain_bytes -= count
        if self.plain_bytes < 0:
            raise ServiceError(
                413,
                "too_large",
                f"the request has more than {MAX_PLAIN_BYTES / 2**20:g} MiB besides files and base64, the limit: "
                "send less, and files as multipart/form-data",
            )

    def take_text(self, text: bytes | bytearray, start: int = 0, end: int | None = None) -> None:
        """Count a text: a file in base64 is free."""
        end = len(text) if end is None else end
        if end - start <= _LONG_BYTES or not holds_file(text, start, end):
            self.take_plain(end - start)


def holds_file(text: bytes | bytearray, start: int, end: int) -> bool:
    """Tell whether a long text is base64, bare or in a data URL, as JSON or a form writes it."""
    if text.count(b"\\", start, end) * _BYTES_PER_ESCAPE > end - start:
        return False
    if text[start : start + 5].lower() == b"data:":
        found = _DATA_URL.match(bytes(text[start : start + 300]).replace(b"\\/", b"/"))
        if found is None:
            return False
        comma = text.find(b",", start, end)
        start = comma + 1
    return not text[start:end].translate(None, BASE64)


def parsed(data: bytes | bytearray, budget: Budget, what: str, param: str | None = None) -> Any:
    """The value that JSON says. It may take a tenth of a second: call it in a thread.

    Args:
        data: UTF-8; broken characters become a question mark's.
        budget: of the request; what is counted is taken from it.
        what: it is called in errors.

    Raises:
        ServiceError: 400 for what is not JSON, has too many values or is nested too deeply, 413 for too much text.
    """
    _count(data, budget, what, param)
    try:
        return json.loads(
            data.decode("utf-8", "replace"),
            parse_constant=_no_constant,
            parse_int=partial(parse_whole, name="a value"),
            parse_float=partial(parse_number, name="a value"),
        )
    except ValueError as error:
        raise ServiceError(400, "invalid_body", f"{what} is not JSON: {str(error)[:200]}", param) from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _count(data: bytes | bytearray, budget: Budget, what: str, param: str | None) -> None:
    """Take what a text holds from the budget. What is no JSON is left for the parser to refuse: it builds no more than
    was counted up to there."""
    position = depth = 0
    while found := _SIGN.search(data, position, position + budget.plain_bytes + 1):
        budget.take_plain(found.end() - position)
        position = found.end()
        sign = found[0]
        if sign in (b"]", b"}"):
            depth -= 1
            continue
        budget.take_values()
        if sign == _QUOTE:
            end = _end_of_text(data, position, budget)
            if end < 0:
                return
            if _NAMES.match(data, end + 1):
                budget.take_plain(end - position)  # a name holds no file
            else:
                budget.take_text(data, position, end)
            position = end + 1
        elif sign != b",":
            depth += 1
            if depth > MAX_DEPTH:
                raise ServiceError(400, "invalid_body", f"{what} is nested more than {MAX_DEPTH} deep", param)
    budget.take_plain(len(data) - position)


def _end_of_text(data: bytes | bytearray, start: int, budget: Budget) -> int:
    """Find the quotation mark that ends a text; -1 without one."""
    position = start
    while (quote := data.find(_QUOTE, position)) >= 0:
        before = quote
        while before > start and data[before - 1] == _BACKSLASH:
            before -= 1
            budget.take_plain(1)  # each is a step here: base64 has none before a quotation mark
        if (quote - before) % 2 == 0:
            return quote
        budget.take_values()
        position = quote + 1
    return -1
