"""Bring the frames of a video into the form in which they are shown: progressive and upright."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import av


class Deinterlacer:
    """Make a progressive frame of each interlaced one, for frames of one size and format."""

    def __init__(self, frame: av.VideoFrame):
        import av

        self._frame_of = frame.width, frame.height, frame.format.name
        self._graph = av.filter.Graph()
        source = self._graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base=str(frame.time_base or Fraction(1, 1000)),
            pixel_aspect="1/1",
        )
        deinterlace = self._graph.add("bwdif", "mode=send_frame:deint=interlaced")
        self._graph.link_nodes(source, deinterlace, self._graph.add("buffersink"))
        self._graph.configure()

    def fits(self, frame: av.VideoFrame) -> bool:
        return self._frame_of == (frame.width, frame.height, frame.format.name)

    def push(self, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
        """Give the next frame, None at the end, and yield those that are ready, in order."""
        import av

        self._graph.push(frame)
        while True:
            try:
                yield self._graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                return


@dataclass(frozen=True)
class Orientation:
    """Say how stored frames are turned and mirrored for display: transposed first, then flipped."""

    is_transposed: bool
    flips_rows: bool
    flips_columns: bool

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Orientation:
        """Read the display matrix of a frame, which maps x to a * x + c * y and y to b * x + d * y."""
        data: Any = frame.side_data.get("DISPLAYMATRIX")
        a, b, _, c, d = (1, 0, 0, 0, 1) if data is None else np.frombuffer(data, np.int32)[:5].tolist()
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, d < 0, a < 0)
        return cls(True, b < 0, c < 0)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return a view of an image [H, W, 3] as displayed."""
        image = image.swapaxes(0, 1) if self.is_transposed else image
        return image[:: -1 if self.flips_rows else 1, :: -1 if self.flips_columns else 1]
