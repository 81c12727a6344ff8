"""Convert decoded frames to sRGB: the matrix of untagged video, wide gamuts, HDR, and transparency.

Wide-gamut and HDR video goes through a lookup table that FFmpeg applies. The table is made of the formulas of
ITU-R BT.2020, BT.2100 (HLG, PQ) and BT.2408 (diffuse white at 203 nits).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from pusa.codes import CodedText
from pusa.media.pictures import on_white
from pusa.media.source import MediaError

if TYPE_CHECKING:
    import av

Gamut = Literal["BT.709", "BT.2020", "P3"]
Transfer = Literal["SDR", "HLG", "PQ"]

# Code points of ITU-T H.273, as frames carry them.
_GAMUTS: dict[int, Gamut] = {1: "BT.709", 9: "BT.2020", 11: "P3", 12: "P3"}
_TRANSFERS: dict[int, Transfer] = {16: "PQ", 18: "HLG"}
_BT709, _BT601, _BT2020 = 1, 5, 9
_UNSPECIFIED = (0, 2, 3)
_MATRICES = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: _BT2020, 10: _BT2020}  # to those of swscale
_SD_SIZE = (1279, 576)  # the largest width and height of untagged video that players take for BT.601

_PRIMARIES = {  # x and y of red, green and blue; the white of all is D65
    "BT.709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "BT.2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)
_WHITE_NITS = 203.0
_PEAK_NITS = 1000.0  # of HLG by definition, and of most PQ video; above is white
_KNEE = 0.75  # of diffuse white: the linear light above which highlights are compressed
_CUBE = 64  # colours per channel of a lookup table; a Hald image of level 8
_CLUT_SIDE = 512  # pixels: 512 * 512 = 64 ** 3


@dataclass(frozen=True)
class ColorSpace:
    """Name the colours of a video; `matrix` is swscale's number for the YUV matrix."""

    matrix: int
    gamut: Gamut
    transfer: Transfer

    @property
    def note(self) -> CodedText | None:
        """Say how frames are converted; None for sRGB and BT.709, which stay as they are."""
        if self.transfer != "SDR":
            message = f"its HDR ({self.transfer}) was tone-mapped to standard range"
            return CodedText("input_hdr", message, transfer=self.transfer)
        if self.gamut == "BT.709":
            return None
        message = f"its colours were converted from {self.gamut} to sRGB"
        return CodedText("input_colors_converted", message, profile=self.gamut)


def color_space_of(frame: av.VideoFrame, name: str) -> ColorSpace:
    """Read the colour space of a frame's tags; guess what they leave open, as players do.

    Untagged HD is BT.709, untagged SD is BT.601. `name` is that of the file. Raises MediaError for a matrix that is not
    read here (YCgCo, ICtCp).
    """
    transfer = _TRANSFERS.get(frame.color_trc, "SDR")
    is_wide = transfer != "SDR" or frame.colorspace in (9, 10)
    gamut = _GAMUTS.get(frame.color_primaries, "BT.709")
    if frame.color_primaries in _UNSPECIFIED and is_wide:
        gamut = "BT.2020"
    if frame.format.is_rgb:
        return ColorSpace(_BT709, gamut, transfer)
    matrix = _MATRICES.get(frame.colorspace)
    if frame.colorspace in _UNSPECIFIED:
        is_sd = frame.width <= _SD_SIZE[0] and frame.height <= _SD_SIZE[1]
        matrix = _BT2020 if gamut == "BT.2020" else _BT601 if is_sd else _BT709
    if matrix is None:
        raise MediaError(
            f"{name}: its colour matrix (number {frame.colorspace} of H.273) is not read here; export it as BT.709"
        )
    return ColorSpace(matrix, gamut, transfer)


def shows_transparency(frame: av.VideoFrame) -> bool:
    """Tell whether any pixel of a frame is transparent."""
    return _has_alpha(frame) and bool(frame.to_ndarray(format="rgba")[..., 3].min() < 255)


def _has_alpha(frame: av.VideoFrame) -> bool:
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


class FrameConverter:
    """Convert the frames of one video to sRGB, transparency on white."""

    def __init__(self, space: ColorSpace):
        from av.video.reformatter import VideoReformatter

        self._space = space
        self._opaque, self._scaler = VideoReformatter(), VideoReformatter()
        self._lookup: _LookupTable | None = None

    def rgb(self, frame: av.VideoFrame, width: int, height: int, interpolation: str) -> np.ndarray:
        """Convert a frame to uint8 [height, width, 3]."""
        import av

        space = self._space
        if _has_alpha(frame):
            rgba = self._opaque.reformat(frame, format="rgba", src_colorspace=space.matrix).to_ndarray()
            frame = av.VideoFrame.from_image(on_white(Image.fromarray(rgba)))
        if space.note is None:
            options: dict[str, Any] = {"interpolation": interpolation, "src_colorspace": space.matrix}
            return self._scaler.reformat(frame, width, height, "rgb24", **options).to_ndarray()
        # As players do, scale what is stored, then convert the colours.
        deep = any(component.bits > 8 for component in frame.format.components)
        coded = self._scaler.reformat(
            frame,
            width,
            height,
            "rgb48le" if deep else "rgb24",
            interpolation=interpolation,
            src_colorspace=space.matrix,
        )
        if not deep:
            coded = av.VideoFrame.from_ndarray(coded.to_ndarray() * np.uint16(257), format="rgb48le")
        if self._lookup is None or self._lookup.size != (width, height):
            self._lookup = _LookupTable(space, width, height)
        converted = self._lookup.apply(coded).to_ndarray()
        return ((converted + np.uint32(128)) // 257).astype(np.uint8)


class _LookupTable:
    """Apply the conversion of a colour space to frames (rgb48le) of one size, with FFmpeg's filter haldclut."""

    def __init__(self, space: ColorSpace, width: int, height: int):
        import av

        self.size = width, height
        self._count = 0
        graph = self._graph = av.filter.Graph()
        shared = {"pix_fmt": "rgb48le", "time_base": "1/1000", "pixel_aspect": "1/1"}
        self._source = graph.add("buffer", video_size=f"{width}x{height}", **shared)
        table_source = graph.add("buffer", video_size=f"{_CLUT_SIDE}x{_CLUT_SIDE}", **shared)
        lookup = graph.add("haldclut", "clut=first")
        self._source.link_to(lookup, 0, 0)
        table_source.link_to(lookup, 0, 1)
        lookup.link_to(graph.add("buffersink"))
        graph.configure()
        pixels = (_table(space.gamut, space.transfer) * 65535).round().astype(np.uint16)
        table_source.push(self._stamped(av.VideoFrame.from_ndarray(pixels, format="rgb48le")))
        table_source.push(None)

    def apply(self, frame: av.VideoFrame) -> av.VideoFrame:
        self._source.push(self._stamped(frame))
        return self._graph.vpull()

    def _stamped(self, frame: av.VideoFrame) -> av.VideoFrame:
        frame.pts, frame.time_base = self._count, Fraction(1, 1000)
        self._count += 1
        return frame


# ---- formulas --------------------------------------------------------------------------------------------------------


@cache
def _table(gamut: Gamut, transfer: Transfer) -> np.ndarray:
    """Compute sRGB, 0..1, of every coded colour of a grid as a Hald image [512, 512, 3]: red varies fastest."""
    steps = np.linspace(0, 1, _CUBE)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")
    light = _linear(np.stack([red, green, blue], axis=-1).reshape(-1, 3), transfer)
    light = (light @ _to_bt709(gamut).T).clip(0)
    if transfer != "SDR":
        light = _compress_highlights(light)
    return _encode_srgb(light.clip(0, 1)).reshape(_CLUT_SIDE, _CLUT_SIDE, 3)


def _linear(coded: np.ndarray, transfer: Transfer) -> np.ndarray:
    """Compute displayed linear light, 1 for diffuse white, of coded colours [n, 3]."""
    if transfer == "SDR":  # displays show BT.709 video as they show sRGB pictures
        return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    if transfer == "PQ":
        powered = coded ** (1 / 78.84375)
        ratio = (powered - 0.8359375).clip(0) / (18.8515625 - 18.6875 * powered)
        return 10_000 / _WHITE_NITS * ratio ** (1 / 0.1593017578125)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(coded <= 0.5, coded**2 / 3, (np.exp((coded - c) / a) + b) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593])
    return _PEAK_NITS / _WHITE_NITS * scene * luminance[:, None] ** 0.2  # the system gamma of a display of 1000 nits


def _compress_highlights(light: np.ndarray) -> np.ndarray:
    """Map 0..peak to 0..1: linear up to the knee, then Reinhard's extended curve; keeps the ratios of the channels."""
    largest = light.max(axis=-1, keepdims=True)
    room = 1 - _KNEE
    above, peak = (largest - _KNEE).clip(0) / room, (_PEAK_NITS / _WHITE_NITS - _KNEE) / room
    compressed = _KNEE + room * above * (1 + above / peak**2) / (1 + above)
    return light * np.where(largest > _KNEE, compressed / largest.clip(_KNEE), 1)


def _encode_srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _to_bt709(gamut: Gamut) -> np.ndarray:
    """Return the matrix [3, 3] from linear RGB of a gamut to that of BT.709."""
    return np.linalg.solve(_to_xyz("BT.709"), _to_xyz(gamut))


def _to_xyz(gamut: Gamut) -> np.ndarray:
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*_PRIMARIES[gamut], _D65)]).T  # [3, 4]
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])
