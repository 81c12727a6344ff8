"""Read uploads in confined processes, forks of ``python -m pusa.server.transfers.probe``, see `readers`.

A fork reads one JSON line from its connection and ends after its answer: one JSON line for each of ``files``, or for
``make`` a JSON line and behind it the content of what was made. Untrusted files are decoded here and nowhere else in
the server, with limits on memory, time and files.
"""

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from io import BufferedWriter
from typing import Any, BinaryIO

from PIL import Image

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
    """Limit this process: `memory_bytes` and `cpu_seconds` from now on, no writing of files, no core dumps.

    Shortly after as many seconds by the clock it is killed, should the server not be there to do so.
    """
    with open("/proc/self/statm") as file:
        mapped_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + cpu_seconds
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    signal.alarm(cpu_seconds + 2)


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
    """Fork a reader for each connection that the server sends, until it ends."""
    _load_decoders()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets ended readers
    control = socket.socket(fileno=sys.stdin.fileno())
    while (received := socket.recv_fds(control, 1, 1))[1]:
        connection = socket.socket(fileno=received[1][0])
        if os.fork() == 0:
            control.close()
            with suppress(BrokenPipeError):  # the server has given up
                serve(connection)
            os._exit(0)
        connection.close()


def _load_decoders() -> None:
    import_module("av")
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif")


def serve(connection: socket.socket) -> None:
    """Do one task of a `Prober`."""
    with connection.makefile("rb") as source, connection.makefile("wb") as target:
        target.write(b"%d\n" % os.getpid())
        target.flush()
        line = source.readline()
        if not line:
            return
        task = json.loads(line)
        pixels = task["limits"].pop("max_pixels")
        frame_pixels = min(pixels, DEFAULT_LIMITS.max_pixels)
        limits = MediaLimits(max_pixels=frame_pixels, max_picture_pixels=pixels, **task["limits"])
        confine(task["memory_bytes"], task["cpu_seconds"])
        if "make" in task:
            answer, content = _answer(task["make"]["path"], partial(make, task=task["make"], limits=limits))
            _write(target, {**answer, "bytes": len(content)}, content)
            return
        for path, expected_kind in task["files"]:
            answer, _ = _answer(path, partial(_probed, expected_kind=expected_kind, limits=limits))
            _write(target, answer)


def _probed(file: BinaryIO, expected_kind: str | None, limits: MediaLimits) -> tuple[dict[str, Any], bytes]:
    return probe_file(file, expected_kind, limits), b""


def _answer(path: str, read: Callable[[BinaryIO], tuple[dict[str, Any], bytes]]) -> tuple[dict[str, Any], bytes]:
    try:
        with open(path, "rb") as file:
            return read(file)
    except MediaError as error:
        return {"error": str(error), "code": error.code, "values": error.values}, b""
    except Exception as error:  # decoders raise anything, MemoryError included
        reason = f"the file cannot be read ({type(error).__name__}): it is damaged or needs too much memory"
        return {"error": reason}, b""


def _write(target: BufferedWriter, answer: dict[str, Any], content: bytes = b"") -> None:
    target.write(json.dumps(answer).encode() + b"\n" + content)
    target.flush()


if __name__ == "__main__":
    main()
