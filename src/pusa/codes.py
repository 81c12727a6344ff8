"""Name errors and notes by stable codes with values, from which a page writes them in its visitor's language.

The message in English says the same, for logs, programs and people on the command line. A code stays what it is once it
is published; `ERRORS` and `NOTES` list them with the names of their values. Imports nothing.
"""

from collections.abc import Mapping
from typing import Any, Self


class CodedError(ValueError):
    """A mistake in a request.

    Args:
        code: one of `ERRORS`.
        message: for people, in English.
        values: those of the code's text, plain JSON.
    """

    def __init__(self, code: str, message: str, **values: Any) -> None:
        super().__init__(message)
        self.code, self.values = code, values

    def __reduce__(self) -> Any:
        return _coded_error, (type(self), self.code, str(self), self.values)


def _coded_error(kind: type[CodedError], code: str, message: str, values: Mapping[str, Any]) -> CodedError:
    return kind(code, message, **values)


class CodedText(str):
    """A note in English, with its code (one of `NOTES`) and the values of its text."""

    code: str
    values: dict[str, Any]

    def __new__(cls, code: str, message: str, **values: Any) -> Self:
        text = super().__new__(cls, message)
        text.code, text.values = code, values
        return text


def code_of(error: object, default: str = "") -> str:
    """Return the code of a `CodedError` or a `CodedText`; of anything else the default."""
    return str(getattr(error, "code", "") or default) if isinstance(error, CodedError | CodedText) else default


def detail_of(note: str) -> dict[str, Any]:
    """Return a note as plain JSON: its code ("" if it has none), values and message."""
    return {"code": code_of(note), "values": values_of(note), "message": str(note)}


def values_of(error: object) -> dict[str, Any]:
    """Return the values of a `CodedError` or a `CodedText`; none of anything else."""
    return dict(error.values) if isinstance(error, CodedError | CodedText) else {}
