"""Define the types of query parameters: numbers are parsed as those in bodies are, see `pusa.numerals`."""

from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BeforeValidator

from pusa.numerals import parse_number, parse_whole


def _whole(text: Any) -> Any:
    return parse_whole(text) if isinstance(text, str) else text


def _number(text: Any) -> Any:
    return parse_number(text) if isinstance(text, str) else text


Whole = BeforeValidator(_whole)
Number = BeforeValidator(_number)

After = Annotated[str | None, Query(description="The last_id of the page before.")]
Limit = Annotated[int, Whole, Query(description="How many on a page.", ge=1, le=100)]
Order = Annotated[Literal["asc", "desc"], Query(description="asc: the oldest first.")]
