"""Prepare the file in which a video can be watched while it is made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pusa import media
from pusa.events import Note, Report
from pusa.request import ResolvedRequest


def growing_video(
    path: Path | None, request: ResolvedRequest, metadata: Mapping[str, Any] | None, report: Report
) -> media.GrowingVideo | None:
    """Return the file, or None where none is asked for; a note tells why it cannot be written."""

    def failed(reason: str) -> None:
        message = f"the video cannot be watched while it grows: {reason}"
        report(Note(message, code="not_growing", values={"reason": reason}))

    if path is None:
        return None
    try:
        return media.GrowingVideo(
            path,
            width=request.width,
            height=request.height,
            fps=request.fps,
            metadata=None if metadata is None else dict(metadata),
            failed=failed,
        )
    except (media.MediaError, ValueError) as error:
        failed(str(error))
        return None
