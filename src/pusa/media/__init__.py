"""Read pictures and videos safely, and write videos with their request inside."""

from pusa.media.decoding import VideoInfo
from pusa.media.growing import GrowingVideo
from pusa.media.pictures import ImageInfo, probe_image, read_image, to_srgb
from pusa.media.previews import contact_sheet, sprite_sheet, thumbnail
from pusa.media.reading import (
    first_picture,
    iter_video,
    probe_video,
    read_metadata,
    read_tag_names,
    read_video,
    read_xmp,
)
from pusa.media.source import DEFAULT_LIMITS, MediaError, MediaLimits, Source
from pusa.media.writing import VideoWriter, discard_unfinished, to_uint8

__all__ = [
    "DEFAULT_LIMITS",
    "GrowingVideo",
    "ImageInfo",
    "MediaError",
    "MediaLimits",
    "Source",
    "VideoInfo",
    "VideoWriter",
    "contact_sheet",
    "discard_unfinished",
    "first_picture",
    "iter_video",
    "probe_image",
    "probe_video",
    "read_image",
    "read_metadata",
    "read_tag_names",
    "read_video",
    "read_xmp",
    "sprite_sheet",
    "thumbnail",
    "to_srgb",
    "to_uint8",
]
