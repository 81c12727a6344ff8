"""Write an MP4 that can be watched while it grows: every frame is a fragment of its own, on the disk at once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pusa.media.encoders import GrowingMp4Encoder, Output
from pusa.media.source import MediaError, one_line
from pusa.media.writing import forget_unfinished, register_unfinished

_CRF = 23  # of something that is looked at once


class GrowingVideo:
    """Write frames to a file that lasts as long as the `with` block: the whole video has a file of its own.

    Players show what is there of it; the last frame follows with the next one. A failure (a full disk, for example)
    ends the file and is no error, as the video does not depend on it.

    Args:
        path: a file that does not exist, ending in ``.mp4``.
        width, height, fps, metadata: as for `VideoWriter`.
        failed: receives the reason of a failure.

    Raises:
        ValueError: another suffix, or sides that are odd.
        MediaError: the file exists.
    """

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: float,
        metadata: dict[str, Any] | None = None,
        failed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        if path.suffix.lower() != ".mp4" or width % 2 or height % 2:
            raise ValueError(f"{one_line(path)}, {width}x{height}: a growing video is an .mp4 with even sides")
        if path.exists():
            raise MediaError(f"{one_line(path)} is there already: remove it, or give the video another name")
        self.path, self._failed = path, failed
        self._output = Output(
            path=path,
            width=width,
            height=height,
            fps=Fraction(fps).limit_denominator(100_000),
            text=None if metadata is None else json.dumps(metadata),
            crf=_CRF,
            lossless=False,
        )
        self._encoder: GrowingMp4Encoder | None = None

    def __enter__(self) -> Self:
        register_unfinished(self.path)
        self._try(self._open)
        return self

    def _open(self) -> None:
        self._encoder = GrowingMp4Encoder(self._output)

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 frames [n, H, W, 3], any n."""

        def write_all() -> None:
            for frame in frames:
                if self._encoder is not None:
                    self._encoder.write(np.ascontiguousarray(frame))

        self._try(write_all)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        forget_unfinished(self.path)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, RuntimeError, ValueError) as error:  # PyAV's are of these kinds
            self._close()
            self._failed(str(error))

    def _close(self) -> None:
        if self._encoder is not None:
            self._encoder.abandon()
            self._encoder = None
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
