"""Mutate some thousand media files and give each to every reader: who answers with one line, and who does not?

    python benchmarks/hostile_media.py --count 3000

Small valid files of every format are damaged at random (seeded): cut short, bits flipped, runs overwritten, removed
or inserted, numbers made absurd, two files spliced. Each result goes through all readers, and what opens as a video is
also written again, so that a failing read interrupts a writer. A worker process does the reading: should a decoder
crash or hang, it is counted and the run goes on. The exit status is 0 only if every file was read or refused in one
line, and no file was left behind.
"""

import argparse
import io
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from pusa.media import (
    MediaError,
    VideoWriter,
    contact_sheet,
    iter_video,
    probe_video,
    read_image,
    read_metadata,
    read_video,
    thumbnail,
)

WIDTH, HEIGHT, FRAMES = 64, 48, 9
ABSURD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0)
HANG_SECONDS = 60
OUTCOMES = ("read", "refused", "unhandled", "crashed", "hung")


def moving_gradient() -> np.ndarray:
    """uint8 [F, H, W, 3]"""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frames = [np.stack([3 * x + 4 * i, 4 * y, 200 - x - y + 2 * i], axis=-1) for i in range(FRAMES)]
    return np.clip(frames, 0, 255).astype(np.uint8)


def samples(folder: Path) -> dict[str, bytes]:
    """One small valid file per format and codec."""
    frames = moving_gradient()
    files = {}
    for name, lossless in (("h264.mp4", False), ("rgb.mp4", True), ("animation.gif", False), ("animation.webp", False)):
        with VideoWriter(
            folder / name, width=WIDTH, height=HEIGHT, metadata={"prompt": "a cat" * 9}, lossless=lossless
        ) as writer:
            writer.write(frames)
        files[name] = (folder / name).read_bytes()
    for name, container, codec, pixels in (
        ("vp9.webm", "webm", "libvpx-vp9", "yuv420p"),
        ("mpeg4.mkv", "matroska", "mpeg4", "yuv420p"),
        ("mjpeg.avi", "avi", "mjpeg", "yuvj420p"),
        ("mpeg2.ts", "mpegts", "mpeg2video", "yuv420p"),
        ("prores.mov", "mov", "prores_ks", "yuv422p10le"),
    ):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=container, options={"fflags": "+bitexact"}) as output:  # no random ids
            stream: Any = output.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
            for frame in frames:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
            output.mux(stream.encode(None))
        files[name] = buffer.getvalue()
    for name, options in (
        ("picture.png", {}),
        ("picture.jpg", {"progressive": True}),
        ("picture.webp", {}),
        ("picture.bmp", {}),
    ):
        buffer = io.BytesIO()
        Image.fromarray(frames[0]).save(buffer, {"jpg": "JPEG"}.get(name[-3:], name.split(".")[1].upper()), **options)
        files[name] = buffer.getvalue()
    return files


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """`data` with one to three kinds of damage, in the first bytes, the headers or anywhere."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if len(result) < 8:
            break
        reach = rng.choice((64, 1024, len(result), len(result)))
        at = rng.randrange(min(reach, len(result) - 4))
        run = rng.randint(1, min(256, len(result) - at))
        match rng.randrange(8):
            case 0:
                del result[at:]
            case 1:
                for _ in range(rng.randint(1, 32)):
                    result[rng.randrange(min(reach, len(result)))] ^= 1 << rng.randrange(8)
            case 2:
                result[at : at + run] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * run
            case 3:
                result[at : at + run] = rng.randbytes(run)
            case 4:
                result[at:at] = rng.randbytes(run)
            case 5:
                del result[at : at + run]
            case 6:
                result[at : at + 4] = rng.choice(ABSURD).to_bytes(4, rng.choice(("big", "little")))
            case 7:
                result[at:] = other[min(at, len(other) // 2) :]
    return bytes(result)


def write_again(path: Path) -> None:
    """Copy a video frame by frame, as an extension does; what the reader raises goes through the writer."""
    info = probe_video(path)
    target = path.with_name("again.mp4")
    width, height = (min(side - side % 2, 1024) for side in (info.width, info.height))
    if width == 0 or height == 0:
        return
    try:
        with VideoWriter(target, width=width, height=height) as writer:
            for frame in iter_video(path, max_frames=32):
                writer.write(frame[None, :height, :width])
    finally:
        target.unlink(missing_ok=True)


READERS: dict[str, Callable[[Path], object]] = {
    "read_image": read_image,
    "probe_video": probe_video,
    "read_video": lambda path: read_video(path, fps=16, fit=(WIDTH, HEIGHT)),
    "read_metadata": read_metadata,
    "thumbnail": thumbnail,
    "contact_sheet": lambda path: contact_sheet(path, frames=4),
    "write_again": write_again,
}


def outcome(reader: str, path: Path) -> tuple[str, str]:
    """("read" | "refused" | "unhandled", message) of one reader on one file."""
    try:
        READERS[reader](path)
    except MediaError as error:
        message = str(error)
        clear = message and "\n" not in message and len(message) < 500
        return ("refused", message) if clear else ("unhandled", f"unclear message: {message!r}")
    except BaseException:
        return "unhandled", traceback.format_exc()
    return "read", ""


def examine(reader: str, path: Path) -> tuple[str, str, int]:
    """Runs in the worker: the outcome and the worker's peak memory in KiB."""
    return *outcome(reader, path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Worker:
    """One process that is replaced when it crashes or hangs."""

    def __init__(self) -> None:
        self.peak_kib = 0
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def run(self, reader: str, path: Path) -> tuple[str, str]:
        future = self._pool.submit(examine, reader, path)
        try:
            kind, message, peak_kib = future.result(timeout=HANG_SECONDS)
        except BrokenProcessPool:
            self._start()
            return "crashed", f"{reader} ended the process"
        except TimeoutError:
            for process in list(self._pool._processes.values()):
                process.kill()
            self._start()
            return "hung", f"{reader} took more than {HANG_SECONDS} s"
        self.peak_kib = max(self.peak_kib, peak_kib)
        return kind, message

    def close(self) -> None:
        self._pool.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3000, help="number of mutated files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    counts = {reader: Counter[str]() for reader in READERS}
    wrong, left_behind, refusals = [], set(), Counter[str]()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as room:
        originals = samples(Path(made))
        worker = Worker()
        for number in range(options.count):
            rng = random.Random(f"{options.seed}-{number}")
            name, data = rng.choice(list(originals.items()))
            path = Path(room) / name
            path.write_bytes(mutated(data, rng.choice(list(originals.values())), rng))
            for reader in READERS:
                kind, message = worker.run(reader, path)
                counts[reader][kind] += 1
                if kind not in ("read", "refused"):
                    wrong.append(f"--seed {options.seed}, file {number} ({name}), {reader}: {kind}\n{message}")
                elif kind == "refused":
                    refusals[message.split(";")[-1].strip()] += 1
            path.unlink()
            left_behind |= {left.name for left in Path(room).iterdir()}
        worker.close()
    seconds = time.monotonic() - started

    print(f"{'reader':<16}" + "".join(f"{kind:>12}" for kind in OUTCOMES))
    for reader, row in counts.items():
        print(f"{reader:<16}" + "".join(f"{row[kind]:>12}" for kind in OUTCOMES))
    total = sum(counts.values(), Counter[str]())
    print(f"{'all':<16}" + "".join(f"{total[kind]:>12}" for kind in OUTCOMES))
    print(f"\n{options.count} files in {seconds:.0f} s; peak memory of the reader {worker.peak_kib / 1024:.0f} MiB;")
    print(f"files left behind: {len(left_behind)}; ways out named most often:")
    for message, times in refusals.most_common(6):
        print(f"{times:>8}  {message}")
    for report in wrong[:5]:
        print("\n" + report, file=sys.stderr)
    summary = {
        "benchmark": "hostile_media",
        "files": options.count,
        "seed": options.seed,
        **{kind: total[kind] for kind in OUTCOMES},
        "left_behind": len(left_behind),
        "peak_mib": round(worker.peak_kib / 1024),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(summary))
    return 1 if wrong or left_behind else 0


if __name__ == "__main__":
    sys.exit(main())
