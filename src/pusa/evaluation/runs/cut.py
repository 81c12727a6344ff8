"""Cut a finished video to the frames that a measurement wants of it."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pusa import media


@dataclass(frozen=True)
class Cut:
    """Select the frames that an item keeps of the video that its request makes.

    A model makes 4n + 1 frames, and a continued video begins with what it continues: neither may be what is measured.

    Attributes:
        frames: number of frames to keep.
        before_end: the first of them is so many frames before the end of the video; None: it is the video's first.
        crf: quality of the file, x264's. 8 is finer than files are by default, so that frames stay what they were.

    Raises:
        ValueError: more frames are wanted than there are before the end.
    """

    frames: int
    before_end: int | None = None
    crf: int = 8

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.before_end is not None and self.before_end < self.frames):
            raise ValueError(
                f"a cut of {self.frames} frames that begins {self.before_end} before the end is not possible"
            )

    def as_json(self) -> dict[str, Any]:
        """Convert to plain JSON."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any] | None) -> "Cut | None":
        """Read what `as_json` made; None for None."""
        return None if values is None else cls(**values)


def cut_video(video: Path, cut: Cut) -> None:
    """Replace an .mp4 by the frames of a cut, with the metadata of the whole video.

    Frames are decoded and encoded again, at the quality of the cut. The request inside makes the whole video.

    Raises:
        MediaError: the file cannot be read.
        ValueError: it has fewer frames than the cut takes.
    """
    info = media.probe_video(video)
    count = info.frames
    start = 0 if cut.before_end is None else count - cut.before_end
    if start < 0 or start + cut.frames > count:
        raise ValueError(f"{video.name} has {count} frames: too few for {cut.frames} from frame {start} on")
    part = video.with_name(f"{video.stem}.cut{video.suffix}")
    with media.VideoWriter(
        part,
        width=info.width,
        height=info.height,
        fps=info.fps,
        metadata=media.read_metadata(video),
        xmp=media.read_xmp(video),
        crf=cut.crf,
    ) as writer:
        for frame in islice(media.iter_video(video), start, start + cut.frames):
            writer.write(frame[None])
    os.replace(part, video)
