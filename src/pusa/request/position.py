"""Parse places in a video: a latent frame, a frame, a time or the end."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from pusa.codes import CodedError
from pusa.fields import shown
from pusa.numerals import split_list
from pusa.positions import latent_index_of


@dataclass(frozen=True)
class Position:
    """Name a place in a video: a latent frame (``3``), a frame (``80f``), a time (``1.5s``) or the end (``last``).

    Negative values count from the end: ``-1`` is the last latent frame, ``-1f`` the last frame, ``-0.5s`` half a second
    before the end.
    """

    unit: Literal["latent", "frame", "second"]
    value: int | float

    @classmethod
    def parse(cls, text: "int | str | Position") -> "Position":
        """Parse one position. Raises ValueError for anything but the grammar above."""
        if isinstance(text, Position):
            return text
        match = re.fullmatch(r"(-?\d{1,7})(f?)|(-?\d{1,7}(?:\.\d{1,3})?)s|last", _text(text).strip().lower(), re.ASCII)
        if match is None:
            raise CodedError(
                "position_unknown",
                f"position {shown(text)} is not understood: write a latent frame (3), a frame (80f), seconds (1.5s) "
                "or last; a negative one counts from the end",
                value=str(text)[:60],
            )
        whole, frame, seconds = match.groups()
        if seconds is not None:
            return cls("second", float(seconds) + 0.0)  # no minus zero
        if whole is None:
            return cls("latent", -1)
        return cls("frame" if frame else "latent", int(whole))

    def __str__(self) -> str:
        if self.unit == "second":
            return f"{self.value:.3f}".rstrip("0").rstrip(".") + "s"
        if self == Position("latent", -1):
            return "last"
        return f"{int(self.value)}{'f' if self.unit == 'frame' else ''}"

    def place(self) -> dict[str, Any]:
        """Return the position as an argument of `PusaCondition`."""
        return {{"latent": "latent_index", "frame": "frame_index", "second": "seconds"}[self.unit]: self.value}

    def latent_index(self, frames: int, fps: float, factor: int) -> int:
        """Return the index of the latent frame in a video of `frames` frames, of which each later one holds `factor`.

        Raises ValueError outside the video.
        """
        return latent_index_of(num_frames=frames, fps=fps, factor=factor, **self.place())


def parse_positions(text: str) -> list[Position]:
    """Parse positions with commas or blanks between them: ``0,1.5s,last``. Raises ValueError."""
    return [Position.parse(part) for part in split_list(text)]


def _text(value: Any) -> str:
    """Return a position as text; for anything but text and whole numbers, a text that is no position."""
    return str(value) if isinstance(value, str) or (type(value) is int and abs(value) < 10**9) else "?"


PositionField = Annotated[
    Position,
    PlainValidator(Position.parse),
    PlainSerializer(lambda p: int(p.value) if p.unit == "latent" and p.value != -1 else str(p)),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^(-?\d+f?|-?\d+(\.\d+)?s|last)$"}]}),
]
