"""Read videos as a player shows them, within limits, at the frame rate of the model."""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags

from pusa.media.decoding import Decoder, VideoInfo, open_container, open_video
from pusa.media.pictures import open_picture
from pusa.media.source import (
    DEFAULT_LIMITS,
    MAX_FPS,
    MediaError,
    MediaLimits,
    OpenSource,
    Source,
    open_source,
    wrap_decoder_errors,
)

_GIF_XMP = re.compile(rb"!\xff\x0bXMP DataXMP(.*?)\x01\xff\xfe", re.DOTALL)
_GIF_XMP_BYTES = 2**24  # of a file's start, where it is
_USUAL_TAGS = {"comment", "COMMENT", "xmp", "major_brand", "minor_version", "compatible_brands", "encoder", "language"}
_USUAL_TAGS |= {"handler_name", "vendor_id", "ENCODER", "DURATION"}
_TIME_STAMP_SECONDS = Fraction(1, 1000)  # Matroska rounds to these


def probe_video(source: Source, *, limits: MediaLimits = DEFAULT_LIMITS) -> VideoInfo:
    """Read a video's header and decode its first frame, so that a probed video is one that can be read.

    Raises as `iter_video` does.
    """
    with open_video(source, limits) as decoder:
        return decoder.info


def iter_video(
    source: Source,
    *,
    fps: float | Fraction | None = None,
    start_seconds: float = 0.0,
    max_frames: int | None = None,
    fit: tuple[int, int] | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Iterator[np.ndarray]:
    """Yield a video's frames, uint8 [H, W, 3], one at a time, upright and of one size.

    fps: None yields the frames as stored. A number yields, for each time start + k / fps, the frame shown then: each
        is held until the next one begins, however long. At a constant frame rate that is the nearest one (the earlier
        of two equally near). Frames are repeated or left out, never blended.
    start_seconds: exact to the frame; what lies before is decoded and dropped.
    fit: (width, height) in pixels; larger frames are scaled down while decoding until they just cover this size.

    Raises MediaError for what is no video, is damaged, or exceeds `limits`, FileNotFoundError for a missing file.
    """
    _check_arguments(fps, start_seconds, max_frames, fit)
    return _frames(source, fps, start_seconds, max_frames, fit, limits)


def read_video(
    source: Source,
    *,
    fps: float | Fraction | None = None,
    start_seconds: float = 0.0,
    max_frames: int | None = None,
    last_frames: int | None = None,
    fit: tuple[int, int] | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Read a video to uint8 [F, H, W, 3], see `iter_video`. `last_frames=n` keeps the last n at most.

    Raises MediaError as `iter_video` does, and if the result would exceed `limits.max_decoded_bytes`.
    """
    if max_frames is not None and last_frames is not None:
        raise ValueError("max_frames counts from the start, last_frames from the end; give one of them")
    _check_arguments(fps, start_seconds, max_frames, fit)
    _check_arguments(None, 0.0, last_frames, None, name="last_frames")
    if last_frames is None:
        return _stack(_frames(source, fps, start_seconds, max_frames, fit, limits), limits)
    with open_video(source, limits) as decoder:
        last = deque(_select(decoder, fps, start_seconds, None), maxlen=last_frames)  # not yet RGB, so half the size
        return _stack((decoder.rgb(frame, fit) for frame in last), limits)


def read_metadata(source: Source, *, limits: MediaLimits = DEFAULT_LIMITS) -> dict[str, Any] | None:
    """Read the JSON object that `VideoWriter` stored in a file (or in the first picture of a folder); None without one.

    Raises MediaError for what is neither picture nor video, FileNotFoundError for a missing file.
    """
    with _open_with_metadata(source, limits) as media:
        text = _stored_text(media, limits)
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):  # a comment of another program
        return None
    return stored if isinstance(stored, dict) else None


def read_xmp(source: Source, *, limits: MediaLimits = DEFAULT_LIMITS) -> bytes:
    """Read the XMP packet of a picture or a video (or of the first picture of a folder); empty without one.

    Raises as `read_metadata` does.
    """
    with _open_with_metadata(source, limits) as media:
        packet: bytes | str
        if media.kind.decoder == "gif":  # Pillow skips the packet
            found = _GIF_XMP.search(media.file.read(_GIF_XMP_BYTES))
            packet = found[1] if found else b""
        elif media.kind.holds in ("picture", "both"):
            with open_picture(media, limits.max_picture_pixels) as image:
                packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
        else:
            with open_container(media, limits) as container:
                packet = container.metadata.get("xmp", "")
    return packet.encode() if isinstance(packet, str) else bytes(packet)


def read_tag_names(source: Source, *, limits: MediaLimits = DEFAULT_LIMITS) -> list[str]:
    """List the names of a file's metadata: EXIF of a picture, with the position and the maker; tags of a video.

    The comment that `VideoWriter` writes and what every file has are left out. Raises as `read_metadata` does.
    """
    with _open_with_metadata(source, limits) as media:
        if media.kind.holds in ("picture", "both") or media.kind.decoder == "gif":
            with open_picture(media, limits.max_picture_pixels, decoder=media.kind.decoder.upper()) as image:
                exif = image.getexif()
                codes = {*exif, *exif.get_ifd(ExifTags.IFD.Exif)} - {ExifTags.Base.ImageDescription}
                names = {ExifTags.TAGS.get(code, f"EXIF {code}") for code in codes}
                return sorted(names | ({"ICC profile"} if "icc_profile" in image.info else set()))
        with open_container(media, limits) as container:
            tags = {*container.metadata, *(name for stream in container.streams for name in stream.metadata)}
            return sorted(tags - _USUAL_TAGS)


@contextmanager
def _open_with_metadata(source: Source, limits: MediaLimits) -> Iterator[OpenSource]:
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        source = first_picture(Path(source))
    with open_source(source, limits=limits, what="file") as media:
        if media.kind.holds == "other":
            raise MediaError(f"{media.name} is {media.kind.name}; only pictures and videos carry a request")
        with wrap_decoder_errors(media.name, media.kind):
            yield media


def first_picture(folder: Path) -> Path:
    """Return the first PNG by name in a folder of frames. Raises MediaError if there is none."""
    pictures = sorted(folder.glob("*.png"))
    if not pictures:
        raise MediaError(f"{folder} holds no PNG frames; name a video or a folder of frames")
    return pictures[0]


def _stored_text(media: OpenSource, limits: MediaLimits) -> str:
    if media.kind.holds in ("picture", "both") or media.kind.decoder == "gif":
        with open_picture(media, limits.max_picture_pixels, decoder=media.kind.decoder.upper()) as image:
            comment = image.info.get("comment") or image.getexif().get(ExifTags.Base.ImageDescription) or ""
            return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)
    with open_container(media, limits) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}  # Matroska writes COMMENT
        return tags.get("comment", "")


def _check_arguments(
    fps: float | Fraction | None,
    start_seconds: float,
    max_frames: int | None,
    fit: tuple[int, int] | None,
    *,
    name: str = "max_frames",
) -> None:
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps={fps} is outside 0..{MAX_FPS}")
    if not (isfinite(start_seconds) and start_seconds >= 0):
        raise ValueError(f"start_seconds={start_seconds} is not a time from the start (0 or more)")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"{name}={max_frames} is less than 1")
    if fit is not None and min(fit) < 1:
        raise ValueError(f"fit={fit} is not a size in pixels")


def _frames(
    source: Source,
    fps: float | Fraction | None,
    start_seconds: float,
    max_frames: int | None,
    fit: tuple[int, int] | None,
    limits: MediaLimits,
) -> Iterator[np.ndarray]:
    with open_video(source, limits) as decoder:
        for frame in _select(decoder, fps, start_seconds, max_frames):
            yield decoder.rgb(frame, fit)


def _select(
    decoder: Decoder, fps: float | Fraction | None, start_seconds: float, max_frames: int | None
) -> Iterator[Any]:
    """Yield the wanted frames, not converted yet; at least one, or MediaError."""
    start = Fraction(start_seconds)
    if fps is None:
        earliest = start - _TIME_STAMP_SECONDS
        selected: Iterator[Any] = (frame for seconds, frame in decoder.frames() if seconds >= earliest)
    else:
        step = 1 / Fraction(fps)
        selected = _shown(decoder, step, start)
    number = 0
    for number, frame in enumerate(islice(selected, max_frames), start=1):
        if number > decoder.limits.max_frames:
            raise MediaError(f"fps={fps} makes more than {decoder.limits.max_frames} frames, the limit; ask for fewer")
        yield frame
    if number == 0:
        name, seconds = decoder.media.name, decoder.info.seconds
        if start_seconds < seconds:
            raise MediaError(f"{name}: ends before {start_seconds:g} s, though it says {seconds:g} s; export it again")
        raise MediaError(f"start_seconds={start_seconds:g} is past the end of {name} ({seconds:g} s long)")


def _shown(decoder: Decoder, step: Fraction, start: Fraction) -> Iterator[Any]:
    """Yield the frame that is shown at each time start + k * step.

    A frame gives way up to half a frame before the next one begins (half the smallest interval so far, of the video or
    of the output): at a constant rate that picks the nearest frame, and rounded time stamps do not shift any.
    """
    wanted, interval = start, step
    shown: tuple[Fraction, Any] | None = None
    for time, frame in decoder.frames():
        if shown is not None:
            interval = min(interval, (time - shown[0]) or interval)
            while wanted <= time - interval / 2:
                yield shown[1]
                wanted += step
        shown = time, frame
    if shown is not None:
        end = decoder.end_seconds - step / 10  # a file's rounded time stamps must not add a frame at the end
        while wanted < end:
            yield shown[1]
            wanted += step


def _stack(frames: Iterable[np.ndarray], limits: MediaLimits) -> np.ndarray:
    """Stack frames to uint8 [F, H, W, 3]. One buffer grows in place: a list to stack would hold the video twice."""
    frames = iter(frames)
    first = next(frames)
    room = limits.max_decoded_bytes // first.nbytes

    def bounded() -> Iterator[np.ndarray]:
        yield first
        for number, frame in enumerate(frames, start=2):
            if number > room:
                raise MediaError(
                    f"{first.shape[1]}x{first.shape[0]} video of more than {room} frames passes the limit of"
                    f" {limits.max_decoded_bytes / 2**20:.0f} MiB; ask for fewer or smaller frames"
                )
            yield frame

    return np.fromiter(bounded(), dtype=np.dtype((np.uint8, first.shape)))
