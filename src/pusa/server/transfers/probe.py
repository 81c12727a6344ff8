"""Read the metadata of uploads in a confined child process: ``python -m pusa.server.transfers.probe``.

The process reads one JSON line from its standard input and ends after its answer: one JSON line for each of ``files``,
or for ``make`` a JSON line and behind it the content of what was made. Untrusted files are decoded here and nowhere
else in the server, with limits on memory, time and files.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

from pusa.media import DEFAULT_LIMITS, MediaError, MediaLimits, probe_image, probe_video, read_metadata
from pusa.media.source import open_source
from pusa.server.transfers.making import make

_SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "AVIF": ".avif",
    "HEIF": ".heic",
    "gif": ".gif",
    "mov": ".mp4",
    "matroska": ".mkv",
    "avi": ".avi",
    "ogg": ".ogv",
    "mpeg": ".mpg",
    "mpegts": ".ts",
}
_OPEN_FILES = 64


def confine(memory_bytes: int, cpu_seconds: int) -> None:
    """Limit this process: `memory_bytes` and `cpu_seconds` from now on, no writing of files, no core dumps."""
    with open("/proc/self/statm") as file:
        mapped_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + cpu_seconds
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))


def probe_file(file: BinaryIO, expected_kind: str | None, limits: MediaLimits) -> dict[str, Any]:
    """Read the fields of `pusa.server.transfers.uploads.UploadInfo`.

    Args:
        file: open for reading; messages call it "the picture" or "the video", since its path must not leak.
        expected_kind: "image", "video" or None; decides for formats that may be either (WebP, PNG, AVIF).

    Raises:
        MediaError: the file is neither, is damaged or exceeds a limit.
    """
    with open_source(file, limits=limits, what=expected_kind or "file") as media:
        kind = media.kind
    file.seek(0)
    if kind.holds == "both" and expected_kind is None:
        expected_kind = "video" if _is_animated(file, limits) else "image"
        file.seek(0)
    has_request = _has_request(file, limits)
    if expected_kind == "image" or (expected_kind is None and kind.holds != "video"):
        image = probe_image(file, limits=limits)
        size = {"width": image.width, "height": image.height, "frames": 1, "fps": None, "seconds": 0.0}
        return {"kind": "image", "suffix": _SUFFIXES[kind.decoder], **size, "has_request": has_request}
    video = probe_video(file, limits=limits)
    return {
        "kind": "video",
        "suffix": _SUFFIXES[kind.decoder],
        "width": video.width,
        "height": video.height,
        "frames": video.frames,
        "fps": video.fps,
        "seconds": video.seconds,
        "has_request": has_request,
    }


def _has_request(file: BinaryIO, limits: MediaLimits) -> bool:
    """Tell if pusa has stored the whole request in a file. Leaves the file at its start."""
    try:
        stored = read_metadata(file, limits=limits) or {}
    except MediaError:  # the picture or the video itself tells what is wrong
        stored = {}
    file.seek(0)
    return "pusa" in stored and isinstance(stored.get("request"), dict)


def _is_animated(file: BinaryIO, limits: MediaLimits) -> bool:
    try:
        return probe_video(file, limits=limits).frames > 1
    except MediaError:
        return False


def main() -> None:
    """Serve one request of a `Prober`."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:  # the server ended, or closed its spare child
        return
    task = json.loads(line)
    pixels = task["limits"].pop("max_pixels")
    frame_pixels = min(pixels, DEFAULT_LIMITS.max_pixels)
    limits = MediaLimits(max_pixels=frame_pixels, max_picture_pixels=pixels, **task["limits"])
    confine(task["memory_bytes"], task["cpu_seconds"])
    if "make" in task:
        answer, content = _answer(task["make"]["path"], partial(make, task=task["make"], limits=limits))
        _write({**answer, "bytes": len(content)}, content)
        return
    for path, expected_kind in task["files"]:
        answer, _ = _answer(path, partial(_probed, expected_kind=expected_kind, limits=limits))
        _write(answer)


def _probed(file: BinaryIO, expected_kind: str | None, limits: MediaLimits) -> tuple[dict[str, Any], bytes]:
    return probe_file(file, expected_kind, limits), b""


def _answer(path: str, read: Callable[[BinaryIO], tuple[dict[str, Any], bytes]]) -> tuple[dict[str, Any], bytes]:
    try:
        with open(path, "rb") as file:
            return read(file)
    except MediaError as error:
        return {"error": str(error)}, b""
    except Exception as error:  # decoders raise anything, MemoryError included
        reason = f"the file cannot be read ({type(error).__name__}): it is damaged or needs too much memory"
        return {"error": reason}, b""


def _write(answer: dict[str, Any], content: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + content)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
