"""Decode videos to frames with their times, within `MediaLimits`.

FFmpeg (PyAV) decodes everything but WebP, which Pillow does. Opening a file imports PyAV: without it, training and
everything else that opens no video still runs.
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, chain
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pusa.media.source import (
    VIDEOS,
    MediaError,
    MediaLimits,
    OpenSource,
    Source,
    check_complete,
    open_source,
    wrap_decoder_errors,
)

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

_CODECS = (
    "av1,dnxhd,ffv1,gif,h264,hevc,libdav1d,libvpx,libvpx-vp9,mjpeg,mpeg1video,mpeg2video,mpeg4,prores,theora,vp8,vp9"
)
_IO_BUFFER_BYTES = 256 * 1024
_TICKS_PER_SECOND = 1_000_000  # of a duration that a container names, in FFmpeg
_SILENT_RATE = Fraction(25)  # what FFmpeg assumes where a file names no frame rate


@dataclass(frozen=True)
class VideoInfo:
    """Facts from a video's header: pixels as displayed (upright); `frames` is an estimate where no count is stored."""

    width: int
    height: int
    fps: float
    frames: int
    seconds: float
    codec: str
    has_audio: bool


def check_pixels(name: str, width: int, height: int, limits: MediaLimits) -> None:
    """Raise MediaError unless a picture of width x height pixels is within `limits.max_pixels`."""
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{name}: {width}x{height} is {width * height / 1e6:.4g} megapixels,"
            f" the limit is {limits.max_pixels / 1e6:.4g}; scale it down first"
        )


@contextmanager
def open_picture(media: OpenSource, limits: MediaLimits, *, decoder: str | None = None) -> Iterator[Image.Image]:
    """Open `media` with Pillow and check its size; no pixel is decoded yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is the stricter one
        try:
            image = Image.open(media.file, formats=(decoder or media.kind.decoder,))
        except Image.DecompressionBombError as error:
            most = limits.max_pixels / 1e6
            raise MediaError(f"{media.name}: is far above the limit of {most:.4g} megapixels; scale it down") from error
    with image:
        check_pixels(media.name, image.width, image.height, limits)
        yield image


@contextmanager
def open_container(media: OpenSource, limits: MediaLimits) -> Iterator[InputContainer]:
    """Open `media` with the FFmpeg demuxer of its format: listed codecs only, and no other file or address."""
    import av

    container = av.open(
        media.file,
        "r",
        format=media.kind.decoder,
        options={
            "codec_whitelist": _CODECS,
            "protocol_whitelist": "none",
            "max_pixels": str(limits.max_pixels),
            "export_xmp": "1",  # of MP4 and MOV, as a tag
        },
        metadata_errors="replace",
        buffer_size=_IO_BUFFER_BYTES,
        timeout=limits.max_decode_seconds,
    )
    with container:
        yield container


@contextmanager
def open_video(source: Source, limits: MediaLimits) -> Iterator[Decoder]:
    """Open a decoder for `source`. Raises MediaError for what is no video, is damaged or exceeds `limits`."""
    with open_source(source, limits=limits, what="video") as media:
        if media.kind.holds not in ("video", "both"):
            way_out = "pass it as an image" if media.kind.holds == "picture" else f"give {VIDEOS}"
            raise MediaError(f"{media.name} is {media.kind.name}, not a video; {way_out}")
        check_complete(media)
        with WebPDecoder(media, limits) if media.kind.decoder == "WEBP" else FFmpegDecoder(media, limits) as decoder:
            yield decoder


class Decoder(ABC):
    """One open video. Call `frames` once; its frames are opaque, and `rgb` converts those that are needed."""

    info: VideoInfo
    last_frame_seconds: Fraction
    """Duration of the last frame."""

    def __init__(self, media: OpenSource, limits: MediaLimits):
        self.media = media
        self.limits = limits
        self._spent_seconds = 0.0
        self._shape: tuple[int, ...] = ()
        self._resources = ExitStack()

    def __enter__(self) -> Decoder:
        try:
            with self._timed():
                self._open()
            self._check_length(self.info.frames, self.info.seconds)
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._resources.close()

    def frames(self) -> Iterator[tuple[Fraction, Any]]:
        """Yield (seconds since the first frame, frame) in the order of display; times never decrease."""
        decoded = self._decode()
        last = Fraction(0)
        count = 0
        while True:
            with self._timed():
                timed = next(decoded, None)
            if timed is None:
                return
            count += 1
            last = max(last, timed[0])
            self._check_length(count, float(last))
            yield last, timed[1]

    def rgb(self, frame: Any, fit: tuple[int, int] | None) -> np.ndarray:
        """Convert `frame` to upright uint8 [H, W, 3]; scaled down to just cover a smaller `fit` (width, height).

        All frames of a video have one shape, or MediaError.
        """
        with self._timed():
            pixels = self._rgb(frame, fit)
        self._shape = self._shape or pixels.shape
        if pixels.shape != self._shape:
            raise MediaError(f"{self.media.name}: the frame size changes within the video; export it again at one size")
        return pixels

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _decode(self) -> Iterator[tuple[Fraction, Any]]: ...

    @abstractmethod
    def _rgb(self, frame: Any, fit: tuple[int, int] | None) -> np.ndarray: ...

    def _enter(self, context: AbstractContextManager[Any]) -> Any:
        return self._resources.enter_context(context)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        with wrap_decoder_errors(self.media.name, self.media.kind):
            yield
        self._spent_seconds += time.monotonic() - started
        if self._spent_seconds > self.limits.max_decode_seconds:
            raise MediaError(
                f"{self.media.name}: decoding takes longer than the limit of {self.limits.max_decode_seconds:g} s;"
                " shorten it or scale it down first"
            )

    def _check_length(self, frames: int, seconds: float) -> None:
        limits = self.limits
        if seconds > limits.max_seconds:
            raise MediaError(
                f"{self.media.name}: lasts {seconds:.6g} s, the limit is {limits.max_seconds:g} s;"
                " cut out the part you need"
            )
        if frames > limits.max_frames:
            raise MediaError(
                f"{self.media.name}: has {frames} frames, the limit is {limits.max_frames}; cut out the part you need"
            )


class FFmpegDecoder(Decoder):
    """Decode everything but WebP with PyAV. Frames are `av.VideoFrame`."""

    def _open(self) -> None:
        from av.video.reformatter import VideoReformatter

        container = self._enter(open_container(self.media, self.limits))
        stream = self._video_stream(container)
        rate = next((rate for rate in (stream.average_rate, stream.guessed_rate) if rate and rate > 0), _SILENT_RATE)
        frames, seconds = stream.frames, _header_seconds(container, stream)
        if seconds is None:  # a browser's MediaRecorder writes no duration: read all packets, then start again
            frames, seconds = _measure(container, stream, 1 / rate)
            self._resources.close()
            self.media.file.seek(0)
            container = self._enter(open_container(self.media, self.limits))
            stream = self._video_stream(container)
        self._scaler = VideoReformatter()
        self._pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
        self._decoded = self._decode_all(container, stream)
        first = next(self._decoded, None)
        if first is None:
            raise MediaError(f"{self.media.name}: holds no frame that can be decoded; export it again")
        self._first = first
        self.last_frame_seconds = 1 / rate
        width, height = self._upright_size(first)
        self.info = VideoInfo(
            width=width,
            height=height,
            fps=float(rate),
            frames=frames or max(1, round(seconds * rate)),
            seconds=float(seconds),
            codec=stream.codec_context.codec.canonical_name,
            has_audio=bool(container.streams.audio),
        )

    def _video_stream(self, container: InputContainer) -> VideoStream:
        from av.stream import Disposition

        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # no cover art
        if not streams:
            raise MediaError(f"{self.media.name}: has no video stream; give a file with moving pictures")
        context = streams[0].codec_context
        if context is None or context.codec.name not in _CODECS.split(","):
            codec = "unknown" if context is None else context.codec.canonical_name
            raise MediaError(f"{self.media.name}: its codec ({codec}) is not read here; export it as H.264 MP4")
        if context.width < 1 or context.height < 1:  # FFmpeg drops a size that is above its own or our limit
            most = f"{self.limits.max_pixels / 1e6:.4g} megapixels"
            raise MediaError(
                f"{self.media.name}: its frame size is unreadable or above {most}; export it again, smaller"
            )
        check_pixels(self.media.name, context.width, context.height, self.limits)
        context.options = {"max_pixels": str(self.limits.max_pixels)}  # the size may change in mid-stream
        return streams[0]

    def _decode_all(self, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
        for packet in container.demux(stream):
            for frame in packet.decode():
                check_pixels(self.media.name, *self._upright_size(frame), self.limits)
                yield frame

    def _decode(self) -> Iterator[tuple[Fraction, av.VideoFrame]]:
        zero, now = None, -self.last_frame_seconds
        for frame in chain([self._first], self._decoded):
            now += self.last_frame_seconds
            if frame.pts is not None and frame.time_base:
                stamp = frame.pts * frame.time_base
                zero = stamp - now if zero is None else zero
                now = stamp - zero
            yield now, frame

    def _upright_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        width = max(1, round(frame.width * self._pixel_aspect))  # anamorphic video is widened to square pixels
        return (frame.height, width) if _quarter_turns(frame) % 2 else (width, frame.height)

    def _rgb(self, frame: av.VideoFrame, fit: tuple[int, int] | None) -> np.ndarray:
        turns = _quarter_turns(frame)
        size = self._upright_size(frame)
        smaller = covering_size(size, fit)
        width, height = smaller[::-1] if turns % 2 else smaller
        interpolation = "BICUBIC" if size == smaller else "LANCZOS"
        rgb = self._scaler.reformat(frame, width, height, "rgb24", interpolation=interpolation)
        return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), turns))  # [H, W, 3]


class WebPDecoder(Decoder):
    """Decode animated WebP, which FFmpeg cannot, with Pillow, one frame at a time. Frames are Pillow images."""

    def _open(self) -> None:
        durations_ms = [ms or 100 for ms in _webp_durations_ms(self.media)] or [100]  # browsers show 0 ms for 100 ms
        self._image: Image.Image = self._enter(open_picture(self.media, self.limits))
        frames = getattr(self._image, "n_frames", 1)
        if frames != len(durations_ms):
            raise MediaError(f"{self.media.name}: {len(durations_ms)} of {frames} frames are there; export it again")
        self._starts_ms = [0, *accumulate(durations_ms)]
        self.last_frame_seconds = Fraction(durations_ms[-1], 1000)
        self.info = VideoInfo(
            width=self._image.width,
            height=self._image.height,
            fps=1000 * frames / self._starts_ms[-1],
            frames=frames,
            seconds=self._starts_ms[-1] / 1000,
            codec="webp",
            has_audio=False,
        )

    def _decode(self) -> Iterator[tuple[Fraction, Image.Image]]:
        for index in range(self.info.frames):
            self._image.seek(index)
            yield Fraction(self._starts_ms[index], 1000), self._image.convert("RGB")

    def _rgb(self, frame: Image.Image, fit: tuple[int, int] | None) -> np.ndarray:
        size = covering_size(frame.size, fit)
        return np.asarray(frame if size == frame.size else frame.resize(size, Image.Resampling.LANCZOS)).copy()


def covering_size(size: tuple[int, int], fit: tuple[int, int] | None) -> tuple[int, int]:
    """Return the smallest (width, height) of the aspect ratio of `size` that covers `fit`, never larger than `size`."""
    if fit is None:
        return size
    scale = max(Fraction(fit[0], size[0]), Fraction(fit[1], size[1]))
    return (ceil(size[0] * scale), ceil(size[1] * scale)) if scale < 1 else size


def _quarter_turns(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) % 4  # counterclockwise, as np.rot90 turns


def _header_seconds(container: InputContainer, stream: VideoStream) -> Fraction | None:
    if stream.duration is not None and stream.duration > 0 and stream.time_base:
        return stream.duration * stream.time_base
    if container.duration is not None and container.duration > 0:
        return Fraction(container.duration, _TICKS_PER_SECOND)
    return None


def _measure(container: InputContainer, stream: VideoStream, frame_seconds: Fraction) -> tuple[int, Fraction]:
    first = last = None
    frames = 0
    for packet in container.demux(stream):
        if packet.size:
            frames += 1
        if packet.pts is not None:
            first = packet.pts if first is None else min(first, packet.pts)
            last = packet.pts if last is None else max(last, packet.pts)
    if first is None or last is None or not stream.time_base:
        return frames, frames * frame_seconds
    return frames, (last - first) * stream.time_base + frame_seconds


def _webp_durations_ms(media: OpenSource) -> list[int]:
    durations_ms = []
    media.file.seek(12)
    while len(header := media.file.read(8)) == 8:
        body = media.file.tell()
        size = int.from_bytes(header[4:], "little")
        if header[:4] == b"ANMF":
            durations_ms.append(int.from_bytes(media.file.read(15)[12:], "little"))
        media.file.seek(body + size + size % 2)
    media.file.seek(0)
    return durations_ms
