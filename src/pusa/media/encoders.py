"""Encode frames one at a time, one class per output format; `close` completes the file.

Opening a file imports PyAV, see `pusa.media.decoding`.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ClassVar, cast

import numpy as np
from PIL import ExifTags, GifImagePlugin, Image, PngImagePlugin

from pusa.media.source import MediaError

if TYPE_CHECKING:
    import av
    from av.video.stream import VideoStream

_X264_THREADS = 4  # x264's decisions depend on it: a fixed number writes the same bytes on any number of cores
_KEYFRAME_SECONDS = 2  # the most that a browser decodes to seek
_BT709 = 1  # ITU-T H.273: primaries, transfer and matrix share this code
_RGB_MATRIX = 0
_LIMITED_RANGE, _FULL_RANGE = 1, 2
_GIF_PALETTE_SIDE = 160
_CRF = 17  # x264's quality of a file that is open already
_PNG_COMPRESSION = 3  # of 9: half the time of the default 6
_WEBP_QUALITY = 90
_WEBP_EXIF_FLAG, _WEBP_XMP_FLAG = 0x08, 0x04
_MP4_XMP = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")  # Adobe's XMP specification, part 3
_PNG_XMP = "XML:com.adobe.xmp"


@dataclass(frozen=True)
class Output:
    """Parameters of an encoder; `text` is ASCII to store in the file, or None; `xmp` a packet in UTF-8, or empty."""

    path: Path
    width: int
    height: int
    fps: Fraction
    text: str | None
    crf: int
    lossless: bool
    xmp: bytes = b""
    file: BinaryIO | None = None
    """Open for writing and seeking: it is written instead of `path`."""

    @classmethod
    def to_file(
        cls, file: BinaryIO, width: int, height: int, fps: Fraction, xmp: bytes, *, lossless: bool = True
    ) -> Output:
        """Describe a file that is open already."""
        return cls(Path(), width, height, fps, text=None, crf=_CRF, lossless=lossless, xmp=xmp, file=file)


class Encoder(ABC):
    """Encode a file: `write` each frame, then `close`; `abandon` closes the file in any state, maybe broken."""

    largest: ClassVar[int]
    """Longest side in pixels that the format can hold."""
    even: ClassVar[bool] = False
    """True if width and height have to be even."""

    def __init__(self, output: Output):
        self.output = output
        self.frames = 0

    @abstractmethod
    def write(self, frame: np.ndarray) -> None:
        """Encode one uint8 frame [H, W, 3]."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def abandon(self) -> None: ...


class _FFmpegEncoder(Encoder):
    def __init__(self, output: Output, *, codec: str, pixels: str, container: dict[str, str], **options: object):
        super().__init__(output)
        import av
        from av.video.reformatter import VideoReformatter

        self._converter = VideoReformatter()
        target = output.file or str(output.path)
        self._container = av.open(target, "w", format=self.container_format, options=container)
        text_options = {name: str(value) for name, value in options.items()}
        self._stream = cast("VideoStream", self._container.add_stream(codec, rate=output.fps, options=text_options))
        self._stream.width, self._stream.height, self._stream.pix_fmt = output.width, output.height, pixels

    container_format: ClassVar[str]

    def write(self, frame: np.ndarray) -> None:
        import av

        self._container.mux(self._stream.encode(self._convert(av.VideoFrame.from_ndarray(frame, format="rgb24"))))
        self.frames += 1

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        import av

        with contextlib.suppress(av.FFmpegError):  # closing writes an index, which fails again where writing failed
            self._container.close()

    @abstractmethod
    def _convert(self, frame: av.VideoFrame) -> av.VideoFrame: ...


class Mp4Encoder(_FFmpegEncoder):
    container_format = "mp4"
    largest = 16384
    even = True

    muxing: ClassVar[dict[str, str]] = {"movflags": "+faststart"}
    speed: ClassVar[dict[str, str]] = {"preset": "medium"}

    def __init__(self, output: Output):
        super().__init__(
            output,
            codec="libx264rgb" if output.lossless else "libx264",
            pixels="rgb24" if output.lossless else "yuv420p",
            container={**self.muxing, "movie_timescale": str(_movie_timescale(output.fps))},
            crf=0 if output.lossless else output.crf,
            mbtree=0,  # x264's AVX-512 code for it reads memory it never wrote: equal frames would give unequal files
            **self.speed,
        )
        if output.text is not None:
            self._container.metadata["comment"] = output.text
        context = self._stream.codec_context
        context.thread_count = _X264_THREADS
        context.gop_size = max(1, round(_KEYFRAME_SECONDS * output.fps))
        context.color_primaries = context.color_trc = _BT709
        context.colorspace = _RGB_MATRIX if output.lossless else _BT709
        context.color_range = _FULL_RANGE if output.lossless else _LIMITED_RANGE

    def close(self) -> None:
        super().close()
        if not self.output.xmp:
            return
        if self.output.file is None:  # FFmpeg writes none
            append_mp4_xmp(self.output.path, self.output.xmp)
        else:
            self.output.file.seek(0, os.SEEK_END)
            self.output.file.write(_mp4_xmp_box(self.output.xmp))

    def _convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        if self.output.lossless:
            return frame
        from av.video.reformatter import Colorspace

        return self._converter.reformat(
            frame,
            format="yuv420p",
            src_color_range=_FULL_RANGE,
            dst_color_range=_LIMITED_RANGE,
            dst_colorspace=Colorspace.ITU709,
            interpolation="AREA",
        )


class GrowingMp4Encoder(Mp4Encoder):
    """Encode an MP4 whose fragments are on the disk as soon as the next frame is written."""

    muxing: ClassVar[dict[str, str]] = {
        "movflags": "+frag_every_frame+empty_moov+default_base_moof",
        "flush_packets": "1",
    }
    speed: ClassVar[dict[str, str]] = {"preset": "veryfast", "tune": "zerolatency"}


class LosslessEncoder(Mp4Encoder):
    """Encode an MP4 of any size without loss, quickly, to read it again; its index is at the end."""

    even = False
    muxing: ClassVar[dict[str, str]] = {}
    speed: ClassVar[dict[str, str]] = {"preset": "veryfast"}


def append_mp4_xmp(path: Path, packet: bytes) -> None:
    """Append an XMP packet to an MP4 file that has none: a box at the end moves no offset."""
    with path.open("ab") as file:
        file.write(_mp4_xmp_box(packet))


def _mp4_xmp_box(packet: bytes) -> bytes:
    return (24 + len(packet)).to_bytes(4, "big") + b"uuid" + _MP4_XMP + packet


def _movie_timescale(fps: Fraction) -> int:
    """Choose ticks per second that divide into whole frames: with 1000, 33 frames at 16 fps lose half a tick."""
    return fps.numerator if fps.numerator >= 1000 else fps.numerator * 1000


class WebPEncoder(_FFmpegEncoder):
    container_format = "webp"
    largest = 16383

    def __init__(self, output: Output):
        super().__init__(
            output,
            codec="libwebp_anim",
            pixels="bgra",
            container={"loop": "0"},
            lossless=int(output.lossless),
            quality=_WEBP_QUALITY,
        )

    def _convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        return self._converter.reformat(frame, format="bgra")

    def close(self) -> None:
        super().close()
        if self.output.text is None and not self.output.xmp:
            return
        if (file := self.output.file) is None:
            path = self.output.path
            path.write_bytes(_with_metadata(path.read_bytes(), self.output))
            return
        file.seek(0)
        content = _with_metadata(file.read(), self.output)
        file.seek(0)
        file.write(content)


def _with_metadata(webp: bytes, output: Output) -> bytes:
    """Add `output.text` to a WebP file as its EXIF image description, and `output.xmp` (FFmpeg's muxer stores none)."""
    flags, added = 0, b""
    if output.text is not None:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = output.text
        flags, added = _WEBP_EXIF_FLAG, _chunk(b"EXIF", exif.tobytes().removeprefix(b"Exif\0\0"))
    if output.xmp:
        flags, added = flags | _WEBP_XMP_FLAG, added + _chunk(b"XMP ", output.xmp)
    chunks = webp[12:]
    if chunks[:4] != b"VP8X":  # one frame alone is written without the header that can announce metadata
        size = (output.width - 1).to_bytes(3, "little") + (output.height - 1).to_bytes(3, "little")
        chunks = _chunk(b"VP8X", bytes(4) + size) + chunks
    body = b"WEBP" + chunks[:8] + bytes([chunks[8] | flags]) + chunks[9:] + added
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _chunk(name: bytes, payload: bytes) -> bytes:
    return name + len(payload).to_bytes(4, "little") + payload + bytes(len(payload) % 2)


class GifEncoder(Encoder):
    """Encode a GIF, 256 dithered colours per frame. Pillow's `save` would collect all frames; its parts do not."""

    largest = 65535

    def __init__(self, output: Output):
        super().__init__(output)
        self._file = output.file or output.path.open("wb")

    def write(self, frame: np.ndarray) -> None:
        image = Image.fromarray(frame)
        smaller = image.reduce(max(1, min(image.size) // _GIF_PALETTE_SIDE))  # counting colours is the slow part
        palette = smaller.quantize(256)
        image = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        if self.frames == 0:
            info = {"loop": 0, "comment": self.output.text}
            self._file.writelines(GifImagePlugin.getheader(image, info=info)[0])
            if self.output.xmp:
                self._file.write(_gif_xmp(self.output.xmp))
        shown = self._hundredths(self.frames + 1) - self._hundredths(self.frames)
        self._file.writelines(GifImagePlugin.getdata(image, duration=10 * shown, include_color_table=True))
        self.frames += 1

    def _hundredths(self, index: int) -> int:
        return round(100 * index / self.output.fps)  # rounding times, not durations, keeps the clip's length

    def close(self) -> None:
        self._file.write(b";")
        self.abandon()

    def abandon(self) -> None:
        if self.output.file is None:
            self._file.close()


def _gif_xmp(packet: bytes) -> bytes:
    """Wrap a packet in an application extension whose trailer leads any reader of sub-blocks to its end."""
    return b"!\xff\x0bXMP DataXMP" + packet + b"\x01" + bytes(range(255, -1, -1)) + b"\0"


class PngEncoder(Encoder):
    """Write one picture to one file."""

    largest = 65535

    def write(self, frame: np.ndarray) -> None:
        if self.frames:
            raise MediaError("a .png file holds one frame, and here is a second; name a folder or folder/%04d.png")
        self._save(frame, self.output.path)
        self.frames += 1

    def _save(self, frame: np.ndarray, path: Path) -> None:
        info = PngImagePlugin.PngInfo()
        if self.output.text is not None and self.frames == 0:
            info.add_text("comment", self.output.text)
        if self.output.xmp:
            info.add_itxt(_PNG_XMP, self.output.xmp.decode())
        Image.fromarray(frame).save(path, format="PNG", pnginfo=info, compress_level=_PNG_COMPRESSION)

    def close(self) -> None:
        """Each picture is complete once written."""

    def abandon(self) -> None:
        """Nothing stays open between pictures."""


class PngFolderEncoder(PngEncoder):
    """Write a folder of numbered pictures."""

    pattern = "%04d.png"

    def __init__(self, output: Output):
        super().__init__(output)
        output.path.mkdir()

    def write(self, frame: np.ndarray) -> None:
        self._save(frame, self.output.path / (self.pattern % self.frames))
        self.frames += 1
