"""Decode videos to frames with their times, within `MediaLimits`.

FFmpeg (PyAV) decodes everything but WebP and AVIF, which Pillow does. Frames come out as a player shows them: upright,
progressive, in sRGB, transparency on white. Opening a file imports PyAV: without it, training and everything else that
opens no video still runs.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, chain
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pusa.codes import CodedText
from pusa.media.as_shown import Deinterlacer, Orientation
from pusa.media.color import FrameConverter, color_space_of, shows_transparency
from pusa.media.pictures import TRANSPARENCY_NOTE, check_pixels, is_transparent, on_white, open_picture, to_srgb
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
    "apng,av1,dnxhd,ffv1,gif,h264,hevc,libdav1d,libvpx,libvpx-vp9,mjpeg,mpeg1video,mpeg2video,mpeg4,prores,theora,"
    "vp8,vp9"
)
_PILLOW = ("WEBP", "AVIF")
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own ones drop transparency
_IO_BUFFER_BYTES = 256 * 1024
_TICKS_PER_SECOND = 1_000_000  # of a duration that a container names, in FFmpeg
_SILENT_RATE = Fraction(25)  # what FFmpeg assumes where a file names no frame rate
_INDEXED = ("mov", "matroska")  # demuxers that find a place without reading what lies before


@dataclass(frozen=True)
class VideoInfo:
    """Facts from a video's header: pixels as displayed (upright); `frames` is an estimate where no count is stored.

    `fps` is the average. `notes` say what reading the video converts.
    """

    width: int
    height: int
    fps: float
    frames: int
    seconds: float
    codec: str
    has_audio: bool
    notes: tuple[str, ...] = ()


@contextmanager
def open_container(media: OpenSource, limits: MediaLimits) -> Iterator[InputContainer]:
    """Open `media` with the FFmpeg demuxer of its format: listed codecs only, and no other file or address."""
    import av

    container = av.open(
        media.file,
        "r",
        format=media.kind.demuxer or media.kind.decoder,
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
            raise MediaError(
                f"{media.name} is {media.kind.name}, not a video; {way_out}",
                "not_a_video",
                name=media.name,
                format=media.kind.name,
            )
        check_complete(media)
        with (PillowDecoder if media.kind.decoder in _PILLOW else FFmpegDecoder)(media, limits) as decoder:
            yield decoder


class Decoder(ABC):
    """One open video. Call `frames` once, or once more after each `seek`; `rgb` converts those that are needed."""

    info: VideoInfo
    end_seconds: Fraction
    """Time at which the display of the last frame that `frames` has yielded ends."""

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
            raise MediaError(
                f"{self.media.name}: the frame size changes within the video; export it again at one size",
                "frame_size_changes",
                name=self.media.name,
            )
        return pixels

    def seek(self, seconds: Fraction) -> bool:
        """Let the next call of `frames` begin shortly before a time; return False where the format has no way to."""
        return False

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
                " shorten it or scale it down first",
                "decoding_too_slow",
                name=self.media.name,
                limit=self.limits.max_decode_seconds,
            )

    def _check_length(self, frames: int, seconds: float) -> None:
        limits = self.limits
        if seconds > limits.max_seconds:
            raise MediaError(
                f"{self.media.name}: lasts {seconds:.6g} s, the limit is {limits.max_seconds:g} s;"
                " cut out the part you need",
                "video_too_long",
                name=self.media.name,
                seconds=seconds,
                limit=limits.max_seconds,
            )
        if frames > limits.max_frames:
            raise MediaError(
                f"{self.media.name}: has {frames} frames, the limit is {limits.max_frames}; cut out the part you need",
                "video_too_many_frames",
                name=self.media.name,
                frames=frames,
                limit=limits.max_frames,
            )


class FFmpegDecoder(Decoder):
    """Decode with PyAV. Frames are `av.VideoFrame`, progressive."""

    def _open(self) -> None:
        container = self._enter(open_container(self.media, self.limits))
        stream = self._video_stream(container)
        rate = next((rate for rate in (stream.average_rate, stream.guessed_rate) if rate and rate > 0), _SILENT_RATE)
        frames, seconds = stream.frames, _header_seconds(container, stream)
        # A browser's MediaRecorder writes no duration, and a trimmed MP4 counts the frames that its edit list hides.
        if seconds is None or (self.media.kind.decoder == "mov" and frames and abs(frames - seconds * rate) > 1):
            frames, measured = _measure(container, stream, 1 / rate)  # reads all packets
            seconds = measured if seconds is None else seconds
            container, stream = self._open_again()
        self._container, self._stream = container, stream
        self._zero: Fraction | None = None
        self._interval, self._pixel_aspect = 1 / rate, stream.sample_aspect_ratio or Fraction(1)
        # These state no duration of a frame, or a wrong one; the last one is held until the end.
        keeps_last = self.media.kind.decoder in ("avi", "matroska") and not container.streams.audio
        self._least_end = seconds if keeps_last else Fraction(0)
        self._is_interlaced = False
        self._orientation: Orientation | None = None
        first = self._start_decoding()
        if first is None:
            raise MediaError(
                f"{self.media.name}: holds no frame that can be decoded; export it again",
                "no_frames",
                name=self.media.name,
            )
        space = color_space_of(first, self.media.name)
        self._converter = FrameConverter(space)
        width, height = self._upright_size(first)
        notes = (
            space.note,
            CodedText("input_deinterlaced", "it is interlaced and was deinterlaced") if self._is_interlaced else None,
            TRANSPARENCY_NOTE if shows_transparency(first) else None,
        )
        self.info = VideoInfo(
            width=width,
            height=height,
            fps=float(rate),
            frames=frames or max(1, round(seconds * rate)),
            seconds=float(seconds),
            codec=stream.codec_context.codec.canonical_name,
            has_audio=bool(container.streams.audio),
            notes=tuple(note for note in notes if note),
        )

    def _open_again(self) -> tuple[InputContainer, VideoStream]:
        self._resources.close()
        self.media.file.seek(0)
        container = self._enter(open_container(self.media, self.limits))
        return container, self._video_stream(container)

    def _start_decoding(self) -> av.VideoFrame | None:
        """Decode from where the container is; return the first frame, which `_decode` yields again."""
        self._decoded = self._progressive(self._decode_all(self._container, self._stream))
        self._first = next(self._decoded, None)
        return self._first

    def seek(self, seconds: Fraction) -> bool:
        first, unit = self._first, self._stream.time_base
        if self.media.kind.decoder not in _INDEXED or first is None or not unit:
            return False
        first_time = _time_of(first)
        if first_time is None:
            return False
        with self._timed():
            zero = first_time if self._zero is None else self._zero
            self._container.seek(floor((zero + seconds) / unit), stream=self._stream)
            found, self._zero = self._start_decoding(), zero
            time = None if found is None else _time_of(found)
            if time is None or time > zero + seconds:  # a gap in the index
                self._container, self._stream = self._open_again()
                self._start_decoding()
        return True

    def _video_stream(self, container: InputContainer) -> VideoStream:
        from av.stream import Disposition

        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # no cover art
        if not streams:
            raise MediaError(
                f"{self.media.name}: has no video stream; give a file with moving pictures",
                "no_frames",
                name=self.media.name,
            )
        context = streams[0].codec_context
        if context is None or context.codec.name not in _CODECS.split(","):
            codec = "unknown" if context is None else context.codec.canonical_name
            raise MediaError(
                f"{self.media.name}: its codec ({codec}) is not read here; export it as H.264 MP4",
                "codec_not_read",
                name=self.media.name,
                codec=codec,
            )
        if context.width < 1 or context.height < 1:  # FFmpeg drops a size that is above its own or our limit
            most = f"{self.limits.max_pixels / 1e6:.4g} megapixels"
            raise MediaError(
                f"{self.media.name}: its frame size is unreadable or above {most}; export it again, smaller"
            )
        check_pixels(self.media.name, context.width, context.height, self.limits.max_pixels)
        context.options = {"max_pixels": str(self.limits.max_pixels)}  # the size may change in mid-stream
        return streams[0]

    def _decode_all(self, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
        context = stream.codec_context
        tags = {key.lower(): value for key, value in stream.metadata.items()}  # muxers differ in case
        if tags.get("alpha_mode") == "1" and context.name in _ALPHA_DECODERS:
            context = self._alpha_context(_ALPHA_DECODERS[context.name])
        for packet in container.demux(stream):
            for frame in context.decode(packet):
                check_pixels(self.media.name, *self._upright_size(frame), self.limits.max_pixels)
                yield frame

    def _alpha_context(self, decoder: str) -> Any:
        from av.video.codeccontext import VideoCodecContext

        context = VideoCodecContext.create(decoder, "r")
        context.options = {"max_pixels": str(self.limits.max_pixels)}
        return context

    def _progressive(self, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """Deinterlace from the first interlaced frame on."""
        deinterlacer = None
        for frame in frames:
            if deinterlacer is not None and not deinterlacer.fits(frame):
                yield from deinterlacer.push(None)
                deinterlacer = None
            if deinterlacer is None and frame.interlaced_frame:
                self._is_interlaced = True
                deinterlacer = Deinterlacer(frame)
            if deinterlacer is None:
                yield frame
            else:
                yield from deinterlacer.push(frame)
        if deinterlacer is not None:
            yield from deinterlacer.push(None)

    def _decode(self) -> Iterator[tuple[Fraction, av.VideoFrame]]:
        zero, self.end_seconds = self._zero, Fraction(0)
        for frame in chain([self._first] if self._first else [], self._decoded):
            now = self.end_seconds
            if frame.pts is not None and frame.time_base:
                stamp = frame.pts * frame.time_base
                zero = stamp - now if zero is None else zero
                now = stamp - zero
            if frame.duration and frame.time_base:
                seconds = frame.duration * frame.time_base
            else:
                seconds = self._interval
            self.end_seconds = now + seconds
            yield now, frame
        self.end_seconds = max(self.end_seconds, self._least_end)

    def _upright_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        width = max(1, round(frame.width * self._pixel_aspect))  # anamorphic video is widened to square pixels
        self._orientation = self._orientation or Orientation.of(frame)
        return (frame.height, width) if self._orientation.is_transposed else (width, frame.height)

    def _rgb(self, frame: av.VideoFrame, fit: tuple[int, int] | None) -> np.ndarray:
        size = self._upright_size(frame)
        smaller = covering_size(size, fit)
        assert self._orientation is not None
        width, height = smaller[::-1] if self._orientation.is_transposed else smaller
        rgb = self._converter.rgb(frame, width, height, "BICUBIC" if size == smaller else "LANCZOS")
        return np.ascontiguousarray(self._orientation.apply(rgb))  # [H, W, 3]


class PillowDecoder(Decoder):
    """Decode animated WebP and AVIF with Pillow: FFmpeg reads no WebP, and no transparency of AVIF.

    Decodes one frame at a time; frames are Pillow images.
    """

    def _open(self) -> None:
        is_webp = self.media.kind.decoder == "WEBP"
        durations_ms = _webp_durations_ms(self.media) if is_webp else []
        self._image: Image.Image = self._enter(open_picture(self.media, self.limits.max_pixels))
        frames = getattr(self._image, "n_frames", 1)
        self._check_length(frames, 0.0)
        if not is_webp:
            durations_ms = list(self._read_durations_ms(frames))
        durations_ms = [ms or 100 for ms in durations_ms] or [100]  # browsers show 0 ms for 100 ms
        if frames != len(durations_ms):
            raise MediaError(f"{self.media.name}: {len(durations_ms)} of {frames} frames are there; export it again")
        self._starts_ms = [0, *accumulate(durations_ms)]
        opened, notes = to_srgb(self._image)
        if is_transparent(opened):
            notes = (*notes, TRANSPARENCY_NOTE)
        self.info = VideoInfo(
            width=self._image.width,
            height=self._image.height,
            fps=1000 * frames / self._starts_ms[-1],
            frames=frames,
            seconds=self._starts_ms[-1] / 1000,
            codec="webp" if is_webp else "av1",
            has_audio=False,
            notes=notes,
        )

    def _read_durations_ms(self, frames: int) -> Iterator[int]:
        for index in range(frames):
            self._image.seek(index)
            self._image.load()
            yield round(self._image.info.get("duration", 0))

    def _decode(self) -> Iterator[tuple[Fraction, Image.Image]]:
        for index in range(self.info.frames):
            self._image.seek(index)
            self.end_seconds = Fraction(self._starts_ms[index + 1], 1000)
            yield Fraction(self._starts_ms[index], 1000), on_white(to_srgb(self._image)[0])

    def _rgb(self, frame: Image.Image, fit: tuple[int, int] | None) -> np.ndarray:
        size = covering_size(frame.size, fit)
        return np.asarray(frame if size == frame.size else frame.resize(size, Image.Resampling.LANCZOS)).copy()


def covering_size(size: tuple[int, int], fit: tuple[int, int] | None) -> tuple[int, int]:
    """Return the smallest (width, height) of the aspect ratio of `size` that covers `fit`, never larger than `size`."""
    if fit is None:
        return size
    scale = max(Fraction(fit[0], size[0]), Fraction(fit[1], size[1]))
    return (ceil(size[0] * scale), ceil(size[1] * scale)) if scale < 1 else size


def _header_seconds(container: InputContainer, stream: VideoStream) -> Fraction | None:
    if stream.duration is not None and stream.duration > 0 and stream.time_base:
        return stream.duration * stream.time_base
    if container.duration is not None and container.duration > 0:
        ticks = container.duration
        if container.format.name.startswith("matroska"):  # there it is the time of the end
            ticks -= max(container.start_time or 0, 0)
        return Fraction(ticks, _TICKS_PER_SECOND)
    return None


def _time_of(frame: av.VideoFrame) -> Fraction | None:
    """Return when a frame is shown, in seconds of its stream; None if the stream does not say."""
    return None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base


def _measure(container: InputContainer, stream: VideoStream, interval: Fraction) -> tuple[int, Fraction]:
    """Read all packets; return the number of frames shown and the time from the first to the end of the last."""
    frames, starts, end = 0, [], Fraction(0)
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        frames += 1
        if packet.pts is not None and packet.time_base:
            starts.append(packet.pts * packet.time_base)
            end = max(end, starts[-1] + (packet.duration * packet.time_base if packet.duration else interval))
    return frames, end - min(starts) if starts else frames * interval


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
