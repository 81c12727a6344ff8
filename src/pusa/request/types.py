"""Define the values that several fields of a request share."""

from typing import Annotated

from pydantic import AfterValidator, Field

from pusa.codes import CodedError
from pusa.fields import shown


def _check_text(text: str) -> str:
    """Refuse NUL and halves of surrogate pairs: neither can be stored with the result."""
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise CodedError(
            "invalid_text", f"{shown(text)} has a character that is not valid text: type it again", value=shown(text)
        )
    return text


Text = Annotated[str, AfterValidator(_check_text)]
FileReference = Annotated[Text, Field(min_length=1, max_length=4096)]
Multiplier = Annotated[float, Field(ge=0, le=1)]
