"""Make the small pictures and videos that the media tests share."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from pusa.media import VideoWriter

HEIGHT, WIDTH = 96, 160
OUTPUTS = ("clip.mp4", "clip.gif", "clip.webp", "frames")


def moving_gradient(frames: int) -> np.ndarray:
    """Smooth and in motion: uint8 [F, H, W, 3]."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    images = [np.stack([x + 2 * i, 2 * y + i, 220 - x / 2 - i], axis=-1) for i in range(frames)]
    return np.clip(images, 0, 255).astype(np.uint8)


def grey_levels(levels: list[int]) -> np.ndarray:
    """One flat frame per level, so that a frame can be recognised: uint8 [F, 32, 32, 3]."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 32, 32, 3)).copy()


def write(path: Path, frames: np.ndarray, **options: object) -> Path:
    with VideoWriter(path, width=frames.shape[2], height=frames.shape[1], **options) as writer:  # type: ignore[arg-type]
        for start in range(0, len(frames), 4):
            writer.write(frames[start : start + 4])
    return path


def encode(
    frames: np.ndarray,
    *,
    container: str = "matroska",
    codec: str = "ffv1",
    pixels: str = "bgr0",
    times_ms: list[int] | None = None,
    fps: int = 25,
    options: dict[str, str] | None = None,
    stream: dict[str, str] | None = None,
) -> bytes:
    """A video by somebody else: any container and codec and their options, any time stamps."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options or {}) as output:
        track = output.add_stream(codec, rate=fps, options=stream or {})
        track.width, track.height, track.pix_fmt = frames.shape[2], frames.shape[1], pixels
        if times_ms:
            track.codec_context.time_base = Fraction(1, 1000)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)
            if times_ms:
                picture.pts, picture.time_base = times_ms[index], Fraction(1, 1000)
            output.mux(track.encode(picture))
        output.mux(track.encode(None))
    return buffer.getvalue()


def levels_of(frames: np.ndarray) -> list[int]:
    return [int(frame[16, 16, 0]) for frame in frames]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def picture_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    """`image` as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
