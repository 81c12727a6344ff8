"""Write videos chunk by chunk with their request inside; a file appears under its name once it is complete."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pusa.fsutil import flush
from pusa.media.encoders import Encoder, GifEncoder, Mp4Encoder, Output, PngEncoder, PngFolderEncoder, WebPEncoder
from pusa.media.source import MAX_FPS, MediaError, one_line

_BY_SUFFIX: dict[str, type[Encoder]] = {
    ".mp4": Mp4Encoder,
    ".gif": GifEncoder,
    ".webp": WebPEncoder,
    ".png": PngEncoder,
    "": PngFolderEncoder,
}
_MIN_FPS = 0.1
_NUMBERED = re.compile(r"[^%]*%0?\d{0,2}d[^%]*\.png")


def to_uint8(frames: Any) -> np.ndarray:
    """Convert decoded frames to pixels: float [3, n, H, W] or [1, 3, n, H, W] in -1..1 -> uint8 [n, H, W, 3].

    Takes a NumPy array or a torch tensor (any device and float type; only the bytes leave the device). Values outside
    are clamped, halves are rounded to even. Raises ValueError for another shape and for NaN or infinity.
    """
    if frames.ndim == 5 and frames.shape[0] == 1:
        frames = frames[0]
    if frames.ndim != 4 or frames.shape[0] != 3:
        raise ValueError(f"frames of shape {list(frames.shape)} are not [3, n, H, W] or [1, 3, n, H, W]")
    is_numpy = isinstance(frames, np.ndarray)
    values = frames.astype(np.float32) if is_numpy else frames.detach().float()
    if not bool((abs(values) < np.inf).all()):
        raise ValueError("decoded frames hold NaN or infinity; decode with the VAE in float32")
    levels = ((values * 0.5 + 0.5).clip(0.0, 1.0) * 255.0).round()
    if is_numpy:
        return np.ascontiguousarray(levels.astype(np.uint8).transpose(1, 2, 3, 0))  # [n, H, W, 3]
    return levels.byte().permute(1, 2, 3, 0).contiguous().cpu().numpy()  # [n, H, W, 3]


_unfinished: set[Path] = set()


def register_unfinished(path: Path) -> None:
    """Let `discard_unfinished` remove a file, until `forget_unfinished`."""
    _unfinished.add(path)


def forget_unfinished(path: Path) -> None:
    """Undo `register_unfinished`."""
    _unfinished.discard(path)


def discard_unfinished() -> None:
    """Remove the temporary files of open writers, for a program about to end without unwinding its threads."""
    for temporary in list(_unfinished):
        _remove(temporary)


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


class VideoWriter:
    """Write frames to a video while the model generates them.

        with VideoWriter("clip.mp4", width=832, height=480, metadata=request) as writer:
            for chunk in chunks:
                writer.write(chunk)

    The suffix decides the format:

    - `.mp4`: H.264 that browsers play at once (yuv420p, BT.709, index in front). Width and height must be even.
    - `.gif`: at most 256 colours per frame, times rounded to GIF's 1/100 s.
    - `.webp`: animated; libwebp keeps the compressed frames, not the pixels, until the end, and shows a frame longer
      instead of storing a next one that hardly differs.
    - a folder (a name without suffix) or `folder/%04d.png`: one PNG per frame, counted from 0.
    - `.png`: one frame.

    Args:
        width, height: in pixels.
        fps: frames per second; Wan's models make 16.
        metadata: a JSON object for `read_metadata` (MP4 or GIF comment, WebP EXIF, PNG text of the first frame).
        xmp: an XMP packet in UTF-8, which goes into the file, or into each picture of a folder.
        seal: called with each complete file before it gets its name, to sign it; it may replace the file.
        crf: x264's quality, 0..51, lower is better.
        lossless: keep every pixel: MP4 as H.264 RGB, which browsers do not play, or WebP; PNG always does, GIF cannot.

    No more than the chunk at hand and the codec's look-ahead are held in memory. Everything goes to a hidden temporary
    name in the same folder, is flushed to the disk and renamed; after an exception, Ctrl-C included, nothing is left.

    Raises:
        ValueError: a format, size or rate that cannot be written.
        FileNotFoundError: the folder to write into is missing.
        MediaError: a folder has the name, or no frame was written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        width: int,
        height: int,
        fps: float | Fraction = 16.0,
        metadata: dict[str, Any] | None = None,
        xmp: bytes = b"",
        seal: Callable[[Path], None] | None = None,
        crf: int = 17,
        lossless: bool = False,
    ):
        self.path = Path(path)
        numbered = "%" in self.path.name
        suffix = self.path.suffix.lower()
        if suffix not in _BY_SUFFIX or (numbered and not _NUMBERED.fullmatch(self.path.name)):
            raise ValueError(f"{one_line(self.path)}: give .mp4, .gif, .webp, .png, a folder or folder/%04d.png")
        self._format = _BY_SUFFIX["" if numbered else suffix]
        self._pattern = self.path.name if numbered else None
        self._target = Path(os.path.abspath(self.path.parent if numbered else self.path))
        self._check_size(width, height)
        if not _MIN_FPS <= fps <= MAX_FPS:
            raise ValueError(f"fps={fps} is outside {_MIN_FPS}..{MAX_FPS}")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf={crf} is outside 0..51")
        if lossless and self._format is GifEncoder:
            raise ValueError("lossless=True: a GIF holds 256 colours per frame; give .mp4, .webp or PNG frames")
        self._check_target()
        self._output = Output(
            path=self._target.with_name(f".pusa-{secrets.token_hex(8)}.tmp"),
            width=width,
            height=height,
            fps=Fraction(fps).limit_denominator(100_000),
            text=None if metadata is None else json.dumps(metadata),  # ASCII, which every container keeps as it is
            crf=crf,
            lossless=lossless,
            xmp=xmp,
        )
        self._seal = seal
        self._encoder: Encoder | None = None

    def __enter__(self) -> Self:
        register_unfinished(self._output.path)
        try:
            self._encoder = self._format(self._output)
        except BaseException:
            self._discard()
            raise
        if isinstance(self._encoder, PngFolderEncoder) and self._pattern is not None:
            self._encoder.pattern = self._pattern
        return self

    @property
    def frames_written(self) -> int:
        return self._encoder.frames if self._encoder else 0

    def write(self, frames: np.ndarray) -> None:
        """Encode uint8 frames [n, H, W, 3], any n. Raises ValueError for another shape or dtype."""
        height, width = self._output.height, self._output.width
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (height, width, 3):
            raise ValueError(
                f"frames {frames.dtype} {list(frames.shape)} do not fit; uint8 [n, {height}, {width}, 3] is expected"
            )
        if self._encoder is None:
            raise RuntimeError("VideoWriter.write works inside its with block")
        for frame in frames:
            self._encoder.write(np.ascontiguousarray(frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        assert self._encoder is not None
        if self.frames_written == 0:
            raise MediaError(f"{one_line(self.path)}: no frame was written, so there is no video to keep")
        self._encoder.close()
        temporary = self._output.path
        files = sorted(temporary.glob("*.png")) if temporary.is_dir() else [temporary]
        if self._seal is not None:
            self._seal_all(files, self._seal)
        for path in dict.fromkeys((*files, temporary)):
            flush(path)
        os.replace(temporary, self._target)
        flush(self._target.parent)

    def _seal_all(self, files: list[Path], seal: Callable[[Path], None]) -> None:
        """Sign the files; keep the video under another name where that fails, as after an hour of work it must be."""
        try:
            for path in files:
                seal(path)
        except RuntimeError as error:
            kept = self._target.with_name(f"{self._target.stem}.unsigned{self._target.suffix}")
            if kept.is_dir():
                raise
            os.replace(self._output.path, kept)
            raise RuntimeError(f"{error}; the video is kept, unsigned, as {one_line(kept)}") from error

    def _discard(self) -> None:
        """Close the encoder and remove the temporary file, which a rename has already moved away."""
        temporary = self._output.path
        try:
            if self._encoder is not None:
                self._encoder.abandon()
        finally:
            _remove(temporary)
            forget_unfinished(temporary)

    def _check_size(self, width: int, height: int) -> None:
        largest = self._format.largest
        if not (1 <= width <= largest and 1 <= height <= largest):
            raise ValueError(f"size {width}x{height} is outside 1..{largest}, what this format holds")
        if self._format.even and (width % 2 or height % 2):
            raise ValueError(f"size {width}x{height} is odd; an mp4 needs even sides (Wan's are multiples of 16)")

    def _check_target(self) -> None:
        target = self._target
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{one_line(target.parent)}: no such folder; make it first")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise MediaError(f"{one_line(target.parent)} cannot be written to; name another folder")
        if self._format is PngFolderEncoder:
            if target.exists() and not (target.is_dir() and not any(target.iterdir())):
                raise MediaError(f"{one_line(target)} is there already and no empty folder; name another one")
        elif target.is_dir():
            raise MediaError(f"{one_line(target)} is a folder; name a file in it")
