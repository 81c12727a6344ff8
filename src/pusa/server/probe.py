"""The child process that looks at uploads: ``python -m pusa.server.probe``.

It reads one JSON line from its standard input, answers with one JSON line for each file, and ends. Decoders meet
strangers' bytes here and nowhere else in the server: whatever they do, a process with little memory, little time and
nothing to lose does it.
"""

import json
import os
import resource
import sys
from typing import Any, BinaryIO

from pusa.media import MediaError, MediaLimits, probe_video, read_image
from pusa.media.source import open_source

_SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "BMP": ".bmp",
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
    """Take away what looking at a file needs no more: memory beyond this, time, writing files, core dumps."""
    with open("/proc/self/statm") as file:
        mapped_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + cpu_seconds
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))


def look(file: BinaryIO, wanted: str | None, limits: MediaLimits) -> dict[str, Any]:
    """What a file is: ``kind``, ``suffix``, ``width``, ``height``, ``frames``, ``fps``, ``seconds``.

    Args:
        file: open for reading; messages name it "the picture" or "the video", as its path is nobody's business.
        wanted: "image" or "video" where the request says which; what may be both (WebP) is read as that.

    Raises:
        MediaError: neither, damaged, or above the limits.
    """
    with open_source(file, limits=limits, what=wanted or "file") as media:
        kind = media.kind
    file.seek(0)
    if kind.holds == "both" and wanted is None:
        wanted = "video" if _is_animated(file, limits) else "image"
        file.seek(0)
    if wanted == "image" or (wanted is None and kind.holds != "video"):
        image = read_image(file, limits=limits)
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
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:  # the server is gone, or needs no more
        return
    task = json.loads(line)
    limits = MediaLimits(**task["limits"])
    confine(task["memory_bytes"], task["cpu_seconds"])
    for path, wanted in task["files"]:
        try:
            with open(path, "rb") as file:
                answer = look(file, wanted, limits)
        except MediaError as error:
            answer = {"error": str(error)}
        except Exception as error:  # a decoder's own confusion, MemoryError included
            answer = {
                "error": f"the file cannot be read ({type(error).__name__}): it is damaged or needs too much memory"
            }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
