"""Read pictures, and convert any picture to what the rest of the package works on: upright 8-bit sRGB."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import ceil, sqrt
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from pusa.codes import CodedText
from pusa.media.source import (
    DEFAULT_LIMITS,
    PICTURES,
    MediaError,
    MediaLimits,
    OpenSource,
    Source,
    one_line,
    open_source,
    wrap_decoder_errors,
)

_JPEG_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")
_MAX_JPEG_SCANS = 100  # encoders write about ten; 3 MB of tiny scans over a large picture cost minutes
_PROFILED = {  # by an ICC profile's colour space: the mode to convert from, and the modes of pictures that may have it
    "RGB": ("RGB", ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")),
    "GRAY": ("L", ("1", "L", "LA")),
    "CMYK": ("CMYK", ("CMYK",)),
}
TRANSPARENCY_NOTE = CodedText("input_transparent", "its transparency is shown on white")
_WEBP_ANIMATED, _WEBP_TRANSPARENT = 0x02, 0x10
_SAME_COLOR = 2  # of 255; a profile that changes less is sRGB by another name
_GRID = 7  # colours per channel to compare a profile with sRGB


@dataclass(frozen=True)
class ImageInfo:
    """Facts about a picture: pixels as stored in the file but upright; `notes` say what reading it converts."""

    width: int
    height: int
    notes: tuple[str, ...] = ()


def read_image(source: Source, *, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read a picture (of an animation its first frame), upright, 8-bit sRGB, as RGB or RGBA.

    Reads PNG, JPEG, WebP, BMP, AVIF, and HEIC where the package pillow-heif is installed. The size is checked before a
    pixel is decoded. A picture above `limits.max_pixels` comes at a half, a third, ... of its size. See `to_srgb`.
    Raises MediaError for anything that is not such a picture or exceeds `limits`, FileNotFoundError for a missing file.
    """
    return _read(source, limits)[0]


def probe_image(source: Source, *, limits: MediaLimits = DEFAULT_LIMITS) -> ImageInfo:
    """Read a picture for its size and notes, so that a probed picture is one that can be read.

    Raises as `read_image` does.
    """
    return _read(source, limits)[1]


def to_srgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert a picture to upright 8-bit sRGB, mode RGB or RGBA; return it and notes of what changed colours.

    Applies the EXIF orientation and the ICC profile. 16-bit grey keeps its upper 8 bits. The modes I and F have no
    range of their own: the largest value tells whether it is 0..1 (F only), 0..255 or 0..65535.
    """
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    image, notes = _apply_profile(_eight_bit(image))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode), notes


def is_transparent(image: Image.Image) -> bool:
    """Tell whether any pixel of a picture of mode RGB or RGBA is transparent."""
    return image.mode == "RGBA" and bool(image.getchannel("A").getextrema()[0] != 255)


def on_white(image: Image.Image) -> Image.Image:
    """Convert a picture of mode RGB or RGBA to RGB, transparency on white."""
    if is_transparent(image):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    """Raise MediaError unless a picture of width x height pixels has at most `max_pixels`."""
    if width * height > max_pixels:
        raise MediaError(
            f"{name}: {width}x{height} is {width * height / 1e6:.4g} megapixels,"
            f" the limit is {max_pixels / 1e6:.4g}; scale it down first",
            "picture_too_large",
            name=name,
            width=width,
            height=height,
            megapixels=width * height / 1e6,
            limit=max_pixels / 1e6,
        )


@contextmanager
def open_picture(media: OpenSource, max_pixels: int, *, decoder: str | None = None) -> Iterator[Image.Image]:
    """Open `media` with Pillow and check its size; no pixel is decoded yet."""
    decoder = decoder or media.kind.decoder
    _find_decoder(media, decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bombs, where our own limit is the stricter one, and of damage
        try:
            image = Image.open(_flag_transparency(media.file) if decoder == "WEBP" else media.file, formats=(decoder,))
        except Image.DecompressionBombError as error:
            most = max_pixels / 1e6
            raise MediaError(
                f"{media.name}: is far above the limit of {most:.4g} megapixels; scale it down",
                "picture_far_too_large",
                name=media.name,
                limit=most,
            ) from error
    with image:
        check_pixels(media.name, image.width, image.height, max_pixels)
        yield image


def _flag_transparency(file: BinaryIO) -> BinaryIO:
    """Return an animated WebP with its flag of transparency set; any other file as it is.

    Writers leave the flag out where all frames are opaque, though they may not cover the canvas, which is transparent.
    """
    head = file.read(21)
    file.seek(0)
    if len(head) < 21 or head[12:16] != b"VP8X" or not head[20] & _WEBP_ANIMATED:
        return file
    content = bytearray(file.read())
    content[20] |= _WEBP_TRANSPARENT
    return io.BytesIO(content)


def _find_decoder(media: OpenSource, decoder: str) -> None:
    """Raise MediaError where Pillow lacks a decoder that only some installations have."""
    way_out = "upgrade Pillow (`pip install --upgrade pillow`)"
    if decoder == "HEIF":
        way_out = "install its reader (`pip install pillow-heif`)"
        with suppress(ImportError):  # the next lines say so
            import_module("pillow_heif").register_heif_opener()
    Image.init()
    if decoder not in Image.OPEN:
        raise MediaError(
            f"{media.name} is {media.kind.name}, which is not read here; {way_out}, or convert it to JPEG",
            "format_not_read",
            name=media.name,
            format=media.kind.name,
        )


def _read(source: Source, limits: MediaLimits) -> tuple[Image.Image, ImageInfo]:
    with open_source(source, limits=limits, what="picture") as media:
        if media.kind.holds not in ("picture", "both"):
            way_out = "pass it as a video" if media.kind.holds == "video" else f"convert it to {PICTURES}"
            raise MediaError(
                f"{media.name} is {media.kind.name}, not {PICTURES}; {way_out}",
                "not_a_picture",
                name=media.name,
                format=media.kind.name,
            )
        with wrap_decoder_errors(media.name, media.kind):
            if media.kind.decoder == "JPEG":
                _check_jpeg_scans(media)
            with open_picture(media, limits.max_picture_pixels) as image:
                width, height = image.size
                if _orientation(image) >= 5:  # turned by a quarter
                    width, height = height, width
                upright, notes = to_srgb(_reduced(image, limits.max_pixels))
                upright.info.pop("icc_profile", None)
                notes += (TRANSPARENCY_NOTE,) if is_transparent(upright) else ()
                return upright, ImageInfo(width, height, notes)


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1..8; 1 is upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about damaged EXIF data
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def _reduced(image: Image.Image, max_pixels: int) -> Image.Image:
    """Decode a picture, at a half, a third, ... of its size if it has more than `max_pixels`."""
    factor = ceil(sqrt(image.width * image.height / max_pixels))
    if factor > 1:
        image.draft(image.mode, (image.width // factor, image.height // factor))  # a JPEG decodes no more than it needs
        factor = ceil(sqrt(image.width * image.height / max_pixels))
    if factor == 1:
        return image.copy()
    image = _eight_bit(image)
    if image.mode in ("1", "P", "PA"):
        image = image.convert("L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB")
    return image.reduce(factor)


def _check_jpeg_scans(media: OpenSource) -> None:
    scans = len(_JPEG_SCAN.findall(media.file.read()))
    media.file.seek(0)
    if scans > _MAX_JPEG_SCANS:
        raise MediaError(
            f"{media.name}: has {scans} JPEG scans, the limit is {_MAX_JPEG_SCANS}; save it again as PNG or plain JPEG"
        )


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale a picture of mode I;16, I or F to mode L; return any other as it is."""
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values)
        largest = values.max()
        scaled = (values * (255 if largest <= 1 else 1 if largest <= 255 else 1 / 257)).round()
    else:
        scaled = values >> (0 if image.mode == "I" and values.max() <= 255 else 8)
    grey = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    grey.info = {name: value for name, value in image.info.items() if name != "transparency"}  # that is of 16 bits
    return grey


# ---- colour profiles -------------------------------------------------------------------------------------------------


@cache
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")


def _apply_profile(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert a picture with an ICC profile to sRGB."""
    content = image.info.get("icc_profile")
    if not content:
        return image, ()
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        mode, modes = _PROFILED.get(profile.profile.xcolor_space.strip(), ("", ()))
        if image.mode not in modes:  # the profile of another kind of picture
            return image, ()
        transform = ImageCms.buildTransform(profile, _srgb(), mode, "RGB")
        name = one_line(ImageCms.getProfileDescription(profile), longest=60).strip()
    except (ImageCms.PyCMSError, OSError):
        return image, (CodedText("input_profile_damaged", "its colour profile is damaged and was ignored"),)
    if mode != "CMYK" and _is_identity(transform, mode):
        return image, ()
    converted: Any = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    message = f"its colours were converted from {name or 'its profile'} to sRGB"
    return converted, (CodedText("input_colors_converted", message, profile=name or "ICC"),)


def _is_identity(transform: Any, mode: str) -> bool:
    steps = np.linspace(0, 255, _GRID).round().astype(np.uint8)
    colors = np.stack(np.meshgrid(*[steps] * 3), axis=-1).reshape(1, -1, 3)
    grid = Image.fromarray(colors if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    changed = np.asarray(ImageCms.applyTransform(grid, transform)).astype(int)
    return bool(np.abs(changed - np.asarray(grid.convert("RGB"))).max() <= _SAME_COLOR)
