"""Say which part of a file is meant, and what comes of it: one frame of a clip, a piece of it, a region."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from pusa.codes import CodedError
from pusa.server.transfers.uploads import UploadInfo

_MAX_FPS = 1000.0  # that `pusa.media` writes, which the server's own process does not import
MIN_SIDE = 8  # pixels of a region
_TOLERANCE_SECONDS = 0.05  # by which a piece may end after its clip: players round times

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


@dataclass(frozen=True)
class Part:
    """A part of a file, as a client asks for it.

    Attributes:
        frame: a frame of a clip, as a picture; negative counts from the end.
        start, end: a piece of a clip in seconds; None: from its beginning, to its end.
        crop: left, top, width and height as fractions 0..1 of the upright picture.
    """

    frame: int | None = None
    start: float | None = None
    end: float | None = None
    crop: Sequence[float] | None = None

    def of(self, info: UploadInfo) -> "FoundPart":
        """Find the part in a file. Raises ValueError if the file has no such part."""
        box = None if self.crop is None else _box(self.crop, info.width, info.height)
        width, height = (info.width, info.height) if box is None else (box[2] - box[0], box[3] - box[1])
        made = replace(info, width=width, height=height, has_request=False)
        if info.kind == "image":
            if (self.frame, self.start, self.end) != (None, None, None):
                raise CodedError(
                    "part_of_picture", "frame, start and end are for clips, and this is a picture: leave them out"
                )
            return FoundPart(info, replace(made, suffix=".png"), box=box)
        if self.frame is not None:
            number = self.frame + (info.frames if self.frame < 0 else 0)
            if not 0 <= number < info.frames:
                raise CodedError(
                    "frame_outside",
                    f"frame={self.frame} is not there: the clip has {info.frames} frames, counted from 0",
                    frame=self.frame,
                    frames=info.frames,
                )
            still = replace(made, kind="image", suffix=".png", frames=1, fps=None, seconds=0.0)
            return FoundPart(info, still, box=box, first=number)
        first, frames = self._piece(info)
        piece = replace(made, suffix=".mp4", frames=frames, fps=rate_of(info), seconds=frames / rate_of(info))
        return FoundPart(info, piece, box=box, first=first)

    def _piece(self, info: UploadInfo) -> tuple[int, int]:
        """Return the first frame of the piece and the number of its frames."""
        start, end, fps = self.start or 0.0, self.end, rate_of(info)
        last = info.seconds + max(_TOLERANCE_SECONDS, 1 / fps)
        if start >= info.seconds:
            raise CodedError(
                "part_outside",
                f"start={start:g} is not before the end of the clip, which lasts {info.seconds:.4g} s",
                seconds=info.seconds,
            )
        if end is not None and end > last:
            raise CodedError(
                "part_outside",
                f"end={end:g} is after the end of the clip, which lasts {info.seconds:.4g} s",
                seconds=info.seconds,
            )
        first = min(round(start * fps), max(0, info.frames - 1))
        after = info.frames if end is None else min(round(end * fps), info.frames)
        return first, max(1, after - first)


@dataclass(frozen=True)
class FoundPart:
    """A part that is there: what it is of, what it will be, its region, and the first of its frames."""

    source: UploadInfo
    made: UploadInfo
    box: Box | None = None
    first: int = 0

    @property
    def is_whole(self) -> bool:
        """True if nothing is left out."""
        return self.box is None and self.made.kind == self.source.kind and self.made.frames == self.source.frames


def rate_of(info: UploadInfo) -> float:
    """Return the frame rate of a clip in frames per second."""
    return min(float(info.fps or 1.0), _MAX_FPS)


def exact_rate(fps: float) -> Fraction:
    """Return a frame rate as a fraction that video files can hold."""
    return Fraction(fps).limit_denominator(100_000)


def _box(crop: Sequence[float], width: int, height: int) -> Box | None:
    """Return a region in pixels; None for all of the picture."""
    left, top = round(crop[0] * width), round(crop[1] * height)
    right, bottom = round((crop[0] + crop[2]) * width), round((crop[1] + crop[3]) * height)
    right, bottom = min(right, width), min(bottom, height)
    if right - left < MIN_SIDE or bottom - top < MIN_SIDE:
        raise CodedError(
            "part_too_small",
            f"the region {right - left}x{bottom - top} of the {width}x{height} picture is too small: "
            f"{MIN_SIDE} pixels a side are the least",
            width=right - left,
            height=bottom - top,
            least=MIN_SIDE,
        )
    return None if (right - left, bottom - top) == (width, height) else (left, top, right, bottom)
