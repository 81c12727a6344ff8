"""Open and identify media by the first bytes, within limits, before any decoder sees them.

Every reader opens its input here. The content decides the format, never the name, and a decoder only starts for the
format that the first bytes announce.
"""

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pusa.codes import CodedError

Source = str | os.PathLike[str] | bytes | BinaryIO


class MediaError(CodedError):
    """Media that cannot be read or written; the message is one line with the file, the reason and the way out.

    Args:
        values: those of the code's text; `name` is that of the file.
    """

    def __init__(self, message: str, code: str = "invalid_file", **values: Any) -> None:
        super().__init__(code, message, **values)


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """Limit the cost of one input. Readers refuse anything above, before they decode wherever the header suffices.

    `max_bytes` is the encoded size, `max_pixels` the area of one frame, `max_picture_pixels` that of one picture (a
    picture above `max_pixels` is read at a half, a third, ... of its size), `max_frames` and `max_seconds` the length
    of a video, `max_decode_seconds` the time spent in decoders (not in the code that consumes the frames), and
    `max_decoded_bytes` what a call that returns all frames at once may return.
    """

    max_bytes: int = 512 * 2**20
    max_pixels: int = 36_000_000  # one 8K frame
    max_picture_pixels: int = 110_000_000  # the largest sensors of phones
    max_frames: int = 20_000
    max_seconds: float = 1200.0
    max_decode_seconds: float = 120.0
    max_decoded_bytes: int = 4 * 2**30


DEFAULT_LIMITS = MediaLimits()


@dataclass(frozen=True)
class Kind:
    """A file format that first bytes announce.

    `decoder` is the Pillow format, or the FFmpeg demuxer of a video; `demuxer` is the latter for what holds both.
    """

    name: str
    holds: Literal["picture", "video", "both", "other"]
    decoder: str = ""
    demuxer: str = ""


_ANIMATED_PNG = Kind("an animated PNG", "both", "PNG", "apng")
_MP4 = Kind("an MP4 or MOV video", "video", "mov")
_SIGNATURES: tuple[tuple[re.Pattern[bytes], Kind], ...] = tuple(
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (rb"\x89PNG\r\n\x1a\n", Kind("a PNG picture", "picture", "PNG")),
        (rb"\xff\xd8\xff", Kind("a JPEG picture", "picture", "JPEG")),
        (rb"RIFF....WEBP", Kind("a WebP picture", "both", "WEBP")),
        (rb"BM.{4}\0\0\0\0", Kind("a BMP picture", "picture", "BMP")),
        (rb"GIF8[79]a", Kind("a GIF animation", "video", "gif")),
        (rb"....ftyp(....){0,12}avis", Kind("an animated AVIF", "both", "AVIF")),
        (rb"....ftyp(....){0,12}avif", Kind("an AVIF picture", "picture", "AVIF")),
        (rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", Kind("a HEIC picture", "picture", "HEIF")),
        (rb"....ftypM4A", Kind("an M4A sound file", "other")),
        (rb"....(ftyp|moov|mdat|wide|free|skip|pnot)", _MP4),
        (rb"\x1a\x45\xdf\xa3", Kind("a WebM or Matroska video", "video", "matroska")),
        (rb"RIFF....AVI ", Kind("an AVI video", "video", "avi")),
        (rb"OggS", Kind("an Ogg video", "video", "ogg")),
        (rb"\0\0\x01\xba", Kind("an MPEG video", "video", "mpeg")),
        (rb"G.{187}G|.{4}G.{191}G", Kind("an MPEG-TS video", "video", "mpegts")),
        (rb"RIFF....WAVE|ID3|\xff[\xfa\xfb\xf2\xf3]|fLaC", Kind("a sound file", "other")),
        (rb"PK\x03\x04", Kind("a ZIP archive", "other")),
        (rb"\x1f\x8b|7z\xbc\xaf|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", Kind("a compressed archive", "other")),
        (rb"%PDF", Kind("a PDF document", "other")),
        (rb"II\*\0|MM\0\*", Kind("a TIFF picture", "other")),
        (rb"\s*(<\?xml[^>]*>\s*)?<svg", Kind("an SVG drawing", "other")),
        (rb"\s*<(!doctype|!DOCTYPE|html|HTML|\?xml)", Kind("a web page", "other")),
        (rb"#EXTM3U|ffconcat", Kind("a playlist", "other")),
        (rb"FLV\x01", Kind("a Flash video (FLV)", "video")),
        (rb"\x30\x26\xb2\x75", Kind("a Windows Media video (WMV)", "video")),
        (rb"[\t\n\r\x20-\x7e]{16,}$", Kind("text", "other")),
    )
)
_UNKNOWN = Kind("of no kind known here", "other")
_MP4_BOXES = (
    b"ftyp",
    b"moov",
    b"mdat",
    b"moof",
    b"free",
    b"skip",
    b"wide",
    b"uuid",
    b"sidx",
    b"styp",
    b"mfra",
    b"meta",
)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters or more: "C:" is a drive
_SNIFFED_BYTES = 256
_MAX_PNG_CHUNKS = 1000  # before the picture

MAX_FPS = 1000
PICTURES = "PNG, JPEG, WebP, AVIF, HEIC or BMP"
VIDEOS = "MP4, MOV, WebM, MKV, AVI, MPEG, Ogg, GIF, WebP or animated PNG"


@dataclass(frozen=True)
class OpenSource:
    """An input that passed the first checks: `file` is at its start, `name` fits into a one-line message."""

    file: BinaryIO
    name: str
    kind: Kind
    size_bytes: int


def one_line(text: object, *, longest: int = 160) -> str:
    """Replace line breaks and control characters of `text` by spaces, and cut it to `longest` characters."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    return line if len(line) <= longest else line[: longest - 3] + "..."


@contextmanager
def open_source(source: Source, *, limits: MediaLimits, what: str) -> Iterator[OpenSource]:
    """Open `source` (path, bytes or a seekable binary file, which stays open) for reading from its first byte.

    `what` names the thing in messages ("picture", "video"). Raises FileNotFoundError for a missing file and
    MediaError for an address, a folder, a device, an empty file, or one above `limits.max_bytes`.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        with io.BytesIO(source) as file:
            yield _identify(file, f"the {what}", limits)
    elif isinstance(source, (str, os.PathLike)):
        path = _regular_file(os.fspath(source), what)
        with path.open("rb") as file:
            yield _identify(file, one_line(path), limits)
    elif hasattr(source, "read") and hasattr(source, "seek"):
        yield _identify(source, f"the {what}", limits)
    else:
        raise TypeError(f"a {what} comes from a path, bytes or a binary file, not from {type(source).__name__}")


def _regular_file(text: str, what: str) -> Path:
    name = one_line(text)
    path = Path(text)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if _ADDRESS.match(text):
            raise MediaError(f"{name}: only local files are read, no addresses; download the {what} first") from None
        raise FileNotFoundError(f"{name}: no such file; check the path of the {what}") from None
    except (OSError, ValueError) as error:  # a name too long, a null byte, a folder without permission
        reason = error.strerror if isinstance(error, OSError) else error
        raise MediaError(f"{name}: cannot be opened ({one_line(reason)}); check the path of the {what}") from error
    if stat.S_ISDIR(mode):
        raise MediaError(f"{name} is a folder; name a {what} in it")
    if not stat.S_ISREG(mode):
        raise MediaError(f"{name} is a device or a pipe; save the {what} as a file first")
    return path


def _identify(file: BinaryIO, name: str, limits: MediaLimits) -> OpenSource:
    size_bytes = file.seek(0, io.SEEK_END)
    if size_bytes == 0:
        raise MediaError(f"{name} is empty (0 bytes); copy or export it again", "file_empty", name=name)
    if size_bytes > limits.max_bytes:
        raise MediaError(
            f"{name} has {size_bytes / 2**20:.4g} MiB, the limit is {limits.max_bytes / 2**20:.4g} MiB;"
            " shorten it or compress it more",
            "file_too_large",
            name=name,
            mebibytes=size_bytes / 2**20,
            limit=limits.max_bytes / 2**20,
        )
    file.seek(0)
    head = file.read(_SNIFFED_BYTES)
    file.seek(0)
    kind = next((kind for pattern, kind in _SIGNATURES if pattern.match(head)), _UNKNOWN)
    if kind.decoder == "PNG" and _is_animated_png(file):
        kind = _ANIMATED_PNG
    if kind.holds == "video" and not kind.decoder:
        raise MediaError(
            f"{name} is {kind.name}, which is not read here; convert it to MP4",
            "format_not_read",
            name=name,
            format=kind.name,
        )
    return OpenSource(file, name, kind, size_bytes)


def _is_animated_png(file: BinaryIO) -> bool:
    """Look for the animation's header, which precedes the picture. Leaves `file` at its start."""
    name = b""
    file.seek(8)
    for _ in range(_MAX_PNG_CHUNKS):
        length, name = int.from_bytes(file.read(4), "big"), file.read(4)
        if name in (b"acTL", b"IDAT", b""):
            break
        file.seek(length + 4, io.SEEK_CUR)  # and the check sum
    file.seek(0)
    return name == b"acTL"


@contextmanager
def wrap_decoder_errors(name: str, kind: Kind) -> Iterator[None]:
    """Raise any error of a decoder as a MediaError of one line, with the cause chained.

    Mutated files make FFmpeg and Pillow raise nearly anything (EOFError, MemoryError, UnicodeDecodeError,
    AssertionError, struct.error and more), so every Exception is caught on purpose.
    """
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(
            f"{name}: looks like {kind.name} but cannot be decoded ({one_line(reason, longest=100)});"
            " it is damaged or cut short, export it again",
            "file_unreadable",
            name=name,
            format=kind.name,
        ) from error


def check_complete(media: OpenSource) -> None:
    """Raise MediaError for a video that ends before its headers say; FFmpeg often just stops there, without an error.

    MPEG, MPEG-TS and Ogg are streams that may end anywhere. Leaves `media.file` at its start.
    """
    match media.kind.demuxer or media.kind.decoder:
        case "mov" | "AVIF":
            end = _mp4_end(media)
        case "avi" | "WEBP":
            end = 8 + int.from_bytes(media.file.read(8)[4:], "little")
        case "matroska":
            end = _matroska_end(media)
        case "gif" | "apng" as demuxer:
            media.file.seek(max(0, media.size_bytes - 512))
            mark = b"\0;" if demuxer == "gif" else b"IEND\xaeB`\x82"  # the end of the last block, and the trailer
            if mark not in media.file.read():
                raise MediaError(
                    f"{media.name}: is cut short (its end mark is missing); copy or download it again",
                    "file_cut_short",
                    name=media.name,
                )
            end = media.size_bytes
        case _:
            end = media.size_bytes
    media.file.seek(0)
    if end > media.size_bytes:
        raise MediaError(
            f"{media.name}: is cut short ({media.size_bytes} of {end} bytes are there); copy or download it again",
            "file_cut_short",
            name=media.name,
        )


def _mp4_end(media: OpenSource) -> int:
    end = 0
    while end < media.size_bytes:
        media.file.seek(end)
        header = media.file.read(16)
        size = int.from_bytes(header[:4], "big")
        if size == 1:
            size = int.from_bytes(header[8:], "big")
        if size == 0 or header[4:8] not in _MP4_BOXES:  # "up to the end of the file", or padding behind the last box
            return media.size_bytes
        end += max(size, 8)
    return end


def _matroska_end(media: OpenSource) -> int:
    end = 0
    for _ in range(2):  # the EBML header, then the segment that holds all the rest
        media.file.seek(end + 4)
        first = int.from_bytes(media.file.read(1), "big")
        length = 9 - first.bit_length()  # bytes of this size field, the number of its leading zero bits plus one
        size = (first << 8 * (length - 1)) + int.from_bytes(media.file.read(length - 1), "big")
        size -= 1 << 7 * length  # the marker bit
        if length > 8 or size == (1 << 7 * length) - 1:  # no size field, or "unknown", as live recordings have
            return media.size_bytes
        end += 4 + length + size
    return end
