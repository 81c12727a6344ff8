"""Read the metadata of uploads in a confined child process: ``python -m pusa.server.transfers.probe``.

The process reads one JSON line from its standard input, writes one JSON line for each file, and ends. Untrusted files
are decoded here and nowhere else in the server, with limits on memory, time and files.
"""

import json
import os
import resource
import sys
from typing import Any, BinaryIO

from pusa.media import DEFAULT_LIMITS, MediaError, MediaLimits, probe_image, probe_video
from pusa.media.source import open_source

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
    if expected_kind == "image" or (expected_kind is None and kind.holds != "video"):
        image = probe_image(file, limits=limits)
        size = {"width": image.width, "height": image.height, "frames": 1, "fps": None, "seconds": 0.0}
        return {"kind": "image", "suffix": _SUFFIXES[kind.decoder], **size}
    video = probe_video(file, limits=limits)
    return {
        "kind": "video",
        "suffix": _SUFFIXES[kind.decoder],
        "width": video.width,
        "height": video.height,
        "frames": video.frames,
        "fps": video.fps,
        "seconds": video.seconds,
    }


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
    for path, expected_kind in task["files"]:
        try:
            with open(path, "rb") as file:
                answer = probe_file(file, expected_kind, limits)
        except MediaError as error:
            answer = {"error": str(error)}
        except Exception as error:  # decoders raise anything, MemoryError included
            answer = {
                "error": f"the file cannot be read ({type(error).__name__}): it is damaged or needs too much memory"
            }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
